package verdict

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records/stored"
	"github.com/assay-id/assay/server/verdict/report"
)

// bodyVersion is the first byte of a stored body; see server/records/stored/evidence.proto.
const bodyVersion = 1

func encodeBody(m proto.Message) ([]byte, error) {
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend([]byte{bodyVersion}, m)
	if err != nil {
		return nil, fmt.Errorf("encode body: %w", err)
	}
	return b, nil
}

func decodeBody(b []byte, m proto.Message) error {
	if len(b) == 0 {
		return errors.New("decode body: no version byte")
	}
	if b[0] != bodyVersion {
		return fmt.Errorf("decode body: version %d was written by a newer server", b[0])
	}
	if err := proto.Unmarshal(b[1:], m); err != nil {
		return fmt.Errorf("decode body: %w", err)
	}
	return nil
}

func encodeReport(r *report.Report) ([]byte, error) {
	m := &stored.EvidenceReport{
		Format: string(r.Format), Scanner: r.Scanner, Version: r.Version,
		Config: r.Subject.Config, Manifests: r.Subject.Manifests, Platform: r.Subject.Platform, Name: clip(r.Subject.Name),
		ScannedAt: nanos(r.ScannedAt), DbAt: nanos(r.DBAt), Packages: int32(min(r.Packages, 1<<30)), //nolint:gosec // bounded
		Findings: make([]*stored.EvidenceFinding, len(r.Findings)),
	}
	for _, f := range r.Flaws {
		m.Flaws = append(m.Flaws, string(f))
	}
	for i := range r.Findings {
		f := &r.Findings[i]
		m.Findings[i] = &stored.EvidenceFinding{
			Id: f.ID, Aliases: f.Aliases, Package: f.Package, Severity: int32(f.Severity), //nolint:gosec // a handful
			Fixed: f.Fixed, Kev: f.KEV, Epss: f.EPSS, Suppressed: clip(f.Suppressed),
		}
	}
	return encodeBody(m)
}

// decodeReport shares strings that many reports have in common.
func (w words) decodeReport(b []byte) (*report.Report, error) {
	var m stored.EvidenceReport
	if err := decodeBody(b, &m); err != nil {
		return nil, err
	}
	r := &report.Report{
		Format: report.Format(w.one(m.GetFormat())), Scanner: w.one(m.GetScanner()), Version: w.one(m.GetVersion()),
		Subject: report.Subject{
			Config: m.GetConfig(), Manifests: m.GetManifests(), Platform: w.one(m.GetPlatform()), Name: m.GetName(),
		},
		ScannedAt: timeOf(m.GetScannedAt()), DBAt: timeOf(m.GetDbAt()), Packages: int(m.GetPackages()),
		Findings: make([]report.Finding, len(m.GetFindings())),
	}
	for _, f := range m.GetFlaws() {
		r.Flaws = append(r.Flaws, report.Flaw(w.one(f)))
	}
	for i, f := range m.GetFindings() {
		if f.GetSeverity() < int32(report.Unknown) || f.GetSeverity() > int32(report.Critical) {
			return nil, fmt.Errorf("decode body: severity %d", f.GetSeverity())
		}
		r.Findings[i] = report.Finding{
			ID: w.one(f.GetId()), Aliases: w.all(f.GetAliases()), Package: w.one(f.GetPackage()), Severity: report.Severity(f.GetSeverity()),
			Fixed: f.GetFixed(), KEV: f.GetKev(), EPSS: f.GetEpss(), Suppressed: w.one(f.GetSuppressed()),
		}
	}
	return r, nil
}

func encodeVEX(v *report.VEX) ([]byte, error) {
	m := &stored.EvidenceVEX{
		Format: string(v.Format), Id: v.ID, Author: v.Author, Timestamp: nanos(v.Timestamp),
		Version: int32(min(v.Version, 1<<30)), //nolint:gosec // bounded
	}
	for i := range v.Statements {
		s := &v.Statements[i]
		m.Statements = append(m.Statements, &stored.EvidenceStatement{
			Vulnerability: s.Vulnerability, Aliases: s.Aliases, Product: s.Product, Package: s.Package,
			Status: s.Status, Justification: s.Justification, Timestamp: nanos(s.Timestamp),
		})
	}
	return encodeBody(m)
}

func (w words) decodeVEX(b []byte) (*report.VEX, error) {
	var m stored.EvidenceVEX
	if err := decodeBody(b, &m); err != nil {
		return nil, err
	}
	v := &report.VEX{
		Format: report.Format(m.GetFormat()), ID: m.GetId(), Author: m.GetAuthor(), Timestamp: timeOf(m.GetTimestamp()), Version: int(m.GetVersion()),
	}
	for _, s := range m.GetStatements() {
		v.Statements = append(v.Statements, report.Statement{
			Vulnerability: w.one(s.GetVulnerability()), Aliases: w.all(s.GetAliases()), Product: w.one(s.GetProduct()), Package: w.one(s.GetPackage()),
			Status: w.one(s.GetStatus()), Justification: w.one(s.GetJustification()), Timestamp: timeOf(s.GetTimestamp()),
		})
	}
	return v, nil
}

// words keeps one copy of strings that reports share: the same few thousand CVE numbers and packages
// are in the reports of all images.
type words map[string]string

func (w words) one(s string) string {
	if s == "" {
		return ""
	}
	if known, ok := w[s]; ok {
		return known
	}
	w[s] = s
	return s
}

func (w words) all(list []string) []string {
	for i, s := range list {
		list[i] = w.one(s)
	}
	return list
}

// share makes a fresh report share its strings.
func (w words) share(r *report.Report) {
	for i := range r.Findings {
		f := &r.Findings[i]
		f.ID, f.Package, f.Suppressed, f.Aliases = w.one(f.ID), w.one(f.Package), w.one(f.Suppressed), w.all(f.Aliases)
	}
}

// maxText is the longest free text that is kept of a document, in bytes.
const maxText = 500

func clip(s string) string { return strings.ToValidUTF8(s[:min(len(s), maxText)], "") }

func selectorsOf(list []*stored.Selector) []attestor.Selector {
	out := make([]attestor.Selector, 0, len(list))
	for _, s := range list {
		out = append(out, attestor.Selector{Type: s.GetType(), Value: s.GetValue()})
	}
	return out
}

func storedSelectors(list []attestor.Selector) []*stored.Selector {
	out := make([]*stored.Selector, 0, len(list))
	for _, s := range list {
		out = append(out, &stored.Selector{Type: s.Type, Value: s.Value})
	}
	return out
}

// nanos is a time as it is stored, 0 for none. One before 1970 becomes the first moment of it, and one
// after 2261 the last that fits: a document from the Middle Ages must not come round as one of today.
func nanos(t time.Time) int64 {
	switch {
	case t.IsZero():
		return 0
	case t.Unix() < 0 || t.Equal(time.Unix(0, 0)):
		return 1
	case t.Year() > 2261:
		return math.MaxInt64
	}
	return t.UnixNano()
}

func timeOf(nanos int64) time.Time {
	if nanos == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanos).UTC()
}

// keyOf hashes parts into the ID of a record. Each goes in after its length, so that no two different
// lists look the same.
func keyOf(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write([]byte(p))
	}
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil))
}
