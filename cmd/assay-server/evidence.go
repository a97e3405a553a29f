package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

func evidenceCommands() *cobra.Command {
	return cli.Group("evidence", "Looks after what is known about images, and what comes of it",
		evidenceList(), evidenceShow(), evidenceExplain(), evidencePush(), evidenceSimulate(),
		evidenceExcept(), evidenceExceptions(), evidenceUnexcept(), evidenceRelease(), evidenceAccept())
}

// shortTime is how times are shown.
func shortTime(unix int64) string {
	if unix == 0 {
		return "-"
	}
	return time.Unix(unix, 0).UTC().Format(time.RFC3339)
}

func evidenceList() *cobra.Command {
	var req evidencev1.ListRequest
	r := newDesk("list", "Lists the images that are known or run, with their verdicts", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		client := evidencev1.NewEvidenceClient(conn)
		all := &evidencev1.ListResponse{}
		for page := proto.CloneOf(&req); ; {
			page.PageSize = 1000
			resp, err := client.List(ctx, page)
			if err != nil {
				return err
			}
			all.Images = append(all.Images, resp.GetImages()...)
			if page.PageToken = resp.GetNextPageToken(); page.GetPageToken() == "" {
				break
			}
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Found "+cli.Count(len(all.GetImages()), "image", "images"))
			for _, i := range all.GetImages() {
				fmt.Fprintln(w)
				cli.PrintImage(w, i, "")
			}
			return nil
		}, all)
	})
	r.Flags().StringVar(&req.Status, "status", "", "Only images with this status under some policy: pass, grace, fail, stale, missing, error or exempt")
	r.Flags().BoolVar(&req.Running, "running", false, "Only images that agents run")
	return r.Command
}

// imageFlag adds -image and demands it.
func imageFlag(r *remote, into *string) *cobra.Command {
	r.Flags().StringVar(into, "image", "", "The image: its config, manifest or index digest, or the beginning of its config digest")
	r.checked(func() error {
		if *into == "" {
			return errors.New("-image is required: which image? \"evidence list\" lists them")
		}
		return nil
	})
	return r.Command
}

func evidenceShow() *cobra.Command {
	var image string
	r := newDesk("show", "Shows everything about one image", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).Show(ctx, &evidencev1.ShowRequest{Image: image})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error { return printWhole(w, resp) }, resp)
	})
	return imageFlag(r, &image)
}

func printWhole(w io.Writer, s *evidencev1.ShowResponse) error {
	cli.PrintImage(w, s.GetImage(), "")
	fmt.Fprintf(w, "  first run: %s; verdict number %d\n", shortTime(s.GetSeenAt()), s.GetSeq())
	for _, agent := range s.GetImage().GetAgents() {
		fmt.Fprintf(w, "  agent %s\n", agent)
	}
	for _, l := range s.GetLinks() {
		fmt.Fprintf(w, "  %s %s %s\n", l.GetKind(), l.GetDigest(), l.GetPlatform())
	}
	if len(s.GetDocuments()) > 0 {
		fmt.Fprintln(w, "\nEvidence:")
	}
	for _, d := range s.GetDocuments() {
		fmt.Fprintf(w, "  %s from %s: %s, %s, match %s\n", d.GetKind(), d.GetSource(), d.GetFormat(), d.GetForm(), d.GetMatch())
		fmt.Fprintf(w, "    received %s from %s", shortTime(d.GetReceivedAt()), d.GetPushedBy())
		if d.GetKind() == "report" {
			fmt.Fprintf(w, "; scanned %s with %s, database %s: %s", shortTime(d.GetScannedAt()), d.GetScanner(), shortTime(d.GetDbAt()),
				cli.Count(int(d.GetFindings()), "finding", "findings"))
		}
		fmt.Fprintln(w)
		for _, name := range slices.Sorted(maps.Keys(d.GetPushedWith())) {
			fmt.Fprintf(w, "    pushed with %s %s\n", name, d.GetPushedWith()[name])
		}
		if d.GetSigner() != "" {
			fmt.Fprintf(w, "    signed by %s %s\n", d.GetSigner(), d.GetIssuer())
		}
		if len(d.GetFlaws()) > 0 {
			fmt.Fprintf(w, "    flaws: %s\n", strings.Join(d.GetFlaws(), ", "))
		}
		if d.GetVoid() != "" {
			fmt.Fprintf(w, "    does not count: %s\n", d.GetVoid())
		}
		fmt.Fprintf(w, "    %s\n", d.GetHash())
	}
	if len(s.GetFindings()) > 0 {
		fmt.Fprintln(w, "\nFindings that count:")
		table := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
		for _, f := range s.GetFindings() {
			fmt.Fprintf(table, "  %s\t%s\t%s\t%s\tfixed %t\tKEV %t\tsince %s\n",
				f.GetPolicy(), f.GetSeverity(), f.GetId(), f.GetPackage(), f.GetFixed(), f.GetKev(), shortTime(f.GetFirstSeen()))
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	if len(s.GetExceptions()) > 0 {
		fmt.Fprintln(w, "\nExceptions:")
		printExceptions(w, s.GetExceptions())
	}
	if len(s.GetEntries()) > 0 {
		fmt.Fprintln(w, "\nEntries that demand evidence:")
	}
	for _, e := range s.GetEntries() {
		if e.GetOpen() {
			fmt.Fprintf(w, "  %s %s: open\n", e.GetId(), e.GetSpiffeId())
		} else {
			fmt.Fprintf(w, "  %s %s: closed, missing %s\n", e.GetId(), e.GetSpiffeId(), strings.Join(e.GetMissing(), ", "))
		}
	}
	if len(s.GetSelectors()) > 0 {
		fmt.Fprintln(w, "\nSelectors of its workloads:")
	}
	for _, selector := range s.GetSelectors() {
		fmt.Fprintln(w, "  "+selector)
	}
	return nil
}

func evidenceExplain() *cobra.Command {
	var req evidencev1.ExplainRequest
	r := newDesk("explain", "Says in sentences why an image has its verdicts", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).Explain(ctx, &req)
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			for _, line := range resp.GetLines() {
				fmt.Fprintln(w, line)
			}
			return nil
		}, resp)
	})
	r.Flags().StringVar(&req.Policy, "policy", "", "Only this scan policy")
	return imageFlag(r, &req.Image)
}

