// Package pkcs11 keeps the server's signing keys in a hardware security module, or whatever else has a
// PKCS #11 module: they are made in the token and do not leave it.
//
// A module is a C library that is loaded into the process that uses it. It is not loaded into the server:
// a helper process (cmd/assay-pkcs11, the one program here that is built with cgo) loads it and is spoken to
// over its standard input and output, a line of JSON for each question and answer.
//
// Why it is so: the server stays one static binary without cgo; a vendor's library that crashes, leaks or
// hangs ends the helper, which is started again with the next question, and not the authority of a trust
// domain; and whoever has no module has nothing of all this. A question costs two writes to a pipe more,
// which nobody notices beside what a signature of an HSM takes. Every signature that comes back is verified.
package pkcs11

import (
	"bufio"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/ca/keys"
)

// Config says where the helper and the token are.
type Config struct {
	// Helper is the path of assay-pkcs11, and Args come before anything else (tests only).
	Helper string
	Args   []string
	// Module is the path of the PKCS #11 library, TokenLabel says which of its tokens, and PIN opens it.
	Module, TokenLabel, PIN string
	// Prefix comes before names in the token. Empty: "assay-".
	Prefix string
	Log    logrus.FieldLogger
}

// patience is how long a question may take. RSA-4096 keys take their time in some tokens.
const patience = 60 * time.Second

// Manager keeps keys in a token.
type Manager struct {
	cfg Config

	mu     sync.Mutex // guards the rest
	helper *helper    // nil while there is none
	closed bool
}

var _ keys.Manager = (*Manager)(nil)

// Open starts the helper and looks whether it can open the token.
func Open(ctx context.Context, cfg Config) (*Manager, error) {
	if cfg.Prefix == "" {
		cfg.Prefix = "assay-"
	}
	m := &Manager{cfg: cfg}
	if _, err := m.List(ctx); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// Close ends the helper. Keys that were handed out sign no more.
func (m *Manager) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	if m.helper != nil {
		m.helper.end()
		m.helper = nil
	}
	return nil
}

// helper is a running process.
type helper struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	ended chan struct{} // closed when its output has ended

	mu      sync.Mutex // guards the rest
	next    uint64
	waiting map[uint64]chan Answer
}

// running returns the helper, started if need be.
func (m *Manager) running() (*helper, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, errors.New("key manager is closed")
	}
	if h := m.helper; h != nil {
		select {
		case <-h.ended:
			m.cfg.Log.Warn("The PKCS #11 helper has ended; starting another")
		default:
			return h, nil
		}
	}
	h, err := m.start()
	if err != nil {
		return nil, fmt.Errorf("start the PKCS #11 helper %s: %w", m.cfg.Helper, err)
	}
	m.helper = h
	return h, nil
}

