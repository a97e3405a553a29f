package report

import (
	"fmt"
	"slices"
	"strings"
)

// marks are the keys of the outermost object that only one format has.
var marks = []struct {
	key    string
	format Format
	read   func(top []byte) (*Document, error)
}{
	{"SchemaVersion", Trivy, asReport(readTrivy)},
	{"matches", Grype, asReport(readGrype)},
	{"bomFormat", CycloneDX, readCycloneDX},
	{"@context", OpenVEX, func(top []byte) (*Document, error) { return readOpenVEX(top, nil) }},
	{"runs", SARIF, asReport(readSARIF)},
	{"apiVersion", TrivyOperator, asReport(readOperator)},
}

// strangers are documents that people send and that are not read, with the sentence that helps.
var strangers = []struct{ key, text string }{
	{"spdxVersion", "an SPDX bill of materials lists packages and says nothing of vulnerabilities; scan it and send the scan"},
	{"ArtifactName", "a Trivy report without SchemaVersion; schema 2 is read (trivy 0.20 and later, --format json)"},
	{"document", "CSAF is not read; OpenVEX and CycloneDX VEX are"},
	{"vulnerabilities", "reports of this scanner are not read"},
}

func asReport(read func(top []byte) (*Report, error)) func(top []byte) (*Document, error) {
	return func(top []byte) (*Document, error) {
		r, err := read(top)
		if err != nil {
			return nil, err
		}
		return &Document{Format: r.Format, Report: r}, nil
	}
}

// Parse reads a document of any known format, which it finds by content: names of files and media types
// are somebody's word. Errors say what is wrong in one sentence; ErrTooLarge, ErrFormat and ErrEnvelope
// can be told apart.
//
// Nothing is verified here. Times may lie in the future and digests may name any image: the caller judges.
func Parse(data []byte) (*Document, error) {
	top, err := check(data)
	if err != nil {
		return nil, fmt.Errorf("read document: %w", err)
	}
	if has(top, "payload", "payloadType", "signatures") || has(top, "verificationMaterial") {
		return nil, fmt.Errorf("%w: verify it first, its payload is read then", ErrEnvelope)
	}
	if has(top, "_type") {
		return statement(data, top)
	}
	return plain(data, top)
}

// ParseStatement reads an in-toto statement, v0.1 or v1: the payload of a verified envelope.
func ParseStatement(payload []byte) (*Document, error) {
	top, err := check(payload)
	if err != nil {
		return nil, fmt.Errorf("read statement: %w", err)
	}
	if !has(top, "_type") {
		return nil, fmt.Errorf("read statement: %w: an in-toto statement has _type", ErrFormat)
	}
	return statement(payload, top)
}

// plain reads a checked document that is not a statement.
func plain(data []byte, top []member) (*Document, error) {
	found := -1
	for i, m := range marks {
		if !has(top, m.key) {
			continue
		}
		if found >= 0 {
			return nil, fmt.Errorf("read document: %w: %s marks a %s document and %s a %s one",
				ErrFormat, marks[found].key, marks[found].format, m.key, m.format)
		}
		found = i
	}
	if found >= 0 {
		d, err := marks[found].read(data)
		if err != nil {
			return nil, fmt.Errorf("read %s document: %w", marks[found].format, err)
		}
		return d, nil
	}
	for _, s := range strangers {
		if has(top, s.key) {
			return nil, fmt.Errorf("read document: %w: %s", ErrFormat, s.text)
		}
	}
	if at(data).kind() == '[' {
		return nil, fmt.Errorf("read document: %w: a list, as Trivy wrote before schema 2", ErrFormat)
	}
	return nil, fmt.Errorf("read document: %w: read are Trivy and Grype JSON, CycloneDX, OpenVEX, SARIF, "+
		"the Trivy operator's VulnerabilityReport and in-toto statements", ErrFormat)
}

// has says that the outermost object has all of these keys.
func has(top []member, keys ...string) bool {
	for _, key := range keys {
		if !slices.ContainsFunc(top, func(m member) bool { return m.key == key }) {
			return false
		}
	}
	return true
}

// known lists words for the sentence that refuses another one.
func known(words ...string) string { return strings.Join(words, ", ") }
