package tpmdevid_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/attestor/tpmdevid"
	"github.com/assay-id/assay/attestor/tpmdevid/node"
	"github.com/assay-id/assay/attestor/tpmdevid/server"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// plant makes TPMs and their device identities.
type plant struct {
	t       testing.TB
	maker   *swtpm.Maker
	devices *swtpm.DevIDAuthority
}

func newPlant(t testing.TB) *plant {
	t.Helper()
	if err := swtpm.Available(); err != nil {
		lab.Missing(t, "a software TPM", err)
	}
	m, err := swtpm.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	devices, err := swtpm.NewDevIDAuthority(m.Dir(), "devices")
	if err != nil {
		t.Fatal(err)
	}
	return &plant{t, m, devices}
}

func (p *plant) tpm(name string) string {
	p.t.Helper()
	socket, err := p.maker.Make(p.t.Context(), name)
	if err != nil {
		p.t.Fatal(err)
	}
	return socket
}

func (p *plant) devID(socket, name string, kind tpm2.TPMAlgID, password string, change func(*x509.Certificate)) *swtpm.DevID {
	p.t.Helper()
	d, err := p.devices.Provision(p.t.Context(), socket, p.maker.Dir(), name, kind, password, change)
	if err != nil {
		p.t.Fatal(err)
	}
	return d
}

func nodeConfig(socket string, d *swtpm.DevID, password string) string {
	return fmt.Sprintf("devid_cert_path = %q\ndevid_priv_path = %q\ndevid_pub_path = %q\ntpm_device_path = %q\ndevid_password = %q\n",
		d.Cert, d.Priv, d.Pub, socket, password)
}

func (p *plant) judgeConfig() string {
	p.t.Helper()
	roots, err := p.maker.Roots()
	if err != nil {
		p.t.Fatal(err)
	}
	return fmt.Sprintf("devid_ca_path = %q\nendorsement_ca_path = %q\n", p.devices.Path, roots)
}

func open(t testing.TB, nodeBody string) ([]byte, attestor.Ask) {
	t.Helper()
	payload, answer, err := attestortest.OpenNode(t, node.Kind(), nodeBody, attestor.Needs{}).Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, answer
}

func openJudge(t testing.TB, body string, now func() time.Time) attestor.Judge {
	t.Helper()
	return attestortest.OpenJudge(t, server.Kind(), body, attestor.Needs{Now: now})
}

func parse(t testing.TB, payload []byte) (e tpmdevid.Evidence) {
	t.Helper()
	if err := json.Unmarshal(payload, &e); err != nil {
		t.Fatal(err)
	}
	return e
}

