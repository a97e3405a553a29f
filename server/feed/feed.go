// Package feed tells agents what they may have: each agent with a stream gets its picture from
// server/view, first whole or as the difference to what it says it holds, and from then on every
// difference. It also answers SPIRE's GetAuthorizedEntries and SyncAuthorizedEntries from the same
// pictures, so that a stock spire-agent and ours never see different things.
//
// Why it is so: a stream has at most one picture on its way. The next is made only when the agent
// has acknowledged that one, and it is made from what is in force then; what came between is
// skipped. So a slow agent costs the server one picture that it shares with others and one part of
// less than a MiB, never a queue. Each picture carries a checksum of all the agent must now hold;
// an agent that computes another one comes back for a full picture.
//
// An agent that understands verdicts reports on its stream which images it runs, and gets the verdicts
// on these and the entries that demand one. To any other agent neither exists.
package feed

import (
	"cmp"
	"context"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/kv"
	"github.com/assay-id/assay/server/view"
	"github.com/assay-id/assay/server/wire/feedv1"
)

// source is what the feed asks of *view.View.
type source interface {
	Ready() <-chan struct{}
	Rev() kv.Rev
	Wait(ctx context.Context, rev kv.Rev) error
	Follow(id spiffeid.ID) (*view.AgentPicture, <-chan struct{})
	FollowNode(id spiffeid.ID) (*records.Node, <-chan struct{})
	AgentRev(id spiffeid.ID) kv.Rev
	SetRunning(agent spiffeid.ID, stream uint64, digests []string)
	Leave(agent spiffeid.ID, stream uint64)
}

// Config says who calls and may call, and what a stream is allowed.
type Config struct {
	// Caller returns the agent that calls, from the context of a stream. Required.
	Caller func(ctx context.Context) (agent spiffeid.ID, ok bool)
	// Authorize says whether the caller is still an agent with an active SVID. It is called when a
	// stream starts, whenever the record of its node has changed, and every Recheck. A gRPC status
	// that it returns ends the stream as it is, details included. Required.
	Authorize func(ctx context.Context) error

	// Authority names the authority that signed the certificate the agent calls with, from the context
	// of a stream. Nil: no status says so.
	Authority func(ctx context.Context) string

	Log     logrus.FieldLogger    // default: nothing is logged
	Metrics prometheus.Registerer // default: a registry nobody reads
	Now     func() time.Time      // default time.Now

	// HelloTimeout is how long a stream may take to say Hello (default 10 s), AckTimeout how long to
	// acknowledge a picture (default 2 min): an agent that does neither reconnects or is gone.
	HelloTimeout time.Duration
	AckTimeout   time.Duration
	// Recheck is how often Authorize is asked without a change of the record, so that an SVID which
	// expires ends its streams (default 1 min).
	Recheck time.Duration
	// PartSize is how many bytes one message holds at most, if it holds more than one thing
	// (default 1 MiB less what the message itself takes).
	PartSize int
	// StreamsPerAgent is how many streams one agent may have (default 4: a new connection and some
	// that died unnoticed). With one more, the oldest ends.
	StreamsPerAgent int
	// Returning is for how long an agent is expected back after its last stream ended (default 30 s): it
	// reconnects for each SVID of its own, and with none of its streams it is not away yet.
	Returning time.Duration
}

func (c Config) withDefaults() Config {
	if c.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		c.Log = silent
	}
	if c.Metrics == nil {
		c.Metrics = prometheus.NewRegistry()
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	c.HelloTimeout = cmp.Or(c.HelloTimeout, 10*time.Second)
	c.AckTimeout = cmp.Or(c.AckTimeout, 2*time.Minute)
	c.Recheck = cmp.Or(c.Recheck, time.Minute)
	c.PartSize = cmp.Or(c.PartSize, 1<<20-4096)
	c.StreamsPerAgent = cmp.Or(c.StreamsPerAgent, 4)
	c.Returning = cmp.Or(c.Returning, 30*time.Second)
	return c
}

