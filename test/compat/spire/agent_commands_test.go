package spire

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/assay-id/assay/test/lab/site"
)

// agentShell is where what agent-commands.txt has is typed. Besides $ (a command of the agent) there are
//
//	% a command of the server, which goes well
//	@ a command of the agent, typed until it goes well: the agent learns of entries
//	^ a command of the agent that goes on, until it has printed something; then it is interrupted
//	& a folder, whose files are listed
type agentShell struct {
	*words
	program       string
	server        func(t *testing.T, args ...string) (string, error)
	public, admin string // sockets
}

// TestAgentCommands types them.
func TestAgentCommands(t *testing.T) {
	alone(t)
	t.Parallel()
	s := serverAlone(t)
	o := site.AgentOptions{Extra: `workload_hold = "10ms"`}
	admin := filepath.Join(s.Dir, "agent", "private", "admin.sock")
	if realAgent() {
		o.Extra = fmt.Sprintf("admin_socket_path = %q", admin)
	}
	g, a := field(t, s, "agent", o)
	w := newWords(t, s)
	dir := t.TempDir()
	files, err := filepath.Abs("testdata/files")
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"dir": dir, "config": filepath.Join(s.Dir, "agent.hcl"), "site": s.Dir, "files": files, "agent": g.text(g.agentID)} {
		w.values[name], w.names[value] = value, strings.ToUpper(name)
	}
	w.values["token"] = "none"
	w.values["uid"] = strconv.Itoa(os.Getuid())
	shell := &agentShell{words: w, program: g.agent, server: g.cli, public: a.Socket, admin: admin}
	play(t, agentCommands, func(c *command) string { return shell.typed(t, c) })
}

// typed does what a line says, and returns the answer.
func (s *agentShell) typed(t *testing.T, c *command) string {
	t.Helper()
	var args []string
	for _, arg := range c.args {
		args = append(args, s.fill(t, arg))
	}
	switch c.mark {
	case "%":
		if out, err := s.server(t, args...); err != nil {
			t.Fatalf("%s:%d: %s, %v", agentCommands, c.line, out, err)
		}
		return ""
	case "@":
		eventually(t, c.typedLine, func() error {
			_, err := site.Run(t.Context(), nil, s.program, s.withSocket(args)...)
			return err
		})
		return ""
	case "&":
		return s.listed(t, args[0])
	}
	if c.title != "help" {
		args = s.withSocket(args)
	}
	cmd := exec.CommandContext(t.Context(), s.program, args...)
	cmd.Dir = "testdata/files"
	if c.mark == "^" {
		return s.interrupted(t, c, cmd)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if c.title == "help" && err == nil {
		return helped(c, stdout.String()+stderr.String())
	}
	if token := jwtText.FindString(stdout.String()); token != "" {
		s.values["token"] = token // the newest, for what is typed next
	}
	return s.complaint(t, c, stdout.String(), stderr.String(), err)
}

// complaint is an answer without what each complaint of ours has and SPIRE's has not: the word that it begins
// with, and what was waited for.
func (s *agentShell) complaint(t *testing.T, c *command, stdout, stderr string, err error) string {
	t.Helper()
	if !isReal() {
		if first, rest, _ := strings.Cut(stderr, "\n"); strings.HasPrefix(first, "waiting for assay-agent at ") {
			stderr = rest
		}
		if !strings.Contains(c.want, "? Error: ") {
			stderr = strings.TrimPrefix(stderr, "Error: ")
		}
		if strings.Contains(stderr, "mistake") { // which are listed
			stderr = strings.Join(strings.Fields(stderr), " ")
		}
	}
	return s.answer(t, c, stdout, stderr, err)
}

var flagName = regexp.MustCompile(`(?m)^ +(?:-h, |-v, )?--?([a-zA-Z]+)\b`)

// helped is what matters of a help: which flags it names. Of ours only those that SPIRE's has count.
func helped(c *command, text string) string {
	var flags []string
	for _, m := range flagName.FindAllStringSubmatch(text, -1) {
		if isReal() || strings.Contains(c.want+" ", " "+m[1]+" ") || strings.Contains(c.want, " "+m[1]+"\n") {
			flags = append(flags, m[1])
		}
	}
	slices.Sort(flags)
	return strings.TrimRight("> flags: "+strings.Join(flags, " "), " ") + "\n"
}

// withSocket adds the socket that a command is for, unless the line has one.
func (s *agentShell) withSocket(args []string) []string {
	if slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "-socketPath") || arg == "-instance" }) {
		return args
	}
	switch {
	case args[0] == "healthcheck", len(args) > 1 && args[0] == "api":
		return append(args, "-socketPath", s.public)
	case len(args) > 1 && (args[0] == "debug" || args[0] == "logger"):
		return append(args, "-socketPath", s.admin)
	}
	return args
}

// interrupted is the answer of a command that would go on.
func (s *agentShell) interrupted(t *testing.T, c *command, cmd *exec.Cmd) string {
	t.Helper()
	var stdout, stderr heard
	stdout.first = make(chan struct{})
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if signal.Ignored(os.Interrupt) { // as below a shell that started us in the background; what we start would ignore it too
		signal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-stdout.first:
	case <-time.After(patience):
		t.Errorf("%s:%d: nothing was printed; standard error has %s", agentCommands, c.line, stderr.String())
	}
	_ = cmd.Process.Signal(os.Interrupt)
	err := cmd.Wait()
	return s.complaint(t, c, stdout.String(), stderr.String(), err)
}

var received = regexp.MustCompile(`Received (\d+) svid`)

// heard is a buffer that says when the first update is whole: a line says how many SVIDs it has, each has an
// empty line before it, and one is at the end.
type heard struct {
	mu    sync.Mutex // guards text and told
	text  bytes.Buffer
	told  bool
	first chan struct{} // nil: nobody waits
}

func (h *heard) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.text.Write(p)
	if m := received.FindStringSubmatch(h.text.String()); m != nil && h.first != nil && !h.told {
		if n, err := strconv.Atoi(m[1]); err == nil && strings.Count(h.text.String(), "\n\n") > n {
			h.told = true
			close(h.first)
		}
	}
	return len(p), nil
}

func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text.String()
}

// listed names the files of a folder, with who may read them and what is in them.
func (s *agentShell) listed(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&out, "> %s %s %s\n", info.Mode(), d.Name(), strings.Join(strings.Fields(pemBlock.ReplaceAllString(string(text), "${1}")), " "))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}
