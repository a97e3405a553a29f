package issue

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/workloadapi/identity"
)

// slot holds the X509-SVID of an entry. Issuer.mu guards it.
type slot struct {
	// entry is as it is in the picture.
	entry *identity.Entry
	// svid is nil if there is none. It was signed when the entry had the revision and creation time.
	svid      *identity.X509SVID
	revision  int64
	createdAt time.Time
	// top is the chain's last certificate, which an authority signed.
	top *x509.Certificate
	// signer names the authority that signed the SVID itself.
	signer  string
	renewAt time.Time
	// forced says that the SVID is to be replaced even if nobody follows it.
	forced bool
	// over says that the SVID had expired when it was last looked at. It is kept for a while: the clock
	// may be set right again.
	over bool

	// call is queued or under way; nil: none.
	call *call
	// err is why the last call failed, nil if it did not; the next is made at retryAt.
	err      error
	failures int
	retryAt  time.Time

	users map[*subject]struct{}
	used  time.Time
}

// usable reports whether the SVID may be given to a workload.
func (sl *slot) usable(now time.Time) bool {
	return sl.svid != nil && now.Before(sl.svid.NotAfter) && sl.svid.ID == sl.entry.SPIFFEID
}

// current reports whether the SVID was signed for the entry as it is now.
func (sl *slot) current() bool {
	return sl.svid != nil && sl.revision == sl.entry.Revision && sl.createdAt.Equal(sl.entry.CreatedAt)
}

// follow takes the entry as it is now. An SVID for another ID is nobody's any more.
func (sl *slot) follow(e *identity.Entry) {
	sl.entry = e
	sl.retryAt, sl.failures = time.Time{}, 0
	if sl.svid != nil && sl.svid.ID != e.SPIFFEID {
		sl.svid, sl.top = nil, nil
	}
}

// put takes an SVID that is to be renewed at the given time.
func (sl *slot) put(svid *identity.X509SVID, renewAt time.Time, revision int64, createdAt time.Time) {
	sl.svid, sl.revision, sl.createdAt = svid, revision, createdAt
	sl.renewAt, sl.over = renewAt, false
	sl.err, sl.failures, sl.retryAt, sl.forced = nil, 0, time.Time{}, false
	sl.top, _ = x509.ParseCertificate(svid.Chain[len(svid.Chain)-1])
	sl.signer = signerOf(svid.Chain[0])
}

// tainted reports whether an authority signed the SVID that is not to be relied on any longer.
func (sl *slot) tainted(own *identity.Bundle) bool {
	return own != nil && sl.top != nil && slices.ContainsFunc(own.X509, func(a identity.X509Authority) bool {
		return a.Tainted && signedBy(sl.top, a.Certificate)
	})
}

func (sl *slot) finish() {
	if sl.call != nil {
		close(sl.call.done)
		sl.call = nil
	}
}

// signedBy compares key identifiers first: they tell almost all pairs apart without arithmetic.
func signedBy(cert, authority *x509.Certificate) bool {
	if len(cert.AuthorityKeyId) > 0 && len(authority.SubjectKeyId) > 0 && !bytes.Equal(cert.AuthorityKeyId, authority.SubjectKeyId) {
		return false
	}
	return cert.CheckSignatureFrom(authority) == nil
}

// renewalTime is half of the lifetime that begins at from, give or take a tenth of that half, so that
// SVIDs that were signed together are not renewed together.
func renewalTime(from, to time.Time) time.Time {
	half := max(to.Sub(from)/2, minRenewal)
	return from.Add(half + time.Duration((mathrand.Float64()*2-1)*0.1*float64(half))) //nolint:gosec // spreads load, hides nothing
}

