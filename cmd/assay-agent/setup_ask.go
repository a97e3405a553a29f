package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"
)

// maxAnswers bounds how often one question is asked.
const maxAnswers = 5

// asker asks questions at a terminal.
type asker struct {
	in  *bufio.Reader
	out io.Writer
}

// newAsker returns one if somebody is there to answer, else nil: what a script runs must never wait for a
// person.
func newAsker(c *cobra.Command) *asker {
	in, out := c.InOrStdin(), c.ErrOrStderr()
	if !isTerminal(in) || !isTerminal(out) {
		return nil
	}
	return &asker{in: bufio.NewReader(in), out: out}
}

func isTerminal(stream any) bool {
	file, ok := stream.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// ask asks until the answer passes; an empty one is the one that is offered.
func (a *asker) ask(question, offered string, check func(string) error) (string, error) {
	for range maxAnswers {
		if offered == "" {
			fmt.Fprintf(a.out, "%s: ", question)
		} else {
			fmt.Fprintf(a.out, "%s [%s]: ", question, offered)
		}
		line, err := a.in.ReadString('\n')
		if err != nil {
			fmt.Fprintln(a.out)
			return "", errors.New("there is no answer; nothing was written")
		}
		answer := strings.TrimSpace(line)
		if answer == "" {
			answer = offered
		}
		if err := check(answer); err != nil {
			fmt.Fprintf(a.out, "  %v\n", err)
			continue
		}
		return answer, nil
	}
	return "", errors.New("there is no answer that will do; nothing was written")
}

// confirm asks for a yes, and takes everything else for a no.
func (a *asker) confirm(question string) (bool, error) {
	answer, err := a.ask(question+" (yes or no)", "no", func(string) error { return nil })
	return strings.EqualFold(answer, "yes") || strings.EqualFold(answer, "y"), err
}

func needed(text string) error {
	if text == "" {
		return errors.New("an answer is needed")
	}
	return nil
}

func isTrustDomain(text string) error {
	if text == "" {
		return needed(text)
	}
	if _, err := spiffeid.TrustDomainFromString(text); err != nil || strings.Contains(text, "/") {
		return errors.New("that is no trust domain: lower-case letters, digits, dots, dashes and underscores, as in example.org")
	}
	return nil
}

func isHost(text string) error {
	switch {
	case strings.ContainsAny(text, "/ @"), net.ParseIP(text) == nil && strings.Contains(text, ":"):
		return errors.New("only the host name or IP address, without scheme, port or path")
	}
	return needed(text)
}

// isBundle checks that there is a bundle, and on this machine that it can be used.
func (f *setupFlags) isBundle(path string) error {
	if err := isThere(path); err != nil || f.root != "/" {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(f.trustDomain)
	if err != nil {
		return err
	}
	return tryBundle(td, path, "")
}

func isThere(path string) error {
	_, err := os.Stat(path)
	return err
}

// fill asks for what no flag said.
func (f *setupFlags) fill(c *cobra.Command, a *asker, ways []way) error {
	given := func(name string) bool { return c.Flags().Changed(name) }
	text := func(name, question string, into *string, check func(string) error) (err error) {
		if !given(name) {
			*into, err = a.ask(question, *into, check)
		}
		return err
	}
	if err := text("trustDomain", "Trust domain of the server", &f.trustDomain, isTrustDomain); err != nil {
		return err
	}
	if err := text("serverAddress", "Host name or IP address of the server", &f.address, isHost); err != nil {
		return err
	}
	if !given("serverPort") {
		port, err := a.ask("TCP port of the server", strconv.Itoa(f.port), func(text string) error {
			if n, err := strconv.Atoi(text); err != nil || n < 1 || n > 65535 {
				return errors.New("a port is a number from 1 to 65535")
			}
			return nil
		})
		if err != nil {
			return err
		}
		f.port, _ = strconv.Atoi(port)
	}
	if err := text("trustBundle", `File with the server's bundle, as "assay-server bundle show" prints it`, &f.bundle, f.isBundle); err != nil {
		return err
	}
	return f.fillNode(a, ways)
}

// fillNode asks how the node is to be proved.
func (f *setupFlags) fillNode(a *asker, ways []way) error {
	if f.token != "" || f.node != "" {
		return nil
	}
	fmt.Fprintln(a.out, "How this machine can prove what it is:")
	var names []string
	for _, w := range ways {
		names = append(names, w.Type)
		fmt.Fprintf(a.out, "  %-12s %s.\n  %-12s It proves %s.\n", w.Type, w.Why, "", w.Proves)
	}
	names = append(names, "join_token")
	fmt.Fprintf(a.out, "  %-12s a token of \"assay-server token generate\", in a file.\n  %-12s It proves %s.\n", "join_token", "", proofs["join_token"])
	chosen, err := a.ask("Prove it by", names[0], func(text string) error {
		if slices.Contains(names, text) {
			return nil
		}
		return fmt.Errorf("one of %s", strings.Join(names, ", "))
	})
	if err != nil {
		return err
	}
	if chosen == "join_token" {
		f.token, err = a.ask("File with the join token", "/etc/assay/join-token", isThere)
		return err
	}
	f.node = chosen
	if chosen == "k8s_psat" && f.cluster == "" {
		f.cluster, err = a.ask("Name that the server has for the cluster", "", needed)
	}
	return err
}
