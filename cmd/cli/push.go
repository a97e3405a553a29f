package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/server/wire/evidencev1"
)

// Evidence are the flags that say what is pushed.
type Evidence struct {
	image                            string
	scans, vexes, bundles, manifests []string
	attached                         bool
}

// AddTo adds the flags to a command.
func (e *Evidence) AddTo(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&e.image, "image", "", "The image, as registry/repository@sha256:… or the digest alone")
	f.StringArrayVar(&e.scans, "scan", nil, "A scan report (Trivy, Grype, CycloneDX, in-toto, SARIF, …); - is standard input. Can be used more than once")
	f.StringArrayVar(&e.vexes, "vex", nil, "A VEX document (OpenVEX, CycloneDX). Can be used more than once")
	f.StringArrayVar(&e.bundles, "bundle", nil, "A signed statement: a Sigstore bundle or a DSSE envelope. Can be used more than once")
	f.BoolVar(&e.attached, "attached", false, "What is attached to the image in its registry, which the server fetches: signed statements, as \"cosign attest\" leaves them there")
	f.StringArrayVar(&e.manifests, "manifest", nil, "A manifest or index, byte for byte, that leads from the image's digest to its config digest. Can be used more than once")
}

// Check says what is missing.
func (e *Evidence) Check() error {
	switch {
	case e.image == "":
		return errors.New("-image is required: which image is it about? Write registry/repository@sha256:… or the digest alone")
	case !strings.Contains(e.image, "sha256:"):
		return fmt.Errorf("-image %s has no digest; a tag may mean another image tomorrow. Write registry/repository@sha256:…", e.image)
	case len(e.scans)+len(e.vexes)+len(e.bundles) == 0 && !e.attached:
		return errors.New("nothing to push: name a file with -scan, -vex or -bundle, or say -attached")
	}
	return nil
}

// PushAll sends every document, and returns the answers to those that were taken and the names of their
// files. The error is of the first one that was not.
func (e *Evidence) PushAll(ctx context.Context, c *cobra.Command, conn grpc.ClientConnInterface, source string) (names []string, answers []*evidencev1.PushResponse, err error) {
	header := &evidencev1.PushHeader{Image: e.image, Source: source}
	for _, name := range e.manifests {
		m, err := os.ReadFile(name)
		if err != nil {
			return nil, nil, err
		}
		header.Manifests = append(header.Manifests, m)
	}
	client := evidencev1.NewEvidenceClient(conn)
	for _, name := range slices.Concat(e.scans, e.vexes, e.bundles) {
		content, err := document(name, c.InOrStdin())
		if err != nil {
			return names, answers, err
		}
		resp, err := push(ctx, client, header, content)
		if err != nil {
			return names, answers, fmt.Errorf("push %s: %w", name, Sentence(err))
		}
		names, answers = append(names, name), append(answers, resp)
	}
	if !e.attached {
		return names, answers, nil
	}
	resp, err := client.Collect(ctx, &evidencev1.CollectRequest{Image: e.image})
	if err != nil {
		return names, answers, fmt.Errorf("collect what is attached: %w", Sentence(err))
	}
	var errs []error
	for _, d := range resp.GetDocuments() {
		if d.GetTaken() == nil {
			errs = append(errs, fmt.Errorf("attached %s: %s", d.GetDigest(), d.GetRefused()))
			continue
		}
		names, answers = append(names, "attached "+d.GetDigest()), append(answers, d.GetTaken())
	}
	if len(resp.GetDocuments()) == 0 {
		errs = append(errs, fmt.Errorf("nothing signed is attached to %s", e.image))
	}
	// Whoever may push to a registry can attach what nobody trusts: it is told, and fails only where there is
	// nothing else.
	if len(answers) > 0 {
		for _, err := range errs {
			fmt.Fprintf(c.ErrOrStderr(), "not taken: %s\n", err)
		}
		errs = nil
	}
	return names, answers, errors.Join(errs...)
}

