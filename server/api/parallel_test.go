package api

import (
	"runtime"
	"sync"
	"testing"
)

func TestInParallel(t *testing.T) {
	t.Run("every index is taken once", func(t *testing.T) {
		for _, n := range []int{0, 1, 2, 3, 50, 500} {
			var mu sync.Mutex
			seen := make([]int, n)
			inParallel(runtime.GOMAXPROCS(0), n, func(i int) {
				mu.Lock()
				defer mu.Unlock()
				seen[i]++
			})
			for i, times := range seen {
				if times != 1 {
					t.Errorf("n=%d: index %d taken %d times", n, i, times)
				}
			}
		}
	})

	t.Run("a panic comes out in the caller's goroutine, whoever had it", func(t *testing.T) {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
		for culprit := range 4 {
			var together sync.WaitGroup // all four run at once, so each has a goroutine of its own
			together.Add(4)
			got := func() (p any) {
				defer func() { p = recover() }()
				inParallel(runtime.GOMAXPROCS(0), 4, func(i int) {
					together.Done()
					together.Wait()
					if i == culprit {
						panic("boom")
					}
				})
				return nil
			}()
			if got != "boom" {
				t.Errorf("culprit %d: recovered %v", culprit, got)
			}
		}
	})
}
