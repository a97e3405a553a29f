package tpm_test

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/attestortest"
	"github.com/assay-id/assay/attestor/tpm"
	"github.com/assay-id/assay/attestor/tpm/node"
	"github.com/assay-id/assay/attestor/tpm/server"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/swtpm"
)

// maker is a manufacturer of software TPMs of the test's own, whose errors end it.
type maker struct {
	t testing.TB
	m *swtpm.Maker
}

func newMaker(t testing.TB) *maker {
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
	return &maker{t, m}
}

func (m *maker) roots() string {
	m.t.Helper()
	path, err := m.m.Roots()
	if err != nil {
		m.t.Fatal(err)
	}
	return path
}

func (m *maker) make(name string) string {
	m.t.Helper()
	socket, err := m.m.Make(m.t.Context(), name)
	if err != nil {
		m.t.Fatal(err)
	}
	return socket
}

func openNode(t testing.TB, body string) attestor.Node {
	t.Helper()
	return attestortest.OpenNode(t, node.Kind(), body, attestor.Needs{})
}

func evidence(t testing.TB, body string) ([]byte, attestor.Ask) {
	t.Helper()
	payload, answer, err := openNode(t, body).Evidence(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return payload, answer
}

func openJudge(t testing.TB, body string) attestor.Judge {
	t.Helper()
	return attestortest.OpenJudge(t, server.Kind(), body, attestor.Needs{})
}

// hashOf reads the hash of the endorsement key off a proof.
func hashOf(t testing.TB, roots string, payload []byte, answer attestor.Ask) string {
	t.Helper()
	proof, err := openJudge(t, fmt.Sprintf("ek_ca_path = %q", roots)).Judge(t.Context(), payload, answer)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimPrefix(proof.Path, "tpm/")
}

func TestSuite(t *testing.T) {
	m := newMaker(t)
	socket := m.make("one")
	for _, kind := range []string{"rsa", "ecc"} {
		t.Run(kind, func(t *testing.T) {
			config := fmt.Sprintf("tpm_path = %q\nendorsement_key = %q", socket, kind)
			payload, answer := evidence(t, config)
			var judge string
			if kind == "rsa" { // swtpm's other certificate is for a key on P-384
				judge = fmt.Sprintf("ek_ca_path = %q\n", m.roots())
			} else {
				var e tpm.Evidence
				if err := json.Unmarshal(payload, &e); err != nil {
					t.Fatal(err)
				}
				public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.EK)
				if err != nil {
					t.Fatal(err)
				}
				parms, _ := public.Parameters.ECCDetail()
				unique, _ := public.Unique.ECC()
				key, err := tpm2.ECDSAPub(parms, unique)
				if err != nil {
					t.Fatal(err)
				}
				hash, err := tpmchip.KeyHash(key)
				if err != nil {
					t.Fatal(err)
				}
				judge = fmt.Sprintf("ek_hashes = [%q]\n", hash)
			}
			judge += "pcrs = [0, 7, 16]\n"
			proof, err := openJudge(t, judge).Judge(t.Context(), payload, answer)
			if err != nil {
				t.Fatal(err)
			}
			zero := strings.Repeat("0", 64)
			got := attestor.NewSet(proof.Selectors...).Strings()
			for _, n := range []int{0, 7, 16} {
				if want := fmt.Sprintf("tpm:pcr:sha256:%d:%s", n, zero); !slices.Contains(got, want) {
					t.Errorf("no %s in %q", want, got)
				}
			}
			attestortest.Run(t, attestortest.Pair{
				Node: node.Kind(), Judge: server.Kind(), NodeConfig: config, JudgeConfig: judge,
				Path: proof.Path, Selectors: got, CanReattest: true, README: "README.md",
				Foreign: map[string][]byte{"keys that are none": []byte(`{"ek":"AAAA","ak":"AAAA"}`)},
			})
		})
	}
}

