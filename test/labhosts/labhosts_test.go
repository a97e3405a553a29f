package labhosts

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/assay-id/assay/test/fake/vcenter"
	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/clock"
)

// TestMain lets the test binary be vmtoolsd.
func TestMain(m *testing.M) {
	vcenter.Guest()
	os.Exit(m.Run())
}

// report collects the times for the end. They are printed, never judged: machines differ.
type report struct{ rows []string }

func (r *report) add(what string, took time.Duration) {
	r.rows = append(r.rows, fmt.Sprintf("%-74s %10s", what, took.Round(time.Millisecond)))
}

// beside runs the steps of several nodes beside each other.
func beside(t *testing.T, nodes []*node, step func(context.Context, *node) error) {
	t.Helper()
	group, ctx := errgroup.WithContext(t.Context())
	for _, n := range nodes {
		group.Go(func() error {
			if err := step(ctx, n); err != nil {
				return fmt.Errorf("%s: %w", n.name, err)
			}
			return nil
		})
	}
	must(t, group.Wait())
}

func TestHosts(t *testing.T) {
	debs, err := filepath.Glob(filepath.Join("..", "..", "bin", "packages", "assay-agent_*.deb"))
	if err == nil && len(debs) != 1 {
		err = fmt.Errorf("there are %d; run make packages", len(debs))
	}
	if err != nil {
		lab.Missing(t, "the agent's package", err)
	}
	r, began := &report{}, time.Now()
	defer func() {
		r.add("all of it", time.Since(began))
		text := strings.Join(r.rows, "\n") + "\n"
		t.Logf("hosts\n%s", text)
		if path := os.Getenv("LAB_REPORT"); path != "" {
			must(t, os.WriteFile(path, []byte(text), 0o600))
		}
	}()

	w := newWorld(t)
	w.newCenter()
	w.newCloud()
	tpm := w.newTPM()
	unit := &node{name: "machine", kind: "x509pop", workload: domain + "/web"}
	box := &node{name: "tpm", kind: "tpm", workload: domain + "/shop"}
	vm := &node{name: "vm", kind: "vsphere", workload: domain + "/ledger"}
	cloud := &node{name: "cloud", kind: "aws_iid", workload: domain + "/front"}
	plain := &node{name: "plain", kind: "join_token", workload: domain + "/batch"}
	all := []*node{unit, box, vm, cloud, plain}
	for _, n := range all {
		n.host = w.host(n.name)
	}
	w.nodes = all
	guests := w.newGuests()
	w.startServer(guests)
	defer w.logs()
	r.add("the network, a vCenter, a cloud, a TPM and the server", time.Since(began))

	t.Run("nodes of each kind join", func(t *testing.T) { w.join(t, r, all, debs[0], tpm) })
	if t.Failed() {
		return
	}
	t.Run("others join beside them", func(t *testing.T) { w.visit(t, r, guests) })
	first := map[*node]string{} // the serial number of what each workload has
	t.Run("workloads of each kind get their identity", func(t *testing.T) {
		began := time.Now()
		for _, n := range all {
			w.entry(t, n, n.workload)
		}
		beside(t, all, func(ctx context.Context, n *node) error { return n.start(ctx) })
		for _, n := range all {
			first[n] = n.has(t, n.workload).serial(n.workload)
		}
		r.add("five workloads, a unit, a container and processes: entries to SVIDs", time.Since(began))
	})
	if t.Failed() {
		return
	}
	t.Run("each speaks mTLS with each", func(t *testing.T) {
		began := time.Now()
		w.everybodyCalls(t, all)
		r.add("twenty calls across hosts", time.Since(began))
	})
	if t.Failed() {
		return
	}
	same := func(t *testing.T, nodes ...*node) {
		t.Helper()
		for _, n := range nodes {
			var s state
			if err := n.ask("/fetch", &s); err != nil || s.serial(n.workload) != first[n] {
				t.Errorf("%s is served %+v, %v, and had %s", n.name, s, err, first[n])
			}
		}
	}
	t.Run("a virtual machine moves to another host", func(t *testing.T) { w.move(t, r, vm) })
	t.Run("links are cut", func(t *testing.T) { w.cut(t, r, box, vm, unit, cloud, same) })
	t.Run("an agent is banned", func(t *testing.T) { w.ban(t, r, plain, []*node{unit, vm, cloud}, same) })
	t.Run("a clock is set", func(t *testing.T) { w.clock(t, r, cloud, same) })
	t.Run("the link that was cut is mended", func(t *testing.T) { w.mend(t, r, box, same) })
	if t.Failed() {
		return
	}
	before, err := w.signed()
	must(t, err)
	t.Run("hosts are rebooted while the server is away", func(t *testing.T) {
		w.reboot(t, r, []*node{unit, box, vm, cloud}, cloud, plain, same)
	})
	t.Run("the server comes back", func(t *testing.T) { w.back(t, r, []*node{unit, box, vm, cloud}, before, same) })
	if t.Failed() {
		return
	}
	t.Run("an agent is banned while its link is cut", func(t *testing.T) { w.banMeanwhile(t, r, vm, unit) })
	t.Run("a node that was banned does not come back, and one that was evicted does", func(t *testing.T) { w.again(t, r, vm) })
}

