// Package awskeys is a stand-in for AWS Key Management Service and AWS Private CA: their JSON 1.1 protocol as the
// API references have it, with signatures of requests (SigV4) that are verified, real keys and real
// certificates.
package awskeys

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/assay-id/assay/test/fake/pki"
)

// Server is both services.
type Server struct {
	*httptest.Server
	// KeyID and Secret are who may ask, Region where it is, and ARN the private CA's.
	KeyID, Secret, Region, ARN string
	// Page is how many aliases a page has.
	Page int
	// Answer, if not nil, is asked first; it reports whether it has answered.
	Answer func(w http.ResponseWriter, r *http.Request) bool

	mu      sync.Mutex // guards the rest
	keys    map[string]*key
	aliases map[string]string
	issued  map[string]*issued
	chain   []*x509.Certificate // the issuing CA first
	signer  crypto.Signer
}

type key struct {
	signer  crypto.Signer
	deleted bool
	tags    map[string]string
}

type issued struct {
	text string
	asks int
}

// New starts both.
func New(t testing.TB) *Server {
	s := &Server{
		KeyID: "AKIA" + rand.Text()[:16], Secret: rand.Text(), Region: "eu-central-1",
		ARN: "arn:aws:acm-pca:eu-central-1:123456789012:certificate-authority/11111111-2222-3333-4444-555555555555", Page: 5,
		keys: map[string]*key{}, aliases: map[string]string{}, issued: map[string]*issued{},
	}
	root, rootKey := pki.Authority(t, "AWS root", nil, nil)
	issuing, issuingKey := pki.Authority(t, "AWS issuing", root, rootKey)
	s.chain, s.signer = []*x509.Certificate{issuing, root}, issuingKey
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

// Live counts keys that are not scheduled for deletion.
func (s *Server) Live() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.keys {
		if !k.deleted {
			n++
		}
	}
	return n
}

func fail(w http.ResponseWriter, code, message string) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.WriteHeader(http.StatusBadRequest)
	_ = json.NewEncoder(w).Encode(map[string]string{"__type": code, "message": message})
}

func reply(w http.ResponseWriter, out any) {
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	_ = json.NewEncoder(w).Encode(out)
}

