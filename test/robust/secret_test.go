package robust

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/site"
)

// TestNoSecretIsLogged has both binaries log all they can, and looks for secrets in everything they wrote
// that is not sealed or for its owner only by design: logs and audit lines.
func TestNoSecretIsLogged(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.LogLevel = "trace"
	known, foreign := bearer(t, s.Dir, "known"), bearer(t, s.Dir, "foreign")
	s.ServerBlocks = fmt.Sprintf("node_attestor \"join_token\" {}\nrole \"shop\" {\n  verbs = [\"entry:read\"]\n  oidc {\n    issuer = \"https://login.example.org\"\n    audience = \"assay\"\n    jwks_path = %q\n    claims = { \"email\" = \"^alice@example.org$\" }\n  }\n}", known.keys)
	h := newHistory()
	start(t, s)
	a := newAgent(t, s, "agent", site.AgentOptions{})
	node := onlyAgent(t, s)
	unspent := token(t, s)
	// What a workload keeps in its environment is a selector like any other.
	guarded := newEntry(node, "/guarded")
	guarded.Selectors = []*types.Selector{{Type: "docker", Value: "env:PASSWORD=hunter2-of-the-shop"}}
	h.mustCreate(t, dial(t, s), guarded)
	h.mustCreate(t, dial(t, s), newEntry(node, "/one"))
	svid := newWorkload(t, a.Socket).has("/one").DefaultSVID()
	handed, err := client(t, a.Socket).FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, a.Socket).ValidateJWTSVID(patiently(t), handed.Marshal(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, a.Socket).ValidateJWTSVID(patiently(t), handed.Marshal(), "b"); err == nil {
		t.Error("a token for another was taken")
	}
	// Administrators over TCP, one of whom is nobody; what is made for them; and a node that is nobody.
	bundle, err := s.WriteBundle(patiently(t))
	if err != nil {
		t.Fatal(err)
	}
	over := []string{"entry", "show", "-server", fmt.Sprintf("127.0.0.1:%d", s.Port), "-trustBundle", bundle, "-tokenFile"}
	if _, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), append(over, known.file)...); err != nil {
		t.Error(err)
	}
	if _, err := site.Run(patiently(t), nil, filepath.Join(s.Bin, "assay-server"), append(over, foreign.file)...); err == nil {
		t.Error("a token that a stranger signed was taken")
	}
	minted, err := s.ServerCLI(patiently(t), "jwt", "mint", "-spiffeID", "spiffe://example.org/minted", "-audience", "a")
	if err != nil {
		t.Fatal(err)
	}
	minted = strings.TrimSpace(minted)
	const noToken = "0b0e7a2c-7a1d-4c52-9d5e-0123456789ab"
	stranger, err := s.NewAgent(patiently(t), "stranger", site.AgentOptions{Token: noToken})
	if err != nil {
		t.Fatal(err)
	}
	if err := stranger.Launch(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stranger to be refused", func() error {
		if lines(t, stranger.Log, "does not exist or has already been used") == 0 {
			return errors.New("nothing is said")
		}
		return nil
	})
	if err := stranger.Stop(patience); err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(svid.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Stop(patience); err != nil {
		t.Fatal(err)
	}
	stop(t, s)

	secrets := map[string]string{
		"a join token that is not spent": unspent,
		"a selector's value":             "hunter2-of-the-shop",
		"a JWT-SVID":                     handed.Marshal(),
		"a JWT-SVID's signature":         handed.Marshal()[strings.LastIndex(handed.Marshal(), ".")+1:],
		"a workload's key":               base64.StdEncoding.EncodeToString(key)[30:],
		"a private key":                  "PRIVATE KEY",
		"an administrator's token":       known.token,
		"the signature of one":           known.token[strings.LastIndex(known.token, ".")+1:],
		"a token that was refused":       foreign.token[strings.LastIndex(foreign.token, ".")+1:],
		"a token that was minted":        minted[strings.LastIndex(minted, ".")+1:],
		"a join token that was refused":  noToken,
	}
	looked := 0
	err = filepath.WalkDir(s.Dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || !strings.Contains(filepath.Base(path), ".log") {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		looked++
		if path != stranger.Log && !strings.Contains(string(text), "/one") && !strings.Contains(string(text), node) {
			t.Errorf("%s says nothing of what was done", path)
		}
		for what, secret := range secrets {
			if at := strings.Index(string(text), secret); at >= 0 {
				t.Errorf("%s is in %s: …%s…", what, path, text[max(0, at-200):min(len(text), at+len(secret)+20)])
			}
		}
		return nil
	})
	for what, secret := range secrets {
		if len(secret) < 10 {
			t.Errorf("%s is %q, which could be anywhere or nowhere", what, secret)
		}
	}
	if err != nil || looked < 4 {
		t.Errorf("looked into %d logs, %v", looked, err)
	}
}

// bearerToken is an administrator's, with the file it is in and that of the key that verifies it.
type bearerToken struct{ token, file, keys string }

// bearer makes a token of a key of its own.
func bearer(t *testing.T, dir, name string) bearerToken {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	options := (&jose.SignerOptions{}).WithType("JWT").WithHeader("kid", "k")
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, options)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(signer).Claims(map[string]any{
		"iss": "https://login.example.org", "aud": "assay", "sub": "alice", "email": "alice@example.org",
		"iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix(),
	}).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k", Algorithm: "ES256", Use: "sig"}}})
	if err != nil {
		t.Fatal(err)
	}
	made := bearerToken{token: token, file: filepath.Join(dir, name+".jwt"), keys: filepath.Join(dir, name+".json")}
	for path, text := range map[string]string{made.file: token, made.keys: string(keys)} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return made
}
