package spire

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// testdata/commands.txt and agent-commands.txt are what an operator types, and what SPIRE's command lines v1.15.3
// answer him: what they print (>) and how they end, if not well (? and what they say is wrong; the number is the
// exit status, if not 1). As with messages, ! is why Assay's answers something else, and ~ what.

// command is one line that is typed, with its answer.
type command struct {
	mark             string // $, or what ground has others for
	args             []string
	line             int
	want, ours       string
	why              string
	title, typedLine string
}

const (
	serverCommands = "testdata/commands.txt"
	agentCommands  = "testdata/agent-commands.txt"
)

func commands(t *testing.T, file string) (all []*command, text []string) {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text = strings.Split(string(raw), "\n")
	title := ""
	for n, line := range text {
		mark, rest, _ := strings.Cut(line, " ")
		var last *command
		if len(all) > 0 {
			last = all[len(all)-1]
		}
		switch {
		case mark == "==":
			title = rest
		case typedMark(mark):
			all = append(all, &command{mark: mark, args: strings.Fields(rest), line: n + 1, title: title, typedLine: rest})
		case answered(mark):
			last.want += line + "\n"
		case mark == "!":
			last.why = rest
		case mark == "~":
			last.ours += rest + "\n"
		}
	}
	return all, text
}

var (
	pemBlock = regexp.MustCompile(`-----BEGIN ([A-Z ]+)-----[^-]*-----END [A-Z ]+-----`)
	keyName  = regexp.MustCompile(`\b[0-9a-f]{40}\b|\b[0-9a-zA-Z]{32}\b`)
	jwtText  = regexp.MustCompile(`eyJ[\w-]+\.[\w-]+\.[\w-]+`)
	serials  = regexp.MustCompile(`\b\d{30,}\b`)
	counters = regexp.MustCompile(`(spiffe_sequence": )\d+`)
	asJSON   = regexp.MustCompile(`-(output|format) json`)
	claimed  = regexp.MustCompile(`"(exp|iat)":\d+|"jti":"[^"]+"`)
	lasted   = regexp.MustCompile(`(after |Uptime: +)[\d.hmsµn]+\b`)
	base64s  = regexp.MustCompile(`"(x5c|x|y|n|kid)": ?(\[?\s*)"[^"]*"`)
)

// printed writes what a command printed in words.
func (w *words) printed(t *testing.T, c *command, out string) string {
	t.Helper()
	var v any
	if asJSON.MatchString(c.typedLine) && json.Unmarshal([]byte(out), &v) == nil {
		var text bytes.Buffer
		encoder := json.NewEncoder(&text)
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(w.walk("", v)); err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(text.String())
	}
	out = lasted.ReplaceAllString(out, "${1}DURATION")
	out = claimed.ReplaceAllStringFunc(out, func(s string) string { name, _, _ := strings.Cut(s, ":"); return name + ":…" })
	out = base64s.ReplaceAllString(out, `"$1": ${2}"…"`)
	out = counters.ReplaceAllString(out, "${1}NUMBER")
	out = pemBlock.ReplaceAllString(out, "PEM of a $1")
	out = jwtText.ReplaceAllString(out, "TOKEN")
	out = serials.ReplaceAllString(out, "SERIAL")
	out = keyName.ReplaceAllStringFunc(out, func(s string) string { return w.name("key", s) })
	return strings.TrimSpace(w.plain(out))
}

// typed runs a command and returns its answer as a transcript has it.
func (w *words) typed(t *testing.T, c *command, program string) string {
	t.Helper()
	var args []string
	for _, arg := range c.args {
		args = append(args, w.fill(t, arg))
	}
	cmd := exec.CommandContext(t.Context(), program, append(args, "-socketPath", w.site.ServerSocket())...)
	cmd.Dir = "testdata/files"
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	return w.answer(t, c, stdout.String(), stderr.String(), err)
}

// answer is what a command printed and how it ended, as a transcript has it.
func (w *words) answer(t *testing.T, c *command, stdout, stderr string, err error) string {
	t.Helper()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var lines []string
	if text := w.printed(t, c, stdout); text != "" {
		for line := range strings.SplitSeq(text, "\n") {
			lines = append(lines, strings.TrimRight("> "+line, " "))
		}
	}
	if err != nil {
		mark := "?"
		if status := exit.ExitCode(); status != 1 {
			mark = fmt.Sprintf("?%d", status)
		}
		wrong, _, _ := strings.Cut(w.printed(t, c, stderr), "\n")
		lines = append(lines, strings.TrimRight(mark+" "+wrong, " "))
	}
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}

