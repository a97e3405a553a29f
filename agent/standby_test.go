package agent_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"google.golang.org/protobuf/proto"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/test/fake/fakeserver"
)

// second is an agent of the same configuration that was started while the first runs.
func (n *node) second(change func(*agent.Config)) (cfg *agent.Config, hook *logtest.Hook, run func(context.Context) chan error) {
	c := n.cfg
	log, hook := logtest.NewNullLogger()
	log.SetLevel(logrus.DebugLevel)
	c.Log, c.Metrics, c.Health = log, prometheus.NewRegistry(), new(agent.Health)
	c.Ready, c.StandingBy = nil, nil
	change(&c)
	return &c, hook, func(ctx context.Context) chan error {
		done := make(chan error, 1)
		go func() { done <- agent.Run(ctx, c) }()
		return done
	}
}

func TestTwoAgentsOnOneDataDirectory(t *testing.T) {
	server := fakeserver.New(t, fakeserver.Config{})
	server.Put(fakeserver.Entry("e", "/shop", mine))
	n := newNode(t, server).start()
	before := n.process().follow().until("/shop")

	t.Run("the second refuses to start, and says what to do", func(t *testing.T) {
		_, _, run := n.second(func(*agent.Config) {})
		err := <-run(t.Context())
		if !errors.Is(err, keep.ErrInUse) || !strings.Contains(err.Error(), n.cfg.DataDir) || !strings.Contains(err.Error(), "standby") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("one that stands by ends when it is told to", func(t *testing.T) {
		stands := make(chan struct{})
		_, _, run := n.second(func(c *agent.Config) { c.Standby, c.StandingBy = true, func() { close(stands) } })
		ctx, cancel := context.WithCancel(t.Context())
		done := run(ctx)
		<-stands
		cancel()
		if err := <-done; err != nil {
			t.Errorf("it ended with %v", err)
		}
	})
	t.Run("one that stands by is ready, says so, takes over when the first ends, and has nothing signed again", func(t *testing.T) {
		stands, serves := make(chan struct{}), make(chan struct{})
		cfg, hook, run := n.second(func(c *agent.Config) {
			c.Standby, c.StandingBy, c.Ready = true, func() { close(stands) }, func() { close(serves) }
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := run(ctx)
		<-stands
		if cfg.Health.Live() != nil || cfg.Health.Ready() != nil {
			t.Errorf("live %v, ready %v", cfg.Health.Live(), cfg.Health.Ready())
		}
		if last := hook.LastEntry(); !strings.Contains(last.Message, "standing by") {
			t.Errorf("it says %q", last.Message)
		}
		callers, ended := make(chan struct{}), make(chan error, 1)
		go func() { // who connects at whatever moment is not refused
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for {
				c, err := net.Dial("unix", n.cfg.SocketPath)
				if err != nil {
					ended <- err
					return
				}
				_ = c.Close()
				select {
				case <-tick.C:
				case <-callers:
					ended <- nil
					return
				}
			}
		}()
		if err := n.stop(); err != nil {
			t.Fatal(err)
		}
		<-serves
		close(callers)
		if err := <-ended; err != nil {
			t.Errorf("a caller was refused: %v", err)
		}
		if after := n.process().follow().until("/shop"); !proto.Equal(before.GetSvids()[0], after.GetSvids()[0]) {
			t.Error("another SVID is served")
		}
		if server.Calls("x509:e") != 1 {
			t.Errorf("signed %d times", server.Calls("x509:e"))
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("it ended with %v", err)
		}
	})
}
