package server

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"testing"
	"time"

	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	localauthorityv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/localauthority/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"

	"github.com/assay-id/assay/server/wire/adminv1"
)

// steps are the calls of a forced rotation for one kind of authority.
type steps struct {
	name, bad string // how messages spell the kind, and what is in the bundle
	state     func() (active, prepared, old *localauthorityv1.AuthorityState, err error)
	prepare   func() (*localauthorityv1.AuthorityState, error)
	activate  func(id string) (*localauthorityv1.AuthorityState, error)
	taint     func(id string) (*localauthorityv1.AuthorityState, error)
	revoke    func(id string) (*localauthorityv1.AuthorityState, error)
	// bundle says whether the own bundle names the authority, and whether as tainted.
	bundle func(id string) (there, tainted bool)
}

func (w *world) ownBundle() *types.Bundle {
	w.t.Helper()
	b, err := w.bundles().GetBundle(w.context(), &bundlev1.GetBundleRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) stepsX509() steps {
	c, ctx := localauthorityv1.NewLocalAuthorityClient(w.local), w.context()
	return steps{
		name: "X.509", bad: "root CA",
		state: func() (a, p, o *localauthorityv1.AuthorityState, err error) {
			r, err := c.GetX509AuthorityState(ctx, &localauthorityv1.GetX509AuthorityStateRequest{})
			return r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		prepare: func() (*localauthorityv1.AuthorityState, error) {
			r, err := c.PrepareX509Authority(ctx, &localauthorityv1.PrepareX509AuthorityRequest{})
			return r.GetPreparedAuthority(), err
		},
		activate: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.ActivateX509Authority(ctx, &localauthorityv1.ActivateX509AuthorityRequest{AuthorityId: id})
			return r.GetActivatedAuthority(), err
		},
		taint: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.TaintX509Authority(ctx, &localauthorityv1.TaintX509AuthorityRequest{AuthorityId: id})
			return r.GetTaintedAuthority(), err
		},
		revoke: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.RevokeX509Authority(ctx, &localauthorityv1.RevokeX509AuthorityRequest{AuthorityId: id})
			return r.GetRevokedAuthority(), err
		},
		bundle: func(id string) (bool, bool) {
			for _, a := range w.ownBundle().GetX509Authorities() {
				cert, err := x509.ParseCertificate(a.GetAsn1())
				if err != nil {
					w.t.Fatal(err)
				}
				if hex.EncodeToString(cert.SubjectKeyId) == id {
					return true, a.GetTainted()
				}
			}
			return false, false
		},
	}
}

func (w *world) stepsJWT() steps {
	c, ctx := localauthorityv1.NewLocalAuthorityClient(w.local), w.context()
	return steps{
		name: "JWT", bad: "key",
		state: func() (a, p, o *localauthorityv1.AuthorityState, err error) {
			r, err := c.GetJWTAuthorityState(ctx, &localauthorityv1.GetJWTAuthorityStateRequest{})
			return r.GetActive(), r.GetPrepared(), r.GetOld(), err
		},
		prepare: func() (*localauthorityv1.AuthorityState, error) {
			r, err := c.PrepareJWTAuthority(ctx, &localauthorityv1.PrepareJWTAuthorityRequest{})
			return r.GetPreparedAuthority(), err
		},
		activate: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.ActivateJWTAuthority(ctx, &localauthorityv1.ActivateJWTAuthorityRequest{AuthorityId: id})
			return r.GetActivatedAuthority(), err
		},
		taint: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.TaintJWTAuthority(ctx, &localauthorityv1.TaintJWTAuthorityRequest{AuthorityId: id})
			return r.GetTaintedAuthority(), err
		},
		revoke: func(id string) (*localauthorityv1.AuthorityState, error) {
			r, err := c.RevokeJWTAuthority(ctx, &localauthorityv1.RevokeJWTAuthorityRequest{AuthorityId: id})
			return r.GetRevokedAuthority(), err
		},
		bundle: func(id string) (bool, bool) {
			for _, k := range w.ownBundle().GetJwtAuthorities() {
				if k.GetKeyId() == id {
					return true, k.GetTainted()
				}
			}
			return false, false
		},
	}
}

