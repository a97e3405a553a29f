package kube

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// refusing answers every entry with one status, or every call with one error.
type refusing struct {
	entryv1.EntryClient
	code codes.Code
	err  error
}

func (r refusing) BatchCreateEntry(_ context.Context, req *entryv1.BatchCreateEntryRequest, _ ...grpc.CallOption) (*entryv1.BatchCreateEntryResponse, error) {
	resp := &entryv1.BatchCreateEntryResponse{}
	for range req.GetEntries() {
		resp.Results = append(resp.Results, &entryv1.BatchCreateEntryResponse_Result{Status: &types.Status{Code: int32(r.code), Message: "no"}})
	}
	return resp, r.err
}

func (r refusing) BatchUpdateEntry(_ context.Context, req *entryv1.BatchUpdateEntryRequest, _ ...grpc.CallOption) (*entryv1.BatchUpdateEntryResponse, error) {
	resp := &entryv1.BatchUpdateEntryResponse{}
	for range req.GetEntries() {
		resp.Results = append(resp.Results, &entryv1.BatchUpdateEntryResponse_Result{Status: &types.Status{Code: int32(r.code), Message: "no"}})
	}
	return resp, r.err
}

func (refusing) BatchDeleteEntry(_ context.Context, req *entryv1.BatchDeleteEntryRequest, _ ...grpc.CallOption) (*entryv1.BatchDeleteEntryResponse, error) {
	resp := &entryv1.BatchDeleteEntryResponse{}
	for _, id := range req.GetIds() {
		resp.Results = append(resp.Results, &entryv1.BatchDeleteEntryResponse_Result{Id: id, Status: &types.Status{}})
	}
	return resp, nil
}

// deskWith returns a desk that has a pod with one entry to be, and what became of it.
func deskWith(t *testing.T, api refusing) (*desk, item, *outcome) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	m, err := newMetrics(prometheus.NewRegistry(), "c")
	if err != nil {
		t.Fatal(err)
	}
	it, o := item{podItem, "shop/web"}, &outcome{id: "kube.c.r.1"}
	return &desk{
		Registrar: &Registrar{api: API{Entries: api}, log: log, m: m},
		have:      map[string]*types.Entry{}, due: map[item]bool{},
		holders: map[item]*holder{it: {ids: map[string]bool{o.id: true}, outcomes: map[string]*outcome{"r": o}}},
	}, it, o
}

func TestAnEntryThatCannotBecomeWhatItShould(t *testing.T) {
	for code, gone := range map[codes.Code]bool{codes.InvalidArgument: true, codes.ResourceExhausted: false} {
		d, it, o := deskWith(t, refusing{code: code})
		d.have[o.id] = &types.Entry{Id: o.id, Hint: "before"}
		todo := newDifference(d)
		todo.put(it, &types.Entry{Id: o.id, Hint: "now"})
		todo.write(t.Context())
		if (d.have[o.id] == nil) != gone || o.failed == nil {
			t.Errorf("%s: there is %v, and the resource says %v", code, d.have[o.id], o.failed)
		}
	}
}

func TestWhatIsTriedAgain(t *testing.T) {
	for name, c := range map[string]struct {
		api  refusing
		want int
	}{
		"what the server would never take is not":           {refusing{code: codes.InvalidArgument}, 0},
		"what a full disk kept from being written is":       {refusing{code: codes.ResourceExhausted}, retry},
		"what a bundle is missing for is":                   {refusing{code: codes.Internal}, retry},
		"what was not answered is":                          {refusing{err: errors.New("gone")}, retry},
		"what was written is not, and its resource is glad": {refusing{code: codes.OK}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			d, it, o := deskWith(t, c.api)
			todo := newDifference(d)
			todo.put(it, &types.Entry{Id: o.id})
			todo.write(t.Context())
			if todo.again[it] != c.want {
				t.Errorf("it is to be tried again: %d, want %d", todo.again[it], c.want)
			}
			failed := c.api.err != nil || c.api.code != codes.OK
			if (o.failed != nil) != failed || !d.due[item{ruleItem, "r"}] || (d.have[o.id] == nil) != failed {
				t.Errorf("outcome %+v, due %v, have %v", o, d.due, d.have)
			}
		})
	}
}