// join brings all nodes up at once.
func (w *world) join(t *testing.T, r *report, all []*node, deb, tpm string) {
	began := time.Now()
	proves := map[string]string{
		"x509pop": "x509pop:subject:cn:", "tpm": "tpm:pcr:sha256:7:", "vsphere": "vsphere:secure-rpc:true", "aws_iid": "aws_iid:tag:tier:front", "join_token": "",
	}
	took := make([]time.Duration, len(all))
	beside(t, all, func(ctx context.Context, n *node) error {
		var err error
		switch n.kind {
		case "x509pop":
			err = w.onMachine(ctx, n, deb)
		case "tpm":
			err = w.onTPM(ctx, n, tpm)
		case "vsphere":
			err = w.onVSphere(ctx, n)
		case "aws_iid":
			err = w.onEC2(n)
		case "join_token":
			err = w.onNothing(ctx, n)
		}
		if err != nil {
			return err
		}
		w.t.Cleanup(func() {
			if err := n.down(context.Background()); err != nil {
				w.t.Error(err)
			}
		})
		from := time.Now()
		if err := n.up(ctx); err != nil {
			return err
		}
		err = w.joined(ctx, n)
		took[slices.Index(all, n)] = time.Since(from)
		return err
	})
	for i, n := range all {
		n.demands(t, proves[n.kind])
		r.add("agent started -> admitted by "+n.kind, took[i])
	}
	r.add("all five hosts from nothing", time.Since(began))
}

// everybodyCalls has each workload call each other one.
func (w *world) everybodyCalls(t *testing.T, all []*node) {
	t.Helper()
	beside(t, all, func(ctx context.Context, n *node) error {
		var errs []error
		for _, other := range all {
			if other != n {
				errs = append(errs, until(ctx, "call", func() error { return n.call(other) }))
			}
		}
		return errors.Join(errs...)
	})
}

// sentFull is how many full pictures the server has sent.
func (w *world) sentFull(t *testing.T) float64 {
	t.Helper()
	n, err := metric(w.server, `assay_server_feed_pictures_total{kind="full"}`)
	must(t, err)
	return n
}

// move moves a virtual machine, which is a change of the node's selectors: what is said of the new place
// reaches the workload.
func (w *world) move(t *testing.T, r *report, n *node) {
	vm, err := w.center.VM(t.Context(), "DC0_C0_RP0_VM0")
	must(t, err)
	const rack, placed = domain + "/rack", domain + "/placed"
	was, err := w.center.Move(t.Context(), vm)
	must(t, err)
	w.cli(t, "entry", "create", "-node", "-spiffeID", rack, "-selector", "vsphere:host:"+was)
	w.cli(t, "entry", "create", "-parentID", rack, "-spiffeID", placed, "-selector", n.selectors[0])
	n.has(t, placed)
	began := time.Now()
	_, err = w.center.Move(t.Context(), vm)
	must(t, err)
	gone := n.until(t, "/state", "lose what it had for being on "+was, func(s state) bool { return s.serial(placed) == "" })
	r.add("virtual machine moved -> the identity of the place it was at is gone", gone.Since.Sub(began))
	if gone.serial(n.workload) == "" {
		t.Errorf("it has %+v", gone)
	}
}

