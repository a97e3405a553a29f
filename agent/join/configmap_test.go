package join_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/assay-id/assay/agent/join"
	"github.com/assay-id/assay/test/fake/fakeserver"
)

// event is a line of a watch.
func event(t *testing.T, kind string, data map[string]string) string {
	t.Helper()
	text, err := json.Marshal(map[string]any{"type": kind, "object": map[string]any{"kind": "ConfigMap", "data": data}})
	if err != nil {
		t.Fatal(err)
	}
	return string(text) + "\n"
}

// account writes what Kubernetes gives a pod of its service account.
func account(t *testing.T, api *httptest.Server) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "token"), []byte("the-token\n"))
	write(t, filepath.Join(dir, "namespace"), []byte("assay\n"))
	write(t, filepath.Join(dir, "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}))
	return dir
}

func TestBundleFromAConfigMap(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	bundle := map[string]string{"bundle.pem": string(server.BundlePEM())}
	for name, c := range map[string]struct {
		events    []string
		configMap string
		status    int
		want      string // "" is good
	}{
		"one that is there":                       {events: []string{event(t, "ADDED", bundle)}},
		"one of another namespace":                {events: []string{event(t, "ADDED", bundle)}, configMap: "other/assay-bundle"},
		"one that comes empty and is filled":      {events: []string{event(t, "ADDED", nil), event(t, "MODIFIED", bundle)}},
		"one that is deleted and made again":      {events: []string{event(t, "ADDED", nil), event(t, "DELETED", bundle), event(t, "ADDED", bundle)}},
		"one that never comes":                    {want: "waiting for bundle.pem in ConfigMap assay/assay-bundle, which the server writes"},
		"one that is deleted":                     {events: []string{event(t, "DELETED", bundle)}, want: "waiting for bundle.pem"},
		"one with a leaf certificate":             {events: []string{event(t, "ADDED", map[string]string{"bundle.pem": string(leaf(t))})}, want: "is no CA certificate"},
		"one with a key beside it":                {events: []string{event(t, "ADDED", map[string]string{"other.pem": string(server.BundlePEM())})}, want: "waiting for bundle.pem"},
		"an error in the stream":                  {events: []string{`{"type":"ERROR","object":{"message":"too old"}}`}, want: `API server says "too old"`},
		"a stream that is none":                   {events: []string{"<html>"}, want: "invalid character"},
		"a token that is not accepted":            {status: http.StatusUnauthorized, want: "token has expired or is of another cluster"},
		"a role without the right":                {status: http.StatusForbidden, want: "needs get and watch"},
		"an answer larger than any ConfigMap":     {events: []string{`{"type":"ADDED","object":{"data":{"x":"` + strings.Repeat("x", 9<<20) + `"}}}`}, want: "unexpected EOF"},
		"an API server that sends somewhere else": {status: http.StatusFound, want: "it redirects"},
	} {
		t.Run(name, func(t *testing.T) {
			api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				namespace := "assay"
				if c.configMap != "" {
					namespace, _, _ = strings.Cut(c.configMap, "/")
				}
				if q := r.URL.Query(); r.URL.Path != "/api/v1/namespaces/"+namespace+"/configmaps" || q.Get("watch") != "true" ||
					q.Get("fieldSelector") != "metadata.name=assay-bundle" || q.Get("resourceVersion") != "0" || r.Header.Get("Authorization") != "Bearer the-token" {
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				if c.status != 0 {
					w.Header().Set("Location", "https://127.0.0.1:1/")
					w.WriteHeader(c.status)
					return
				}
				for _, e := range c.events {
					_, _ = fmt.Fprint(w, e)
				}
			}))
			t.Cleanup(api.Close)
			b := join.Bootstrap{ConfigMap: "assay-bundle", Cluster: join.Cluster{URL: api.URL, Dir: account(t, api)}}
			if c.configMap != "" {
				b.ConfigMap = c.configMap
			}
			check(t, server, b, c.want)
		})
	}
	t.Run("an API server that nobody vouches for", func(t *testing.T) {
		api, other := httptest.NewTLSServer(http.NotFoundHandler()), server.BundlePEM()
		t.Cleanup(api.Close)
		dir := account(t, api)
		write(t, filepath.Join(dir, "ca.crt"), other)
		check(t, server, join.Bootstrap{ConfigMap: "assay-bundle", Cluster: join.Cluster{URL: api.URL, Dir: dir}}, "certificate")
	})
	t.Run("plain http", func(t *testing.T) {
		api := httptest.NewTLSServer(http.NotFoundHandler())
		t.Cleanup(api.Close)
		check(t, server, join.Bootstrap{ConfigMap: "assay-bundle", Cluster: join.Cluster{URL: "http://127.0.0.1:1", Dir: account(t, api)}}, "scheme must be https")
	})
	t.Run("an agent that is no pod", func(t *testing.T) {
		check(t, server, join.Bootstrap{ConfigMap: "assay-bundle", Cluster: join.Cluster{Dir: t.TempDir()}}, "is this a pod")
	})
}

func TestAnAgentWaitsForTheConfigMapOfItsServer(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	var asked atomic.Int64
	api := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) > 2 { // before that the stream ends with nothing in it
			_, _ = fmt.Fprint(w, event(t, "ADDED", map[string]string{"bundle.pem": string(server.BundlePEM())}))
		}
	}))
	t.Cleanup(api.Close)
	n := prepare(t, server)
	n.cfg.Bootstrap = join.Bootstrap{ConfigMap: "assay-bundle", Cluster: join.Cluster{URL: api.URL, Dir: account(t, api)}}
	n.start()
	n.until("attestation", there)
	if asked.Load() != 3 {
		t.Errorf("it asked %d times", asked.Load())
	}
}