func encode(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestSuite(t *testing.T) {
	p := newPlant(t)
	socket := p.tpm("one")
	for kind, c := range map[string]struct {
		alg      tpm2.TPMAlgID
		password string
	}{"rsa": {tpm2.TPMAlgRSA, "secret"}, "ecc": {tpm2.TPMAlgECC, ""}} {
		t.Run(kind, func(t *testing.T) {
			d := p.devID(socket, "device-"+kind, c.alg, c.password, nil)
			ek, _, err := tpmchip.EK(t.Context(), socket, "", tpmchip.RSAEK)
			if err != nil {
				t.Fatal(err)
			}
			hash, err := tpmchip.KeyHash(ek)
			if err != nil {
				t.Fatal(err)
			}
			ca, err := os.ReadFile(p.devices.Path)
			if err != nil {
				t.Fatal(err)
			}
			attestortest.Run(t, attestortest.Pair{
				Node: node.Kind(), Judge: server.Kind(), NodeConfig: nodeConfig(socket, d, c.password), JudgeConfig: p.judgeConfig(),
				Path: "tpm_devid/" + tpmchip.Fingerprint(d.Leaf),
				Selectors: []string{
					"tpm_devid:ca:fingerprint:" + tpmchip.Fingerprint(certificate(t, ca)), "tpm_devid:ek:" + hash,
					"tpm_devid:issuer:cn:devices", "tpm_devid:subject:cn:device-" + kind,
				},
				CanReattest: true,
				Foreign: map[string][]byte{
					"tpm evidence":        []byte(`{"ek":"AAAA","ak":"AAAA"}`),
					"certificates alone":  encode(t, tpmdevid.Evidence{DevIDCert: [][]byte{d.Leaf.Raw}}),
					"certificates beyond": encode(t, tpmdevid.Evidence{DevIDCert: make([][]byte, 6)}),
				},
				README: "README.md",
			})
		})
	}
	t.Run("files that tpm2_create wrote, with their sizes in front", func(t *testing.T) {
		d := p.devID(socket, "sized", tpm2.TPMAlgECC, "", nil)
		for _, path := range []string{d.Priv, d.Pub} {
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, append([]byte{byte(len(raw) >> 8), byte(len(raw))}, raw...), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		payload, answer := open(t, nodeConfig(socket, d, ""))
		if _, err := openJudge(t, p.judgeConfig(), nil).Judge(t.Context(), payload, answer); err != nil {
			t.Error(err)
		}
	})
	t.Run("an endorsement key that stays in the TPM is used", func(t *testing.T) {
		d := p.devID(socket, "stays", tpm2.TPMAlgECC, "", nil)
		persist(t, socket)
		payload, answer := open(t, nodeConfig(socket, d, ""))
		if _, err := openJudge(t, p.judgeConfig(), nil).Judge(t.Context(), payload, answer); err != nil {
			t.Error(err)
		}
	})
}

// persist makes the RSA endorsement key stay, as machines come from the factory.
func persist(t *testing.T, socket string) {
	t.Helper()
	dev, err := tpmchip.Open(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	ek, _, done, err := tpmchip.RSAEK.Load(dev, "")
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	_, err = tpm2.EvictControl{Auth: tpmchip.Hierarchy(tpm2.TPMRHOwner, ""), ObjectHandle: &ek, PersistentHandle: tpmchip.RSAEK.Persistent}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
}

func certificate(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestForgeries(t *testing.T) {
	p := newPlant(t)
	one, two := p.tpm("one"), p.tpm("two")
	d := p.devID(one, "first", tpm2.TPMAlgECC, "", nil)
	other := p.devID(two, "second", tpm2.TPMAlgECC, "", nil)
	payload, answer := open(t, nodeConfig(one, d, ""))
	otherPayload, byOther := open(t, nodeConfig(two, other, ""))
	judge := openJudge(t, p.judgeConfig(), nil)
	if _, err := judge.Judge(t.Context(), payload, answer); err != nil {
		t.Fatal(err)
	}
	refuse := func(t *testing.T, judge attestor.Judge, payload []byte, ask attestor.Ask, want string) {
		t.Helper()
		if proof, err := judge.Judge(t.Context(), payload, ask); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", proof, err, want)
		}
	}
	soft, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("a DevID whose key is in no TPM, beside a key that is in one", func(t *testing.T) {
		// SPIRE's server believes this: nothing there compares the certificate's key with the public area's.
		cert, err := p.devices.Certify(d, &soft.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		e := parse(t, payload)
		e.DevIDCert = [][]byte{cert.Raw}
		refuse(t, judge, encode(t, e), func(ctx context.Context, challenge []byte) ([]byte, error) {
			var c tpmdevid.Challenge
			if err := json.Unmarshal(challenge, &c); err != nil {
				return nil, err
			}
			said, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			var r tpmdevid.Response
			if err := json.Unmarshal(said, &r); err != nil {
				return nil, err
			}
			digest := sha256.Sum256(c.DevID)
			if r.DevID, err = ecdsa.SignASN1(rand.Reader, soft, digest[:]); err != nil {
				return nil, err
			}
			return json.Marshal(r)
		}, "the certificate is for another key")
	})
	t.Run("a DevID of another TPM, with this TPM's keys around it", func(t *testing.T) {
		e := parse(t, payload)
		o := parse(t, otherPayload)
		e.DevIDCert, e.DevIDPub = o.DevIDCert, o.DevIDPub
		refuse(t, judge, encode(t, e), answer, "certifies another key")
		e.CertifiedDevID, e.CertificationSignature = o.CertifiedDevID, o.CertificationSignature
		refuse(t, judge, encode(t, e), answer, "signature is wrong")
	})
	t.Run("a DevID and attestation key of one TPM with the endorsement key of another", func(t *testing.T) {
		e := parse(t, otherPayload)
		o := parse(t, payload)
		e.EKCert, e.EKPub = o.EKCert, o.EKPub
		for why, ask := range map[string]attestor.Ask{"answered by the one": byOther, "by the other": answer} {
			if proof, err := judge.Judge(t.Context(), encode(t, e), ask); err == nil {
				t.Errorf("%s: believed: %+v", why, proof)
			}
		}
	})
	t.Run("an endorsement certificate for another key", func(t *testing.T) {
		e := parse(t, otherPayload)
		e.EKCert = parse(t, payload).EKCert
		refuse(t, judge, encode(t, e), byOther, "for another key")
	})
	t.Run("no endorsement certificate", func(t *testing.T) {
		e := parse(t, payload)
		e.EKCert = nil
		refuse(t, judge, encode(t, e), answer, "no certificate")
	})
	t.Run("another authority's DevID", func(t *testing.T) {
		rival, err := swtpm.NewDevIDAuthority(t.TempDir(), "devices")
		if err != nil {
			t.Fatal(err)
		}
		refuse(t, openJudge(t, strings.Replace(p.judgeConfig(), p.devices.Path, rival.Path, 1), nil), payload, answer, "not by an accepted authority")
	})
	t.Run("another manufacturer's TPM", func(t *testing.T) {
		refuse(t, openJudge(t, fmt.Sprintf("devid_ca_path = %[1]q\nendorsement_ca_path = %[1]q", p.devices.Path), nil), payload, answer, "endorsement key is not accepted")
	})
	t.Run("a DevID that has expired", func(t *testing.T) {
		late := func() time.Time { return time.Now().Add(2 * time.Hour) }
		refuse(t, openJudge(t, p.judgeConfig(), late), payload, answer, "not valid now")
	})
	t.Run("an authority's certificate in the DevID's place", func(t *testing.T) {
		bad := p.devID(one, "authority", tpm2.TPMAlgECC, "", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true })
		payload, answer := open(t, nodeConfig(one, bad, ""))
		refuse(t, judge, payload, answer, "authority's")
	})
	t.Run("an attestation key that signs anything it is given, or can leave its TPM", func(t *testing.T) {
		for why, spoil := range map[string]func(a *tpm2.TPMAObject){
			"not restricted":    func(a *tpm2.TPMAObject) { a.Restricted = false },
			"not fixed":         func(a *tpm2.TPMAObject) { a.FixedTPM = false },
			"made elsewhere":    func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false },
			"decrypts, as well": func(a *tpm2.TPMAObject) { a.Decrypt = true },
		} {
			e := parse(t, payload)
			public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.AKPub)
			if err != nil {
				t.Fatal(err)
			}
			spoil(&public.ObjectAttributes)
			e.AKPub = tpm2.Marshal(public)
			t.Log(why)
			refuse(t, judge, encode(t, e), answer, "no attestation key")
		}
	})
	t.Run("a DevID's key that can leave its TPM", func(t *testing.T) {
		e := parse(t, payload)
		public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.DevIDPub)
		if err != nil {
			t.Fatal(err)
		}
		public.ObjectAttributes.FixedTPM = false
		e.DevIDPub = tpm2.Marshal(public)
		refuse(t, judge, encode(t, e), answer, "fixed there")
	})
	t.Run("a DevID's public area that was changed after it was certified", func(t *testing.T) {
		e := parse(t, payload)
		public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.DevIDPub)
		if err != nil {
			t.Fatal(err)
		}
		public.ObjectAttributes.NoDA = true
		e.DevIDPub = tpm2.Marshal(public)
		refuse(t, judge, encode(t, e), answer, "certifies another key")
	})
	spoiled := func(spoil func(*tpmdevid.Response)) attestor.Ask {
		return func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			var r tpmdevid.Response
			if err := json.Unmarshal(said, &r); err != nil {
				return nil, err
			}
			spoil(&r)
			return json.Marshal(r)
		}
	}
	var old tpmdevid.Response
	if _, err := judge.Judge(t.Context(), payload, spoiled(func(r *tpmdevid.Response) { old = *r })); err != nil {
		t.Fatal(err)
	}
	for why, c := range map[string]struct {
		spoil func(*tpmdevid.Response)
		want  string
	}{
		"a secret that is not the one":        {func(r *tpmdevid.Response) { r.CredActivation[0] ^= 1 }, "not in the TPM"},
		"no secret":                           {func(r *tpmdevid.Response) { r.CredActivation = nil }, "not in the TPM"},
		"a signature of yesterday":            {func(r *tpmdevid.Response) { r.DevID = old.DevID }, "signature is wrong"},
		"no signature":                        {func(r *tpmdevid.Response) { r.DevID = nil }, "signature is wrong"},
		"a huge signature":                    {func(r *tpmdevid.Response) { r.DevID = make([]byte, 20<<10) }, "signature is wrong"},
		"a secret of yesterday":               {func(r *tpmdevid.Response) { r.CredActivation = old.CredActivation }, "not in the TPM"},
		"a signature by another key, as well": {func(r *tpmdevid.Response) { r.DevID, _ = ecdsa.SignASN1(rand.Reader, soft, make([]byte, 32)) }, "signature is wrong"},
	} {
		t.Run(why, func(t *testing.T) { refuse(t, judge, payload, spoiled(c.spoil), c.want) })
	}
	t.Run("a certification that was bent", func(t *testing.T) {
		e := parse(t, payload)
		e.CertifiedDevID[5] ^= 1
		refuse(t, judge, encode(t, e), answer, "signature is wrong")
	})
}