// newDesk is a command about images, whose errors are told in plain sentences.
func newDesk(use, short string, do func(ctx context.Context, r *remote, conn *grpc.ClientConn) error) *remote {
	return newRemote(use, short, func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		return cli.Sentence(do(ctx, r, conn))
	})
}

func evidencePush() *cobra.Command {
	var what cli.Evidence
	var source string
	r := newDesk("push", "Hands documents about an image to the server, as its administrator", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		names, answers, err := what.PushAll(ctx, r.Command, conn, source)
		if printed := printPushed(r.Command, &r.output, names, answers); printed != nil {
			return errors.Join(err, printed)
		}
		return err
	})
	what.AddTo(r.Command)
	r.Flags().StringVar(&source, "source", "", "Push on behalf of this trust policy or evidence source (default \"local\")")
	return r.checked(what.Check).Command
}

func printPushed(c *cobra.Command, output *cli.Output, names []string, answers []*evidencev1.PushResponse) error {
	if len(answers) == 0 {
		return nil
	}
	var messages []proto.Message
	for _, a := range answers {
		messages = append(messages, a)
	}
	return output.Print(c, func(w io.Writer) error {
		for n, a := range answers {
			if err := cli.PrintPushed(w, names[n], a); err != nil {
				return err
			}
		}
		return nil
	}, messages...)
}

func evidenceSimulate() *cobra.Command {
	var file string
	var running bool
	r := newDesk("simulate", "Says what other scan policies would change, without any effect", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		resp, err := evidencev1.NewEvidenceClient(conn).Simulate(ctx, &evidencev1.SimulateRequest{Config: string(text), File: file, Running: running})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "%s, %s\n", cli.Count(int(resp.GetImages()), "image", "images"), cli.Count(len(resp.GetDifferences()), "difference", "differences"))
			for _, d := range resp.GetDifferences() {
				before := d.GetBefore()
				if before == "" {
					before = "(no such policy)"
				}
				fmt.Fprintf(w, "%s %s: %s -> %s, gate %s -> %s, run by %s\n", d.GetDigest(), d.GetPolicy(), before, d.GetAfter(),
					gate(d.GetAllowedBefore()), gate(d.GetAllowedAfter()), cli.Count(len(d.GetAgents()), "agent", "agents"))
				if len(d.GetReasons()) > 0 {
					fmt.Fprintf(w, "  %s\n", d.GetReasons()[0].GetText())
				}
			}
			return nil
		}, resp)
	})
	r.Flags().StringVar(&file, "policy", "", "File with scan_policy blocks; whatever else is in it is left aside")
	r.Flags().BoolVar(&running, "running", false, "Only images that agents run")
	return r.checked(func() error {
		if file == "" {
			return errors.New("-policy is required: a file with scan_policy blocks")
		}
		return nil
	}).Command
}

func gate(open bool) string {
	if open {
		return "open"
	}
	return "closed"
}

func printExceptions(w io.Writer, list []*evidencev1.Exception) {
	for _, e := range list {
		about := e.GetVulnerability()
		if about == "" {
			about = "everything"
		}
		fmt.Fprintf(w, "  %s: %s", e.GetId(), about)
		if e.GetPackage() != "" {
			fmt.Fprintf(w, " in %s", e.GetPackage())
		}
		if e.GetDigest() != "" {
			fmt.Fprintf(w, " of image %s", e.GetDigest())
		}
		if e.GetPolicy() != "" {
			fmt.Fprintf(w, " under %s", e.GetPolicy())
		}
		fmt.Fprintf(w, ", until %s: %s (approved by %s)\n", shortTime(e.GetExpiresAt()), e.GetReason(), e.GetApprover())
	}
}

