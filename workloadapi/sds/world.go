package sds

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strconv"
	"strings"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"

	"github.com/assay-id/assay/workloadapi"
)

// world is a state-of-the-world client: what it asks for and what it was last sent.
type world struct {
	*service
	plainOnly bool
	names     []string // sorted; none: everything

	asked   bool // a request came that is to be answered even if nothing has changed
	sent    []*resource
	version string // of what was sent
	nonce   string // of the last response; empty: there is none yet
	count   uint64
}

// StreamSecrets sends what a client asks for, all of it, and again whenever any of it changes.
func (s *service) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	first, err := stream.Recv()
	if err != nil {
		return ended(err)
	}
	w := &world{service: s}
	if err := w.request(first); err != nil {
		return err
	}
	ctx := stream.Context()
	v, err := s.feed.Open(ctx)
	if err != nil {
		return err
	}
	err = w.talk(stream, v)
	v.End(ctx, err)
	return err
}

func (w *world) talk(stream secretv3.SecretDiscoveryService_StreamSecretsServer, v *workloadapi.Visit) error {
	ctx := stream.Context()
	in := listen(ctx, stream.Recv)
	for {
		value, err := v.Next(ctx)
		if err != nil {
			if workloadapi.Withdrawn(err) {
				w.replace(stream, v, nil)
			}
			return err
		}
		m := value.(*material)
		resp, handed, err := w.respond(m)
		if errors.Is(err, errGone) {
			w.replace(stream, v, m)
		}
		if err != nil {
			return err
		}
		if resp != nil {
			if err := v.Tell(handed, func() error { return stream.Send(resp) }); err != nil {
				return err
			}
		}
		woken, err := v.Wait(ctx, in.arrived)
		if err != nil {
			return err
		}
		if !woken {
			continue
		}
		req, err := in.take()
		if err != nil {
			return ended(err)
		}
		if w.nonce != "" && req.GetResponseNonce() == w.nonce && req.GetErrorDetail() != nil {
			w.refused(v.Followed, req.GetErrorDetail().GetMessage())
		}
		if err := w.request(req); err != nil {
			return err
		}
	}
}

// request takes in a request: a subscription, or the word on a response. One about a response that is
// not the last is out of date, and another is on its way.
func (w *world) request(req *discoveryv3.DiscoveryRequest) error {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return err
	}
	if n := len(req.GetResourceNames()); n > maxNames {
		return tooMany(n)
	}
	if req.GetNode() != nil || w.count == 0 { // only the first request must say
		w.plainOnly = w.plain(req.GetNode())
	}
	nonce := req.GetResponseNonce()
	if w.nonce != "" && nonce != "" && nonce != w.nonce {
		return nil
	}
	names := slices.Clone(req.GetResourceNames())
	slices.Sort(names)
	names = slices.Compact(names)
	if slices.Contains(names, "*") {
		names = nil
	}
	// The word on a response, yes or no, is no reason to say the same again.
	w.asked = w.nonce == "" || nonce == "" || !slices.Equal(names, w.names)
	w.names = names
	return nil
}

// errGone ends a stream of which a certificate is nobody's any more.
var errGone = workloadapi.Denied("no entry grants a certificate any more that was served")

// respond returns the response that is due, or nil if the client has it.
func (w *world) respond(m *material) (*discoveryv3.DiscoveryResponse, workloadapi.Handed, error) {
	var handed workloadapi.Handed
	names := w.names
	if len(names) == 0 {
		names = m.names()
	}
	var all []*resource
	var unknown []string
	for _, name := range names {
		r, err := m.find(&w.cfg, name, w.plainOnly)
		switch {
		case err != nil:
			return nil, handed, err
		case r == nil:
			unknown = append(unknown, name)
		default:
			all = append(all, r)
		}
	}
	for _, was := range w.sent {
		if was.from != nil && !slices.ContainsFunc(all, func(r *resource) bool { return r.name == was.name }) &&
			(len(w.names) == 0 || slices.Contains(unknown, was.name)) {
			return nil, handed, errGone
		}
	}
	if len(unknown) > 0 {
		return nil, handed, errUnknown(unknown)
	}
	sum := sha256.New()
	for _, r := range all {
		sum.Write([]byte(strconv.Quote(r.name) + r.version)) // hashes never fail
	}
	version := hex.EncodeToString(sum.Sum(nil)[:16])
	if version == w.version && !w.asked {
		return nil, handed, nil
	}
	w.version, w.sent, w.asked = version, all, false
	return w.response(all), hand(all), nil
}

func (w *world) response(all []*resource) *discoveryv3.DiscoveryResponse {
	w.count++
	w.nonce = strconv.FormatUint(w.count, 10)
	resp := &discoveryv3.DiscoveryResponse{VersionInfo: w.version, TypeUrl: typeURL, Nonce: w.nonce}
	for _, r := range all {
		resp.Resources = append(resp.Resources, r.body)
	}
	return resp
}

// replace puts what nobody trusts in the place of the certificates that were sent and that there are no
// more in m, of which nil means none. The stream ends afterwards, so an error changes nothing.
func (w *world) replace(stream secretv3.SecretDiscoveryService_StreamSecretsServer, v *workloadapi.Visit, m *material) {
	if w.cfg.KeepWithdrawn || !v.Alive() {
		return
	}
	nobody, err := withdrawn()
	if err != nil {
		w.cfg.Log.WithError(err).Error("withdrawn certificate cannot be replaced")
		return
	}
	var bodies []*resource
	for _, r := range w.sent {
		var still *resource
		if m != nil {
			still, _ = m.find(&w.cfg, r.name, w.plainOnly) // whose only error is about what is no certificate
		}
		if r.from != nil && still != nil {
			r = still
		} else if r.from != nil {
			if r, err = nobody.resource(r.name); err != nil {
				w.cfg.Log.WithError(err).Error("withdrawn certificate cannot be replaced")
				return
			}
		}
		bodies = append(bodies, r)
	}
	if len(bodies) > 0 {
		w.version = "withdrawn"
		_ = stream.Send(w.response(bodies))
	}
}

// hand returns what the audit line says of a response.
func hand(all []*resource) workloadapi.Handed {
	var h workloadapi.Handed
	for _, r := range all {
		if r.from != nil && !slices.Contains(h.EntryIDs, r.from.entry) {
			h.SPIFFEIDs = append(h.SPIFFEIDs, r.from.id)
			h.EntryIDs = append(h.EntryIDs, r.from.entry)
		}
	}
	return h
}

// errUnknown is for a request with names that the caller may not have. Whether somebody else may is not
// said.
func errUnknown(names []string) error {
	const most = 10
	var shown []string
	for _, name := range names[:min(len(names), most)] {
		shown = append(shown, quote(name))
	}
	if len(names) > most {
		shown = append(shown, "…")
	}
	return workloadapi.Invalid("workload is not authorized for the requested identities [" + strings.Join(shown, " ") + "]")
}

func tooMany(n int) error {
	return workloadapi.Invalid(strconv.Itoa(n) + " resource names, the limit is " + strconv.Itoa(maxNames))
}

// ended is the result of a method whose client has nothing more to say.
func ended(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