// cut cuts two links, one in silence and one loudly, and mends the second.
func (w *world) cut(t *testing.T, r *report, silent, loud, other, still *node, same func(*testing.T, ...*node)) {
	full := w.sentFull(t)
	must(t, silent.host.Cut())
	must(t, loud.host.Refuse())
	began := time.Now()
	loud.connected(t, 0)
	r.add("link refuses -> the agent's metric says so", time.Since(began))
	for _, n := range []*node{silent, loud, still} {
		began = time.Now()
		w.entry(t, n, domain+"/late/"+n.name)
	}
	r.add("entry made -> SVID, beside hosts that are cut off", still.has(t, domain+"/late/"+still.name).Since.Sub(began))
	same(t, silent, loud, other, still)
	for _, n := range []*node{silent, loud} {
		if err := n.ready(); err != nil {
			t.Errorf("an agent that serves what it has is not ready: %v", err)
		}
		if n == loud { // the other has not found out yet
			out, err := n.agent.CLI(t.Context(), "explain", "-pid", strconv.Itoa(os.Getpid()), "-socketPath", n.agent.Admin)
			if err != nil || !strings.Contains(out, "last heard from its server") {
				t.Errorf("it explains %v: %s", err, out)
			}
		}
		var s state
		must(t, n.ask("/state", &s))
		if s.serial(domain+"/late/"+n.name) != "" {
			t.Errorf("%s is not cut off: %+v", n.name, s)
		}
		if err := other.call(n); err == nil {
			t.Errorf("%s is reached", n.name)
		}
	}
	must(t, loud.host.Admit())
	began = time.Now()
	r.add("link admits again -> the SVID that was missed", loud.has(t, domain+"/late/"+loud.name).Since.Sub(began))
	loud.connected(t, 1)
	same(t, loud)
	must(t, other.call(loud))
	if now := w.sentFull(t); now != full {
		t.Errorf("it was told all of the picture again, in place of what has changed: %v", now-full)
	}
}

// mend mends the link that was cut in silence, once the agent has found that out.
func (w *world) mend(t *testing.T, r *report, n *node, same func(*testing.T, ...*node)) {
	n.connected(t, 0)
	same(t, n)
	full := w.sentFull(t)
	must(t, n.host.Mend())
	began := time.Now()
	r.add("link that was cut is mended -> the SVID that was missed", n.has(t, domain+"/late/"+n.name).Since.Sub(began))
	n.connected(t, 1)
	same(t, n)
	if now := w.sentFull(t); now != full {
		t.Errorf("it was told all of the picture again, in place of what has changed: %v", now-full)
	}
}

// ban bans one agent.
func (w *world) ban(t *testing.T, r *report, n *node, others []*node, same func(*testing.T, ...*node)) {
	began := time.Now()
	w.cli(t, "agent", "ban", "-spiffeID", n.id)
	gone := n.until(t, "/state", "lose its identity", func(s state) bool { return len(s.IDs) == 0 })
	r.add("agent banned -> its workload has lost its identity", gone.Since.Sub(began))
	if gone.Code != "PermissionDenied" {
		t.Errorf("it is told %s", gone.Code)
	}
	if err := n.call(others[0]); err == nil {
		t.Error("it still speaks mTLS")
	}
	if err := n.ready(); err == nil || !strings.Contains(err.Error(), "banned") {
		t.Errorf("its agent's probe says %v", err)
	}
	same(t, others...)
	w.everybodyCalls(t, others)
}

// banMeanwhile bans an agent that cannot be told: it serves what is valid until its link is mended, and then
// nothing, before anything else.
func (w *world) banMeanwhile(t *testing.T, r *report, n, other *node) {
	must(t, n.host.Refuse())
	n.connected(t, 0)
	w.cli(t, "agent", "ban", "-spiffeID", n.id)
	var s state
	must(t, n.ask("/fetch", &s))
	if s.serial(n.workload) == "" {
		t.Errorf("it cannot know, and is served %+v", s)
	}
	must(t, n.host.Admit())
	began := time.Now()
	gone := n.until(t, "/state", "lose its identity", func(s state) bool { return len(s.IDs) == 0 })
	r.add("link admits again -> the workload of an agent that was banned has nothing", gone.Since.Sub(began))
	if err := other.call(n); err == nil {
		t.Error("it still speaks mTLS")
	}
}

// again restarts an agent that was banned, whose node proves itself as before, and then once more when the
// server has forgotten it.
func (w *world) again(t *testing.T, r *report, n *node) {
	must(t, n.down(t.Context()))
	// What it says from now on is about this start.
	must(t, os.Truncate(n.agent.Log, 0))
	must(t, n.agent.Launch())
	must(t, n.start(t.Context()))
	eventually(t, "the server refuses it", func() error {
		text, err := os.ReadFile(n.agent.Log)
		if err == nil && !strings.Contains(strings.ToLower(string(text)), "banned") {
			err = errors.New("its log does not say so")
		}
		return err
	})
	var s state
	must(t, n.ask("/fetch", &s))
	if len(s.IDs) != 0 {
		t.Errorf("it is served %+v", s)
	}
	w.cli(t, "agent", "evict", "-spiffeID", n.id)
	must(t, n.down(t.Context()))
	began := time.Now()
	must(t, n.up(t.Context()))
	must(t, n.start(t.Context()))
	must(t, w.joined(t.Context(), n))
	n.has(t, n.workload)
	r.add("agent evicted and started anew -> its workload has its identity", time.Since(began))
}

