package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/assay-id/assay/conf"
)

// terminal is a pseudo terminal and what was written to it.
type terminal struct {
	t             *testing.T
	person, there *os.File

	mu   sync.Mutex // guards the two below
	said bytes.Buffer
	more chan struct{} // closed when more is said
}

func openTerminal(t *testing.T) *terminal {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	there, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = there.Close() })
	term := &terminal{t: t, person: person, there: there, more: make(chan struct{})}
	go func() {
		buffer := make([]byte, 4096)
		for {
			n, err := person.Read(buffer)
			if err != nil {
				return // the test has ended
			}
			term.mu.Lock()
			term.said.Write(buffer[:n])
			close(term.more)
			term.more = make(chan struct{})
			term.mu.Unlock()
		}
	}()
	return term
}

// expect waits until a text is said, forgets all up to it, and answers.
func (term *terminal) expect(text, answer string) {
	term.t.Helper()
	late := time.After(time.Minute)
	for {
		term.mu.Lock()
		said, more := term.said.String(), term.more
		if at := strings.Index(said, text); at >= 0 {
			term.said.Next(at + len(text))
			term.mu.Unlock()
			break
		}
		term.mu.Unlock()
		select {
		case <-more:
		case <-late:
			term.t.Fatalf("never said %q, but %q", text, said)
		}
	}
	if _, err := io.WriteString(term.person, answer); err != nil {
		term.t.Fatal(err)
	}
}

// run starts setup at the terminal.
func (term *terminal) run(args ...string) <-chan error {
	c := root()
	c.SilenceUsage, c.SilenceErrors = true, true
	c.SetArgs(append([]string{"setup"}, args...))
	c.SetIn(term.there)
	c.SetOut(io.Discard)
	c.SetErr(term.there)
	ended := make(chan error, 1)
	go func() { ended <- c.ExecuteContext(term.t.Context()) }()
	return ended
}

// within is a machine with a TPM, a bundle and a token, and the flags that say so.
func within(t *testing.T) (dir string, flags []string) {
	t.Helper()
	for _, name := range []string{"ECS_CONTAINER_METADATA_URI_V4", "AWS_EXECUTION_ENV", "KUBERNETES_SERVICE_HOST"} {
		t.Setenv(name, "")
	}
	dir = furnish(t, map[string]string{"machine/dev/tpmrm0": "", "bundle.pem": "", "token": "0f7ba2b4\n"})
	return dir, []string{"--root", filepath.Join(dir, "machine"), "--config", filepath.Join(dir, "agent.hcl"), "--dataDir", filepath.Join(dir, "data"), "--offline"}
}

func TestSetupAsks(t *testing.T) {
	t.Run("whoever sits there is asked for what no flag says, and told what each way proves", func(t *testing.T) {
		dir, flags := within(t)
		term := openTerminal(t)
		ended := term.run(flags...)
		term.expect("Trust domain of the server: ", "\n")
		term.expect("an answer is needed", "")
		term.expect("Trust domain of the server: ", "Bad Domain\n")
		term.expect("that is no trust domain", "")
		term.expect("Trust domain of the server: ", "example.org\n")
		for _, wrong := range []string{"https://assay.example.org", "assay.example.org:8081"} {
			term.expect("Host name or IP address of the server: ", wrong+"\n")
			term.expect("without scheme, port or path", "")
		}
		term.expect("Host name or IP address of the server: ", "assay.example.org\n")
		term.expect("TCP port of the server [8081]: ", "70000\n")
		term.expect("TCP port of the server [8081]: ", "\n")
		term.expect(": ", filepath.Join(dir, "absent")+"\n")
		term.expect("no such file", "")
		term.expect("]: ", filepath.Join(dir, "bundle.pem")+"\n")
		term.expect("It proves the TPM", "")
		term.expect("Prove it by [tpm]: ", "pigeon\n")
		term.expect("one of tpm, join_token", "")
		term.expect("Prove it by [tpm]: ", "\n")
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		read, err := conf.LoadAgent(filepath.Join(dir, "agent.hcl"), nodes(), workloads(), conf.Options{})
		if err != nil || read.ServerAddress != "assay.example.org" || read.TrustDomain.Name() != "example.org" {
			t.Errorf("%+v, %v", read, err)
		}
	})
	t.Run("a token can be chosen in place of what was found", func(t *testing.T) {
		dir, flags := within(t)
		term := openTerminal(t)
		ended := term.run(append(flags, "--trustDomain", "example.org", "--serverAddress", "localhost", "--serverPort", "8081", "--trustBundle", filepath.Join(dir, "bundle.pem"))...)
		term.expect("Prove it by [tpm]: ", "join_token\n")
		term.expect("File with the join token [/etc/assay/join-token]: ", filepath.Join(dir, "token")+"\n")
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "agent.hcl"))
		if err != nil || !strings.Contains(string(text), `node_attestor "join_token" {}`) {
			t.Errorf("%s, %v", text, err)
		}
	})
	t.Run("what is there is replaced only if they say yes", func(t *testing.T) {
		dir, flags := within(t)
		flags = append(flags, "--trustDomain", "example.org", "--serverAddress", "localhost", "--serverPort", "8081", "--trustBundle", filepath.Join(dir, "bundle.pem"), "--nodeAttestor", "tpm")
		config := filepath.Join(dir, "agent.hcl")
		if err := os.WriteFile(config, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, answer := range []string{"\n", "no\n", "what?\n", "\x04"} {
			term := openTerminal(t)
			ended := term.run(flags...)
			term.expect("Replace it, and keep it as", "")
			term.expect("[no]: ", answer)
			if err := <-ended; err == nil {
				t.Errorf("%q: no error", answer)
			}
			if text, err := os.ReadFile(config); err != nil || string(text) != "mine" {
				t.Fatalf("%q: %s, %v", answer, text, err)
			}
		}
		term := openTerminal(t)
		ended := term.run(flags...)
		term.expect("[no]: ", "yes\n")
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if text, err := os.ReadFile(config + ".old"); err != nil || string(text) != "mine" {
			t.Errorf("kept is %s, %v", text, err)
		}
	})
	t.Run("nobody is asked when nobody is there, or when told so", func(t *testing.T) {
		_, flags := within(t)
		silent, open, err := os.Pipe() // nothing is ever written to it
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		defer open.Close()
		term := openTerminal(t)
		for why, in := range map[string]*os.File{"a pipe": silent, "noQuestions": term.there} {
			c := root()
			c.SilenceUsage, c.SilenceErrors = true, true
			args := append([]string{"setup"}, flags...)
			if in == term.there {
				args = append(args, "--noQuestions")
			}
			c.SetArgs(args)
			c.SetIn(in)
			c.SetOut(io.Discard)
			c.SetErr(term.there)
			if err := c.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "-trustDomain and -serverAddress are required") {
				t.Errorf("%s: %v", why, err)
			}
		}
	})
}