// Sentence is an answer of the server without the wire's words around it, where it is told to people: what is
// wrong with what they asked for. Errors of other kinds stay as they are.
func Sentence(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch s.Code() { // the others are not about what was asked for
	case codes.InvalidArgument, codes.FailedPrecondition, codes.PermissionDenied, codes.Unauthenticated, codes.NotFound, codes.Unimplemented:
		return errors.New(s.Message())
	}
	return err
}

// maxDocument is what a server takes, in bytes.
const maxDocument = 32 << 20

// pushPiece is how much of a document goes into one message.
const pushPiece = 512 << 10

// push sends one document and returns what became of it.
func push(ctx context.Context, client evidencev1.EvidenceClient, header *evidencev1.PushHeader, content []byte) (*evidencev1.PushResponse, error) {
	stream, err := client.Push(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Header{Header: header}}); err != nil {
		return stream.CloseAndRecv() // the answer says why
	}
	for piece := range slices.Chunk(content, pushPiece) {
		if stream.Send(&evidencev1.PushRequest{Step: &evidencev1.PushRequest_Chunk{Chunk: piece}}) != nil {
			break // likewise
		}
	}
	return stream.CloseAndRecv()
}

// document reads one of the files that are to be pushed, "-" for standard input.
func document(name string, stdin io.Reader) ([]byte, error) {
	in := stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer func() { _ = file.Close() }()
		in = file
	}
	content, err := io.ReadAll(io.LimitReader(in, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(content) > maxDocument {
		return nil, fmt.Errorf("read %s: larger than %d MiB, which is what a server takes", name, maxDocument>>20)
	}
	if len(bytes.TrimSpace(content)) == 0 {
		return nil, fmt.Errorf("read %s: it is empty", name)
	}
	return content, nil
}

// PrintPushed tells people what became of a document.
func PrintPushed(w io.Writer, name string, r *evidencev1.PushResponse) error {
	taken := "taken"
	if r.GetDuplicate() {
		taken = "known already"
	}
	fmt.Fprintf(w, "%s: %s (%s %s", name, taken, r.GetFormat(), r.GetKind())
	if r.GetKind() == "report" {
		fmt.Fprintf(w, ", %s", Count(int(r.GetFindings()), "finding", "findings"))
	}
	fmt.Fprintf(w, ") from %s\n", joined(r.GetSources()))
	for _, note := range r.GetNotes() {
		fmt.Fprintf(w, "  note: %s\n", note)
	}
	for _, i := range r.GetImages() {
		PrintImage(w, i, "  ")
	}
	return nil
}

// PrintImage tells people of one image in short, each line indented.
func PrintImage(w io.Writer, i *evidencev1.Image, indent string) {
	fmt.Fprintf(w, "%sImage %s%s\n", indent, i.GetDigest(), inParentheses(joined(i.GetNames())))
	if n := len(i.GetAgents()); n > 0 {
		fmt.Fprintf(w, "%s  run by %s\n", indent, Count(n, "agent", "agents"))
	}
	for _, v := range i.GetVerdicts() {
		gate := "closed"
		if v.GetAllowed() {
			gate = "open"
		}
		if v.GetHeld() {
			gate = "held open by the blast guard"
		}
		if v.GetMode() != "enforce" {
			gate += ", mode " + v.GetMode()
		}
		fmt.Fprintf(w, "%s  scan:policy:%s is %s: %s", indent, v.GetPolicy(), gate, v.GetStatus())
		if len(v.GetReasons()) > 0 {
			fmt.Fprintf(w, ", %s", v.GetReasons()[0].GetText())
		}
		fmt.Fprintln(w)
	}
}

func inParentheses(text string) string {
	if text == "" {
		return ""
	}
	return " (" + text + ")"
}

func joined(names []string) string {
	var b bytes.Buffer
	for i, name := range names {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(name)
	}
	return b.String()
}
