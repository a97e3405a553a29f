package lab_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/machine"
)

// exposure is what systemd-analyze security may find at most, out of 10 (unsafe). The agent is root with
// two capabilities and reads /proc of everybody; the server has neither.
var exposure = map[string]float64{"assay-server.service": 1.5, "assay-agent.service": 3.5}

// maxInstalled is what the agent's package may take on disk, in KiB: a promised number.
const maxInstalled = 25 << 10

// packaged is a machine with a shell for the test.
type packaged struct {
	*machine.Machine
	t *testing.T
}

func (p packaged) sh(script string) string {
	p.t.Helper()
	out, err := p.Run(p.t.Context(), script)
	if err != nil {
		p.t.Fatalf("%v\n%s", err, p.journal())
	}
	return strings.TrimSpace(out)
}

func (p packaged) journal() string {
	out, _ := p.Run(context.WithoutCancel(p.t.Context()), "journalctl --no-pager -n 40 -o cat -u 'assay-*' -u 'init.scope' || true")
	return out
}

// findPackage finds what "make packages" made.
func findPackage(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join("..", "..", "bin", "packages", pattern))
	if err == nil && len(found) != 1 {
		err = fmt.Errorf("%d files fit %s; run make packages", len(found), pattern)
	}
	if err != nil {
		lab.Missing(t, "the package "+pattern, err)
	}
	return found[0]
}

