package awsapi

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"slices"
	"strings"
	"time"
)

// Credentials are an access key of AWS; Token is empty for a lasting one.
type Credentials struct{ ID, Secret, Token string }

// Request is an HTTP request to be signed by AWS's Signature Version 4.
type Request struct {
	Method, Host, Path string
	// Query is sorted and escaped as the signature wants it; empty for all of ours.
	Query   string
	Headers map[string]string // besides Host; all of them are signed
	Body    string
}

// timeForm is how the signature writes a time.
const timeForm = "20060102T150405Z"

// Sign adds the headers X-Amz-Date, X-Amz-Security-Token and Authorization.
func (r *Request) Sign(c Credentials, region, service string, now time.Time) {
	r.Headers = maps.Clone(r.Headers)
	if r.Headers == nil {
		r.Headers = map[string]string{}
	}
	r.Headers["X-Amz-Date"] = now.UTC().Format(timeForm)
	if c.Token != "" {
		r.Headers["X-Amz-Security-Token"] = c.Token
	}
	date := now.UTC().Format("20060102")
	scope := strings.Join([]string{date, region, service, "aws4_request"}, "/")
	canonical, signed := r.canonical()
	text := strings.Join([]string{"AWS4-HMAC-SHA256", r.Headers["X-Amz-Date"], scope, hash(canonical)}, "\n")
	key := []byte("AWS4" + c.Secret)
	for _, part := range []string{date, region, service, "aws4_request", text} {
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(part))
		key = mac.Sum(nil)
	}
	r.Headers["Authorization"] = "AWS4-HMAC-SHA256 Credential=" + c.ID + "/" + scope +
		", SignedHeaders=" + signed + ", Signature=" + hex.EncodeToString(key)
}

// SignedHeaders are the names of the headers that Sign signs, as the Authorization header lists them.
func (r *Request) SignedHeaders() string {
	_, signed := r.canonical()
	return signed
}

// canonical is the form of the request that is hashed, and the list of its headers.
func (r *Request) canonical() (text, signed string) {
	headers := map[string]string{"host": r.Host}
	for name, value := range r.Headers {
		headers[strings.ToLower(name)] = strings.TrimSpace(value)
	}
	delete(headers, "authorization")
	names := slices.Sorted(maps.Keys(headers))
	var b strings.Builder
	b.WriteString(r.Method + "\n" + r.Path + "\n" + r.Query + "\n")
	for _, name := range names {
		b.WriteString(name + ":" + headers[name] + "\n")
	}
	signed = strings.Join(names, ";")
	b.WriteString("\n" + signed + "\n" + hash(r.Body))
	return b.String(), signed
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:])
}
