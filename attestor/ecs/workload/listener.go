package workload

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// maxSockets is how much is read of the kernel's list of sockets, in bytes; a line has 150.
const maxSockets = 32 << 20

// listening is how /proc/net/tcp writes the state of a socket that listens.
const listening = "0A"

// checkListener says what is wrong with who listens at a TCP port of this host: every socket there must be
// root's or the agent's own user's. net is the folder of the kernel's lists, see proc_net(5).
func checkListener(net, port string, self uint32) error {
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return fmt.Errorf("port %q is none", port)
	}
	suffix := fmt.Sprintf(":%04X", number)
	heard := false
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(filepath.Join(net, name))
		if errors.Is(err, os.ErrNotExist) && name == "tcp6" {
			continue // a kernel without IPv6
		}
		if err != nil {
			return fmt.Errorf("find out who listens at port %s: %w", port, err)
		}
		found, err := ownersOf(file, suffix)
		_ = file.Close()
		if err != nil {
			return fmt.Errorf("find out who listens at port %s: %w", port, err)
		}
		for _, uid := range found {
			heard = true
			if uid != 0 && uid != self {
				return fmt.Errorf("it is user %d who listens at port %s, not root's ECS agent", uid, port)
			}
		}
	}
	if !heard {
		return fmt.Errorf("nobody listens at port %s: no ECS agent runs here, or the agent is in another network namespace", port)
	}
	return nil
}

// ownersOf reads the user IDs of the sockets that listen at addresses with the suffix.
func ownersOf(file io.Reader, suffix string) ([]uint32, error) {
	limited := &io.LimitedReader{R: file, N: maxSockets}
	lines := bufio.NewScanner(limited)
	var found []uint32
	for lines.Scan() {
		// sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid …
		fields := strings.Fields(lines.Text())
		if len(fields) < 8 || fields[3] != listening || !strings.HasSuffix(fields[1], suffix) {
			continue
		}
		uid, err := strconv.ParseUint(fields[7], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("user of a socket: %w", err)
		}
		found = append(found, uint32(uid))
	}
	if limited.N <= 0 {
		return nil, errors.New("the kernel's list of sockets is too long")
	}
	return found, lines.Err()
}
