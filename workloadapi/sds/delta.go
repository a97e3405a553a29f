package sds

import (
	"maps"
	"slices"
	"strconv"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/workloadapi"
)

// delta is a client that is told differences: what it asks for and what it has.
type delta struct {
	*service
	plainOnly bool
	all       bool            // it asks for everything
	names     map[string]bool // it asks for these; true: they were there once, so they are no mistake
	has       map[string]held
	count     uint64
}

// held is what a client has under a name.
type held struct {
	version     string
	certificate bool // or so its name says
}

// DeltaSecrets sends what a client asks for and does not have, and what of it is gone.
func (s *service) DeltaSecrets(stream secretv3.SecretDiscoveryService_DeltaSecretsServer) error {
	first, err := stream.Recv()
	if err != nil {
		return ended(err)
	}
	d := &delta{service: s, names: map[string]bool{}, has: map[string]held{}}
	// A first request that names nothing asks for everything, as do later ones with "*".
	d.all = len(first.GetResourceNamesSubscribe()) == 0
	d.plainOnly = d.plain(first.GetNode())
	if n := len(first.GetInitialResourceVersions()); n > maxNames {
		return tooMany(n)
	}
	for name, version := range first.GetInitialResourceVersions() {
		id, err := spiffeid.FromString(name)
		d.has[name] = held{version: version, certificate: name == s.cfg.DefaultSVIDName || err == nil && id.Path() != ""}
	}
	if err := d.request(first, true); err != nil {
		return err
	}
	ctx := stream.Context()
	v, err := s.feed.Open(ctx)
	if err != nil {
		return err
	}
	err = d.talk(stream, v)
	v.End(ctx, err)
	return err
}

func (d *delta) talk(stream secretv3.SecretDiscoveryService_DeltaSecretsServer, v *workloadapi.Visit) error {
	ctx := stream.Context()
	in := listen(ctx, stream.Recv)
	for {
		value, err := v.Next(ctx)
		if err != nil {
			if workloadapi.Withdrawn(err) && v.Alive() {
				if resp, _, err := d.respond(nil); err == nil && resp != nil {
					_ = stream.Send(resp) // the stream ends anyway
				}
			}
			return err
		}
		resp, handed, err := d.respond(value.(*material))
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
		if req.GetResponseNonce() != "" && req.GetErrorDetail() != nil {
			d.refused(v.Followed, req.GetErrorDetail().GetMessage())
		}
		if err := d.request(req, false); err != nil {
			return err
		}
	}
}

// request takes in a request. The word on a response needs no answer: what a client refused it is not
// sent again until it changes.
func (d *delta) request(req *discoveryv3.DeltaDiscoveryRequest, first bool) error {
	if err := checkType(req.GetTypeUrl()); err != nil {
		return err
	}
	if n := len(d.names) + len(req.GetResourceNamesSubscribe()); n > maxNames {
		return tooMany(n)
	}
	for _, name := range req.GetResourceNamesUnsubscribe() {
		if name == "*" {
			d.all = false
			maps.DeleteFunc(d.has, func(name string, _ held) bool { _, asked := d.names[name]; return !asked })
			continue
		}
		delete(d.names, name)
		if !d.all {
			delete(d.has, name)
		}
	}
	for _, name := range req.GetResourceNamesSubscribe() {
		if name == "*" {
			d.all = true
			continue
		}
		_, had := d.has[name]
		d.names[name] = d.names[name] || had
		if !first { // who asks again wants it again
			delete(d.has, name)
		}
	}
	return nil
}

// respond returns what the client lacks and what is gone, or nil if there is neither. Without material
// everything is gone.
func (d *delta) respond(m *material) (*discoveryv3.DeltaDiscoveryResponse, workloadapi.Handed, error) {
	var handed workloadapi.Handed
	want := slices.Collect(maps.Keys(d.names))
	if d.all && m != nil {
		want = append(want, m.names()...)
	}
	slices.Sort(want)
	there := map[string]*resource{}
	var unknown []string
	if m != nil {
		for _, name := range slices.Compact(want) {
			r, err := m.find(&d.cfg, name, d.plainOnly)
			if err != nil {
				return nil, handed, err
			}
			if r != nil {
				there[name] = r
			} else if _, had := d.has[name]; !had && !d.names[name] {
				unknown = append(unknown, name)
			}
		}
	}
	if len(unknown) > 0 {
		return nil, handed, errUnknown(unknown)
	}
	var changed []*resource
	for _, name := range slices.Sorted(maps.Keys(there)) {
		r := there[name]
		if _, asked := d.names[name]; asked {
			d.names[name] = true
		}
		if d.has[name].version != r.version {
			changed = append(changed, r)
		}
		d.has[name] = held{version: r.version, certificate: r.from != nil}
	}
	handed = hand(changed)
	var removed []string
	for _, name := range slices.Sorted(maps.Keys(d.has)) {
		if there[name] != nil {
			continue
		}
		r, err := d.instead(name)
		if err != nil {
			return nil, handed, err
		}
		switch {
		case r == nil:
			removed = append(removed, name)
			delete(d.has, name)
		case d.has[name].version != r.version:
			changed = append(changed, r)
			d.has[name] = held{version: r.version, certificate: true}
		}
	}
	if len(changed)+len(removed) == 0 {
		return nil, handed, nil
	}
	d.count++
	resp := &discoveryv3.DeltaDiscoveryResponse{
		TypeUrl: typeURL, Nonce: strconv.FormatUint(d.count, 10), SystemVersionInfo: strconv.FormatUint(d.count, 10), RemovedResources: removed,
	}
	for _, r := range changed {
		resp.Resources = append(resp.Resources, &discoveryv3.Resource{Name: r.name, Version: r.version, Resource: r.body})
	}
	return resp, handed, nil
}

// instead returns what takes the place of something that is gone, or nil if nothing does: bundles are no
// secret and do no harm, and Envoy keeps its own.
func (d *delta) instead(name string) (*resource, error) {
	if d.cfg.KeepWithdrawn || !d.has[name].certificate {
		return nil, nil
	}
	nobody, err := withdrawn()
	if err != nil {
		return nil, err
	}
	return nobody.resource(name)
}
