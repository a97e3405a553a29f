package api

import (
	"time"

	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/verdict/policy"
	"github.com/assay-id/assay/server/verdict/report"
	"github.com/assay-id/assay/server/wire/evidencev1"
)

func unixTime(seconds int64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0).UTC()
}

// maxReasons is how many reasons of a verdict are told.
const maxReasons = 20

func reasonsWire(list []policy.Reason) []*evidencev1.Reason {
	var out []*evidencev1.Reason
	for _, r := range list[:min(len(list), maxReasons)] {
		out = append(out, &evidencev1.Reason{Rule: r.Rule, Finding: r.Finding, Report: r.Report, Text: r.Text})
	}
	return out
}

func imageWire(i *verdict.Summary) *evidencev1.Image {
	w := &evidencev1.Image{Digest: i.Digest, Documents: clampInt32(i.Documents), UpdatedAt: unixSeconds(i.UpdatedAt), Names: i.Names}
	for _, id := range i.Agents {
		w.Agents = append(w.Agents, id.String())
	}
	for _, v := range i.Verdicts {
		w.Verdicts = append(w.Verdicts, &evidencev1.PolicyVerdict{
			Policy: v.Policy, Mode: string(v.Mode), Status: string(v.Status), Allowed: v.Effectively, Held: v.Held,
			Until: unixSeconds(v.Until), GraceUntil: unixSeconds(v.GraceUntil), Reasons: reasonsWire(v.Reasons), Effective: clampInt32(len(v.Effective)),
		})
	}
	return w
}

func wholeWire(w *verdict.Whole) *evidencev1.ShowResponse {
	out := &evidencev1.ShowResponse{Image: imageWire(&w.Summary), Selectors: w.Selectors, SeenAt: unixSeconds(w.SeenAt), Seq: w.Seq}
	for _, l := range w.Links {
		out.Links = append(out.Links, &evidencev1.Link{Digest: l.Digest, Kind: l.Kind, Platform: l.Platform})
	}
	for n := range w.Documents {
		d := &w.Documents[n]
		out.Documents = append(out.Documents, &evidencev1.Document{
			Kind: d.Kind, Format: d.Format, Source: d.Source, TrustPolicies: d.TrustPolicies, Repository: d.Repository, Hash: d.Hash, Form: d.Form,
			Signer: d.Signer, Issuer: d.Issuer, PushedBy: d.PushedBy, ReceivedAt: unixSeconds(d.ReceivedAt), VerifiedAt: unixSeconds(d.VerifiedAt),
			ScannedAt: unixSeconds(d.ScannedAt), DbAt: unixSeconds(d.DBAt), Scanner: d.Scanner, Match: d.Match,
			Findings: clampInt32(d.Findings), Packages: clampInt32(d.Packages), Flaws: d.Flaws, Void: d.Void, PushedWith: d.PushedWith,
		})
	}
	for n := range w.Findings {
		f := &w.Findings[n]
		out.Findings = append(out.Findings, &evidencev1.Finding{
			Policy: f.Policy, Id: f.ID, Package: f.Package, Severity: severityWord(f.Severity), Fixed: f.Fixed, Kev: f.KEV, Epss: f.EPSS,
			FirstSeen: unixSeconds(f.FirstSeen), Suppressed: f.Suppressed,
		})
	}
	for n := range w.Exceptions {
		out.Exceptions = append(out.Exceptions, exceptionWire(&w.Exceptions[n]))
	}
	for _, g := range w.Gates {
		out.Entries = append(out.Entries, &evidencev1.GatedEntry{Id: g.Entry.ID, SpiffeId: g.Entry.SPIFFEID.String(), Open: g.Open, Missing: g.Missing})
	}
	return out
}

func severityWord(s report.Severity) string {
	words := []string{"unknown", "negligible", "low", "medium", "high", "critical"}
	if s < 0 || int(s) >= len(words) {
		return words[0]
	}
	return words[s]
}

func exceptionWire(e *policy.Exception) *evidencev1.Exception {
	return &evidencev1.Exception{
		Id: e.ID, Policy: e.Policy, Digest: e.Digest, Package: e.Package, Vulnerability: e.Vulnerability, Reason: e.Reason, Approver: e.Approver,
		CreatedAt: unixSeconds(e.CreatedAt), ExpiresAt: unixSeconds(e.Expires),
	}
}