// genuine says whether the request was signed by who may ask, for this service.
func (s *Server) genuine(r *http.Request, body []byte, service string) bool {
	_, list, ok := strings.Cut(r.Header.Get("Authorization"), "SignedHeaders=")
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if !ok || err != nil || time.Since(at).Abs() > 5*time.Minute {
		return false
	}
	list, _, _ = strings.Cut(list, ",")
	again, err := http.NewRequest(r.Method, "https://"+r.Host+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return false
	}
	for name := range strings.SplitSeq(list, ";") {
		if name != "host" && name != "content-length" {
			again.Header.Set(name, r.Header.Get(name))
		}
	}
	sum := sha256.Sum256(body)
	if err := v4.NewSigner().SignHTTP(r.Context(), aws.Credentials{AccessKeyID: s.KeyID, SecretAccessKey: s.Secret}, again, hex.EncodeToString(sum[:]), service, s.Region, at); err != nil {
		return false
	}
	return again.Header.Get("Authorization") == r.Header.Get("Authorization")
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if s.Answer != nil && s.Answer(w, r) {
		return
	}
	body, err := io.ReadAll(r.Body)
	target := r.Header.Get("X-Amz-Target")
	service := map[string]string{"TrentService": "kms", "ACMPrivateCA": "acm-pca"}[strings.Split(target, ".")[0]]
	var in request
	switch {
	case err != nil || r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" || service == "":
		fail(w, "UnknownOperationException", "")
		return
	case !s.genuine(r, body, service):
		fail(w, "InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
		return
	case json.Unmarshal(body, &in) != nil:
		fail(w, "SerializationException", "")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch target {
	case "TrentService.CreateKey":
		s.create(w, &in)
	case "TrentService.CreateAlias":
		if s.aliases[in.AliasName] != "" {
			fail(w, "AlreadyExistsException", "An alias with the name already exists")
			return
		}
		s.aliases[in.AliasName] = in.TargetKeyID
	case "TrentService.DeleteAlias":
		delete(s.aliases, in.AliasName)
	case "TrentService.ListAliases":
		s.list(w, &in)
	case "TrentService.DescribeKey", "TrentService.GetPublicKey", "TrentService.Sign", "TrentService.ScheduleKeyDeletion":
		s.use(w, strings.TrimPrefix(target, "TrentService."), &in)
	case "ACMPrivateCA.DescribeCertificateAuthority":
		reply(w, map[string]any{"CertificateAuthority": map[string]any{
			"Arn": s.ARN, "Status": "ACTIVE", "CertificateAuthorityConfiguration": map[string]any{"SigningAlgorithm": "SHA256WITHECDSA"},
		}})
	case "ACMPrivateCA.IssueCertificate":
		s.issue(w, &in)
	case "ACMPrivateCA.GetCertificate":
		s.certificate(w, &in)
	default:
		fail(w, "UnknownOperationException", target)
	}
}

// request has the fields of all operations.
type request struct {
	KeySpec, KeyUsage             string
	KeyID                         string `json:"KeyId"`
	AliasName                     string
	TargetKeyID                   string `json:"TargetKeyId"`
	Message                       []byte
	MessageType, SigningAlgorithm string
	PendingWindowInDays           int
	Tags                          []struct{ TagKey, TagValue string }
	Marker                        string
	CertificateAuthorityArn       string
	CertificateArn                string
	Csr                           []byte
	TemplateArn                   string
	Validity                      struct {
		Type  string
		Value int64
	}
}

func (s *Server) create(w http.ResponseWriter, in *request) {
	var signer crypto.Signer
	var err error
	switch in.KeySpec {
	case "ECC_NIST_P256":
		signer, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case "ECC_NIST_P384":
		signer, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case "RSA_2048":
		signer, err = rsa.GenerateKey(rand.Reader, 2048)
	case "RSA_4096":
		signer, err = rsa.GenerateKey(rand.Reader, 4096)
	}
	if err != nil || signer == nil || in.KeyUsage != "SIGN_VERIFY" {
		fail(w, "ValidationException", "key spec or usage")
		return
	}
	id := rand.Text()
	made := &key{signer: signer, tags: map[string]string{}}
	for _, t := range in.Tags {
		if _, twice := made.tags[t.TagKey]; twice || t.TagKey == "" || len(t.TagKey) > 128 || len(t.TagValue) > 256 || strings.HasPrefix(t.TagKey, "aws:") {
			fail(w, "TagException", "tags")
			return
		}
		made.tags[t.TagKey] = t.TagValue
	}
	s.keys[id] = made
	reply(w, map[string]any{"KeyMetadata": map[string]any{"KeyId": id, "Enabled": true}})
}

func (s *Server) list(w http.ResponseWriter, in *request) {
	names := []string{}
	for name := range s.aliases {
		names = append(names, name)
	}
	slices.Sort(names)
	at, _ := slices.BinarySearch(names, in.Marker)
	names = names[at:]
	out := map[string]any{"Truncated": false}
	if len(names) > s.Page {
		out["Truncated"], out["NextMarker"] = true, names[s.Page]
		names = names[:s.Page]
	}
	list := []any{}
	for _, name := range names {
		list = append(list, map[string]any{"AliasName": name, "TargetKeyId": s.aliases[name]})
	}
	out["Aliases"] = list
	reply(w, out)
}

func (s *Server) use(w http.ResponseWriter, operation string, in *request) {
	id := in.KeyID
	if strings.HasPrefix(id, "alias/") {
		id = s.aliases[id]
	}
	k := s.keys[id]
	switch {
	case k == nil:
		fail(w, "NotFoundException", "Alias or key "+in.KeyID+" is not found.")
		return
	case k.deleted && operation != "DescribeKey":
		fail(w, "KMSInvalidStateException", id+" is pending deletion.")
		return
	}
	switch operation {
	case "DescribeKey":
		reply(w, map[string]any{"KeyMetadata": map[string]any{"KeyId": id, "Enabled": !k.deleted}})
	case "GetPublicKey":
		der, err := x509.MarshalPKIXPublicKey(k.signer.Public())
		if err != nil {
			fail(w, "KMSInternalException", err.Error())
			return
		}
		reply(w, map[string]any{"KeyId": id, "PublicKey": der})
	case "ScheduleKeyDeletion":
		if in.PendingWindowInDays < 7 || in.PendingWindowInDays > 30 {
			fail(w, "ValidationException", "PendingWindowInDays")
			return
		}
		k.deleted = true
		reply(w, map[string]any{"KeyId": id})
	case "Sign":
		hash := map[string]crypto.Hash{
			"ECDSA_SHA_256": crypto.SHA256, "ECDSA_SHA_384": crypto.SHA384,
			"RSASSA_PKCS1_V1_5_SHA_256": crypto.SHA256, "RSASSA_PKCS1_V1_5_SHA_384": crypto.SHA384,
		}[in.SigningAlgorithm]
		_, isRSA := k.signer.(*rsa.PrivateKey)
		if hash == 0 || in.MessageType != "DIGEST" || len(in.Message) != hash.Size() || isRSA != strings.HasPrefix(in.SigningAlgorithm, "RSA") {
			fail(w, "InvalidKeyUsageException", in.SigningAlgorithm)
			return
		}
		signature, err := k.signer.Sign(rand.Reader, in.Message, hash)
		if err != nil {
			fail(w, "KMSInternalException", err.Error())
			return
		}
		reply(w, map[string]any{"KeyId": id, "Signature": signature, "SigningAlgorithm": in.SigningAlgorithm})
	}
}

func (s *Server) issue(w http.ResponseWriter, in *request) {
	block, _ := pem.Decode(in.Csr)
	if block == nil || in.CertificateAuthorityArn != s.ARN {
		fail(w, "MalformedCSRException", "")
		return
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil || in.Validity.Type != "ABSOLUTE" || !strings.Contains(in.TemplateArn, ":template/SubordinateCACertificate_PathLen") {
		fail(w, "MalformedCSRException", "The CSR, the validity or the template is malformed.")
		return
	}
	// The template passes subject and alternative names through, and sets the rest.
	c := &x509.Certificate{
		SerialNumber: pki.Serial(), RawSubject: csr.RawSubject, URIs: csr.URIs, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Unix(in.Validity.Value, 0),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature, IsCA: true, BasicConstraintsValid: true,
		MaxPathLenZero: strings.Contains(in.TemplateArn, "PathLen0"),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, s.chain[0], csr.PublicKey, s.signer)
	if err != nil {
		fail(w, "InvalidArgsException", err.Error())
		return
	}
	arn := s.ARN + "/certificate/" + rand.Text()
	s.issued[arn] = &issued{text: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
	reply(w, map[string]any{"CertificateArn": arn})
}

func (s *Server) certificate(w http.ResponseWriter, in *request) {
	c := s.issued[in.CertificateArn]
	switch {
	case c == nil:
		fail(w, "ResourceNotFoundException", "")
	case c.asks == 0:
		c.asks++
		fail(w, "RequestInProgressException", "The certificate is being issued.")
	default:
		var chain strings.Builder
		for _, above := range s.chain {
			chain.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: above.Raw}))
		}
		reply(w, map[string]any{"Certificate": strings.TrimSpace(c.text), "CertificateChain": strings.TrimSpace(chain.String())})
	}
}

// Tags returns those of the key with an alias.
func (s *Server) Tags(alias string) map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k := s.keys[s.aliases[alias]]; k != nil {
		return k.tags
	}
	return nil
}
