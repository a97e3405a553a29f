package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/assay-id/assay/agent/keep"
	"github.com/assay-id/assay/workloadapi/peer"
)

// socketPause is how often a socket is looked at on which somebody else listens.
const socketPause = 50 * time.Millisecond

// take takes the data directory. Another agent that has it is an error, or with Standby waited for: such an
// agent is ready all the while, for the node is served, and has everything behind it that needs no data
// directory.
func take(ctx context.Context, cfg Config) (*keep.Turn, error) {
	log := cfg.Log.WithField("component", "agent").WithField("data_dir", cfg.DataDir)
	turn, err := keep.Take(cfg.DataDir)
	if errors.Is(err, keep.ErrInUse) && !cfg.Standby {
		return nil, fmt.Errorf("%w; end it first, or set standby in agent { } for an agent that waits for the other's end", err)
	}
	waits := errors.Is(err, keep.ErrInUse)
	began := cfg.Now()
	stand := func(what string, err error) {
		cfg.Health.set(func() (live, ready error) { return nil, nil })
		log.WithError(err).Info("standing by: " + what)
		if cfg.StandingBy != nil {
			cfg.StandingBy()
		}
	}
	if waits {
		stand("waiting for the other agent to end", err)
		turn, err = keep.Await(ctx, cfg.DataDir)
	}
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("%w%s", err, mayNot(err))
	}
	if !cfg.Standby {
		return turn, nil
	}
	// Agents of before there was a lock are known by their socket.
	if err := peer.Vacant(cfg.SocketPath); errors.Is(err, peer.ErrInUse) {
		if !waits {
			stand("waiting for whoever listens on the socket to end", err)
			waits = true
		}
		if err := awaitSocket(ctx, cfg.SocketPath); err != nil {
			turn.End()
			return nil, err
		}
	}
	if waits {
		log.WithField("after", cfg.Now().Sub(began).String()).Info("the node is this agent's now")
	}
	return turn, nil
}

func awaitSocket(ctx context.Context, path string) error {
	tick := time.NewTicker(socketPause)
	defer tick.Stop()
	for errors.Is(peer.Vacant(path), peer.ErrInUse) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
