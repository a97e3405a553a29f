package hostile

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"
	"testing"
	"time"

	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
)

const mib = 1 << 20

// crowd does something n times, on several goroutines, and returns how often it failed.
func crowd(n int, do func(i int) error) (failed int) {
	var wg sync.WaitGroup
	var mu sync.Mutex
	next := 0
	for range 32 {
		wg.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= n {
					return
				}
				if do(i) != nil {
					mu.Lock()
					failed++
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return failed
}

// TestTransport attacks the server's TCP listener below gRPC, and the Workload API's socket likewise
// where a Unix socket has the same weakness.
func TestTransport(t *testing.T) {
	v := newVictim(t)
	ways := []struct {
		name string
		open func(t *testing.T, settings ...http2.Setting) *client
		call string
		most int // bytes of a request
	}{
		{"the server", func(t *testing.T, s ...http2.Setting) *client { return overTLS(t, v.is.Address, nil, s...) }, getBundle, 4*mib - 100},
		{"the Workload API", func(t *testing.T, s ...http2.Setting) *client { return overUnix(t, v.is.WorkloadSocket, s...) }, fetchX509, 60 << 10},
	}
	t.Run("more calls at once than a connection may have", func(t *testing.T) {
		v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
			c := overTLS(t, v.is.Address, nil)
			const calls = 1000
			for i := range calls {
				if err := c.open(uint32(2*i+1), getBundle); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "those too many to be refused", func() (end bool) {
				c.got(func() { end = c.refused >= calls/2 })
				return end
			})
			_ = c.conn.Close()
		})
	})
	for _, way := range ways {
		t.Run(way.name, func(t *testing.T) {
			t.Run("rapid reset", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
					for range 4 {
						c := way.open(t)
						for i := range scaled(5_000, 50_000) {
							id := uint32(2*i + 1)
							if c.open(id, way.call) != nil || c.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
								break // thrown out, which is as good
							}
						}
						_ = c.conn.Close()
					}
				})
			})
			t.Run("calls that are canceled when their request is there", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 128 * mib}, func(t *testing.T) {
					c := way.open(t)
					for i := range scaled(3_000, 30_000) {
						id := uint32(2*i + 1)
						if c.open(id, way.call, "workload.spiffe.io", "true") != nil || c.WriteData(id, true, framed(0, 0, nil)) != nil ||
							c.WriteRSTStream(id, http2.ErrCodeCancel) != nil {
							break
						}
					}
					_ = c.conn.Close()
				})
			})
			t.Run("headers that never end", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					c := way.open(t)
					if err := c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: c.headers(way.call)}); err != nil {
						t.Fatal(err)
					}
					sent := 0
					for ; sent < 64*mib; sent += 16 << 10 {
						// A literal that is never indexed: 15,000 bytes of value under a short name.
						field := append([]byte{0x10, 1, 'x', 0x7f, 0x99, 0x74}, make([]byte, 15_000)...)
						if c.WriteContinuation(1, false, field) != nil {
							break
						}
					}
					c.hungUp("after headers without an end")
					// What the two ends of a connection may hold between them is less.
					if sent >= 24*mib {
						t.Errorf("%d MiB of headers were taken in", sent/mib)
					}
				})
			})
			t.Run("headers that grow when they are unpacked", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					c := way.open(t)
					// One entry of 4,000 bytes in the table, then ten thousand references to it, of a byte each.
					block := c.headers(way.call)
					var bomb bytes.Buffer
					enc := hpack.NewEncoder(&bomb)
					_ = enc.WriteField(hpack.HeaderField{Name: "x", Value: string(make([]byte, 4000))}) // to memory
					block = append(append(bytes.Clone(block), bomb.Bytes()...), bytes.Repeat([]byte{0x80 | 62}, 10_000)...)
					_ = c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
					eventually(t, "an answer to a header bomb", func() (end bool) {
						select {
						case <-c.done:
							return true
						default:
						}
						c.got(func() { end = c.resets > 0 || c.answers > 0 || c.goAway })
						return end
					})
					c.unanswered("forty million bytes of headers, unpacked")
					_ = c.conn.Close()
				})
			})
			t.Run("a great many headers", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					c := way.open(t)
					var more []string
					for i := range 1000 {
						more = append(more, fmt.Sprint("x-", i), "0123456789")
					}
					block := c.headers(way.call, more...)
					first := min(len(block), 16<<10)
					_ = c.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:first], EndHeaders: first == len(block)})
					for rest := block[first:]; len(rest) > 0; {
						n := min(len(rest), 16<<10)
						if c.WriteContinuation(1, n == len(rest), rest[:n]) != nil {
							break
						}
						rest = rest[n:]
					}
					eventually(t, "an answer to a thousand headers", func() (end bool) {
						select {
						case <-c.done:
							return true
						default:
						}
						c.got(func() { end = c.resets > 0 || c.answers > 0 })
						return end
					})
					c.unanswered("a thousand headers")
					_ = c.conn.Close()
				})
			})
			t.Run("a message that grows when it is unpacked", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					for _, encoding := range []string{"gzip", "deflate", "snappy", "zstd", "identity", ""} {
						c := way.open(t)
						if err := c.open(1, way.call, "grpc-encoding", encoding, "workload.spiffe.io", "true"); err != nil {
							t.Fatal(err)
						}
						bomb := gzipped(8 * mib)
						_ = c.WriteData(1, true, framed(1, len(bomb), bomb))
						eventually(t, "an answer to a bomb of "+encoding, func() (end bool) {
							c.got(func() { end = c.answers > 0 || c.resets > 0 })
							return end
						})
						c.got(func() {
							// gRPC's own answers: 12 to an encoding nobody installed, 13 to a message that says
							// it is packed where the headers say it is not.
							if c.status["0"] > 0 || encoding != "identity" && encoding != "" && c.status["12"] != 1 {
								t.Errorf("%s: answered %v", encoding, c.status)
							}
						})
						_ = c.conn.Close()
					}
				})
			})
			t.Run("a flood of pings", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					c := way.open(t)
					for i := range scaled(100_000, 1_000_000) {
						if c.WritePing(false, [8]byte{byte(i)}) != nil {
							break
						}
					}
					c.hungUp("after a flood of pings")
				})
			})
			t.Run("a flood of settings", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					c := way.open(t)
					for i := range scaled(50_000, 1_000_000) {
						if c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(i)}) != nil {
							break
						}
					}
					_ = c.conn.Close()
				})
			})
			t.Run("a flood of settings whose acknowledgements nobody reads", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) { flood(t, way.open(t), v) })
			})
			t.Run("a flood of other frames", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					for _, frame := range []func(c *client, i int) error{
						func(c *client, _ int) error { return c.WriteRawFrame(0x77, 0, 0, make([]byte, 100)) }, // nobody's
						func(c *client, i int) error {
							return c.WritePriority(uint32(2*i+1), http2.PriorityParam{Weight: 7})
						},
						func(c *client, _ int) error { return c.WriteWindowUpdate(0, 1) },
						func(c *client, i int) error { return c.WriteRSTStream(uint32(2*i+1), http2.ErrCodeNo) },
						func(c *client, i int) error { return c.WriteData(uint32(2*i+1), false, nil) },
						func(c *client, _ int) error { return c.WriteGoAway(1, http2.ErrCodeNo, nil) },
					} {
						c := way.open(t)
						for i := range scaled(5_000, 100_000) {
							if frame(c, i) != nil {
								break
							}
						}
						_ = c.conn.Close()
					}
				})
			})
			t.Run("frames that are none", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					for what, send := range map[string]func(c *client) error{
						"a window beyond the limit":  func(c *client) error { return c.WriteWindowUpdate(0, math.MaxInt32) },
						"a window of nothing":        func(c *client) error { return c.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4)) },
						"an even stream":             func(c *client) error { return c.open(2, way.call) },
						"stream zero":                func(c *client) error { return c.open(0, way.call) },
						"settings of half a setting": func(c *client) error { return c.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 3)) },
						"a frame size of nothing":    func(c *client) error { return c.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1}) },
						"a frame beyond the limit":   func(c *client) error { return c.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, 1<<20)) },
						"a promise": func(c *client) error {
							return c.WriteRawFrame(http2.FramePushPromise, http2.FlagHeadersEndHeaders, 1, make([]byte, 4))
						},
						"a continuation of nothing": func(c *client) error { return c.WriteContinuation(1, true, nil) },
						"headers that are no HPACK": func(c *client) error {
							return c.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, bytes.Repeat([]byte{0xff}, 100))
						},
						"a table size beyond the limit": func(c *client) error {
							return c.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 1, []byte{0x3f, 0xe1, 0xff, 0xff, 0x07})
						},
						"data for a call that is not": func(c *client) error { return c.WriteData(1, true, []byte("x")) },
						"no frames at all": func(c *client) error {
							_, err := c.conn.Write(bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 10))
							return err
						},
					} {
						c := way.open(t)
						_ = send(c) // the other end may be faster
						// Then it is still able to tell a good call from this one, or has hung up.
						_ = c.open(9, "/nobody/Knows")
						eventually(t, "an answer after "+what, func() (end bool) {
							select {
							case <-c.done:
								return true
							default:
							}
							c.got(func() { end = c.answers > 0 || c.goAway })
							return end
						})
						_ = c.conn.Close()
					}
				})
			})
			t.Run("calls that are no gRPC", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 64 * mib}, func(t *testing.T) {
					for what, more := range map[string][]string{
						"a GET":                      {":method", "GET"},
						"a content type":             {"content-type", "text/html"},
						"no path":                    {":path", ""},
						"a path of a MiB":            {":path", "/" + string(bytes.Repeat([]byte("a"), 14_000))},
						"a path without a slash":     {":path", "nothing"},
						"a path with one slash":      {":path", "/nothing"},
						"a timeout that is none":     {"grpc-timeout", "forever"},
						"a timeout beyond the end":   {"grpc-timeout", "99999999H"},
						"a timeout below zero":       {"grpc-timeout", "-1S"},
						"a timeout of nothing":       {"grpc-timeout", "0n"},
						"bytes that are no base64":   {"x-bin", "!!!"},
						"a header in upper case":     {"X-Upper", "x"},
						"a header with a line break": {"x", "a\r\nb: c"},
						"two hosts":                  {"host", "y"},
						"a connection header":        {"connection", "close"},
					} {
						c := way.open(t)
						_ = c.open(1, way.call, append(more, "workload.spiffe.io", "true")...)
						_ = c.WriteData(1, true, framed(0, 0, nil))
						eventually(t, "an answer to "+what, func() (end bool) {
							select {
							case <-c.done:
								return true
							default:
							}
							c.got(func() {
								end = c.answers > 0 || c.resets > 0 || c.goAway || what == "two hosts" || what == "bytes that are no base64" || way.call == fetchX509
							})
							return end
						})
						_ = c.conn.Close()
					}
				})
			})
			t.Run("requests of which half never comes", func(t *testing.T) {
				v.suffer(t, bounds{Peak: 256 * mib}, func(t *testing.T) {
					var clients []*client
					for range scaled(4, 40) {
						c := way.open(t)
						clients = append(clients, c)
						for i := range 100 {
							id := uint32(2*i + 1)
							if c.open(id, way.call, "workload.spiffe.io", "true") != nil {
								break
							}
							// As much as may be is announced, and less than what a window holds is sent.
							_ = c.WriteData(id, false, framed(0, way.most, make([]byte, 600)))
						}
					}
					// They are cut off when their time is over, which not all of them have at once.
					eventually(t, "the end of half requests", func() bool {
						ends := 0
						for _, c := range clients {
							c.got(func() { ends += c.answers + c.resets })
						}
						return ends >= 16
					})
					t.Logf("the victim: %s", v.size())
					for _, c := range clients {
						_ = c.conn.Close()
					}
				})
			})
		})
	}
}

