package pkcs11

import (
	"bufio"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/assay-id/assay/server/ca/keys"
)

// What is asked of the helper.
const (
	OpOpen     = "open" // first, once
	OpGenerate = "generate"
	OpGet      = "get"
	OpSign     = "sign"
	OpDelete   = "delete"
	OpList     = "list"
)

// MaxLine is the longest question or answer in bytes.
const MaxLine = 1 << 20

// Question is a line to the helper.
type Question struct {
	ID   uint64 `json:"id"`
	Op   string `json:"op"`
	Name string `json:"name,omitempty"`
	Kind string `json:"kind,omitempty"`

	Digest []byte `json:"digest,omitempty"`
	Hash   string `json:"hash,omitempty"` // "SHA-256" or "SHA-384"

	// Of OpOpen.
	Module string `json:"module,omitempty"`
	Token  string `json:"token,omitempty"`
	PIN    string `json:"pin,omitempty"`
	Prefix string `json:"prefix,omitempty"`
}

// Answer is a line from the helper.
type Answer struct {
	ID    uint64 `json:"id"`
	Error string `json:"error,omitempty"`
	// Code tells errors that somebody acts on: "not found", "exists".
	Code string `json:"code,omitempty"`

	Public    []byte   `json:"public,omitempty"` // PKIX
	Signature []byte   `json:"signature,omitempty"`
	Names     []string `json:"names,omitempty"`
}

var codes = map[string]error{"not found": keys.ErrNotFound, "exists": keys.ErrExists}

func (a *Answer) err() error {
	switch {
	case a.Error == "" && a.Code == "":
		return nil
	case codes[a.Code] != nil:
		return codes[a.Code]
	}
	return errors.New(a.Error)
}

// Token is what the helper has opened. Errors wrap keys.ErrNotFound and keys.ErrExists.
type Token interface {
	// Generate makes a key and returns its public half, PKIX, as Public does.
	Generate(name string, kind keys.Kind) ([]byte, error)
	Public(name string) ([]byte, error)
	// Sign returns ECDSA in ASN.1, or RSA as PKCS #1 v1.5.
	Sign(name string, digest []byte, hash crypto.Hash) ([]byte, error)
	Delete(name string) error
	List() ([]string, error)
}

// atOnce is how many questions are worked on at a time.
const atOnce = 8

// Serve answers questions until there are no more. open opens the token that the first one names.
func Serve(in io.Reader, out io.Writer, open func(q Question) (Token, error)) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(make([]byte, 0, 64<<10), MaxLine)
	var token Token
	var writing sync.Mutex
	var working sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	say := func(a Answer) {
		line, err := json.Marshal(&a)
		if err != nil {
			return
		}
		writing.Lock()
		defer writing.Unlock()
		_, _ = out.Write(append(line, '\n')) // nobody listens: the end of the input says so too
	}
	defer working.Wait()
	for lines.Scan() {
		var q Question
		if err := json.Unmarshal(lines.Bytes(), &q); err != nil {
			return errors.New("a question is not understood")
		}
		if token == nil {
			var err error
			if q.Op != OpOpen {
				return errors.New("the first question does not name a token")
			}
			if token, err = open(q); err != nil {
				say(Answer{ID: q.ID, Error: err.Error()})
				return err
			}
			say(Answer{ID: q.ID})
			continue
		}
		slots <- struct{}{}
		working.Go(func() {
			defer func() { <-slots }()
			a := answer(token, &q)
			a.ID = q.ID
			say(a)
		})
	}
	return lines.Err()
}

func answer(token Token, q *Question) Answer {
	var a Answer
	var err error
	switch q.Op {
	case OpGenerate:
		a.Public, err = token.Generate(q.Name, keys.Kind(q.Kind))
	case OpGet:
		a.Public, err = token.Public(q.Name)
	case OpSign:
		hash := map[string]crypto.Hash{crypto.SHA256.String(): crypto.SHA256, crypto.SHA384.String(): crypto.SHA384}[q.Hash]
		if hash == 0 || len(q.Digest) != hash.Size() {
			err = errors.New("no digest that is signed here")
			break
		}
		a.Signature, err = token.Sign(q.Name, q.Digest, hash)
	case OpDelete:
		err = token.Delete(q.Name)
	case OpList:
		a.Names, err = token.List()
		slices.Sort(a.Names)
	default:
		err = fmt.Errorf("%q is not known here", q.Op)
	}
	for code, sentinel := range codes {
		if errors.Is(err, sentinel) {
			a.Code = code
		}
	}
	if err != nil {
		a.Error = err.Error()
	}
	return a
}
