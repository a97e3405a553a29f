package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/workloadapi/unixsocket"
)

// socketPause is how often a socket is looked at on which somebody else listens.
const socketPause = 50 * time.Millisecond

// take takes the data directory. Another agent that has it is an error, or with Standby waited for: such an
// agent is ready all the while, for the node is served. It knows the node by its attestors then, and has a
// socket ready that the other puts in its place; what it has is no more than this agent's to open.
func take(ctx context.Context, cfg Config) (*keep.Turn, *unixsocket.Socket, error) {
	turn, err := keep.Take(cfg.DataDir)
	switch {
	case err == nil && !cfg.Standby:
		if err := cfg.vacant(); err != nil {
			turn.End()
			return nil, nil, err
		}
		return turn, nil, nil
	case errors.Is(err, keep.ErrInUse) && !cfg.Standby:
		return nil, nil, fmt.Errorf("%w; end it first, or set standby in agent { } for an agent that waits for the other's end", err)
	case err != nil && !errors.Is(err, keep.ErrInUse):
		return nil, nil, fmt.Errorf("%w%s", err, mayNot(err))
	}
	w := &waiting{cfg: cfg, log: cfg.Log.WithField("component", "agent").WithField("data_dir", cfg.DataDir), began: cfg.Now()}
	var socket *unixsocket.Socket
	if err != nil {
		// Before anybody is told: who hears that an agent stands by may end the other at once.
		var unready error
		if socket, unready = unixsocket.Prepare(cfg.SocketPath, 0o777, 0o755); unready != nil {
			w.log.WithError(unready).Warn("no socket could be prepared: callers may be refused for a moment")
		}
		w.stand("waiting for the other agent to end", err)
		if turn, err = keep.Await(ctx, cfg.DataDir); err != nil {
			if socket != nil {
				socket.Withdraw()
			}
			return nil, nil, err
		}
	}
	// Agents of before there was a lock are known by their socket.
	if err := unixsocket.Vacant(cfg.SocketPath); socket == nil && errors.Is(err, unixsocket.ErrInUse) {
		w.stand("waiting for whoever listens on the socket to end", err)
		if err := awaitSocket(ctx, cfg.SocketPath); err != nil {
			turn.End()
			return nil, nil, err
		}
	}
	if w.stands {
		w.log.WithField("after", cfg.Now().Sub(w.began).String()).Info("the node is this agent's now")
	}
	return turn, socket, nil
}

// sockets returns the paths of the agent's sockets by their keys in the configuration.
func (c Config) sockets() map[string]string {
	paths := map[string]string{}
	if c.AdminSocketPath != "" {
		paths["admin_socket_path"] = c.AdminSocketPath
	}
	if !c.DisableWorkloadAPI {
		paths["socket_path"] = c.SocketPath
	}
	return paths
}

// warnOfOthers tells of sockets that somebody else could put others in the place of: workloads would have their
// identity from him.
func (c Config) warnOfOthers() {
	for key, path := range c.sockets() {
		if who := unixsocket.Exposed(path); who != "" {
			c.Log.WithFields(logrus.Fields{"component": "agent", "key": key, "socket": path}).
				Warn("somebody else could put another socket in this one's place: " + who)
		}
	}
}

// vacant says why the agent cannot have its sockets, or nil. It is asked before anything is done that cannot be
// undone: a join token is good once.
func (c Config) vacant() error {
	for key, path := range c.sockets() {
		if err := unixsocket.Vacant(path); err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
	}
	return nil
}

// waiting is an agent that stands by, or may have to.
type waiting struct {
	cfg    Config
	log    logrus.FieldLogger
	began  time.Time
	stands bool
}

// stand says that the agent stands by, and why.
func (w *waiting) stand(what string, why error) {
	w.log.WithError(why).Info("standing by: " + what)
	if w.stands {
		return
	}
	w.stands = true
	w.cfg.Health.set(func() (live, ready error) { return nil, nil })
	if w.cfg.StandingBy != nil {
		w.cfg.StandingBy()
	}
}

func awaitSocket(ctx context.Context, path string) error {
	tick := time.NewTicker(socketPause)
	defer tick.Stop()
	for errors.Is(unixsocket.Vacant(path), unixsocket.ErrInUse) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
