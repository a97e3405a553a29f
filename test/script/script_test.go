// Package script runs sessions of the real binaries as an operator types them: one .txtar file in
// testdata for each. Run "go test ./test/script -update" after a help text changed.
package script

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	ossignal "os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/assay-id/assay/attestor/external"
	"github.com/assay-id/assay/test/fake/spireplugin"
	"github.com/assay-id/assay/test/lab/port"
)

var update = flag.Bool("update", false, "write the help texts as they are into the scripts")

// patience is how long a session waits for something that comes about by itself.
const patience = 2 * time.Minute

// binaries is the folder of the built commands.
var binaries string

func TestMain(m *testing.M) {
	spireplugin.RunIfAsked()
	// Sessions end what they left running with an interrupt. Who is started in the background of a shell has that
	// ignored, and so has all that it starts, unless it looks for it.
	if ossignal.Ignored(os.Interrupt) {
		ossignal.Notify(make(chan os.Signal, 1), os.Interrupt)
	}
	flag.Parse()
	os.Exit(testMain(m))
}

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "assay-script-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binaries = dir
	args := []string{"build", "-o", dir + "/"}
	if raceDetector {
		args = append(args, "-race")
	}
	build := exec.Command("go", append(args, "./cmd/assay-server", "./cmd/assay-agent", "./cmd/assay", "./cmd/assay-csi")...)
	build.Dir = filepath.Join("..", "..")
	build.Stdout, build.Stderr = os.Stderr, os.Stderr
	if err := build.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build the commands:", err)
		return 1
	}
	return m.Run()
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata",
		UpdateScripts:       *update,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               setup,
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"await":   await,
			"capture": capture,
			"helps":   helps,
			"signal":  signal,
			"httpget": httpget,
			"mode":    mode,
			"oidc":    oidc,
			"sds":     fetchSecret,
		},
	})
}

// setup puts the commands on the path, points them at sockets in the session's folder, and gives the
// session free ports.
func setup(env *testscript.Env) error {
	for _, name := range []string{"PORT", "PORT2", "PORT3", "PORT4"} {
		free, err := port.Free()
		if err != nil {
			return err
		}
		env.Setenv(name, strconv.Itoa(free))
	}
	env.Setenv("PATH", binaries+string(os.PathListSeparator)+env.Getenv("PATH"))
	env.Setenv("GORACE", "atexit_sleep_ms=0 halt_on_error=1") // else each command ends a second late
	plugin, err := os.Executable()                            // the test is a plugin of SPIRE too
	if err != nil {
		return err
	}
	env.Setenv("PLUGIN", plugin)
	sum, err := external.Checksum(plugin)
	if err != nil {
		return err
	}
	env.Setenv("SUM", fmt.Sprintf("%x", sum))
	env.Setenv("PID", strconv.Itoa(os.Getpid()))
	env.Setenv("UID", strconv.Itoa(os.Getuid()))
	samples, err := filepath.Abs(filepath.Join("..", "..", "conf"))
	if err != nil {
		return err
	}
	env.Setenv("SAMPLES", samples)
	env.Setenv("ASSAY_SERVER_PRIVATE_SOCKET", filepath.Join(env.WorkDir, "s", "api.sock"))
	env.Setenv("ASSAY_AGENT_PUBLIC_SOCKET", filepath.Join(env.WorkDir, "a", "public", "api.sock"))
	env.Setenv("ASSAY_AGENT_ADMIN_SOCKET", filepath.Join(env.WorkDir, "a", "private", "admin.sock"))
	return nil
}

// await runs a command again and again until it succeeds, or, with "!", until it fails:
//
//	await assay-server healthcheck
//	! await assay-agent api fetch x509
//
// With -stdout or -stderr and a pattern, what it wrote must match as well. The last output is there for
// "stdout" and "stderr".
func await(ts *testscript.TestScript, neg bool, args []string) {
	var stdout, stderr *regexp.Regexp
	for len(args) > 2 && (args[0] == "-stdout" || args[0] == "-stderr") {
		pattern, err := regexp.Compile("(?m)" + args[1])
		ts.Check(err)
		if args[0] == "-stdout" {
			stdout = pattern
		} else {
			stderr = pattern
		}
		args = args[2:]
	}
	deadline := time.After(patience)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		// The script's own Exec logs each try; only the last one is worth reading.
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Env = ts.MkAbs("."), environ(ts)
		var o, e strings.Builder
		cmd.Stdout, cmd.Stderr = &o, &e
		err := lookup(cmd)
		if err == nil {
			err = cmd.Run()
		}
		if (err == nil) != neg && (stdout == nil || stdout.MatchString(o.String())) && (stderr == nil || stderr.MatchString(e.String())) {
			fmt.Fprint(ts.Stdout(), o.String())
			fmt.Fprint(ts.Stderr(), e.String())
			return
		}
		select {
		case <-deadline:
			ts.Fatalf("still not after %s: %v: %v\n%s%s", patience, args, err, o.String(), e.String())
		case <-tick.C:
		}
	}
}