func TestPackages(t *testing.T) {
	files := map[string]string{}
	for name, pattern := range map[string]string{
		"server.deb": "assay-server_*.deb", "agent.deb": "assay-agent_*.deb", "server.rpm": "assay-server-*.rpm", "agent.rpm": "assay-agent-*.rpm",
	} {
		files[name] = findPackage(t, pattern)
	}
	if err := machine.Available(); err != nil {
		lab.Missing(t, "a real systemd", err)
	}
	m, err := machine.Boot(t.Context(), machine.Config{})
	if err != nil {
		lab.Missing(t, "a real systemd", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	for name, file := range files {
		if err := m.Copy(file, "/opt/lab/"+name); err != nil {
			t.Fatal(err)
		}
	}
	p := packaged{m, t}

	p.sh("dpkg --install /opt/lab/server.deb /opt/lab/agent.deb")
	kib := p.sh("dpkg-query --show --showformat='${Installed-Size}' assay-agent")
	var size int
	if _, err := fmt.Sscan(kib, &size); err != nil || size <= 0 || size > maxInstalled {
		t.Errorf("the agent takes %s KiB installed, promised are %d", kib, maxInstalled)
	}
	t.Logf("the agent takes %s KiB installed", kib)

	t.Run("the units hold and are hardened", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("systemd-analyze verify /usr/lib/systemd/system/assay-server.service /usr/lib/systemd/system/assay-agent.service /usr/lib/systemd/system/assay-agent.socket")
		for unit, most := range exposure {
			out := p.sh("systemd-analyze security --no-pager " + unit + " | tail -n 1")
			at := strings.LastIndex(out, ": ")
			var found float64
			if _, err := fmt.Sscan(out[at+1:], &found); at < 0 || err != nil || found > most {
				t.Errorf("%s: %s; the most is %.1f", unit, out, most)
			}
			t.Log(out)
		}
	})
	t.Run("they start, and a workload gets its identity", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("systemctl start assay-server.service")
		p.sh("assay-server bundle show > /etc/assay/bundle.pem")
		token := strings.TrimPrefix(p.sh("assay-server token generate -spiffeID spiffe://example.org/node/one"), "Token: ")
		p.sh("umask 077; echo " + token + " > /etc/assay/join-token")
		if said := p.sh("assay-agent setup -trustDomain example.org -serverAddress localhost -joinTokenFile /etc/assay/join-token"); !strings.Contains(said, "localhost:8081: reached") {
			t.Errorf("setup says\n%s", said)
		}
		p.sh("assay-server entry create -parentID spiffe://example.org/node/one -spiffeID spiffe://example.org/root -selector unix:uid:0")
		p.sh("assay-server entry create -parentID spiffe://example.org/node/one -spiffeID spiffe://example.org/web -selector systemd:id:web.service -selector systemd:user:nobody")
		p.sh("systemctl enable --now assay-agent.service")
		p.fetch("spiffe://example.org/root")
		p.sh("systemd-run --quiet --wait --pipe --unit=web -p User=nobody assay-agent api fetch x509 -timeout 30s | grep -F spiffe://example.org/web")
	})
	t.Run("who asks while the agent is away waits for it", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("systemctl stop assay-agent.service")
		waiting := m.Command(t.Context(), "assay-agent", "api", "fetch", "x509", "-timeout", "60s")
		said := make(chan error, 1)
		go func() {
			out, err := waiting.CombinedOutput()
			if err == nil && !strings.Contains(string(out), "spiffe://example.org/root") {
				err = errors.New(string(out))
			}
			said <- err
		}()
		// Its connection starts the agent: that is what socket activation is.
		if err := <-said; err != nil {
			t.Errorf("%v\n%s", err, p.journal())
		}
		if state := p.sh("systemctl is-active assay-agent.service"); state != "active" {
			t.Errorf("the agent is %s", state)
		}
	})
	t.Run("a restart refuses nobody", func(t *testing.T) {
		p := packaged{m, t}
		// A plain connection, as fast as it goes, over three restarts: each must be taken.
		p.sh(`( for n in 1 2 3; do systemctl restart assay-agent.service; done; touch /run/restarted ) &
while [ ! -e /run/restarted ]; do
	python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); s.connect("/run/assay/agent/public/api.sock")'
done; wait`)
		p.fetch("spiffe://example.org/root")
	})
	t.Run("an agent that hangs is started anew", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("mkdir -p /run/systemd/system/assay-agent.service.d && printf '[Service]\\nWatchdogSec=2s\\nTimeoutAbortSec=1s\\nRestartSec=100ms\\n' > /run/systemd/system/assay-agent.service.d/quick.conf")
		p.sh("systemctl daemon-reload; systemctl restart assay-agent.service")
		pid := p.sh("systemctl show -p MainPID --value assay-agent.service")
		p.sh("kill -STOP " + pid)
		for p.sh("systemctl show -p MainPID --value assay-agent.service") == pid {
			select {
			case <-time.After(100 * time.Millisecond):
			case <-t.Context().Done():
				t.Fatal("it is still the old one")
			}
		}
		p.sh("rm -r /run/systemd/system/assay-agent.service.d; systemctl daemon-reload")
		p.fetch("spiffe://example.org/root")
	})
	t.Run("an upgrade keeps keys, state and what runs", func(t *testing.T) {
		p := packaged{m, t}
		before := p.sh("assay-server bundle show; assay-server agent list -output json | grep -o 'join_token/[^\"]*'")
		pid := p.sh("systemctl show -p MainPID --value assay-server.service")
		p.sh("dpkg --install /opt/lab/server.deb /opt/lab/agent.deb")
		if now := p.sh("systemctl show -p MainPID --value assay-server.service"); now == pid || now == "0" {
			t.Errorf("the server's PID was %s and is %s", pid, now)
		}
		if after := p.sh("assay-server bundle show; assay-server agent list -output json | grep -o 'join_token/[^\"]*'"); after != before {
			t.Errorf("before it was\n%s\nnow it is\n%s", before, after)
		}
		p.fetch("spiffe://example.org/root")
	})
	t.Run("a reboot while the server is away serves what is kept", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("systemctl disable --now assay-server.service")
		if err := m.Down(); err != nil {
			t.Fatal(err)
		}
		if err := m.Up(t.Context()); err != nil {
			t.Fatal(err)
		}
		p.sh("systemctl start assay-agent.socket") // lab.target wants nothing of multi-user.target
		p.fetch("spiffe://example.org/root")
		if state, _ := m.Run(t.Context(), "systemctl is-active assay-server.service"); strings.TrimSpace(state) == "active" {
			t.Error("the server is not away")
		}
	})
	t.Run("a removal keeps the keys, a purge asks first", func(t *testing.T) {
		p := packaged{m, t}
		p.sh("dpkg --remove assay-server assay-agent")
		p.sh("test -s /var/lib/assay/server/keys.json && ! systemctl is-active assay-agent.socket")
		p.sh("dpkg --purge assay-server </dev/null | grep 'is kept'; test -s /var/lib/assay/server/keys.json")
		p.sh("dpkg --install /opt/lab/server.deb && ASSAY_REMOVE_KEYS=yes dpkg --purge assay-server && ! test -e /var/lib/assay/server")
	})
	t.Run("the rpm packages hold the same", func(t *testing.T) {
		p := packaged{m, t}
		if _, err := exec.LookPath("rpm"); err != nil {
			lab.Missing(t, "rpm", err)
		}
		p.sh("rpm --install --nodeps /opt/lab/server.rpm /opt/lab/agent.rpm")
		p.sh("rpm --query --file /usr/lib/assay /usr/share/doc/assay-agent /usr/share/doc/assay-server") // or they stay when it goes
		p.sh("systemctl start assay-server.service && assay-server healthcheck")
		p.sh("rpm --upgrade --force --nodeps /opt/lab/server.rpm && assay-server healthcheck")
		p.sh("rpm --erase assay-server assay-agent && ! systemctl is-active assay-server.service && test -s /var/lib/assay/server/keys.json")
	})
}

// fetch fetches an X509-SVID as root and demands whose it is. The agent may need a moment for its
// server.
func (p packaged) fetch(want string) {
	p.t.Helper()
	var out string
	var err error
	for range 30 {
		out, err = p.Run(p.t.Context(), "assay-agent api fetch x509 -timeout 10s -output json")
		var parsed map[string]any
		if err == nil && strings.Contains(out, want) && json.Unmarshal([]byte(out), &parsed) == nil {
			return
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-p.t.Context().Done():
		}
	}
	p.t.Fatalf("no %s: %v\n%s\n%s", want, err, out, p.journal())
}