func evidenceExcept() *cobra.Command {
	e := &evidencev1.Exception{}
	var lasts time.Duration
	r := newDesk("except", "Makes findings not count for a while", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		e.ExpiresAt = time.Now().Add(lasts).Unix()
		made, err := evidencev1.NewEvidenceClient(conn).PutException(ctx, &evidencev1.PutExceptionRequest{Exception: e})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Exception in force:")
			printExceptions(w, []*evidencev1.Exception{made})
			return nil
		}, made)
	})
	f := r.Flags()
	f.StringVar(&e.Digest, "image", "", "Only for the image with this config digest")
	f.StringVar(&e.Package, "package", "", "Only for this package, as a purl; what is left out of it may be anything")
	f.StringVar(&e.Vulnerability, "vulnerability", "", "The vulnerability, as CVE-2024-1234; without it all of the package's, or the image as a whole")
	f.StringVar(&e.Policy, "policy", "", "Only under this scan policy")
	f.StringVar(&e.Reason, "reason", "", "Why, for those who ask later")
	f.StringVar(&e.Approver, "approver", "", "Who approved it")
	f.DurationVar(&lasts, "for", 0, "How long, as 72h")
	f.StringVar(&e.Id, "id", "", "Change the exception with this ID (optional)")
	r.Example = "  assay-server evidence except -vulnerability CVE-2024-1234 -package pkg:deb/debian/openssl -for 72h \\\n" +
		"    -reason \"not reachable, see SEC-7\" -approver alice"
	return r.checked(func() error {
		switch {
		case e.GetReason() == "" || e.GetApprover() == "":
			return errors.New("-reason and -approver are required: somebody will ask")
		case lasts <= 0:
			return errors.New("-for is required: an exception ends, as in -for 72h")
		case e.GetDigest() == "" && e.GetPackage() == "":
			return errors.New("-image or -package is required: an exception is for something")
		}
		return nil
	}).Command
}

func evidenceExceptions() *cobra.Command {
	return newDesk("exceptions", "Lists the exceptions", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).ListExceptions(ctx, &evidencev1.ListExceptionsRequest{})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintln(w, "Found "+cli.Count(len(resp.GetExceptions()), "exception", "exceptions"))
			printExceptions(w, resp.GetExceptions())
			return nil
		}, resp)
	}).Command
}

func evidenceUnexcept() *cobra.Command {
	var id string
	r := newDesk("unexcept", "Takes an exception back", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).DeleteException(ctx, &evidencev1.DeleteExceptionRequest{Id: id})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "Exception %s is gone.\n", id)
			return nil
		}, resp)
	})
	r.Flags().StringVar(&id, "id", "", "The exception's ID; \"evidence exceptions\" lists them")
	return r.checked(func() error {
		if id == "" {
			return errors.New("-id is required")
		}
		return nil
	}).Command
}

func evidenceRelease() *cobra.Command {
	var policy string
	r := newDesk("release", "Lets go what the blast guard of a scan policy holds back", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).Release(ctx, &evidencev1.ReleaseRequest{Policy: policy})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			fmt.Fprintf(w, "Released %s.\n", cli.Count(len(resp.GetDigests()), "image", "images"))
			for _, digest := range resp.GetDigests() {
				fmt.Fprintln(w, "  "+digest)
			}
			return nil
		}, resp)
	})
	r.Flags().StringVar(&policy, "policy", "", "The scan policy")
	return r.checked(func() error {
		if policy == "" {
			return errors.New("-policy is required: whose guard?")
		}
		return nil
	}).Command
}

func evidenceAccept() *cobra.Command {
	var req evidencev1.AcceptRequest
	r := newDesk("accept", "Puts a report in force that was held because packages are gone", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		resp, err := evidencev1.NewEvidenceClient(conn).Accept(ctx, &req)
		if err != nil {
			return err
		}
		return printPushed(r.Command, &r.output, []string{req.GetReport()}, []*evidencev1.PushResponse{resp})
	})
	f := r.Flags()
	f.StringVar(&req.Report, "report", "", "The digest of the report's bytes, as its pusher and the webhooks were told")
	f.StringVar(&req.Image, "image", "", "What it was pushed for, as it was written there; needed only if the same bytes were pushed for several")
	f.StringVar(&req.Reason, "reason", "", "Why, for those who ask later")
	return r.checked(func() error {
		switch {
		case req.GetReport() == "":
			return errors.New("-report is required: the pusher's error and the audit log have its digest")
		case req.GetReason() == "":
			return errors.New("-reason is required: somebody will ask")
		}
		return nil
	}).Command
}