// Server serves assay.feed.v1.Feed.
type Server struct {
	feedv1.UnimplementedFeedServer

	view source
	cfg  Config
	m    *metrics

	// mu guards the following, and in each stream what is said there.
	mu      sync.Mutex
	streams map[spiffeid.ID][]*stream // by agent, oldest first
	count   uint64                    // of streams there ever were
	// left has, of the agents without a stream, those expected back. Older ones may still be in it.
	left   map[spiffeid.ID]departure
	forgot time.Time // when the older ones were dropped
}

// New returns a server of the view's pictures. It panics if cfg lacks a required function, because a
// feed that does not know its callers must not exist.
func New(v *view.View, cfg Config) *Server {
	if cfg.Caller == nil || cfg.Authorize == nil {
		panic("feed: Config.Caller and Config.Authorize are required")
	}
	s := &Server{view: v, cfg: cfg.withDefaults(), streams: map[spiffeid.ID][]*stream{}, left: map[spiffeid.ID]departure{}}
	s.m = newMetrics(s.cfg.Metrics, s)
	return s
}

// Register makes the service known to a gRPC server.
func (s *Server) Register(r grpc.ServiceRegistrar) { feedv1.RegisterFeedServer(r, s) }

// StreamStatus is one agent's stream as an operator sees it.
type StreamStatus struct {
	Agent spiffeid.ID
	// Version is what the agent says of itself.
	Version string
	Since   time.Time // when the stream began
	// Rev is the revision of the agent's picture at the server, Sent that of the last picture sent
	// to it, Acked that of the last it has put in force.
	Rev, Sent, Acked kv.Rev
	AckedAt          time.Time // zero: never
	// Authority signed the certificate that the agent connected with, as Config.Authority says.
	Authority string
	// Held is what is held for its workloads, by authority and sorted by that. It is known if Reports is
	// set, and for the authority that signed last there it may be older.
	Reports  bool
	Held     []HeldAuthority
	Pictures uint64 // sent on this stream
	Bytes    uint64 // of all parts sent on this stream
}

// Lag returns how many revisions the agent is behind its picture at the server.
func (s StreamStatus) Lag() uint64 {
	if s.Rev <= s.Acked {
		return 0
	}
	return uint64(s.Rev - s.Acked)
}

// Status returns the state of all streams, sorted by agent, each agent's oldest first.
func (s *Server) Status() []StreamStatus {
	s.mu.Lock()
	var all []StreamStatus
	for _, streams := range s.streams {
		for _, st := range streams {
			all = append(all, st.status)
		}
	}
	s.mu.Unlock()
	for i := range all {
		all[i].Rev = s.view.AgentRev(all[i].Agent)
	}
	slices.SortStableFunc(all, func(a, b StreamStatus) int {
		return cmp.Or(cmp.Compare(a.Agent.String(), b.Agent.String()), a.Since.Compare(b.Since))
	})
	return all
}

// add registers a stream. The one that is too many is told to end.
func (s *Server) add(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := st.agent
	delete(s.left, id)
	if len(s.streams[id]) >= s.cfg.StreamsPerAgent {
		close(s.streams[id][0].replaced)
		s.streams[id] = slices.Delete(s.streams[id], 0, 1)
	}
	s.streams[id] = append(s.streams[id], st)
	s.count++
	st.number = s.count
}

func (s *Server) remove(st *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	rest := slices.DeleteFunc(s.streams[st.agent], func(o *stream) bool { return o == st })
	if len(rest) > 0 {
		s.streams[st.agent] = rest
		return
	}
	delete(s.streams, st.agent)
	if s.cfg.Now().Sub(s.forgot) > s.cfg.Returning {
		s.forgetAway() // so that s.left has no more than what went within two of these
	}
	s.left[st.agent] = departure{at: s.cfg.Now(), acked: st.status.Acked}
}