// gzipped is so many zeros, packed.
func gzipped(n int) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	for zeros := make([]byte, mib); n > 0; n -= mib {
		_, _ = w.Write(zeros) // to memory
	}
	_ = w.Close() // likewise
	return b.Bytes()
}

// flood writes settings and reads nothing, until the other end reads no more.
func flood(t *testing.T, c *client, v *victim) {
	t.Helper()
	// The framer reads through the connection; a deadline in the past stops it.
	if err := c.conn.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	<-c.done
	stuck := false
	for range scaled(400_000, 4_000_000) {
		if err := c.conn.SetWriteDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if err := c.WriteSettings(); err != nil {
			stuck = true // it has closed, or waits for us to read
			break
		}
	}
	t.Logf("stuck: %v; the victim meanwhile: %s", stuck, v.size())
	_ = c.conn.Close()
}

// TestAnswersThatNobodyReads holds calls with large answers open without letting a byte of them through.
func TestAnswersThatNobodyReads(t *testing.T) {
	v := newVictim(t)
	path, cert, err := enroll(t.Context(), dialTCP(t, v.is.Address, nil), "greedy")
	if err != nil {
		t.Fatal(err)
	}
	var lot []*types.Entry
	for i := range 2000 {
		lot = append(lot, &types.Entry{
			SpiffeId: wireID(fmt.Sprint("/lot/", i)), ParentId: wireID(path), Hint: string(bytes.Repeat([]byte("h"), 1000)),
			Selectors: []*types.Selector{{Type: "unix", Value: fmt.Sprint("uid:", i)}},
		})
	}
	if _, err := entryv1.NewEntryClient(v.local).BatchCreateEntry(t.Context(), &entryv1.BatchCreateEntryRequest{Entries: lot},
		grpc.MaxCallRecvMsgSize(64*mib), grpc.MaxCallSendMsgSize(64*mib)); err != nil {
		t.Fatal(err)
	}
	// Each answer is more than two MiB: a thousand of them would be two GiB.
	v.suffer(t, bounds{Peak: 256 * mib}, func(t *testing.T) {
		var clients []*client
		for range 5 {
			clients = append(clients, overTLS(t, v.is.Address, cert, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
		}
		call := func(c *client, n int) {
			if id := uint32(2*n + 1); c.open(id, getAuthorized) != nil || c.WriteData(id, true, framed(0, 0, nil)) != nil {
				t.Fatal("a connection was closed")
			}
		}
		answers := func() (begun, sentAway int) {
			for _, c := range clients {
				c.got(func() { begun += c.begun; sentAway += c.status["8"] })
			}
			return begun, sentAway
		}
		for n := range 20 { // each when that of the last has been made
			for i, c := range clients {
				call(c, n)
				eventually(t, "an answer", func() bool {
					begun, sentAway := answers()
					return begun+sentAway > len(clients)*n+i
				})
			}
		}
		for _, c := range clients {
			for n := range 180 { // and the rest at once
				call(c, 20+n)
			}
		}
		eventually(t, "an end of the calls over the limit", func() bool {
			begun, sentAway := answers()
			return begun+sentAway == 1000
		})
		if begun, _ := answers(); begun != 8 {
			t.Errorf("%d answers were made", begun)
		}
		t.Logf("the victim: %s", v.size())
		for _, c := range clients {
			_ = c.conn.Close()
		}
	})
}

// errEnough ends an attack.
var errEnough = errors.New("enough")

// short is a context for one attack.
func short(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), patience, errEnough)
	t.Cleanup(cancel)
	return ctx
}