func TestAgentSaysWhatIsWrong(t *testing.T) {
	p := newPlant(t)
	one, two := p.tpm("one"), p.tpm("two")
	d, other := p.devID(one, "first", tpm2.TPMAlgECC, "secret", nil), p.devID(two, "second", tpm2.TPMAlgECC, "", nil)
	mixed := *d
	mixed.Pub = other.Pub
	empty := *d
	empty.Priv = filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty.Priv, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	gone := *d
	gone.Cert = "/nowhere.pem"
	for body, says := range map[string]string{
		nodeConfig(one, &mixed, "secret"): "does not belong to the certificate",
		nodeConfig(one, &empty, "secret"): "it is empty",
		nodeConfig(one, &gone, "secret"):  "/nowhere.pem",
	} {
		config, diags := attestortest.Decode(node.Kind().Config, body)
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		if _, err := node.Kind().Open(config, attestor.Needs{}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
	for body, says := range map[string]string{
		nodeConfig(two, d, "secret"):        "is it this TPM's?",
		nodeConfig(one, d, "wrong"):         "certify the DevID's key",
		nodeConfig("/nowhere", d, "secret"): "find TPM",
	} {
		n := attestortest.OpenNode(t, node.Kind(), body, attestor.Needs{})
		if _, _, err := n.Evidence(t.Context()); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, want %q", err, says)
		}
	}
}

func TestAWrongPasswordIsTriedOnce(t *testing.T) {
	p := newPlant(t)
	socket := p.tpm("one")
	d := p.devID(socket, "first", tpm2.TPMAlgECC, "secret", nil)
	n := attestortest.OpenNode(t, node.Kind(), nodeConfig(socket, d, "another"), attestor.Needs{})
	for range 10 { // this TPM locks its passwords up after three
		if _, _, err := n.Evidence(t.Context()); err == nil || !strings.Contains(err.Error(), "the TPM refuses devid_password") {
			t.Fatal(err)
		}
	}
	open(t, nodeConfig(socket, d, "secret"))
	// The files are read at each attestation: what is in them now may have this password.
	next := p.devID(socket, "next", tpm2.TPMAlgECC, "another", nil)
	for from, to := range map[string]string{next.Cert: d.Cert, next.Priv: d.Priv, next.Pub: d.Pub} {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := n.Evidence(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestMessagesAreSPIREs(t *testing.T) {
	for want, message := range map[string]any{
		`{"DevIDCert":["AQ=="],"DevIDPub":"Ag==","EKCert":"Aw==","EKPub":"BA==","AKPub":"BQ==","CertifiedDevID":"Bg==","CertificationSignature":"Bw=="}`: tpmdevid.Evidence{
			DevIDCert: [][]byte{{1}}, DevIDPub: []byte{2}, EKCert: []byte{3}, EKPub: []byte{4}, AKPub: []byte{5}, CertifiedDevID: []byte{6}, CertificationSignature: []byte{7},
		},
		`{"DevID":"AQ==","CredActivation":{"Credential":"Ag==","Secret":"Aw=="}}`: tpmdevid.Challenge{DevID: []byte{1}, CredActivation: &tpmdevid.Credential{Credential: []byte{2}, Secret: []byte{3}}},
		`{"DevID":"AQ==","CredActivation":"Ag=="}`:                                tpmdevid.Response{DevID: []byte{1}, CredActivation: []byte{2}},
	} {
		if got, err := json.Marshal(message); err != nil || string(got) != want {
			t.Errorf("message is %s, want %s", got, want)
		}
	}
}