// clock sets one agent's clock past the end of all it has, and right again.
func (w *world) clock(t *testing.T, r *report, n *node, same func(*testing.T, ...*node)) {
	set, err := clock.Of(n.agent.PID())
	if err != nil {
		lab.Missing(t, "a clock of a process's own", err)
	}
	defer set.Close()
	must(t, set.Set(3*time.Hour))
	began := time.Now()
	n.until(t, "/fetch", "be refused by an agent whose clock says that all has expired", func(s state) bool { return s.Code == "Unavailable" || s.Code == "DeadlineExceeded" })
	r.add("an agent's clock is set ahead -> it serves nothing", time.Since(began))
	must(t, set.Set(0))
	began = time.Now()
	n.until(t, "/fetch", "have its identity again", func(s state) bool { return s.serial(n.workload) != "" })
	r.add("the clock is set right -> the same SVID", time.Since(began))
	same(t, n)
}

// reboot takes the server away, reboots hosts, and looks at what they serve. One of them finds when it is up
// that all it has has expired; one was banned.
func (w *world) reboot(t *testing.T, r *report, nodes []*node, late, banned *node, same func(*testing.T, ...*node)) {
	must(t, w.site.Server().Stop(time.Minute))
	began := time.Now()
	beside(t, append(slices.Clone(nodes), banned), func(ctx context.Context, n *node) error { return n.down(ctx) })
	var set *clock.Clock
	beside(t, append(slices.Clone(nodes), banned), func(ctx context.Context, n *node) error {
		var err error
		switch n {
		case late:
			if err := n.agent.Launch(); err != nil {
				return err
			}
			// It must be the agent by then, and no longer what brings it to its host.
			err = n.agent.WaitFor(ctx, "its socket", func() error { _, err := os.Stat(n.agent.Socket); return err })
			if err != nil {
				return err
			}
			if set, err = clock.Of(n.agent.PID()); err == nil {
				err = set.Set(3 * time.Hour)
			}
		case banned:
			err = n.agent.Launch()
		default:
			err = n.up(ctx)
		}
		if err != nil {
			return err
		}
		return n.start(ctx)
	})
	in := slices.DeleteFunc(slices.Clone(nodes), func(n *node) bool { return n == late })
	for _, n := range in {
		n.has(t, n.workload)
	}
	r.add("hosts rebooted without the server -> the SVIDs they had", time.Since(began))
	same(t, in...)
	w.everybodyCalls(t, in)
	for _, n := range []*node{late, banned} {
		n.until(t, "/fetch", "be refused", func(s state) bool { return s.Code != "" && len(s.IDs) == 0 })
		var s state
		must(t, n.ask("/state", &s))
		if len(s.IDs) != 0 {
			t.Errorf("%s was served %+v", n.name, s)
		}
	}
	must(t, set.Set(0))
	must(t, set.Close())
	late.has(t, late.workload)
	same(t, late)
}

// back brings the server back, which then has nothing to sign that is valid.
func (w *world) back(t *testing.T, r *report, nodes []*node, before map[string]int, same func(*testing.T, ...*node)) {
	must(t, w.site.StartServer(t.Context()))
	began := time.Now()
	for _, n := range nodes {
		n.connected(t, 1)
	}
	r.add("the server is back -> every agent hears it", time.Since(began))
	same(t, nodes...)
	for _, n := range nodes {
		w.entry(t, n, domain+"/new/"+n.name)
		n.has(t, domain+"/new/"+n.name)
	}
	w.everybodyCalls(t, nodes)
	signed, err := w.signed()
	must(t, err)
	for _, n := range nodes {
		if again := signed[n.workload] - before[n.workload]; again != 0 {
			t.Errorf("%s was signed %d times more", n.workload, again)
		}
		if signed[domain+"/new/"+n.name] != 1 {
			t.Errorf("what is new on %s was signed %d times", n.name, signed[domain+"/new/"+n.name])
		}
	}
}

// signed counts the X509-SVIDs that the server has signed, by ID, as its audit log says.
func (w *world) signed() (map[string]int, error) {
	file, err := os.Open(filepath.Join(w.site.ServerData(), "audit.log"))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	count := map[string]int{}
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var line struct {
			Event, Outcome string
			ID             string `json:"spiffe_id"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return nil, err
		}
		if line.Event == "svid.x509.new" && line.Outcome == "allow" {
			count[line.ID]++
		}
	}
	return count, nil
}