func TestForgeries(t *testing.T) {
	m := newMaker(t)
	one, two := m.make("one"), m.make("two")
	configOf := func(socket string) string { return fmt.Sprintf("tpm_path = %q", socket) }
	payload, answer := evidence(t, configOf(one))
	other, byOther := evidence(t, configOf(two))
	hash := hashOf(t, m.roots(), payload, answer)
	listed := fmt.Sprintf("ek_hashes = [%q]\npcrs = [0, 7]\n", hash)
	refuse := func(t *testing.T, judge string, payload []byte, ask attestor.Ask, want string) {
		t.Helper()
		if proof, err := openJudge(t, judge).Judge(t.Context(), payload, ask); !errors.Is(err, attestor.ErrEvidence) || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v, %v; want %q", proof, err, want)
		}
	}
	parts := func(payload []byte) (e tpm.Evidence) {
		t.Helper()
		if err := json.Unmarshal(payload, &e); err != nil {
			t.Fatal(err)
		}
		return e
	}
	encode := func(v any) []byte {
		t.Helper()
		raw, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	t.Run("a TPM with another endorsement key", func(t *testing.T) {
		refuse(t, listed, other, byOther, "ek_hashes")
	})
	t.Run("another manufacturer's TPM", func(t *testing.T) {
		rival := newMaker(t)
		rival.make("rival")
		refuse(t, fmt.Sprintf("ek_ca_path = %q", rival.roots()), payload, answer, "not by an accepted authority")
	})
	t.Run("the certificate of another TPM's key", func(t *testing.T) {
		e := parts(other)
		e.EKCert = parts(payload).EKCert
		refuse(t, fmt.Sprintf("ek_ca_path = %q", m.roots()), encode(e), byOther, "for another key")
	})
	t.Run("no certificate", func(t *testing.T) {
		e := parts(payload)
		e.EKCert = nil
		refuse(t, fmt.Sprintf("ek_ca_path = %q", m.roots()), encode(e), answer, "no certificate")
	})
	t.Run("an attestation key of another TPM", func(t *testing.T) {
		e := parts(payload)
		e.AK = parts(other).AK
		if proof, err := openJudge(t, listed).Judge(t.Context(), encode(e), answer); err == nil {
			t.Errorf("believed: %+v", proof)
		}
	})
	t.Run("an attestation key that signs anything it is given, or can leave its TPM", func(t *testing.T) {
		for why, spoil := range map[string]func(a *tpm2.TPMAObject){
			"not restricted":    func(a *tpm2.TPMAObject) { a.Restricted = false },
			"not fixed":         func(a *tpm2.TPMAObject) { a.FixedTPM = false },
			"made elsewhere":    func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false },
			"decrypts, as well": func(a *tpm2.TPMAObject) { a.Decrypt = true },
		} {
			e := parts(payload)
			public, err := tpm2.Unmarshal[tpm2.TPMTPublic](e.AK)
			if err != nil {
				t.Fatal(err)
			}
			spoil(&public.ObjectAttributes)
			e.AK = tpm2.Marshal(public)
			t.Log(why)
			refuse(t, listed, encode(e), answer, "no attestation key")
		}
	})
	spoiled := func(spoil func(*tpm.Response)) attestor.Ask {
		return func(ctx context.Context, challenge []byte) ([]byte, error) {
			said, err := answer(ctx, challenge)
			if err != nil {
				return nil, err
			}
			var r tpm.Response
			if err := json.Unmarshal(said, &r); err != nil {
				return nil, err
			}
			spoil(&r)
			return json.Marshal(r)
		}
	}
	for why, c := range map[string]struct {
		spoil func(*tpm.Response)
		want  string
	}{
		"a secret that is not the one":           {func(r *tpm.Response) { r.Secret[0] ^= 1 }, "not in the TPM"},
		"a corrupt quote":                        {func(r *tpm.Response) { r.Quote[20] ^= 1 }, "signature is wrong"},
		"a quote cut short":                      {func(r *tpm.Response) { r.Quote = r.Quote[:10] }, "signature is wrong"},
		"a corrupt signature":                    {func(r *tpm.Response) { r.Signature[len(r.Signature)-1] ^= 1 }, "signature is wrong"},
		"no signature":                           {func(r *tpm.Response) { r.Signature = nil }, "cannot be read"},
		"registers that are not the quoted ones": {func(r *tpm.Response) { r.Values[1] = append([]byte{1}, r.Values[1][1:]...) }, "not those that were quoted"},
		"fewer registers than were asked for":    {func(r *tpm.Response) { r.Values = r.Values[:1] }, "asked for"},
		"registers whose borders are moved":      {func(r *tpm.Response) { all := slices.Concat(r.Values...); r.Values = [][]byte{all[:31], all[31:]} }, "SHA-256 bank"},
	} {
		t.Run(why, func(t *testing.T) { refuse(t, listed, payload, spoiled(c.spoil), c.want) })
	}
	t.Run("a quote for another key of an agent's", func(t *testing.T) {
		payload, answer, err := attestor.Gather(t.Context(), openNode(t, configOf(one)), attestor.KeyHash{1})
		if err != nil {
			t.Fatal(err)
		}
		for key, ok := range map[attestor.KeyHash]bool{{1}: true, {2}: false} {
			if _, err := attestor.Decide(t.Context(), openJudge(t, listed), payload, key, answer); (err == nil) != ok {
				t.Errorf("for %x: %v", key[:1], err)
			}
		}
	})
	t.Run("a quote that answered another question", func(t *testing.T) {
		var old tpm.Response
		_, err := openJudge(t, listed).Judge(t.Context(), payload, spoiled(func(r *tpm.Response) { old = *r }))
		if err != nil {
			t.Fatal(err)
		}
		refuse(t, listed, payload, spoiled(func(r *tpm.Response) { r.Quote, r.Signature = old.Quote, old.Signature }), "another question")
	})
}

