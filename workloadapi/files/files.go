// Package files keeps a workload's identity in files, for programs that read nothing else: certificate,
// key and bundle, list of revoked certificates, JWT-SVIDs and the keys that verify them. A file is
// replaced whole or not at all, with the owner and the mode that its reader wants, and the reader is
// told afterwards, by a signal or a command.
//
// Where the identity comes from is a Source: Dial makes one of any SPIFFE Workload API, and the agent
// has one for what its own configuration names.
//
// Why it is so:
//   - The key is renamed into place before its certificate, and the reader is told once all files are in
//     place: who reads when it is told never reads a pair that does not match.
//   - What is on disk already is not written again, and nobody is told of it. A restart is no reload.
//   - An API that is away changes nothing. One that says that there is no identity does: a key that
//     its owner may not use any more is replaced by one that nobody trusts, or removed, for a server that
//     cannot read its key on a reload goes on with the old one.
//   - A reader that could not be told is told again later: it would go on with a certificate that expires.
package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/sync/errgroup"
)

// Source is where an identity comes from.
type Source interface {
	// X509 calls fn with the X509-SVIDs of the moment and again whenever they change, and with nil when
	// there is no identity. It returns when ctx ends, when fn fails, or when the source does; then it is
	// called again after a while.
	X509(ctx context.Context, fn func(*workload.X509SVIDResponse) error) error
	// JWTBundles does the same with the keys that verify JWT-SVIDs.
	JWTBundles(ctx context.Context, fn func(*workload.JWTBundlesResponse) error) error
	// JWT returns JWT-SVIDs for an audience. The error wraps ErrNoIdentity if there is no identity.
	JWT(ctx context.Context, audience []string) (*workload.JWTSVIDResponse, error)
}

// ErrNoIdentity says that there is no identity, or not any more.
var ErrNoIdentity = errors.New("no identity issued")

// What becomes of certificate and key when the identity is withdrawn. Tokens are removed unless it is
// Keep, and what verifies others stays.
const (
	Replace = "replace" // by a pair that nobody trusts
	Remove  = "remove"
	Keep    = "keep"
)

// Config says which files. Dir is required, and at least one file; for the rest the zero value works.
type Config struct {
	// Name is for the log.
	Name string
	// Dir is where the files are. It is made if it is missing.
	Dir string

	// Names of files in Dir; those that are empty are not written. JWTBundle is a JSON object with the JWK
	// set of each trust domain in base64, as spiffe-helper writes it; JWKS is the plain JWK set of the own
	// trust domain.
	Cert, Key, Bundle, CRL, JWTBundle, JWKS string
	// JWTs are tokens, each in a file of its own.
	JWTs []JWT

	// CertMode is of certificate, bundle and list (0644), KeyMode of the key (0600), JWTMode of tokens
	// (0600), JWTBundleMode of JWTBundle and JWKS (0600).
	CertMode, KeyMode, JWTMode, JWTBundleMode fs.FileMode
	// Owner and Group are numbers; nil: those of this process.
	Owner, Group *int

	// SPIFFEID and Hint choose among several identities; both empty: the first.
	SPIFFEID, Hint string
	// IntermediatesInBundle moves intermediates from Cert to Bundle.
	IntermediatesInBundle bool
	// Federated adds the bundles of other trust domains to Bundle and JWTBundle.
	Federated bool
	// OmitExpired leaves authorities that have expired out of Bundle.
	OmitExpired bool
	// Withdrawn is Replace, Remove or Keep; empty: Replace.
	Withdrawn string

	// PIDFile names a file with the number of a process that gets Signal when a file has changed.
	PIDFile string
	// Signal is what is sent; 0: SIGHUP.
	Signal syscall.Signal
	// Command is run, without a shell, when a file has changed, and must end within CommandTimeout
	// (30 s). ASSAY_FILES_EVENT in its environment is "renewed" or "withdrawn".
	Command        []string
	CommandTimeout time.Duration
	// Process is started once the files are there, gets Signal when one has changed, and is started again
	// then if it has ended.
	Process []string
	// Stdout and Stderr are Process's and Command's; nil: none.
	Stdout, Stderr io.Writer

	Log logrus.FieldLogger
	Now func() time.Time
	// Changed is called when certificate and key were written or withdrawn; ids are empty if withdrawn. For
	// the audit log; nil is fine.
	Changed func(ids []string)
}

