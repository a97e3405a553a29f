package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/sirupsen/logrus"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	"github.com/assay-id/assay/server/api/caller"
	"github.com/assay-id/assay/server/kube"
	"github.com/assay-id/assay/server/verdict"
	"github.com/assay-id/assay/server/view"
)

// clusters are the registrars of Kubernetes clusters. They call the server's own API, each over a
// connection that never leaves the process, and so are audited and refused like everybody.
type clusters struct {
	registrars []*kube.Registrar
	conns      []*grpc.ClientConn
	inside     []*insideServer
}

// insideServer serves the API to one part of this process.
type insideServer struct {
	server   *grpc.Server
	listener *bufconn.Listener
}

// insideBuffer is how many bytes may be on the way between the two ends of a connection.
const insideBuffer = 256 << 10

// serveInside returns a connection to the services that register adds, whose caller is the named part.
func serveInside(part string, options []grpc.ServerOption, register func(grpc.ServiceRegistrar)) (*insideServer, *grpc.ClientConn, error) {
	credentials := caller.InsideCredentials(part)
	s := &insideServer{
		server:   grpc.NewServer(append(slices.Clip(options), grpc.Creds(credentials))...),
		listener: bufconn.Listen(insideBuffer),
	}
	register(s.server)
	conn, err := grpc.NewClient("passthrough:///inside", grpc.WithTransportCredentials(credentials),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.listener.DialContext(ctx) }))
	if err != nil {
		return nil, nil, fmt.Errorf("connect %s to the API: %w", part, err)
	}
	return s, conn, nil
}

// open makes the registrars, before tell or run is called.
func (c *clusters) open(cfg *Config, options []grpc.ServerOption, register func(grpc.ServiceRegistrar), pictures *view.View, judge *verdict.Service, log logrus.FieldLogger) error {
	for _, one := range cfg.Clusters {
		of := *one
		of.TrustDomain, of.Log, of.Metrics = cfg.TrustDomain.Name(), log, cfg.Metrics
		of.Policies = func() (scan, trust []string) { return nil, nil } // without an evidence block there are none
		if judge != nil {
			of.Policies = judge.PolicyNames
		}
		inside, conn, err := serveInside("kubernetes/"+of.Name, options, register)
		if err != nil {
			return err
		}
		cluster, err := kube.Connect(of)
		if err != nil {
			return err
		}
		registrar, err := kube.New(kube.NewAPI(conn, following(pictures)), cluster, of)
		if err != nil {
			return err
		}
		c.registrars, c.conns, c.inside = append(c.registrars, registrar), append(c.conns, conn), append(c.inside, inside)
	}
	return nil
}

// following returns a function that returns whenever the view has moved since it returned last.
func following(pictures *view.View) func(context.Context) error {
	last := pictures.Rev()
	return func(ctx context.Context) error {
		if err := pictures.Wait(ctx, last+1); err != nil {
			return err
		}
		last = pictures.Rev()
		return nil
	}
}

// tell has events made at the pods whose identity turned with a verdict.
func (c *clusters) tell(t verdict.Turn) {
	for _, r := range c.registrars {
		r.Tell(kube.Turn{Allowed: t.Allowed, Policy: t.Policy, Digests: t.Digests, Reason: t.Reason})
	}
}

// policiesChanged has rules that name policies looked at again.
func (c *clusters) policiesChanged() {
	for _, r := range c.registrars {
		r.PoliciesChanged()
	}
}

// run keeps the entries of all clusters until ctx ends; ready says that the API can be called.
func (c *clusters) run(ctx context.Context, ready <-chan struct{}) error {
	if len(c.registrars) == 0 {
		return nil
	}
	select {
	case <-ready:
	case <-ctx.Done():
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	for i, registrar := range c.registrars {
		group.Go(func() error { return serve(c.inside[i].server, c.inside[i].listener) })
		group.Go(func() error {
			defer c.inside[i].server.Stop()
			err := registrar.Run(ctx)
			return errors.Join(err, c.conns[i].Close())
		})
	}
	return group.Wait()
}
