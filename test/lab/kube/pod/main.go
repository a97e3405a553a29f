// Command pod is what the pods of the private cluster run: "pause" waits for its end, as every pod's sandbox
// does; "watch" keeps a stream of the Workload API open and prints a line of JSON at its start, and each time
// it has another identity or none; "fetch" has it once; "dial"
// says which of the addresses it is given can be connected to; "hammer" fetches its identity from eight connections for some seconds, each
// time on a new one and then on those that it has, and prints how often it had it.
package main

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

func main() {
	say("main", "", nil)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) < 3 || filepath.Base(os.Args[0]) == "pause" {
		<-ctx.Done()
		return
	}
	switch os.Args[1] {
	case "watch":
		client, err := workloadapi.New(ctx, workloadapi.WithAddr(os.Args[2]), workloadapi.WithBackoffStrategy(often{}))
		if err != nil {
			say("error", "", err)
			os.Exit(1)
		}
		defer client.Close()
		_ = client.WatchX509Context(ctx, watcher{}) // it ends with ctx
	case "fetch":
		svid, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(os.Args[2]))
		if err != nil {
			say("error", "", err)
			os.Exit(1)
		}
		say("svid", svid.ID.String(), nil)
	case "dial":
		for _, address := range os.Args[2:] {
			conn, err := (&net.Dialer{Timeout: 2 * time.Second}).DialContext(ctx, "tcp", address)
			if err != nil {
				say("closed", address, err)
				continue
			}
			_ = conn.Close()
			say("open", address, nil)
		}
	case "hammer":
		hammer(ctx, os.Args[2])
		<-ctx.Done()
	}
}

// How hammer asks.
const (
	callers   = 8
	hammering = 4 * time.Second
)

// hammer asks on a new connection each time, and then as often on one that each caller keeps.
func hammer(ctx context.Context, address string) {
	for _, kept := range []bool{false, true} {
		within, cancel := context.WithTimeout(ctx, hammering)
		var had atomic.Int64
		var group sync.WaitGroup
		say("hammer", strconv.FormatBool(kept), nil)
		for range callers {
			group.Go(func() {
				client, err := workloadapi.New(within, workloadapi.WithAddr(address))
				if err != nil {
					say("error", "", err)
					return
				}
				defer client.Close()
				for within.Err() == nil {
					if kept {
						_, err = client.FetchX509SVID(within)
					} else {
						_, err = workloadapi.FetchX509SVID(within, workloadapi.WithAddr(address))
					}
					if err == nil {
						had.Add(1)
					} else if within.Err() == nil {
						say("error", "", err)
					}
				}
			})
		}
		group.Wait()
		cancel()
		say("hammered", strconv.FormatInt(had.Load(), 10), nil)
	}
}

type watcher struct{}

// OnX509ContextUpdate says who this is now.
func (watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	say("svid", c.DefaultSVID().ID.String(), nil)
}

// OnX509ContextWatchError says that there is no identity.
func (watcher) OnX509ContextWatchError(err error) { say("none", "", err) }

// often asks again soon: the times that are measured are not to be those of a client's patience.
type often struct{}

func (often) NewBackoff() workloadapi.Backoff { return often{} }
func (often) Next() time.Duration             { return 20 * time.Millisecond }
func (often) Reset()                          {}

func say(what, id string, err error) {
	line := map[string]any{"at": time.Now().UTC().Format(time.RFC3339Nano), "what": what}
	if id != "" {
		line["id"] = id
	}
	if err != nil {
		line["error"] = err.Error()
	}
	_ = json.NewEncoder(os.Stdout).Encode(line) // nobody is left to be told
}