// JWT is one token file.
type JWT struct {
	Audience []string
	File     string
}

// Keeper keeps the files of one Config. Use New, then Run or Once.
type Keeper struct {
	cfg  Config
	src  Source
	log  logrus.FieldLogger
	now  func() time.Time
	tell *teller
	// pokes has a channel for each token, by which its keeper is told to fetch it at once.
	pokes []chan struct{}

	mu     sync.Mutex // guards the rest; held while files are written
	states map[string]state
	// withdrawn says that the last word was that there is no identity; known, that there was a word.
	withdrawn, known bool
	unlisted         bool      // it was said that there is no list of revoked certificates
	expires          time.Time // of the certificate
	domain           string    // the own trust domain's ID; empty: not known yet
}

// state is how a group of files is.
type state struct {
	had  bool   // it was written at least once
	err  error  // of the last try
	told string // what was last warned of since it was as it should be
}

// Groups of files, as health calls them.
const (
	groupX509       = "X509-SVID"
	groupJWTBundles = "JWT bundles"
)

// New returns a Keeper; it touches nothing.
func New(src Source, cfg Config) *Keeper {
	mode := func(m *fs.FileMode, byDefault fs.FileMode) {
		if *m == 0 {
			*m = byDefault
		}
	}
	mode(&cfg.CertMode, 0o644)
	mode(&cfg.KeyMode, 0o600)
	mode(&cfg.JWTMode, 0o600)
	mode(&cfg.JWTBundleMode, 0o600)
	if cfg.Withdrawn == "" {
		cfg.Withdrawn = Replace
	}
	if cfg.Signal == 0 {
		cfg.Signal = syscall.SIGHUP
	}
	if cfg.CommandTimeout <= 0 {
		cfg.CommandTimeout = 30 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		cfg.Log = quiet
	}
	if cfg.Name != "" {
		cfg.Log = cfg.Log.WithField("files", cfg.Name)
	}
	k := &Keeper{cfg: cfg, src: src, log: cfg.Log, now: cfg.Now, states: map[string]state{}}
	k.tell = newTeller(&k.cfg, k.log)
	for range cfg.JWTs {
		k.pokes = append(k.pokes, make(chan struct{}, 1))
	}
	return k
}

// groups are the groups of files that the configuration asks for.
func (k *Keeper) groups() []string {
	var all []string
	if k.writesX509() {
		all = append(all, groupX509)
	}
	if k.writesJWTBundles() {
		all = append(all, groupJWTBundles)
	}
	for _, j := range k.cfg.JWTs {
		all = append(all, jwtGroup(j))
	}
	return all
}

func jwtGroup(j JWT) string { return "JWT-SVID " + j.File }

func (k *Keeper) writesX509() bool {
	return k.cfg.Cert != "" || k.cfg.Key != "" || k.cfg.Bundle != "" || k.cfg.CRL != ""
}

func (k *Keeper) writesJWTBundles() bool { return k.cfg.JWTBundle != "" || k.cfg.JWKS != "" }

// Run keeps the files until ctx ends. It returns an error only if the directory cannot be used at all.
func (k *Keeper) Run(ctx context.Context) error {
	if err := makeDir(k.cfg.Dir); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	// Even where no certificate is written: it is what says that the identity is withdrawn.
	g.Go(func() error {
		k.follow(ctx, groupX509, func(ctx context.Context, seen func()) error {
			return k.src.X509(ctx, func(r *workload.X509SVIDResponse) error { seen(); return k.x509(r) })
		})
		return nil
	})
	if k.writesJWTBundles() || len(k.cfg.JWTs) > 0 {
		g.Go(func() error {
			k.follow(ctx, groupJWTBundles, func(ctx context.Context, seen func()) error {
				return k.src.JWTBundles(ctx, func(r *workload.JWTBundlesResponse) error { seen(); return k.jwtBundles(r) })
			})
			return nil
		})
	}
	for n := range k.cfg.JWTs {
		g.Go(func() error { k.keepJWT(ctx, n); return nil })
	}
	g.Go(func() error { k.tell.run(ctx); return nil })
	return g.Wait()
}

// Pauses between tries of what failed.
const (
	firstPause = time.Second
	lastPause  = 30 * time.Second
)

// pause waits longer from time to time, and never as long as others do.
func pause(ctx context.Context, tries int) bool {
	d := min(firstPause<<min(tries, 10), lastPause)
	return sleep(ctx, d/2+rand.N(d/2+1), nil) //nolint:gosec // not a secret
}

