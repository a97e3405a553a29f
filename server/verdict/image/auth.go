package image

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
)

// Auths is a config.json as Docker's command line and Kubernetes (.dockerconfigjson) write it, with credentials for
// registries. It is read for each fetch, so that what is renewed counts at once. Programs that print
// credentials (credsStore, credHelpers) are not run.
type Auths struct{ path string }

// maxAuths is how large such a file may be, in bytes.
const maxAuths = 1 << 20

// OpenAuths looks at the file, so that a mistake is found at the start.
func OpenAuths(path string) (*Auths, error) {
	a := &Auths{path: path}
	_, err := a.read()
	return a, err
}

// dockerConfig is what is understood of the file.
type dockerConfig struct {
	Auths   map[string]dockerAuth `json:"auths"`
	Store   string                `json:"credsStore"`
	Helpers map[string]string     `json:"credHelpers"`
}

type dockerAuth struct {
	Auth          string `json:"auth"`
	Username      string `json:"username"`
	Password      string `json:"password"`
	IdentityToken string `json:"identitytoken"`
	RegistryToken string `json:"registrytoken"`
}

// read returns the credentials by registry. No error has anything of the file's content in it.
func (a *Auths) read() (map[string]authn.AuthConfig, error) {
	file, err := os.Open(a.path)
	if err != nil {
		return nil, fmt.Errorf("read registry credentials: %w", err)
	}
	defer func() { _ = file.Close() }()
	stat, err := file.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read registry credentials: %w", err)
	case !stat.Mode().IsRegular():
		return nil, fmt.Errorf("read registry credentials: %s is not a regular file", a.path)
	case stat.Mode().Perm()&0o027 != 0:
		return nil, fmt.Errorf("read registry credentials: %s has mode %04o, so that others may read or change it; run chmod o-rwx,g-w", a.path, stat.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(file, maxAuths+1))
	if err == nil && len(text) > maxAuths {
		err = fmt.Errorf("it is longer than %d bytes", maxAuths)
	}
	if err != nil {
		return nil, fmt.Errorf("read registry credentials %s: %w", a.path, err)
	}
	var config dockerConfig
	if json.Unmarshal(text, &config) != nil {
		return nil, fmt.Errorf("read registry credentials: %s is no config.json of Docker", a.path)
	}
	if config.Store != "" || len(config.Helpers) > 0 {
		return nil, fmt.Errorf("read registry credentials: %s has credentials from programs (credsStore, credHelpers), which are not run; use a file with \"auths\"", a.path)
	}
	found := map[string]authn.AuthConfig{}
	for name, auth := range config.Auths {
		one, err := auth.config()
		if err != nil {
			return nil, fmt.Errorf("read registry credentials %s: auths.%.200q: %w", a.path, name, err)
		}
		found[host(name)] = one
	}
	return found, nil
}

func (d *dockerAuth) config() (authn.AuthConfig, error) {
	c := authn.AuthConfig{Username: d.Username, Password: d.Password, IdentityToken: d.IdentityToken, RegistryToken: d.RegistryToken}
	if d.Auth != "" {
		text, err := base64.StdEncoding.DecodeString(strings.TrimRight(d.Auth, "\x00"))
		user, password, ok := strings.Cut(string(text), ":")
		if err != nil || !ok {
			return c, errors.New("auth is not base64 of user:password")
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	if c == (authn.AuthConfig{}) {
		return c, errors.New("it has no credentials: add auth, or username and password")
	}
	return c, nil
}

// host is the registry that a key of the file means: some write a URL.
func host(name string) string {
	name = strings.TrimPrefix(strings.TrimPrefix(name, "https://"), "http://")
	name, _, _ = strings.Cut(name, "/")
	if name == "docker.io" || name == "registry-1.docker.io" {
		return "index.docker.io"
	}
	return name
}

// For returns the credentials for a registry, and whether there are any.
func (a *Auths) For(registry string) (authn.AuthConfig, bool, error) {
	all, err := a.read()
	if err != nil {
		return authn.AuthConfig{}, false, err
	}
	c, ok := all[host(registry)]
	return c, ok, nil
}