func TestLocalAuthority(t *testing.T) {
	w := start(t)
	for _, s := range []steps{w.stepsX509(), w.stepsJWT()} {
		t.Run(s.name, func(t *testing.T) {
			active, prepared, old, err := s.state()
			if err != nil || active == nil || prepared != nil || old != nil {
				t.Fatalf("at first: %v, %v, %v, %v", active, prepared, old, err)
			}
			first := active.GetAuthorityId()
			t.Run("an ID that is missing, unknown or in another state is refused in SPIRE's words", func(t *testing.T) {
				_, err := s.activate("")
				refused(t, err, codes.InvalidArgument, "no authority ID provided")
				_, err = s.activate("nobody")
				refused(t, err, codes.InvalidArgument, "unexpected authority ID")
				_, err = s.activate(first)
				refused(t, err, codes.InvalidArgument, "unexpected authority ID")
				_, err = s.taint("")
				refused(t, err, codes.InvalidArgument, "no authority ID provided")
				_, err = s.taint(first)
				refused(t, err, codes.InvalidArgument, "unable to taint current local authority")
				_, err = s.taint("nobody")
				refused(t, err, codes.InvalidArgument, "unexpected authority ID")
				_, err = s.revoke("")
				refused(t, err, codes.InvalidArgument, "invalid authority ID: no authority ID provided")
				_, err = s.revoke(first)
				refused(t, err, codes.InvalidArgument, "invalid authority ID: unable to use current authority")
				_, err = s.revoke("nobody")
				refused(t, err, codes.InvalidArgument, "invalid authority ID: ")
			})
			next, err := s.prepare()
			if err != nil {
				t.Fatal(err)
			}
			second := next.GetAuthorityId()
			t.Run("a prepared one is in the bundle, and cannot be tainted or revoked", func(t *testing.T) {
				if there, tainted := s.bundle(second); !there || tainted {
					t.Errorf("there %t, tainted %t", there, tainted)
				}
				if active, prepared, old, err := s.state(); active.GetAuthorityId() != first || prepared.GetAuthorityId() != second || old != nil || err != nil {
					t.Errorf("%v, %v, %v, %v", active, prepared, old, err)
				}
				_, err := s.taint(second)
				refused(t, err, codes.InvalidArgument, "only Old local authorities can be tainted")
				_, err = s.revoke(second)
				refused(t, err, codes.InvalidArgument, "invalid authority ID: ")
			})
			if done, err := s.activate(second); err != nil || done.GetAuthorityId() != second {
				t.Fatalf("%v, %v", done, err)
			}
			t.Run("an old one is shown, and is tainted before it is revoked", func(t *testing.T) {
				if active, prepared, old, err := s.state(); active.GetAuthorityId() != second || prepared != nil || old.GetAuthorityId() != first || err != nil {
					t.Errorf("%v, %v, %v, %v", active, prepared, old, err)
				}
				_, err := s.revoke(first)
				refused(t, err, codes.Internal, "failed to revoke "+s.name+" authority: it is not possible to revoke an untainted "+s.bad)
			})
			if done, err := s.taint(first); err != nil || done.GetAuthorityId() != first {
				t.Fatalf("%v, %v", done, err)
			}
			t.Run("a tainted one is in the bundle as such", func(t *testing.T) {
				if there, tainted := s.bundle(first); !there || !tainted {
					t.Errorf("there %t, tainted %t", there, tainted)
				}
				_, err := s.taint(first)
				refused(t, err, codes.Internal, "failed to taint "+s.name+" authority: "+s.bad+" is already tainted")
			})
			if done, err := s.revoke(first); err != nil || done.GetAuthorityId() != first {
				t.Fatalf("%v, %v", done, err)
			}
			t.Run("a revoked one is gone", func(t *testing.T) {
				if there, _ := s.bundle(first); there {
					t.Error("it is in the bundle")
				}
				if _, _, old, err := s.state(); old != nil || err != nil {
					t.Errorf("old is %v, %v", old, err)
				}
			})
			t.Run("each step has its audit line", func(t *testing.T) {
				kind := map[string]string{"X.509": "x509", "JWT": "jwt"}[s.name]
				for step, id := range map[string]string{"prepare": second, "activate": second, "taint": first, "revoke": first} {
					if line := w.lastAudit("authority." + kind + "." + step); line["outcome"] == "" || line["authority_id"] != id {
						t.Errorf("%s: %v", step, line)
					}
				}
			})
		})
	}
	c := localauthorityv1.NewLocalAuthorityClient(w.local)
	t.Run("what is about upstream authorities fails, and about WIT until it is switched on", func(t *testing.T) {
		_, err := c.TaintX509UpstreamAuthority(w.context(), &localauthorityv1.TaintX509UpstreamAuthorityRequest{SubjectKeyId: "a"})
		refused(t, err, codes.FailedPrecondition, "upstream authority is not configured")
		_, err = c.RevokeX509UpstreamAuthority(w.context(), &localauthorityv1.RevokeX509UpstreamAuthorityRequest{SubjectKeyId: "a"})
		refused(t, err, codes.FailedPrecondition, "upstream authority is not configured")
		_, err = c.PrepareWITAuthority(w.context(), &localauthorityv1.PrepareWITAuthorityRequest{})
		refused(t, err, codes.Unimplemented, "WIT-SVIDs are not enabled")
	})
	t.Run("agents may not", func(t *testing.T) {
		_, _, conn := w.agent("curious")
		_, err := localauthorityv1.NewLocalAuthorityClient(conn).GetX509AuthorityState(w.context(), &localauthorityv1.GetX509AuthorityStateRequest{})
		refused(t, err, codes.PermissionDenied, "")
	})
	w.unharmed()
}