// moody is a TPM in the way of another, which is busy at first and answers in pieces.
func moody(t *testing.T, real string, busy int, hang bool) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpm-") //nolint:usetesting // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	serve := func(c net.Conn) {
		defer c.Close()
		behind, err := net.Dial("unix", real)
		if err != nil {
			return
		}
		defer behind.Close()
		for {
			command, err := message(c)
			if err != nil || hang {
				_, _ = io.Copy(io.Discard, c)
				return
			}
			for range busy {
				_, _ = c.Write([]byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x09, 0x22})
				if command, err = message(c); err != nil {
					return
				}
			}
			if _, err := behind.Write(command); err != nil {
				return
			}
			response, err := message(behind)
			if err != nil {
				return
			}
			for piece := range slices.Chunk(response, 7) {
				if _, err := c.Write(piece); err != nil {
					return
				}
			}
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c)
		}
	}()
	return l.Addr().String()
}

func message(r io.Reader) ([]byte, error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	rest := make([]byte, binary.BigEndian.Uint32(head[2:6])-10)
	_, err := io.ReadFull(r, rest)
	return append(head, rest...), err
}

func TestDevice(t *testing.T) {
	m := newMaker(t)
	socket := m.make("one")
	t.Run("a TPM that is busy is asked again", func(t *testing.T) {
		payload, answer := evidence(t, fmt.Sprintf("tpm_path = %q", moody(t, socket, 2, false)))
		hashOf(t, m.roots(), payload, answer)
	})
	t.Run("one that stays busy is an error", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, _, err := openNode(t, fmt.Sprintf("tpm_path = %q", moody(t, socket, 1000, false))).Evidence(ctx); err == nil {
			t.Error("no error")
		}
	})
	t.Run("one that hangs is given up with the context", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, _, err := openNode(t, fmt.Sprintf("tpm_path = %q", moody(t, socket, 0, true))).Evidence(ctx)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("none is an error", func(t *testing.T) {
		none := fmt.Sprintf("tpm_path = %q", filepath.Join(t.TempDir(), "none"))
		if _, _, err := openNode(t, none).Evidence(t.Context()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("keys that stay behind would fill the TPM", func(t *testing.T) {
		for range 10 {
			evidence(t, fmt.Sprintf("tpm_path = %q", socket))
		}
	})
}

func FuzzJudge(f *testing.F) {
	f.Add([]byte(`{"ek":"AAAA","ak":"AAAA"}`))
	judge := openJudge(f, `ek_hashes = ["`+strings.Repeat("0", 64)+`"]`)
	f.Fuzz(func(t *testing.T, payload []byte) {
		if proof, err := judge.Judge(t.Context(), payload, nil); err == nil {
			t.Errorf("believed: %+v", proof)
		}
	})
}