// lookup finds the command on the session's path, not on the test's.
func lookup(cmd *exec.Cmd) error {
	if path := filepath.Join(binaries, cmd.Args[0]); !strings.Contains(cmd.Args[0], "/") {
		if _, err := os.Stat(path); err == nil {
			cmd.Path, cmd.Err = path, nil
		}
	}
	return cmd.Err
}

func environ(ts *testscript.TestScript) []string {
	env := os.Environ()
	for _, name := range []string{"GORACE", "ASSAY_SERVER_PRIVATE_SOCKET", "ASSAY_AGENT_PUBLIC_SOCKET", "ASSAY_AGENT_ADMIN_SOCKET", "SPIFFE_ENDPOINT_SOCKET", "ASSAY_SERVER", "ASSAY_TRUST_BUNDLE", "ASSAY_ID_TOKEN_FILE"} {
		if value := ts.Getenv(name); value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// capture sets variables from the standard output of the command before:
//
//	capture TOKEN 'Token: (\S+)'
func capture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: capture NAME PATTERN")
	}
	pattern, err := regexp.Compile("(?m)" + args[1])
	ts.Check(err)
	match := pattern.FindStringSubmatch(ts.ReadFile("stdout"))
	if len(match) != 2 {
		ts.Fatalf("no match for %s", args[1])
	}
	ts.Setenv(args[0], match[1])
}

// helps writes the help of a command and of all below it.
func helps(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: helps COMMAND")
	}
	var walk func(words []string)
	walk = func(words []string) {
		cmd := exec.Command(filepath.Join(binaries, words[0]), append(slices.Clone(words[1:]), "--help")...)
		text, err := cmd.Output()
		ts.Check(err)
		fmt.Fprintf(ts.Stdout(), "# %s\n%s\n", strings.Join(words, " "), text)
		_, list, _ := strings.Cut(string(text), "Available Commands:\n")
		for line := range strings.Lines(list) {
			fields := strings.Fields(line)
			if len(fields) == 0 {
				break
			}
			if fields[0] != "help" && fields[0] != "completion" {
				walk(append(slices.Clone(words), fields[0]))
			}
		}
	}
	walk(args)
}

// httpget asks a URL again and again until there is an answer with the status, and writes the body:
//
//	httpget 200 http://127.0.0.1:$PORT/live
func httpget(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: httpget STATUS URL")
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, args[1], http.NoBody)
		ts.Check(err)
		got, body := "no answer", []byte(nil)
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			body, err = io.ReadAll(resp.Body)
			resp.Body.Close()
			ts.Check(err)
			got = strconv.Itoa(resp.StatusCode)
		}
		if got == args[0] {
			fmt.Fprint(ts.Stdout(), string(body))
			return
		}
		select {
		case <-ctx.Done():
			ts.Fatalf("%s: %s%v", got, body, err)
		case <-tick.C:
		}
	}
}

// signal sends a signal to the background commands of a name: signal HUP assay-server.
func signal(ts *testscript.TestScript, neg bool, args []string) {
	signals := map[string]os.Signal{"HUP": syscall.SIGHUP, "INT": syscall.SIGINT, "TERM": syscall.SIGTERM, "KILL": syscall.SIGKILL}
	if neg || len(args) != 2 || signals[args[0]] == nil {
		ts.Fatalf("usage: signal HUP|INT|TERM|KILL COMMAND")
	}
	for _, cmd := range ts.BackgroundCmds() {
		if filepath.Base(cmd.Path) != args[1] {
			continue
		}
		if err := cmd.Process.Signal(signals[args[0]]); !errors.Is(err, os.ErrProcessDone) {
			ts.Check(err)
		}
	}
}

// mode checks the permissions of a file: mode 0600 svid.0.key.
func mode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: mode OCTAL FILE")
	}
	info, err := os.Stat(ts.MkAbs(args[1]))
	ts.Check(err)
	if got := fmt.Sprintf("%04o", info.Mode().Perm()); got != args[0] {
		ts.Fatalf("%s has mode %s, not %s", args[1], got, args[0])
	}
}
