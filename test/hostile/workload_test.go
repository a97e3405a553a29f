package hostile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/attestor/unix"
)

// beCaller is a workload that asks for its identity and is dead before the answer: it connects, sends
// the whole call in one write, and exits.
func beCaller(path string) {
	conn, err := net.Dial("unix", path)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var c client
	c.Framer = http2.NewFramer(conn, nil)
	c.enc = newEncoder(&c)
	_, err = io.WriteString(conn, http2.ClientPreface)
	if err == nil {
		err = errors.Join(c.WriteSettings(), c.open(1, fetchX509, "workload.spiffe.io", "true"), c.WriteData(1, true, framed(0, 0, nil)))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestWorkloadSocket attacks the Workload API's socket as the processes of a node can.
func TestWorkloadSocket(t *testing.T) {
	v := newVictim(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	t.Run("callers that are dead before the answer", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			failed := crowd(scaled(150, 3000), func(int) error {
				cmd := exec.Command(self, v.is.WorkloadSocket)
				cmd.Env = append(os.Environ(), role+"=caller")
				cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
				return cmd.Run()
			})
			if failed > 0 {
				t.Errorf("%d callers could not call", failed)
			}
		})
	})
	t.Run("connects and drops", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			failed := crowd(scaled(5_000, 50_000), func(i int) error {
				conn, err := net.Dial("unix", v.is.WorkloadSocket)
				if err != nil {
					return err
				}
				if i%2 == 0 {
					_, err = io.WriteString(conn, http2.ClientPreface[:i%len(http2.ClientPreface)])
				}
				return errors.Join(err, conn.Close())
			})
			t.Logf("%d found the socket busy, or were closed first", failed)
		})
	})
	t.Run("connections that say nothing", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			var conns []net.Conn
			for range scaled(300, 2000) {
				conn, err := net.Dial("unix", v.is.WorkloadSocket)
				if err != nil {
					t.Fatal(err)
				}
				conns = append(conns, conn)
			}
			// gRPC hangs up on those who say nothing for ten seconds; these do not wait for it.
			for _, conn := range conns {
				_ = conn.Close()
			}
		})
	})
	t.Run("streams that are opened and canceled", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
			conn := unixConn(t, v.is.WorkloadSocket)
			defer conn.Close()
			crowd(scaled(3_000, 30_000), func(i int) error {
				ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(short(t), "workload.spiffe.io", "true"))
				defer cancel()
				stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
				if err == nil && i%2 == 0 {
					_, err = stream.Recv()
				}
				return err
			})
		})
	})
	t.Run("streams that are opened and never read", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 256 * mib}, func(t *testing.T) {
			entry := func(hint string) *types.Entry {
				return &types.Entry{
					SpiffeId: wireID("/changing"), ParentId: wireID("/node"), Hint: hint,
					Selectors: []*types.Selector{{Type: unix.Type, Value: fmt.Sprint("uid:", os.Getuid())}},
				}
			}
			made, err := entryv1.NewEntryClient(v.local).BatchCreateEntry(short(t), &entryv1.BatchCreateEntryRequest{Entries: []*types.Entry{entry("0")}})
			if err != nil || made.GetResults()[0].GetStatus().GetCode() != 0 {
				t.Fatal(err, made)
			}
			id := made.GetResults()[0].GetEntry().GetId()
			var clients []*client
			for range scaled(4, 20) {
				c := overUnix(t, v.is.WorkloadSocket, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
				clients = append(clients, c)
				for i := range 250 {
					stream := uint32(2*i + 1)
					if c.open(stream, fetchX509, "workload.spiffe.io", "true") != nil || c.WriteData(stream, true, framed(0, 0, nil)) != nil {
						t.Fatal("a connection was closed")
					}
				}
			}
			// Each change is an answer for each stream, of which none is taken.
			for i := range scaled(20, 200) {
				e := entry(fmt.Sprint(i + 1))
				e.Id = id
				if _, err := entryv1.NewEntryClient(v.local).BatchUpdateEntry(short(t), &entryv1.BatchUpdateEntryRequest{Entries: []*types.Entry{e}}); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("the victim with %d streams that nobody reads: %s", len(clients)*250, v.size())
			for _, c := range clients {
				_ = c.conn.Close()
			}
			if _, err := entryv1.NewEntryClient(v.local).BatchDeleteEntry(short(t), &entryv1.BatchDeleteEntryRequest{Ids: []string{id}}); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("a user that opens all the streams there are leaves some for others", func(t *testing.T) {
		v.suffer(t, bounds{}, func(t *testing.T) {
			conn := unixConn(t, v.is.WorkloadSocket)
			defer conn.Close()
			var mu sync.Mutex
			ends := map[codes.Code]int{}
			crowd(scaled(2_000, 40_000), func(int) error {
				ctx := metadata.AppendToOutgoingContext(short(t), "workload.spiffe.io", "true")
				stream, err := workload.NewSpiffeWorkloadAPIClient(conn).FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
				if err == nil {
					_, err = stream.Recv()
				}
				mu.Lock()
				defer mu.Unlock()
				ends[status.Code(err)]++
				return err
			})
			for code := range ends {
				if code != codes.OK && code != codes.ResourceExhausted {
					t.Errorf("streams ended with %v", ends)
				}
			}
			t.Logf("streams began with %v; the victim: %s", ends, v.size())
		})
	})
}
