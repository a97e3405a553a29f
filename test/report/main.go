// Command report runs go test with the given arguments and prints what go test prints, and besides
// which tests were skipped and why, which go test tells only together with everything else.
//
//	go run ./test/report -race ./...
//
// With SKIPPED naming a file, the skipped tests are appended to it too, for the end of a longer run.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// event is one line of go test -json (see go doc test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

// run is what is known of the tests so far.
type run struct {
	out     io.Writer
	output  map[[2]string][]string // of package and test, until it is known how it ended
	skipped []string
}

func main() {
	cmd := exec.Command("go", append([]string{"test", "-json"}, os.Args[1:]...)...)
	cmd.Stderr = os.Stderr
	lines, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(2)
	}
	r := &run{out: os.Stdout, output: map[[2]string][]string{}}
	r.read(lines)
	err = cmd.Wait()
	if saveErr := r.finish(os.Getenv("SKIPPED")); saveErr != nil {
		fmt.Fprintln(os.Stderr, "report:", saveErr)
		os.Exit(2)
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(2)
	}
}

func (r *run) read(lines io.Reader) {
	scanner := bufio.NewScanner(lines)
	scanner.Buffer(nil, 16<<20)
	for scanner.Scan() {
		var e event
		if json.Unmarshal(scanner.Bytes(), &e) != nil {
			fmt.Fprintln(r.out, scanner.Text()) // of the go command itself
			continue
		}
		r.take(e)
	}
}

func (r *run) take(e event) {
	key := [2]string{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "output":
		r.output[key] = append(r.output[key], e.Output)
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, fmt.Sprintf("%s %s: %s", e.Package, e.Test, reason(r.output[key])))
		}
		delete(r.output, key)
	case "pass":
		if e.Test == "" {
			r.summary(key)
		}
		delete(r.output, key)
	case "fail":
		if e.Test == "" {
			r.rest(e.Package)
		}
		fmt.Fprint(r.out, strings.Join(r.output[key], ""))
		delete(r.output, key)
	}
}

// summary prints a passed package's line.
func (r *run) summary(key [2]string) {
	for _, line := range r.output[key] {
		if strings.HasPrefix(line, "ok ") {
			fmt.Fprint(r.out, line)
		}
	}
}

// rest prints what tests wrote that have not ended, which is what a panic or a timeout leaves.
func (r *run) rest(pkg string) {
	for key, lines := range r.output {
		if key[0] == pkg && key[1] != "" {
			fmt.Fprint(r.out, strings.Join(lines, ""))
			delete(r.output, key)
		}
	}
}

// logged is how testing prints what a test logs.
var logged = regexp.MustCompile(`^\s+\S+\.go:\d+: `)

// reason is what a skipped test gave as its reason.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		if at := logged.FindStringIndex(line); at != nil {
			return strings.TrimPrefix(strings.TrimSpace(line[at[1]:]), "SKIPPED: ")
		}
	}
	return "no reason given"
}

// finish prints the skipped tests and appends them to a file, if one is named.
func (r *run) finish(path string) error {
	if len(r.skipped) == 0 {
		return nil
	}
	text := strings.Join(r.skipped, "\n") + "\n"
	fmt.Fprintf(r.out, "skipped %d tests:\n%s", len(r.skipped), text)
	if path == "" {
		return nil
	}
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(text)
	return err
}
