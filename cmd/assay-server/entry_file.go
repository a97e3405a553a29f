package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// maxEntriesFile is the largest file of entries that is read, in bytes.
const maxEntriesFile = 256 << 20

// fileEntry is an entry in the JSON that "entry create -data" has always taken: SPIFFE IDs are text.
type fileEntry struct {
	EntryID       string         `json:"entry_id"`
	SPIFFEID      string         `json:"spiffe_id"`
	ParentID      string         `json:"parent_id"`
	Selectors     []fileSelector `json:"selectors"`
	X509SVIDTTL   int32          `json:"x509_svid_ttl"`
	JWTSVIDTTL    int32          `json:"jwt_svid_ttl"`
	FederatesWith []string       `json:"federates_with"`
	DNSNames      []string       `json:"dns_names"`
	Hint          string         `json:"hint"`
	Admin         bool           `json:"admin"`
	Downstream    bool           `json:"downstream"`
	StoreSVID     bool           `json:"store_svid"`
	EntryExpiry   int64          `json:"entryExpiry"`
	Additional    *struct {
		NoPrefetch bool `json:"disable_x509_svid_prefetch"`
		JTI        bool `json:"jwt_svid_include_jti"`
	} `json:"additional_attributes"`

	// The server decides these; they are accepted so that what was exported can be put back.
	Revision  any `json:"revision_number"`
	CreatedAt any `json:"created_at"`
}

type fileSelector struct {
	Type  string `json:"type"`
	Value string `json:"value"`
}

// readEntries reads {"entries": […]} from a file, or from standard input if the name is "-". Each
// entry has its SPIFFE IDs as text, or as "entry show -output json" prints them. A key that is not
// known is refused, for it would have been a wish.
func readEntries(name string, stdin io.Reader) ([]*types.Entry, error) {
	text, err := readData(name, stdin)
	if err != nil {
		return nil, err
	}
	var file struct {
		Entries []json.RawMessage `json:"entries"`
		Next    any               `json:"next_page_token"`
	}
	if err := strict(text, &file); err != nil {
		return nil, fmt.Errorf("read entries from %s: %w; it must be {\"entries\": [{…}]}", name, err)
	}
	if len(file.Entries) == 0 {
		return nil, fmt.Errorf("read entries from %s: there are none; it must be {\"entries\": [{…}]}", name)
	}
	entries := make([]*types.Entry, len(file.Entries))
	for i, raw := range file.Entries {
		if entries[i], err = parseFileEntry(raw); err != nil {
			return nil, fmt.Errorf("read entries from %s: entry %d: %w", name, i+1, err)
		}
	}
	return entries, nil
}

func parseFileEntry(raw json.RawMessage) (*types.Entry, error) {
	var shape struct {
		SPIFFEID json.RawMessage `json:"spiffe_id"`
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return nil, plainJSON(err)
	}
	if bytes.HasPrefix(bytes.TrimSpace(shape.SPIFFEID), []byte("{")) {
		e := new(types.Entry)
		if err := protojson.Unmarshal(raw, e); err != nil {
			return nil, err
		}
		return e, nil
	}
	var f fileEntry
	if err := strict(raw, &f); err != nil {
		return nil, err
	}
	id, err := parseID(f.SPIFFEID)
	if err != nil {
		return nil, fmt.Errorf("spiffe_id %q: %w", f.SPIFFEID, err)
	}
	parent, err := parseID(f.ParentID)
	if err != nil {
		return nil, fmt.Errorf("parent_id %q: %w", f.ParentID, err)
	}
	e := &types.Entry{
		Id: f.EntryID, SpiffeId: id, ParentId: parent,
		X509SvidTtl: f.X509SVIDTTL, JwtSvidTtl: f.JWTSVIDTTL, FederatesWith: f.FederatesWith, DnsNames: f.DNSNames,
		Hint: f.Hint, Admin: f.Admin, Downstream: f.Downstream, StoreSvid: f.StoreSVID, ExpiresAt: f.EntryExpiry,
	}
	for _, s := range f.Selectors {
		e.Selectors = append(e.Selectors, &types.Selector{Type: s.Type, Value: s.Value})
	}
	if a := f.Additional; a != nil {
		e.AdditionalAttributes = &types.Entry_AdditionalAttributes{DisableX509SvidPrefetch: a.NoPrefetch, JwtSvidIncludeJti: a.JTI}
	}
	return e, nil
}

// What goes into one call at most: gRPC's servers take 4 MiB.
const (
	partItems = 500
	partBytes = 2 << 20
)

// inParts calls do with the items, in parts that one call can hold, until it fails.
func inParts[T any](items []T, size func(T) int, do func(part []T) error) error {
	for len(items) > 0 {
		n, bytes := 1, size(items[0])
		for n < len(items) && n < partItems && bytes+size(items[n]) <= partBytes {
			bytes += size(items[n])
			n++
		}
		if err := do(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}

func entrySize(e *types.Entry) int { return proto.Size(e) }

// notAll says that only some of the items came to the server; nil if all did.
func notAll(sent, all int, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%d of %d were sent, and then: %w", sent, all, err)
}

// readIDs reads {"ids": […]}.
func readIDs(name string, stdin io.Reader) ([]string, error) {
	text, err := readData(name, stdin)
	if err != nil {
		return nil, err
	}
	var req struct {
		IDs []string `json:"ids"`
	}
	if err := strict(text, &req); err != nil {
		return nil, fmt.Errorf("read entry IDs from %s: %w; it must be {\"ids\": [\"…\"]}", name, err)
	}
	if len(req.IDs) == 0 {
		return nil, fmt.Errorf("read entry IDs from %s: there are none; it must be {\"ids\": [\"…\"]}", name)
	}
	return req.IDs, nil
}

// readData reads a file, or standard input if the name is "-".
func readData(name string, stdin io.Reader) ([]byte, error) {
	in := stdin
	if name != "-" {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		in = file
	}
	text, err := io.ReadAll(io.LimitReader(in, maxEntriesFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(text) > maxEntriesFile {
		return nil, fmt.Errorf("read %s: larger than %d bytes", name, maxEntriesFile)
	}
	return text, nil
}

// strict decodes one JSON value and refuses keys that are not known and anything after it.
func strict(text []byte, into any) error {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return plainJSON(err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("there is something after the end of the JSON")
	}
	return nil
}

// plainJSON says what is wrong with JSON in words of whoever wrote it, not of the program that reads it.
func plainJSON(err error) error {
	if shape, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		if shape.Field == "" {
			return fmt.Errorf("it holds a JSON %s", shape.Value)
		}
		return fmt.Errorf("%q cannot be a %s", shape.Field, shape.Value)
	}
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("it is no JSON, from byte %d on: %w", syntax.Offset, err)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it is no JSON: it ends too early")
	}
	return err
}