// TestCommands types them.
func TestCommands(t *testing.T) {
	if os.Getenv("BLACKBOX_SERVER_SOCKET") != "" {
		t.Skip("a server that others use is left alone")
	}
	t.Parallel()
	s := serverAlone(t)
	w := newWords(t, s)
	dir := t.TempDir()
	w.values["dir"], w.names[dir] = dir, "DIR"
	program := s.Bin + "/assay-server"
	if isReal() {
		program = s.SPIRE.Server
	}
	for _, request := range []string{`{"ttl":600,"token":"one"}`, `{"ttl":600,"token":"two"}`} {
		w.ask(t, &question{who: "local", method: "agent.CreateJoinToken", request: request})
	}
	for _, name := range []string{"one", "two"} {
		w.ask(t, &question{who: "anyone", method: "agent.AttestAgent", request: `[{"params":{"data":{"type":"join_token","payload":"${b64 ` + name + `}"},"params":{"csr":"${csr }"}}}]`})
	}
	play(t, serverCommands, func(c *command) string { return w.typed(t, c, program) })
}

// play types what is in a file, and compares what is answered, or writes it down.
func play(t *testing.T, file string, typed func(c *command) string) {
	t.Helper()
	all, text := commands(t, file)
	answers := map[int]string{}
	for _, c := range all {
		got := typed(c)
		answers[c.line] = got
		want := c.want
		if !isReal() && c.ours != "" {
			want = c.ours
		}
		if got != want && os.Getenv("BLACKBOX_RECORD") == "" {
			t.Errorf("%s:%d: %s: %s %s\nwant\n%sgot\n%s", file, c.line, c.title, c.mark, c.typedLine, want, got)
		}
	}
	if os.Getenv("BLACKBOX_RECORD") != "" {
		recordCommands(t, file, text, all, answers)
	}
}

// TestEveryCommandIsTyped says which of SPIRE's commands and flags are not in the transcripts.
func TestEveryCommandIsTyped(t *testing.T) {
	t.Run("the server's", func(t *testing.T) { allTyped(t, "assay-server", serverCommands) })
	t.Run("the agent's", func(t *testing.T) { allTyped(t, "assay-agent", agentCommands) })
}

func allTyped(t *testing.T, program, file string) {
	t.Helper()
	list, err := os.ReadFile("../../../cmd/" + program + "/testdata/spire-flags.txt")
	if err != nil {
		t.Fatal(err)
	}
	all, _ := commands(t, file)
	for line := range strings.Lines(string(list)) {
		name, flags, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok || elsewhere[program+" "+name] != "" {
			continue
		}
		for flag := range strings.FieldsSeq(flags) {
			if flag == "socketPath" || elsewhere[flag] != "" || elsewhere[name+" -"+flag] != "" {
				continue
			}
			typed := func(c *command) bool {
				return strings.HasPrefix(c.typedLine+" ", name+" ") && strings.Contains(c.typedLine+" ", " -"+flag+" ")
			}
			if !slices.ContainsFunc(all, typed) {
				t.Errorf("%s: nobody types %s -%s", file, name, flag)
			}
		}
	}
}

// elsewhere are the commands and flags that other tests type, or the reason why nobody does.
var elsewhere = map[string]string{
	"assay-agent run":  "it has the flags of validate, and test/lab/site runs it",
	"assay-server run": "test/lab/site", "assay-server validate": "test/script/testdata/validate.txtar",
	"instance": "test/script/testdata/flags.txtar",
}

// recordCommands writes down what SPIRE said, or with Assay what it says where that is something else and no
// reason is there yet.
func recordCommands(t *testing.T, file string, text []string, all []*command, answers map[int]string) {
	t.Helper()
	byLine := map[int]*command{}
	for _, c := range all {
		byLine[c.line] = c
	}
	var out []string
	var now *command
	for n, line := range text {
		mark, _, _ := strings.Cut(line, " ")
		if isReal() && answered(mark) || !isReal() && mark == "~" {
			continue
		}
		if now != nil && !answered(mark) && mark != "!" && !isReal() {
			if got := answers[now.line]; got != now.want {
				if now.why == "" {
					out = append(out, "! TODO")
				}
				for answer := range strings.SplitSeq(strings.TrimSuffix(got, "\n"), "\n") {
					out = append(out, "~ "+answer)
				}
			}
			now = nil
		}
		out = append(out, line)
		if c := byLine[n+1]; c != nil {
			now = c
			if answer := strings.TrimSuffix(answers[c.line], "\n"); isReal() && answer != "" {
				out = append(out, strings.Split(answer, "\n")...)
			}
		}
	}
	if err := os.WriteFile(file, []byte(strings.Join(out, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
}

// typedMark says whether a line is typed: $ is a command, and the others are what agentShell has them for.
func typedMark(mark string) bool { return len(mark) == 1 && strings.Contains("$%@&^", mark) }

// answered says whether a line is part of an answer.
func answered(mark string) bool { return mark == ">" || strings.HasPrefix(mark, "?") }
