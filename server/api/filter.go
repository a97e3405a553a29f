package api

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/workloadapi/identity"
)

// page is which part of a list is wanted.
type page struct {
	size  int    // 0: everything
	after string // the key of the last item of the page before; empty: from the start
}

const (
	// tokenMark begins every page token, so that one of another server or another kind is known.
	tokenMark = "a1."
	maxPage   = 10_000
)

func pageFromWire(size int32, token string) (page, error) {
	if size < 0 {
		return page{}, refusal(codes.InvalidArgument, "page size is negative")
	}
	p := page{size: min(int(size), maxPage)}
	if size == 0 || token == "" { // as with SPIRE, a token without a size is none
		return p, nil
	}
	rest, ok := strings.CutPrefix(token, tokenMark)
	raw, err := base64.RawURLEncoding.DecodeString(rest)
	if !ok || err != nil || len(raw) == 0 || len(raw) > identity.MaxSPIFFEID {
		return page{}, refusal(codes.InvalidArgument, "could not parse page token")
	}
	p.after = string(raw)
	return p, nil
}

// pageToken returns the token of the page after the item with the key; empty for an empty key.
func pageToken(after string) string {
	if after == "" {
		return ""
	}
	return tokenMark + base64.RawURLEncoding.EncodeToString([]byte(after))
}

func clampInt32(n int) int32 { return int32(min(n, math.MaxInt32)) } //nolint:gosec // clamped

// expiresLayout is how SPIRE's command line writes the time in by_expires_before.
const expiresLayout = "2006-01-02 15:04:05 -0700 -07"

// wireAgentFilter is what the filters of CountAgents and ListAgents have in common, which is all.
type wireAgentFilter interface {
	GetByAttestationType() string
	GetBySelectorMatch() *types.SelectorMatch
	GetByBanned() *wrapperspb.BoolValue
	GetByCanReattest() *wrapperspb.BoolValue
	GetByExpiresBefore() string
}

// agentFilter returns what the filter asks of a node.
func agentFilter(w wireAgentFilter) (func(*records.Node) bool, error) {
	if n := len(w.GetByAttestationType()); n > attestor.MaxTypeLength {
		return nil, refusal(codes.InvalidArgument, fmt.Sprintf("malformed attestation type filter: %d bytes long, the limit is %d", n, attestor.MaxTypeLength))
	}
	var before time.Time
	if text := w.GetByExpiresBefore(); text != "" {
		var err error
		if before, err = time.Parse(expiresLayout, text); err != nil {
			return nil, refusal(codes.InvalidArgument, fmt.Sprintf("malformed expires before filter: want the form %q", expiresLayout))
		}
	}
	var match func(attestor.Set) bool
	if m := w.GetBySelectorMatch(); m != nil {
		want, err := selectorMatch(m)
		if err != nil {
			return nil, err
		}
		match = func(have attestor.Set) bool { return selectorsMatch(have, want, m.GetMatch()) }
	}
	return func(n *records.Node) bool {
		switch {
		case w.GetByAttestationType() != "" && n.Type != w.GetByAttestationType(),
			w.GetByBanned() != nil && n.Banned != w.GetByBanned().GetValue(),
			w.GetByCanReattest() != nil && n.CanReattest != w.GetByCanReattest().GetValue(),
			!before.IsZero() && (n.ExpiresAt.IsZero() || !n.ExpiresAt.Before(before)),
			match != nil && !match(n.Selectors):
			return false
		}
		return true
	}, nil
}

// selectorMatch parses the selectors of a match and checks its mode.
func selectorMatch(m *types.SelectorMatch) (attestor.Set, error) {
	if _, ok := types.SelectorMatch_MatchBehavior_name[int32(m.GetMatch())]; !ok {
		return attestor.Set{}, refusal(codes.InvalidArgument, "malformed selectors filter: match behavior is unknown")
	}
	if len(m.GetSelectors()) == 0 {
		return attestor.Set{}, malformed("malformed selectors filter", errors.New("empty selector set"))
	}
	set, err := identity.SelectorsFromWire(m.GetSelectors())
	if err != nil {
		return attestor.Set{}, malformed("malformed selectors filter", err)
	}
	return set, nil
}

// selectorsMatch compares what a record has with what a filter wants.
func selectorsMatch(have, want attestor.Set, mode types.SelectorMatch_MatchBehavior) bool {
	switch mode {
	case types.SelectorMatch_MATCH_EXACT:
		return have.Equal(want)
	case types.SelectorMatch_MATCH_SUBSET:
		return have.Len() > 0 && have.In(want)
	case types.SelectorMatch_MATCH_SUPERSET:
		return want.In(have)
	default: // any
		return len(want.Missing(have)) < want.Len()
	}
}
