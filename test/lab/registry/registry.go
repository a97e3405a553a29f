// Package registry runs a private image registry: Debian's docker-registry on a loopback port, with a
// folder of its own. It has no referrers API, as many registries in use have not, so that what is attached
// to an image is found by the tag that stands in for it.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package registry

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/crypto/bcrypt"

	"github.com/assay-id/assay/test/lab/port"
	"github.com/assay-id/assay/test/lab/site"
)

const program = "docker-registry"

// Registry is a private registry. Only one goroutine may start and stop it.
type Registry struct {
	// Host is "127.0.0.1:port", as the names of its images begin.
	Host string

	// User and Password are what it demands of who asks; empty: nothing. They are to be set while it is down.
	User, Password string

	dir     string
	process *site.Process
}

// Available says why there can be no private registry here, or nil.
func Available() error {
	_, err := site.Tool(program)
	return err
}

// Start starts a registry that keeps what it is given in dir, and waits until it answers.
func Start(ctx context.Context, dir string) (*Registry, error) {
	free, err := port.Free()
	if err != nil {
		return nil, err
	}
	r := &Registry{Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(free)), dir: dir}
	return r, r.Up(ctx)
}

// Up starts the registry after Down, where it was.
func (r *Registry) Up(ctx context.Context) error {
	path, err := site.Tool(program)
	if err != nil {
		return err
	}
	config, log := filepath.Join(r.dir, "registry.yml"), filepath.Join(r.dir, "registry.log")
	text := fmt.Sprintf("version: 0.1\nlog: {level: warn}\nstorage:\n  filesystem: {rootdirectory: %q}\n  delete: {enabled: true}\nhttp: {addr: %q}\n",
		filepath.Join(r.dir, "registry"), r.Host)
	if r.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(r.Password), bcrypt.MinCost)
		if err != nil {
			return err
		}
		users := filepath.Join(r.dir, "htpasswd")
		if err := os.WriteFile(users, fmt.Appendf(nil, "%s:%s\n", r.User, hash), 0o600); err != nil {
			return err
		}
		text += fmt.Sprintf("auth: {htpasswd: {realm: lab, path: %q}}\n", users)
	}
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return err
	}
	if r.process, err = site.Start(log, nil, path, "serve", config); err != nil {
		return err
	}
	return r.process.WaitFor(ctx, "the registry to answer", func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Host+"/v2/", http.NoBody)
		if err != nil {
			return err
		}
		if r.User != "" {
			req.SetBasicAuth(r.User, r.Password)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("it answers %s", resp.Status)
		}
		return nil
	})
}

// Down stops the registry; what it was given stays.
func (r *Registry) Down() {
	if r.process != nil {
		r.process.Kill()
	}
}
