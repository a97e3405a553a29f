package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"

	"github.com/assay-id/assay/test/lab/docker"
)

// The workload in the container is this program too. It is told what to do over a socket in a folder
// that it shares with the driver, and says how long it took.

// order is what the workload is told.
type order struct {
	// Fetch is how many times to fetch an X509-SVID on a connection of its own, from 8 at a time.
	Fetch int `json:",omitempty"`
	// Wait says to ask until there is an SVID.
	Wait bool `json:",omitempty"`
}

// done is what it answers.
type done struct {
	Error string          `json:",omitempty"`
	Took  []time.Duration `json:",omitempty"`
	At    time.Time       // when it had what it was to get
}

// obey is the workload's life: it follows orders until the driver hangs up.
func obey(control, socket string) error {
	conn, err := net.Dial("unix", control)
	if err != nil {
		return err
	}
	defer conn.Close()
	in, out := json.NewDecoder(bufio.NewReader(conn)), json.NewEncoder(conn)
	for {
		var o order
		if err := in.Decode(&o); err != nil {
			return nil // the driver has ended
		}
		d := follow(socket, o)
		d.At = time.Now()
		if err := out.Encode(d); err != nil {
			return err
		}
	}
}

func follow(socket string, o order) done {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if o.Wait {
		for {
			s, _, err := open(ctx, socket)
			if err == nil {
				s.close()
				return done{}
			}
			if ctx.Err() != nil {
				return done{Error: err.Error()}
			}
		}
	}
	d := done{Took: make([]time.Duration, o.Fetch)}
	if err := parallel(8, o.Fetch, func(i int) error {
		start := time.Now()
		s, _, err := open(ctx, socket)
		if err != nil {
			return err
		}
		d.Took[i] = time.Since(start)
		s.close()
		return nil
	}); err != nil {
		d.Error = err.Error()
	}
	return d
}

// inContainer is a workload in a container.
type inContainer struct {
	docker.Running
	in  *json.Decoder
	out *json.Encoder
}

func (c *inContainer) tell(o order) error { return c.out.Encode(o) }

func (c *inContainer) hear() (done, error) {
	var d done
	err := c.in.Decode(&d)
	if err == nil && d.Error != "" {
		err = errors.New(d.Error)
	}
	if err != nil {
		return d, fmt.Errorf("hear from the container: %w", err)
	}
	return d, nil
}

// harbour starts such workloads.
type harbour struct {
	b      *bench
	engine *docker.Engine
	image  string
	dir    string // shared with all containers
	listen net.Listener
}

func (b *bench) openHarbour(ctx context.Context) (*harbour, error) {
	h := &harbour{b: b, dir: filepath.Join(b.Dir, "control")}
	var err error
	if h.engine, err = docker.Start(ctx); err != nil {
		return nil, err
	}
	b.later(func() {
		if err := h.engine.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "bench: close the Docker engine:", err)
		}
	})
	program, err := docker.BuildStatic(ctx, b.Dir, "github.com/assay-id/assay/test/bench")
	if err != nil {
		return nil, err
	}
	if h.image, err = h.engine.BuildScratch(ctx, docker.Image{Tag: "bench:latest", Program: program}); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.dir, 0o755); err != nil {
		return nil, err
	}
	if h.listen, err = net.Listen("unix", filepath.Join(h.dir, "control.sock")); err != nil {
		return nil, err
	}
	b.later(func() { h.listen.Close() })
	return h, nil
}

// run starts a container and waits until its workload is ready for orders.
func (h *harbour) run(ctx context.Context) (*inContainer, error) {
	c := &inContainer{}
	var err error
	c.Running, err = h.engine.Run(ctx, docker.Container{
		Image: h.image, Labels: map[string]string{"app": "bench"},
		Cmd:   []string{"-obey", "/control/control.sock", "-socket", "/agent/" + filepath.Base(h.b.agent.Socket)},
		Binds: []string{h.dir + ":/control", filepath.Dir(h.b.agent.Socket) + ":/agent:ro"},
	})
	if err != nil {
		return nil, err
	}
	conn, err := h.listen.Accept()
	if err != nil {
		return nil, err
	}
	h.b.later(func() { conn.Close() })
	c.in, c.out = json.NewDecoder(bufio.NewReader(conn)), json.NewEncoder(conn)
	return c, nil
}

