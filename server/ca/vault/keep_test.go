package vault

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	logtest "github.com/sirupsen/logrus/hooks/test"

	fake "github.com/assay-id/assay/test/fake/vault"
)

// of returns a client of the stand-in.
func of(t *testing.T, s *fake.Server, cfg Config) *Client {
	t.Helper()
	cfg.Address, cfg.CAPath = s.URL, filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(cfg.CAPath, s.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestKeep(t *testing.T) {
	for name, c := range map[string]struct {
		life fake.Life
		said string // and after that all is well, or nothing is to be done
		sure int    // renewals
	}{
		"is renewed when a third of its life is gone":          {fake.Life{Left: 30, Created: 60, Renewable: true}, "", 1},
		"is left alone while it is young":                      {fake.Life{Left: 60, Created: 60, Renewable: true}, "", 0},
		"that does not end is left alone":                      {fake.Life{}, "", 0},
		"that cannot be renewed is spoken of":                  {fake.Life{Left: 30, Created: 60}, "cannot be renewed", 0},
		"that is lengthened no more is spoken of in good time": {fake.Life{Left: 30, Created: 60, Max: 25, Renewable: true}, "no more", 1},
	} {
		t.Run("a token "+name, func(t *testing.T) {
			s := fake.New(t)
			token := s.Give(c.life)
			path := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(path, []byte(token+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			log, lines := logtest.NewNullLogger()
			k := &keeper{c: of(t, s, Config{Token: &TokenAuth{Path: path}}), log: log}
			var wait time.Duration
			for range 2 {
				wait = k.look(t.Context())
			}
			if got := s.Renewed(token); c.sure == 0 && got != 0 || got < c.sure {
				t.Errorf("it was renewed %d times", got)
			}
			if wait < lookSoon*9/10 || wait > lookEvery {
				t.Errorf("the next look is in %s", wait)
			}
			switch said := lines.AllEntries(); {
			case c.said == "" && len(said) > 0:
				t.Errorf("said %q", said[0].Message)
			case c.said != "" && (len(said) != 1 || !strings.Contains(said[0].Message, c.said) || said[0].Data["expires_at"] == ""):
				t.Errorf("said %d things, want one with %q", len(said), c.said)
			}
			for _, line := range lines.AllEntries() {
				if text, _ := line.String(); strings.Contains(text, token) {
					t.Error("the log has the token")
				}
			}
		})
	}
	t.Run("a server that is away is asked again", func(t *testing.T) {
		s := fake.New(t)
		log, lines := logtest.NewNullLogger()
		k := &keeper{c: of(t, s, Config{Token: &TokenAuth{Token: s.Token}}), log: log}
		s.Close()
		for range 2 {
			if wait := k.look(t.Context()); wait != lookAgain {
				t.Errorf("in %s", wait)
			}
		}
		if n := len(lines.AllEntries()); n != 1 {
			t.Errorf("it was said %d times", n)
		}
	})
	t.Run("keeping ends with its context, and at once for what logs in", func(t *testing.T) {
		s := fake.New(t)
		token := s.Give(fake.Life{Left: 1, Created: 60, Renewable: true})
		renewed := make(chan struct{}, 100)
		s.Answer = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/renew-self") {
				renewed <- struct{}{}
			}
			return false
		}
		ctx, cancel := context.WithCancel(t.Context())
		log, _ := logtest.NewNullLogger()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			of(t, s, Config{Token: &TokenAuth{Token: token}}).Keep(ctx, log)
		}()
		<-renewed
		cancel()
		<-ended
		of(t, s, Config{AppRole: &AppRoleAuth{}}).Keep(t.Context(), log)
	})
}
