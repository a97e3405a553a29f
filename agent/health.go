package agent

import (
	"errors"
	"sync/atomic"
)

// Health says how an agent is. Its zero value is an agent that has not started. It is safe for
// concurrent use.
type Health struct {
	check atomic.Pointer[func() (live, ready error)]
}

// Live returns nil while the agent runs. An agent whose server is away, or that was banned, is
// alive: restarting it would help nobody.
func (h *Health) Live() error {
	live, _ := h.state()
	return live
}

// Ready returns nil when the Workload API listens, there is a picture to answer from, and the agent has
// a valid SVID of its own to ask the server with. Its error says what is missing, why, and what was lost.
// An agent that is not ready serves all the same what is valid. One that stands by for another is ready: its
// node is served.
func (h *Health) Ready() error {
	_, ready := h.state()
	return ready
}

func (h *Health) state() (live, ready error) {
	check := h.check.Load()
	if check == nil {
		err := errors.New("agent has not started")
		return err, err
	}
	return (*check)()
}

func (h *Health) set(check func() (live, ready error)) { h.check.Store(&check) }