// inDocker measures workloads in containers.
func inDocker(ctx context.Context, b *bench) error {
	if err := docker.Available(); err != nil {
		fmt.Fprintln(os.Stderr, "bench: the figures of Docker are not measured:", err)
		return nil
	}
	h, err := b.openHarbour(ctx)
	if err != nil {
		return err
	}
	if err := b.startAgent(ctx, h.engine.Socket()); err != nil {
		return err
	}
	entry := entryFor(b.node, "/in-docker", "")
	entry.Selectors = []*types.Selector{{Type: "docker", Value: "label:app:bench"}}
	made, err := b.create(ctx, []*types.Entry{entry})
	if err != nil {
		return err
	}
	c, err := firstCalls(ctx, b, h)
	if err != nil {
		return err
	}
	if err := knownContainer(b, h, c); err != nil {
		return err
	}
	return laterEntries(ctx, b, c, made[0])
}

// firstCalls measures how long the first call takes in containers that nobody has asked about, and
// returns the last of them.
func firstCalls(ctx context.Context, b *bench, h *harbour) (*inContainer, error) {
	var first times
	var last *inContainer
	count := max(b.n(20), 3)
	for range count {
		c, err := h.run(ctx)
		if err != nil {
			return nil, err
		}
		if err := c.tell(order{Fetch: 1}); err != nil {
			return nil, err
		}
		d, err := c.hear()
		if err != nil {
			return nil, err
		}
		first = append(first, d.Took[0])
		if last != nil {
			if err := h.engine.Remove(ctx, last.ID); err != nil {
				return nil, err
			}
		}
		last = c
	}
	b.report(figure{"Docker workload: first call → SVID, p50", "10.7 ms", 5, "ms"}, first.at(50), fmt.Sprintf("(%d containers, p99 %.1f ms)", count, first.at(99)))
	return last, nil
}

// knownContainer measures what calls from a container cost that is known already.
func knownContainer(b *bench, h *harbour, c *inContainer) error {
	count := b.n(2000)
	var engine time.Duration
	agent, err := cpuOf(func() error {
		var err error
		engine, err = cpuOf(func() error {
			if err := c.tell(order{Fetch: count}); err != nil {
				return err
			}
			_, err := c.hear()
			return err
		}, h.engine.PID())
		return err
	}, b.agent.PID())
	if err != nil {
		return err
	}
	b.report(figure{"Docker workload, container known: agent CPU per call", "2,600 µs", 500, "µs"}, micros(agent, count), "")
	b.report(figure{"Docker workload, container known: dockerd CPU per call", "1,200 µs", 0, "µs"}, micros(engine, count), "(must be about 0)")
	return nil
}

// laterEntries measures how soon a container has its SVID when its entry comes later than it.
func laterEntries(ctx context.Context, b *bench, c *inContainer, entry *types.Entry) error {
	var late times
	rounds := b.rounds(100)
	for range rounds {
		if err := b.remove(ctx, entry); err != nil {
			return err
		}
		if err := c.tell(order{Wait: true}); err != nil {
			return err
		}
		// Not in step with anything.
		if !sleep(ctx, 200*time.Millisecond+rand.N(300*time.Millisecond)) {
			return ctx.Err()
		}
		entry.Id = ""
		start := time.Now()
		made, err := b.create(ctx, []*types.Entry{entry})
		if err != nil {
			return err
		}
		entry = made[0]
		d, err := c.hear()
		if err != nil {
			return err
		}
		late = append(late, d.At.Sub(start))
	}
	b.report(figure{"Docker entry created after the container runs → SVID, p50", "4,200 ms", 20, "ms"}, late.at(50), fmt.Sprintf("(%d rounds)", rounds))
	b.report(figure{"Docker entry created after the container runs → SVID, p99", "9,100 ms", 100, "ms"}, late.at(99), "")
	return nil
}
