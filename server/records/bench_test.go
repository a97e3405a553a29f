package records

import (
	"context"
	"fmt"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/workloadapi/identity"
)

// manyEntries returns n entries of the usual size: three selectors each, 100 below each parent.
func manyEntries(from, n int) []*identity.Entry {
	list := make([]*identity.Entry, n)
	for i := range list {
		k := from + i
		e := entry(fmt.Sprintf("ns/team-%d/sa/workload-%d", k%50, k),
			fmt.Sprintf("k8s:ns:team-%d", k%50), fmt.Sprintf("k8s:sa:workload-%d", k), "docker:label:tier:backend")
		e.ParentID = agent(fmt.Sprintf("x509pop/%040x", k/100))
		list[i] = e
	}
	return list
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func openBench(b *testing.B) *Records {
	b.Helper()
	s, err := boltkv.Open(filepath.Join(b.TempDir(), "store.db"), boltkv.Config{})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = s.Close() })
	r, err := Open(context.Background(), s, domain, Config{})
	if err != nil {
		b.Fatal(err)
	}
	return r
}

// BenchmarkCreateBatch creates entries 100 at a time; cpu-µs/entry is user and system time.
func BenchmarkCreateBatch(b *testing.B) {
	r := openBench(b)
	n := 0
	start := cpuTime()
	for b.Loop() {
		results, _, err := r.CreateEntries(b.Context(), manyEntries(n, 100))
		if err != nil || results[0].Err != nil {
			b.Fatal(err, results[0].Err)
		}
		n += 100
	}
	b.ReportMetric(float64((cpuTime()-start).Microseconds())/float64(n), "cpu-µs/entry")
	b.ReportMetric(float64(n)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkCreateSingle has eight clients create entries one by one.
func BenchmarkCreateSingle(b *testing.B) {
	r := openBench(b)
	var next atomic.Int64
	start := cpuTime()
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for {
				n := int(next.Add(1))
				if n > b.N {
					return
				}
				if results, _, err := r.CreateEntries(context.Background(), manyEntries(n, 1)); err != nil || results[0].Err != nil {
					b.Error(err, results)
					return
				}
			}
		})
	}
	group.Wait()
	b.ReportMetric(float64((cpuTime()-start).Microseconds())/float64(b.N), "cpu-µs/entry")
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "entries/s")
}

// BenchmarkSnapshot reads 100,000 entries; B/held is the heap that they take afterwards.
func BenchmarkSnapshot(b *testing.B) {
	r := openBench(b)
	const total = 100_000
	for n := 0; n < total; n += 5000 {
		if _, _, err := r.CreateEntries(b.Context(), manyEntries(n, 5000)); err != nil {
			b.Fatal(err)
		}
	}
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	var s *Snapshot
	for b.Loop() {
		var err error
		if s, err = r.Snapshot(b.Context()); err != nil || len(s.Entries) != total {
			b.Fatal(err, len(s.Entries))
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/total, "B/held")
	if bolt, ok := r.store.(*boltkv.Store); ok {
		size, err := bolt.Size()
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(size)/total, "B/file")
	}
	runtime.KeepAlive(s)
}
