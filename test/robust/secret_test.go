package robust

import (
	"crypto/x509"
	"encoding/base64"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
	jwt, err := client(t, a.Socket).FetchJWTSVID(patiently(t), jwtsvid.Params{Audience: "a"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, a.Socket).ValidateJWTSVID(patiently(t), jwt.Marshal(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := client(t, a.Socket).ValidateJWTSVID(patiently(t), jwt.Marshal(), "b"); err == nil {
		t.Error("a token for another was taken")
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
		"a JWT-SVID":                     jwt.Marshal(),
		"a JWT-SVID's signature":         jwt.Marshal()[strings.LastIndex(jwt.Marshal(), ".")+1:],
		"a workload's key":               base64.StdEncoding.EncodeToString(key)[30:],
		"a private key":                  "PRIVATE KEY",
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
		if !strings.Contains(string(text), "/one") && !strings.Contains(string(text), node) {
			t.Errorf("%s says nothing of what was done", path)
		}
		for what, secret := range secrets {
			if at := strings.Index(string(text), secret); at >= 0 {
				t.Errorf("%s is in %s: …%s…", what, path, text[max(0, at-200):min(len(text), at+len(secret)+20)])
			}
		}
		return nil
	})
	if err != nil || looked < 3 {
		t.Errorf("looked into %d logs, %v", looked, err)
	}
}
