package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/assay-id/assay/conf"
)

// stateDir is where the package's unit lets the agent write.
const stateDir = "/var/lib/assay/agent"

// absolute makes the paths mean the same to the agent, which runs in another directory.
func (f *setupFlags) absolute() error {
	for _, path := range []*string{&f.bundle, &f.token, &f.dataDir} {
		if *path == "" {
			continue
		}
		whole, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = whole
	}
	return nil
}

// unit says what the package's unit would keep from the agent, if it is that unit which will read the file.
func (f *setupFlags) unit(h host) []string {
	if f.config != defaultConfig || !h.exists("run/systemd/system") {
		return nil
	}
	var problems []string
	for _, named := range []struct{ flag, path string }{{"-trustBundle", f.bundle}, {"-joinTokenFile", f.token}} {
		if below(named.path, "/tmp") || below(named.path, "/var/tmp") {
			problems = append(problems, fmt.Sprintf("%s %s: it has a /tmp and a /var/tmp of its own, and does not see that file; put it into /etc/assay", named.flag, named.path))
		}
	}
	if f.dataDir != stateDir && !below(f.dataDir, stateDir) {
		problems = append(problems, fmt.Sprintf("-dataDir %s: it may write below %s only; \"systemctl edit assay-agent\" with ReadWritePaths=%s below [Service] lets it, once the directory is there",
			f.dataDir, stateDir, f.dataDir))
	}
	return problems
}

func below(path, dir string) bool { return strings.HasPrefix(path, dir+"/") }

// settings name the flags of the values, for complaints about them: the file that was written is gone by then.
func (f *setupFlags) settings() []conf.Setting {
	set := []conf.Setting{
		{Key: "agent.trust_domain", Value: f.trustDomain, Flag: "-trustDomain"},
		{Key: "agent.server_address", Value: f.address, Flag: "-serverAddress"},
		{Key: "agent.server_port", Value: strconv.Itoa(f.port), Flag: "-serverPort"},
		{Key: "agent.data_dir", Value: f.dataDir, Flag: "-dataDir"},
		{Key: "agent.trust_bundle_path", Value: f.bundle, Flag: "-trustBundle"},
	}
	if f.token != "" {
		set = append(set, conf.Setting{Key: "agent.join_token_file", Value: f.token, Flag: "-joinTokenFile"})
	}
	return set
}

// told says of mistakes that are left in the file, which are in what proves the node, what they came of.
func (f *setupFlags) told(err error, written, node string) error {
	var mistakes conf.Mistakes
	if !errors.As(err, &mistakes) {
		return err
	}
	for i, m := range mistakes {
		if !strings.HasPrefix(m.Where, written+":") {
			continue
		}
		mistakes[i].Where = "node attestor " + node
		if m.Summary == "Missing required argument" {
			mistakes[i].Detail += " It needs keys that setup does not ask for: write " + f.config + " by hand, of /usr/share/doc/assay-agent/agent.hcl."
		}
	}
	return mistakes
}
