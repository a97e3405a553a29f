package ca

import (
	"bytes"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/test/lab"
)

// revokedNow is the record of a certificate that is revoked.
func revokedNow(cert *x509.Certificate) records.Serial {
	return records.Serial{Number: cert.SerialNumber.String(), EvidenceSerial: &stored.EvidenceSerial{
		AuthorityId: hex.EncodeToString(cert.AuthorityKeyId), RevokedAt: time.Now().Unix(),
	}}
}

// TestRevocationLists replaces an authority and asks openssl, which refuses what it has no list for, about
// certificates of the authority before.
func TestRevocationLists(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		lab.Missing(t, "openssl", err)
	}
	store, km, ctx := newStore(), &durable{InMemory: keys.Memory()}, t.Context()
	start := func() *CA {
		t.Helper()
		c, err := Open(ctx, km, store, testTD, Config{RevocationLists: true})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	c := start()
	dir, number := t.TempDir(), uint64(0)
	write := func(name, kind string, ders ...[]byte) string {
		t.Helper()
		var text []byte
		for _, der := range ders {
			text = append(text, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})...)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	// verdict is what openssl says of a certificate, by the bundle and the lists as they are now.
	verdict := func(c *CA, cert *x509.Certificate, revoked ...records.Serial) string {
		t.Helper()
		number++
		lists, err := c.SignCRLs(ctx, number, revoked, time.Now().Add(time.Hour))
		if err != nil {
			t.Fatal(err)
		}
		var roots [][]byte
		for _, a := range store.held().X509 {
			roots = append(roots, a.Certificate.Raw)
		}
		out, err := exec.CommandContext(ctx, openssl, "verify", "-crl_check",
			"-CAfile", write("roots.pem", "CERTIFICATE", roots...), "-CRLfile", write("lists.pem", "X509 CRL", lists...), write("one.pem", "CERTIFICATE", cert.Raw)).CombinedOutput()
		switch {
		case err == nil:
			return "good"
		case strings.Contains(string(out), "certificate revoked"):
			return "revoked"
		case strings.Contains(string(out), "unable to get certificate CRL"):
			return "no list"
		}
		return string(out)
	}
	want := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: openssl says %q, want %q", what, got, want)
		}
	}
	first := lineIn(t, c, KindX509, StateActive)
	kept, gone := issueChecked(t, c, store, time.Now())[0], issueChecked(t, c, store, time.Now())[0]
	want("before", verdict(c, kept, revokedNow(gone)), "good")
	want("before, revoked", verdict(c, gone, revokedNow(gone)), "revoked")

	before, err := c.SignCRLs(ctx, number+1, []records.Serial{revokedNow(gone)}, time.Now().Add(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	store.bundle.CRLs = before
	due := c.CRLsDue()
	prepared, _, err := c.PrepareAuthority(ctx, KindX509)
	if err != nil {
		t.Fatal(err)
	}
	if along := store.held().CRLs; len(along) != 2 || !bytes.Equal(along[0], before[0]) {
		t.Errorf("%d lists are in the bundle to which an authority came", len(along))
	} else if list, err := x509.ParseRevocationList(along[1]); err != nil || hex.EncodeToString(list.AuthorityKeyId) != prepared.AuthorityID {
		t.Errorf("the list that came with the authority is not its own: %v", err)
	}
	select {
	case <-due:
	default:
		t.Error("nobody is told that there is another authority")
	}
	lists, err := c.SignCRLs(ctx, 1, nil, time.Now().Add(time.Hour))
	if err != nil || len(lists) != 2 {
		t.Fatalf("%d lists, %v: a verifier refuses what the prepared authority will sign until there is one of its own", len(lists), err)
	}
	if list, err := x509.ParseRevocationList(lists[0]); err != nil || hex.EncodeToString(list.AuthorityKeyId) != first.AuthorityID {
		t.Errorf("the first is not the active authority's: %v", err)
	}
	if _, err := c.ActivateAuthority(ctx, KindX509, prepared.AuthorityID); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]*CA{"after": c, "after a restart": start()} {
		want(name+", of the old one", verdict(c, kept, revokedNow(gone)), "good")
		want(name+", of the old one, revoked", verdict(c, gone, revokedNow(gone)), "revoked")
		want(name+", of the new one", verdict(c, issueChecked(t, c, store, time.Now())[0], revokedNow(gone)), "good")
		want(name+", unknown by whom", verdict(c, gone, records.Serial{Number: gone.SerialNumber.String(), EvidenceSerial: &stored.EvidenceSerial{RevokedAt: 1}}), "revoked")
		if lists, err := c.SignCRLs(ctx, 1, []records.Serial{revokedNow(gone)}, time.Now().Add(time.Hour)); err != nil {
			t.Error(err)
		} else if list, err := x509.ParseRevocationList(lists[0]); err != nil || len(list.RevokedCertificateEntries) != 0 {
			t.Errorf("%s: the new authority's list has what it did not sign: %v, %v", name, list, err)
		}
	}

	if _, _, err := c.TaintAuthority(ctx, KindX509, first.AuthorityID); err != nil {
		t.Fatal(err)
	}
	want("tainted", verdict(c, kept), "good")
	if _, _, err := c.RevokeAuthority(ctx, KindX509, first.AuthorityID); err != nil {
		t.Fatal(err)
	}
	if _, err := km.Get(ctx, first.KeyID); err == nil {
		t.Error("the key of a revoked authority is still there")
	}
	if lists, err := c.SignCRLs(ctx, 1, nil, time.Now().Add(time.Hour)); err != nil || len(lists) != 1 {
		t.Errorf("%d lists, %v, after the old authority is gone", len(lists), err)
	}
}

func TestKeysGoAtOnceWithoutLists(t *testing.T) {
	store, km, ctx := newStore(), &durable{InMemory: keys.Memory()}, t.Context()
	c, err := Open(ctx, km, store, testTD, Config{})
	if err != nil {
		t.Fatal(err)
	}
	first := lineIn(t, c, KindX509, StateActive)
	prepared, _, err := c.PrepareAuthority(ctx, KindX509)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.ActivateAuthority(ctx, KindX509, prepared.AuthorityID); err != nil {
		t.Fatal(err)
	}
	if _, err := km.Get(ctx, first.KeyID); err == nil {
		t.Error("the key of an old authority is still there, and nobody needs it")
	}
	if lists, err := c.SignCRLs(ctx, 1, nil, time.Now().Add(time.Hour)); err != nil || len(lists) != 1 {
		t.Errorf("%d lists, %v", len(lists), err)
	}
}