func TestJWTAuthoritiesWithoutJWT(t *testing.T) {
	w := start(t, func(c *Config) { c.CA.DisableJWT = true })
	s := w.stepsJWT()
	for name, call := range map[string]func() error{
		"show":     func() error { _, _, _, err := s.state(); return err },
		"prepare":  func() error { _, err := s.prepare(); return err },
		"activate": func() error { _, err := s.activate("a"); return err },
		"taint":    func() error { _, err := s.taint("a"); return err },
		"revoke":   func() error { _, err := s.revoke("a"); return err },
	} {
		t.Run(name+" is switched off", func(t *testing.T) {
			refused(t, call(), codes.Unimplemented, "JWT functionality is disabled")
		})
	}
}

func TestRotationStatus(t *testing.T) {
	w := start(t)
	w.agent("away")
	read := func(kind string) ([]*adminv1.RotationStatusResponse, error) {
		stream, err := adminv1.NewAdminClient(w.local).RotationStatus(w.context(), &adminv1.RotationStatusRequest{Kind: kind})
		if err != nil {
			t.Fatal(err)
		}
		var all []*adminv1.RotationStatusResponse
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return all, nil
			}
			if err != nil {
				return nil, err
			}
			all = append(all, resp)
		}
	}
	t.Run("another kind than there are is refused", func(t *testing.T) {
		_, err := read("ssh")
		refused(t, err, codes.InvalidArgument, `"x509", "jwt" or "wit"`)
	})
	t.Run("an agent that does not follow the feed is unknown", func(t *testing.T) {
		all, err := read("x509")
		if err != nil || len(all) != 2 {
			t.Fatalf("%v, %v", all, err)
		}
		if a := all[0].GetAuthorities(); len(a) != 1 || a[0].GetState() != "active" || a[0].GetActivatedAt() == 0 {
			t.Errorf("authorities %v", a)
		}
		if n := all[0].GetCounts(); n.GetAgents() != 1 || n.GetUnknown() != 1 || n.GetCurrent() != 0 {
			t.Errorf("counts %v", n)
		}
		if a := all[1].GetAgents()[0]; a.GetConnected() || a.GetExpiresAt() == 0 {
			t.Errorf("agent %v", a)
		}
	})
}