// renewalFrom is renewalTime for what was signed just now. Servers date back, by more than the whole
// lifetime if that is short; and one whose clock is ahead of ours dates what it signs into our future,
// which must not put the renewal off: the life is counted from now, by a clock that nobody sets.
func renewalFrom(now, notBefore, to time.Time) time.Time {
	life := to.Sub(latest(now, notBefore))
	return renewalTime(now, now.Add(life))
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// errClock says that our clock and the server's disagree by so much that nothing it signs is of use.
var errClock = errors.New("check the clocks")

// nextClockRetry is when to ask again after errClock: each try costs the server a signature for nothing,
// so all SVIDs go together, once a minute, at this agent's own second of it.
func (i *Issuer) nextClockRetry(now time.Time) time.Time {
	since := (time.Duration(now.UnixNano()) + i.clockPhase) % clockRetry
	return now.Add(clockRetry - since)
}

// backoff is the jittered wait after so many failures.
func backoff(failures int) time.Duration {
	d := min(firstRetry<<min(failures-1, 10), maxRetry)
	return d/2 + time.Duration(mathrand.Int64N(int64(d/2)+1)) //nolint:gosec // spreads load, hides nothing
}

// slot returns the entry's slot and notes that the subject uses it. mu is held.
func (i *Issuer) slot(s *subject, e *identity.Entry) *slot {
	sl := i.slots[e.ID]
	if sl == nil {
		sl = &slot{entry: e, users: map[*subject]struct{}{}, used: s.askedAt}
		i.slots[e.ID] = sl
		if len(i.slots) > i.cfg.X509Size {
			i.due(i.now())
		}
	}
	sl.users[s] = struct{}{}
	return sl
}

// request has the slot's SVID signed and returns what to wait for, or nil if it has failed lately.
// mu is held.
func (i *Issuer) request(sl *slot, now time.Time) *call {
	if sl.call != nil {
		return sl.call
	}
	if i.stopped {
		sl.err = errStopped
		return nil
	}
	if wait := sl.retryAt.Sub(now); wait > 0 && wait <= clockRetry { // more: the clock was set back
		i.due(sl.retryAt)
		return nil
	}
	sl.call = &call{done: make(chan struct{})}
	i.queue = append(i.queue, sl)
	i.poke()
	return sl.call
}

// drop forgets a slot whose entry is gone. mu is held.
func (i *Issuer) drop(sl *slot) {
	delete(i.slots, sl.entry.ID)
	sl.svid = nil
	i.held()
	if sl.call != nil && slices.Contains(i.queue, sl) {
		i.queue = slices.DeleteFunc(i.queue, func(o *slot) bool { return o == sl })
		sl.finish()
	}
}

// batch has everything signed that is asked for within a moment.
func (i *Issuer) batch(ctx context.Context) {
	timer := time.NewTimer(gather)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	i.mu.Lock()
	todo := slices.Clone(i.queue[:min(len(i.queue), maxBatch)])
	i.queue = slices.Delete(i.queue, 0, len(todo))
	i.gathering = false
	entries := make([]*identity.Entry, len(todo))
	for n, sl := range todo {
		entries[n] = sl.entry
	}
	more := len(i.queue) > 0
	i.mu.Unlock()
	if more {
		i.poke()
	}

	svids, errs := i.sign(ctx, entries)

	i.mu.Lock()
	defer i.mu.Unlock()
	now := i.now()
	changed := map[*subject]bool{} // whether it has a new SVID
	saved := false
	for n, sl := range todo {
		ok := i.complete(sl, entries[n], svids[n], errs[n], now)
		saved = saved || ok
		for s := range sl.users {
			changed[s] = changed[s] || ok
		}
	}
	for s, ok := range changed {
		i.settled(s, ok, now)
	}
	i.batches--
	if saved {
		i.save()
	}
	i.poke()
}

// sign makes keys and requests and has them signed.
func (i *Issuer) sign(ctx context.Context, entries []*identity.Entry) ([]*identity.X509SVID, []error) {
	svids := make([]*identity.X509SVID, len(entries))
	errs := make([]error, len(entries))
	var asked []identity.Asked
	var csrs [][]byte
	var keys []crypto.Signer
	var at []int
	for n, e := range entries {
		key, csr, err := i.newCSR(e.SPIFFEID)
		if err != nil {
			errs[n] = err
			continue
		}
		asked, csrs, keys, at = append(asked, i.asked(e)), append(csrs, csr), append(keys, key), append(at, n)
	}
	if len(asked) == 0 {
		return svids, errs
	}
	began := time.Now()
	chains, signErrs := i.signer.SignX509(ctx, asked, csrs)
	i.metrics.latency.WithLabelValues("x509").Observe(time.Since(began).Seconds())
	for m, n := range at {
		if errs[n] = signErrs[m]; errs[n] == nil {
			svids[n], errs[n] = i.parse(entries[n], chains[m], keys[m])
		}
		i.metrics.count("x509", errs[n])
	}
	return svids, errs
}

// asked is what is told to the server of why the entry is signed for: by which of its revisions, and by which
// verdicts there is somebody who may have it.
func (i *Issuer) asked(e *identity.Entry) identity.Asked {
	a := identity.Asked{EntryID: e.ID, Revision: e.Revision}
	if !e.Gated() {
		return a
	}
	i.mu.Lock()
	p := i.picture
	i.mu.Unlock()
	gates := e.Gates()
	for _, v := range p.VerdictList() {
		if _, counts := p.Verdict(v.Digest); counts && gates.In(v.Selectors) {
			a.Verdicts = append(a.Verdicts, identity.HeldVerdict{Digest: v.Digest, Seq: v.Seq})
		}
	}
	return a
}

// complete takes the result of a call into the slot and reports whether there is a new SVID. mu is
// held.
func (i *Issuer) complete(sl *slot, asked *identity.Entry, svid *identity.X509SVID, err error, now time.Time) bool {
	defer sl.finish()
	if i.slots[asked.ID] != sl {
		return false // the entry is gone, or was and is back
	}
	log := i.log.WithField("entry_id", asked.ID).WithField("spiffe_id", asked.SPIFFEID.String())
	if err == nil && i.fromRevoked(svid) {
		err = errRevoked
	}
	if err != nil {
		sl.err = err
		sl.failures++
		sl.retryAt = now.Add(backoff(sl.failures))
		if errors.Is(err, errClock) {
			sl.retryAt = i.nextClockRetry(now)
		}
		i.due(sl.retryAt)
		switch {
		case errors.Is(err, identity.ErrUnavailable), errors.Is(err, identity.ErrUnknownEntry), errors.Is(err, context.Canceled):
			log.WithError(err).Debug("X509-SVID was not signed")
		default:
			log.WithError(err).Warn("X509-SVID was not signed")
		}
		return false
	}
	if svid.ID != sl.entry.SPIFFEID { // the entry changed while the call was under way
		i.due(now)
		return false
	}
	sl.put(svid, renewalFrom(now, svid.NotBefore, svid.NotAfter), asked.Revision, asked.CreatedAt)
	if !sl.current() {
		i.due(now)
	}
	i.latest[0] = sl.signer
	i.held()
	if sl.tainted(i.own()) {
		// It was under way when the authority was tainted, or the server is behind its own bundle.
		sl.forced, sl.failures = true, 1
		sl.renewAt = now.Add(backoff(sl.failures))
	}
	i.due(sl.renewAt)
	log.WithField("rev", i.picture.Rev).Debug("X509-SVID signed")
	return true
}

// newCSR makes the request that SPIRE's servers expect. They take the key from it and nothing else.
func (i *Issuer) newCSR(id spiffeid.ID) (crypto.Signer, []byte, error) {
	key, err := i.pool.take()
	if err != nil {
		return nil, nil, fmt.Errorf("make workload key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
		URIs:    []*url.URL{id.URL()},
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make workload CSR: %w", err)
	}
	return key, csr, nil
}

// parse checks what the server signed: the right ID, the right key, still valid.
func (i *Issuer) parse(e *identity.Entry, chain [][]byte, key crypto.Signer) (*identity.X509SVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("server sent no certificate")
	}
	var leaf *x509.Certificate
	for n, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("server sent a certificate that cannot be read: %w", err)
		}
		if n == 0 {
			leaf = cert
		}
	}
	if len(leaf.URIs) != 1 {
		return nil, fmt.Errorf("server sent a certificate with %d URIs", len(leaf.URIs))
	}
	id, err := spiffeid.FromURI(leaf.URIs[0])
	if err != nil {
		return nil, fmt.Errorf("server sent a certificate with an unusable ID: %w", err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	switch {
	case id != e.SPIFFEID:
		return nil, fmt.Errorf("server sent a certificate for %q", id)
	case !ok || !public.Equal(leaf.PublicKey):
		return nil, errors.New("server sent a certificate for another key")
	case !i.now().Before(leaf.NotAfter):
		return nil, fmt.Errorf("server sent a certificate that expired at %s: %w", leaf.NotAfter.UTC().Format(time.RFC3339), errClock)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("marshal workload key: %w", err)
	}
	return &identity.X509SVID{
		EntryID: e.ID, ID: id, Chain: chain, Key: key, KeyDER: der,
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Hint: e.Hint,
	}, nil
}

// save has all SVIDs kept. mu is held.
func (i *Issuer) save() { i.store.SaveSVIDs(i.snapshot) }

func (i *Issuer) snapshot() []keep.SVID {
	i.mu.Lock()
	defer i.mu.Unlock()
	all := make([]keep.SVID, 0, len(i.slots))
	for _, sl := range i.slots {
		if sl.svid != nil {
			all = append(all, keep.SVID{SVID: sl.svid, EntryRevision: sl.revision, EntryCreatedAt: sl.createdAt})
		}
	}
	slices.SortFunc(all, func(a, b keep.SVID) int { return cmp.Compare(a.SVID.EntryID, b.SVID.EntryID) })
	return all
}
