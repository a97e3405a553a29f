// Package hosts makes hosts of network namespaces: each has an address and a link of its own to a router,
// and the links can be cut. Programs run on a host as they are; only the network they see is another.
//
// A link is cut in one of two ways, because programs find out about them differently: silently, so that
// packets vanish and only time tells, and loudly, so that whoever connects is refused at once.
//
// It returns errors and never calls testing functions, so that a program can use it too.
package hosts

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Network is a router with hosts around it.
type Network struct {
	name  string // what the names of all namespaces begin with
	hosts []*Host
}

// Host is one host.
type Host struct {
	// Addr is its address on the network, as text.
	Addr string

	network *Network
	name    string // of its namespace
	link    string // the router's end of its link
}

// folder is where "ip netns" keeps namespaces.
const folder = "/run/netns"

// Available says why there can be no hosts here, or nil.
func Available() error {
	if os.Geteuid() != 0 {
		return errors.New("hosts of their own need root")
	}
	for program, of := range map[string]string{"ip": "iproute2", "iptables": "iptables", "nsenter": "util-linux"} {
		if _, err := tool(program); err != nil {
			return fmt.Errorf("%w (Debian: apt-get install %s)", err, of)
		}
	}
	return nil
}

// tool finds a program also where not every path leads.
func tool(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		if path, err = exec.LookPath(filepath.Join("/usr/sbin", name)); err != nil {
			return "", fmt.Errorf("%s is not installed", name)
		}
	}
	return path, nil
}

func run(name string, args ...string) error {
	path, err := tool(name)
	if err != nil {
		return err
	}
	if out, err := exec.Command(path, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

func ip(line string) error { return run("ip", strings.Fields(line)...) }

// New makes a router.
func New() (_ *Network, err error) {
	n := &Network{name: "lab" + strconv.Itoa(os.Getpid())}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	if err := ip("netns add " + n.router()); err != nil {
		return nil, err
	}
	return n, in(n.router(), func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o600) })
}

func (n *Network) router() string { return n.name + "-router" }

// Host adds a host.
func (n *Network) Host(name string) (*Host, error) {
	at := len(n.hosts) + 1
	h := &Host{network: n, name: n.name + "-" + name, link: "to" + strconv.Itoa(at), Addr: fmt.Sprintf("10.77.%d.2", at)}
	if err := ip("netns add " + h.name); err != nil {
		return nil, err
	}
	n.hosts = append(n.hosts, h)
	gateway := fmt.Sprintf("10.77.%d.1", at)
	for _, line := range []string{
		"-n " + h.name + " link set lo up",
		"-n " + h.name + " link add eth0 type veth peer name " + h.link + " netns " + n.router(),
		"-n " + h.name + " addr add " + h.Addr + "/24 dev eth0",
		"-n " + h.name + " link set eth0 up",
		"-n " + n.router() + " addr add " + gateway + "/24 dev " + h.link,
		"-n " + n.router() + " link set " + h.link + " up",
		"-n " + h.name + " route add default via " + gateway,
	} {
		if err := ip(line); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Close removes the router and the hosts. What still runs there keeps what it has of them.
func (n *Network) Close() error {
	var errs []error
	for _, h := range n.hosts {
		errs = append(errs, ip("netns del "+h.name))
	}
	if _, err := os.Stat(filepath.Join(folder, n.router())); err == nil {
		errs = append(errs, ip("netns del "+n.router()))
	}
	return errors.Join(errs...)
}

// Netns is the path of the host's network namespace.
func (h *Host) Netns() string { return filepath.Join(folder, h.name) }

// Cut takes the host's link away: what is sent to it or by it is lost, and nobody is told.
func (h *Host) Cut() error { return ip("-n " + h.network.router() + " link set " + h.link + " down") }

// Mend gives the link back.
func (h *Host) Mend() error { return ip("-n " + h.network.router() + " link set " + h.link + " up") }

// Refuse has the router end each connection of the host and refuse new ones.
func (h *Host) Refuse() error { return h.rules("-I") }

// Admit ends what Refuse began.
func (h *Host) Admit() error { return h.rules("-D") }

func (h *Host) rules(what string) error {
	for _, side := range []string{"-i", "-o"} {
		if err := run("nsenter", "--net="+filepath.Join(folder, h.network.router()), "iptables", "-w", what, "FORWARD", side, h.link,
			"-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"); err != nil {
			return err
		}
	}
	return nil
}

// Has gives the host another address of its own, on the loopback interface.
func (h *Host) Has(addr string) error { return ip("-n " + h.name + " addr add " + addr + "/32 dev lo") }

// Command makes a command that will run on the host.
func (h *Host) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + h.Netns(), "--", name}, args...)...)
}

// Do calls do as if this program ran on the host: sockets that do makes by itself, not in goroutines that it
// starts, are the host's, and stay so.
func (h *Host) Do(do func() error) error { return in(h.name, do) }

// in calls do within a namespace. The thread comes back from there and is not given up: programs that it has
// started may end with it.
func in(namespace string, do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := os.Open("/proc/thread-self/ns/net")
		if err == nil {
			defer home.Close()
			err = enter(filepath.Join(folder, namespace), do)
			if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
				done <- errors.Join(err, fmt.Errorf("leave %s: %w", namespace, back))
				return // and the thread, which is in the wrong place, ends
			}
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

func enter(path string, do func() error) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := unix.Setns(int(file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", path, err)
	}
	return do()
}

// Listen listens on the host.
func (h *Host) Listen(network, address string) (l net.Listener, err error) {
	err = h.Do(func() error {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// Dial connects from the host. The address must be a number: a name would be looked up elsewhere.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = h.Do(func() error {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}