func (m *Manager) start() (*helper, error) {
	cmd := exec.Command(m.cfg.Helper, m.cfg.Args...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	h := &helper{cmd: cmd, in: in, ended: make(chan struct{}), waiting: map[uint64]chan Answer{}}
	go h.read(out) // it ends with the process, which end ends
	// The PIN goes through the pipe: arguments and environment are for others to read.
	open := Question{Op: OpOpen, Module: m.cfg.Module, Token: m.cfg.TokenLabel, PIN: m.cfg.PIN, Prefix: m.cfg.Prefix}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := h.ask(ctx, open); err != nil {
		h.end()
		return nil, err
	}
	return h, nil
}

// end kills the process and waits for it.
func (h *helper) end() {
	_ = h.in.Close()
	_ = h.cmd.Process.Kill() // it may hang in a library
	<-h.ended
}

// read hands answers to those who wait for them, until there are no more.
func (h *helper) read(out io.Reader) {
	lines := bufio.NewScanner(out)
	lines.Buffer(make([]byte, 0, 64<<10), MaxLine)
	for lines.Scan() {
		var a Answer
		if json.Unmarshal(lines.Bytes(), &a) != nil {
			break
		}
		h.mu.Lock()
		to := h.waiting[a.ID]
		delete(h.waiting, a.ID)
		h.mu.Unlock()
		if to != nil {
			to <- a
		}
	}
	_ = h.cmd.Process.Kill() // what it says after nonsense is nonsense
	_, _ = io.Copy(io.Discard, out)
	_ = h.cmd.Wait()
	close(h.ended)
}

var errEnded = errors.New("the PKCS #11 helper has ended: its module may have crashed")

func (h *helper) ask(ctx context.Context, q Question) (Answer, error) {
	to := make(chan Answer, 1)
	h.mu.Lock()
	h.next++
	q.ID = h.next
	h.waiting[q.ID] = to
	line, err := json.Marshal(&q)
	if err == nil {
		_, err = h.in.Write(append(line, '\n'))
	}
	h.mu.Unlock()
	if err != nil {
		return Answer{}, errors.Join(errEnded, err)
	}
	select {
	case a := <-to:
		return a, a.err()
	case <-h.ended:
		select {
		case a := <-to: // the last thing it said, and most likely why it ended
			return a, a.err()
		default:
		}
		return Answer{}, errEnded
	case <-ctx.Done():
		h.mu.Lock()
		delete(h.waiting, q.ID)
		h.mu.Unlock()
		return Answer{}, ctx.Err()
	}
}

// do asks a question. A helper that does not answer in time is taken to hang, and ended.
func (m *Manager) do(ctx context.Context, q Question) (Answer, error) {
	if err := ctx.Err(); err != nil {
		return Answer{}, err
	}
	h, err := m.running()
	if err != nil {
		return Answer{}, err
	}
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	a, err := h.ask(asking, q)
	if errors.Is(err, context.DeadlineExceeded) {
		m.cfg.Log.WithField("op", q.Op).Error("The PKCS #11 module does not answer; its helper is ended")
		h.end()
	}
	return a, err
}

// Generate implements keys.Manager.
func (m *Manager) Generate(ctx context.Context, name string, kind keys.Kind) (crypto.Signer, error) {
	if err := keys.CheckName(name); err != nil {
		return nil, err
	}
	if _, err := keys.ParseKind(string(kind)); err != nil {
		return nil, err
	}
	a, err := m.do(ctx, Question{Op: OpGenerate, Name: name, Kind: string(kind)})
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	signer, err := m.signer(name, a.Public)
	if err == nil {
		err = keys.Fits(kind, signer.Public())
	}
	if err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	return signer, nil
}

func (m *Manager) signer(name string, spki []byte) (crypto.Signer, error) {
	public, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return nil, fmt.Errorf("parse public key: %w", err)
	}
	return keys.Remote(name, public, func(ctx context.Context, digest []byte, hash crypto.Hash) ([]byte, error) {
		a, err := m.do(ctx, Question{Op: OpSign, Name: name, Digest: digest, Hash: hash.String()})
		return a.Signature, err
	}), nil
}

// Get implements keys.Manager.
func (m *Manager) Get(ctx context.Context, name string) (crypto.Signer, error) {
	a, err := m.do(ctx, Question{Op: OpGet, Name: name})
	var signer crypto.Signer
	if err == nil {
		signer, err = m.signer(name, a.Public)
	}
	if err != nil {
		return nil, fmt.Errorf("get key %s: %w", name, err)
	}
	return signer, nil
}

// Delete implements keys.Manager.
func (m *Manager) Delete(ctx context.Context, name string) error {
	if _, err := m.do(ctx, Question{Op: OpDelete, Name: name}); err != nil && !errors.Is(err, keys.ErrNotFound) {
		return fmt.Errorf("delete key %s: %w", name, err)
	}
	return nil
}

// List implements keys.Manager.
func (m *Manager) List(ctx context.Context) ([]string, error) {
	a, err := m.do(ctx, Question{Op: OpList})
	if err != nil {
		return nil, fmt.Errorf("list keys: %w", err)
	}
	return a.Names, nil
}

// Persistent implements keys.Manager: it is true.
func (m *Manager) Persistent() bool { return true }