func TestRotationStatusOverTheNetwork(t *testing.T) {
	w := start(t)
	w.create(shop(func(e *types.Entry) { e.SpiffeId, e.Admin = id("/admin"), true }))
	as := func(path string) adminv1.AdminClient {
		key := newKey(t)
		svid, err := w.svids().MintX509SVID(w.context(), &svidv1.MintX509SVIDRequest{Csr: csr(t, key, "spiffe://example.org"+path)})
		if err != nil {
			t.Fatal(err)
		}
		return adminv1.NewAdminClient(w.dial(&tls.Certificate{Certificate: svid.GetSvid().GetCertChain(), PrivateKey: key}))
	}
	status := func(c adminv1.AdminClient) error {
		stream, err := c.RotationStatus(w.context(), &adminv1.RotationStatusRequest{Kind: "x509"})
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		return err
	}
	t.Run("an administrator sees how far it has come", func(t *testing.T) {
		if err := status(as("/admin")); err != nil {
			t.Error(err)
		}
	})
	t.Run("and gets no copy of the store", func(t *testing.T) {
		stream, err := as("/admin").Backup(w.context(), &adminv1.BackupRequest{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		refused(t, err, codes.Unimplemented, "unknown method Backup")
	})
	t.Run("somebody else sees nothing", func(t *testing.T) {
		refused(t, status(as("/else")), codes.PermissionDenied, "authorization denied")
	})
}

// downstream returns a connection of a server that has a downstream entry.
func (w *world) downstream() (*types.Entry, svidv1.SVIDClient, bundlev1.BundleClient) {
	w.t.Helper()
	e := w.create(shop(func(e *types.Entry) { e.SpiffeId, e.Downstream = id("/nested"), true }))
	key := newKey(w.t)
	svid, err := w.svids().MintX509SVID(w.context(), &svidv1.MintX509SVIDRequest{Csr: csr(w.t, key, "spiffe://example.org/nested")})
	if err != nil {
		w.t.Fatal(err)
	}
	conn := w.dial(&tls.Certificate{Certificate: svid.GetSvid().GetCertChain(), PrivateKey: key})
	return e, svidv1.NewSVIDClient(conn), bundlev1.NewBundleClient(conn)
}

func TestDownstreamServer(t *testing.T) {
	w := start(t)
	ctx := w.context()
	entry, svids, bundles := w.downstream()
	t.Run("it gets an authority with the lifetime it prefers, and all roots", func(t *testing.T) {
		key := newKey(t)
		resp, err := svids.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, key, "spiffe://example.org/else"), PreferredTtl: 3600})
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(resp.GetCaCertChain()[0])
		if err != nil || len(resp.GetCaCertChain()) != 1 || len(resp.GetX509Authorities()) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
		if !key.PublicKey.Equal(cert.PublicKey) || cert.URIs[0].String() != "spiffe://example.org" || cert.Subject.OrganizationalUnit[0] != "DOWNSTREAM-1" {
			t.Errorf("%s of %s", cert.URIs[0], cert.Subject)
		}
		if life := cert.NotAfter.Sub(cert.NotBefore); life != time.Hour+10*time.Second {
			t.Errorf("it lives %s", life)
		}
		root, err := x509.ParseCertificate(resp.GetX509Authorities()[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := cert.CheckSignatureFrom(root); err != nil {
			t.Error(err)
		}
		line := w.lastAudit("svid.downstream.new")
		if line["entry_id"] != entry.GetId() || line["serial"] != cert.SerialNumber.String() || line["caller"] != "spiffe://example.org/nested" {
			t.Errorf("audit line %v", line)
		}
	})
	t.Run("a bad request is refused", func(t *testing.T) {
		_, err := svids.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{})
		refused(t, err, codes.InvalidArgument, "missing CSR")
		_, err = svids.NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, newKey(t)), PreferredTtl: -1})
		refused(t, err, codes.InvalidArgument, "invalid TTL")
	})
	t.Run("its JWT key comes into the bundle, once, and never as tainted", func(t *testing.T) {
		der, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		key := &types.JWTKey{PublicKey: der, KeyId: "nested-1", ExpiresAt: time.Now().Add(time.Hour).Unix(), Tainted: true}
		for range 2 {
			resp, err := bundles.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: key})
			if err != nil || len(resp.GetJwtAuthorities()) != 2 {
				t.Fatalf("%v, %v", resp, err)
			}
		}
		if there, tainted := w.stepsJWT().bundle("nested-1"); !there || tainted {
			t.Errorf("there %t, tainted %t", there, tainted)
		}
		if line := w.lastAudit("bundle.publish"); line["authority_id"] != "nested-1" || line["entry_id"] != entry.GetId() {
			t.Errorf("audit line %v", line)
		}
		other, err := x509.MarshalPKIXPublicKey(newKey(t).Public())
		if err != nil {
			t.Fatal(err)
		}
		_, err = bundles.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{PublicKey: other, KeyId: "nested-1"}})
		refused(t, err, codes.AlreadyExists, "that of another key")
		_, err = bundles.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{})
		refused(t, err, codes.InvalidArgument, "missing JWT authority")
		_, err = bundles.PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{JwtAuthority: &types.JWTKey{PublicKey: der}})
		refused(t, err, codes.InvalidArgument, "invalid JWT authority: ")
	})
	t.Run("a workload that is no downstream server gets neither", func(t *testing.T) {
		_, err := svidv1.NewSVIDClient(w.dial(nil)).NewDownstreamX509CA(ctx, &svidv1.NewDownstreamX509CARequest{Csr: csr(t, newKey(t))})
		refused(t, err, codes.PermissionDenied, "")
		_, _, conn := w.agent("curious")
		_, err = bundlev1.NewBundleClient(conn).PublishJWTAuthority(ctx, &bundlev1.PublishJWTAuthorityRequest{})
		refused(t, err, codes.PermissionDenied, "")
	})
	w.unharmed()
}
