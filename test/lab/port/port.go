// Package port gives harnesses ports for programs that are to be told where to listen.
package port

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// Ports are taken from here: below those that the kernel gives to connections and to listeners that name none
// (ip_local_port_range), so that nobody gets one of them by chance between Free and the program's start.
const first, end = 20000, 32000

var (
	mu   sync.Mutex
	mine []*os.File // the locks of what this process was given, held until it ends
)

// Free returns a TCP port that nobody listens on, and that no other caller of Free on this machine gets for as
// long as this process lives.
func Free() (int, error) {
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("assay-test-ports-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return 0, err
	}
	mu.Lock()
	defer mu.Unlock()
	start := rand.N(end - first)
	for i := range end - first {
		port := first + (start+i)%(end-first)
		lock, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(port)), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return 0, err
		}
		if unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			if l, err := net.Listen("tcp", ":"+strconv.Itoa(port)); err == nil {
				mine = append(mine, lock)
				return port, l.Close()
			}
		}
		_ = lock.Close() // nothing was written
	}
	return 0, errors.New("no port is free")
}