// sleep reports whether ctx is still on after the time, or after a poke.
func sleep(ctx context.Context, d time.Duration, poke <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-poke:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// follow opens a stream anew each time it ends.
func (k *Keeper) follow(ctx context.Context, group string, open func(ctx context.Context, seen func()) error) {
	for tries := 0; ctx.Err() == nil; tries++ {
		err := open(ctx, func() { tries = 0 })
		if ctx.Err() != nil {
			return
		}
		if err != nil && !errors.Is(err, ErrNoIdentity) {
			k.failed(group, err)
		}
		if !pause(ctx, tries) {
			return
		}
	}
}

// failed notes that a group could not be brought up to date. What is on disk stays.
func (k *Keeper) failed(group string, err error) {
	k.mu.Lock()
	s := k.states[group]
	news := s.told != err.Error()
	s.err, s.told = err, err.Error()
	k.states[group] = s
	k.mu.Unlock()
	log := k.log.WithError(err).WithField("what", group)
	if news {
		log.Warn("files cannot be brought up to date; trying again")
	} else {
		log.Debug("files cannot be brought up to date; trying again")
	}
}

// wrote notes what came of writing a group. mu is held. Who called it returns the error, which failed then tells.
func (k *Keeper) wrote(group string, err error) {
	s := k.states[group]
	s.had, s.err = s.had || err == nil, err
	if err == nil {
		s.told = ""
	}
	k.states[group] = s
}

// complete says whether every group was written. mu is held.
func (k *Keeper) complete() bool {
	return !slices.ContainsFunc(k.groups(), func(group string) bool { return !k.states[group].had })
}

// Once writes all files once and returns; the first error ends it.
func (k *Keeper) Once(ctx context.Context) error {
	if err := makeDir(k.cfg.Dir); err != nil {
		return err
	}
	done := errors.New("done")
	err := k.src.X509(ctx, func(r *workload.X509SVIDResponse) error {
		if err := k.x509(r); err != nil {
			return err
		}
		if r == nil {
			return ErrNoIdentity
		}
		return done
	})
	if !errors.Is(err, done) {
		return fmt.Errorf("fetch X509-SVID: %w", orEnded(err))
	}
	if k.writesJWTBundles() {
		err := k.src.JWTBundles(ctx, func(r *workload.JWTBundlesResponse) error {
			if r == nil {
				return ErrNoIdentity
			}
			if err := k.jwtBundles(r); err != nil {
				return err
			}
			return done
		})
		if !errors.Is(err, done) {
			return fmt.Errorf("fetch JWT bundles: %w", orEnded(err))
		}
	}
	for n := range k.cfg.JWTs {
		if _, err := k.jwt(ctx, n); err != nil {
			return fmt.Errorf("fetch JWT-SVID: %w", err)
		}
	}
	return k.group(groupX509).err
}

func orEnded(err error) error {
	if err == nil {
		return errors.New("the API ended the stream")
	}
	return err
}

func (k *Keeper) group(name string) state {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.states[name]
}

// Live says what is wrong with the files themselves: they cannot be written, or their reader cannot be
// told. That the API is away is no such thing.
func (k *Keeper) Live() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, g := range k.groups() {
		if err := k.states[g].err; errors.Is(err, errWrite) {
			return fmt.Errorf("%s: %w", g, err)
		}
	}
	return k.tell.err()
}

// Ready says why not all files are there and good, or nil.
func (k *Keeper) Ready() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.withdrawn {
		return ErrNoIdentity
	}
	for _, g := range k.groups() {
		switch s := k.states[g]; {
		case errors.Is(s.err, errWrite) || s.err != nil && !s.had:
			return fmt.Errorf("%s: %w", g, s.err)
		case !s.had:
			return fmt.Errorf("%s: not fetched yet", g)
		}
	}
	if k.writesX509() && !k.now().Before(k.expires) {
		return errors.New("the certificate has expired")
	}
	return nil
}

// Files are the names of all files that the configuration asks for, sorted.
func (c *Config) Files() []string {
	names := []string{c.Cert, c.Key, c.Bundle, c.CRL, c.JWTBundle, c.JWKS}
	for _, j := range c.JWTs {
		names = append(names, j.File)
	}
	slices.Sort(names)
	return slices.DeleteFunc(names, func(n string) bool { return n == "" })
}
