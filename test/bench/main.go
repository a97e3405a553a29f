// Command bench measures the built binaries through their public sockets and prints one table: the figure,
// what SPIRE v1.15.3 was measured at, what Assay must reach, the limit (what the primitives in it take on
// this machine, limits.go), what it reaches today, and today's ratio to both.
//
// CPU per operation, read from /proc, is the figure to trust: wall times are those of a shared
// machine. A figure that is over its bar is marked, and never fails the run; wrong counts and errors
// do. Beside a wall time stands the CPU time of the processes that it was spent by.
//
//	go run ./test/bench -bin bin                   all figures
//	go run ./test/bench -bin bin -short            small counts, as CI runs it
//	go run ./test/bench -bin bin -only jwt -v      those whose name matches
//	go run ./test/bench -bin bin -json now.json    also as JSON, to compare two commits
//	go run ./test/bench -compare before.json,now.json
//
// The driver knows nothing of Assay but its programs' names and what an administrator sees, so a real SPIRE
// can take the place of either; figures that SPIRE has no API for are left out:
//
//	go run ./test/bench -spire-server /opt/spire/bin/spire-server -spire-agent /opt/spire/bin/spire-agent
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/assay-id/assay/test/lab/site"
)

// figure is one row of the table.
type figure struct {
	name  string
	spire string  // as measured on SPIRE v1.15.3, for people
	bar   float64 // what must be reached, in unit
	unit  string
}

// result is what a figure came to.
type result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Bar   float64 `json:"bar"`
	Spire string  `json:"spire"`
	// Limit is what the primitives alone take, nil if that is not known.
	Limit *float64 `json:"limit,omitempty"`
	// More says what else was seen on the way.
	More string `json:"more,omitempty"`
}

// scene is a set of figures measured on one site.
type scene struct {
	name string
	run  func(ctx context.Context, b *bench) error
	// ours says that it uses what SPIRE does not have.
	ours bool
}

// options are what scenes are run with.
type options struct {
	bin            string
	short, verbose bool
	only           string
	spire          site.SPIRE
}

func main() {
	var (
		bin     = flag.String("bin", "bin", "folder with the built binaries")
		short   = flag.Bool("short", false, "small counts: checks that everything can be measured")
		only    = flag.String("only", "", "regular expression of scenes to run")
		out     = flag.String("json", "", "file to write the results to as JSON")
		compare = flag.String("compare", "", "two JSON files, before and after, to print the ratios of")
		verbose = flag.Bool("v", false, "say what goes on")
		held    = flag.Int("hold", 0, "hold this many streams open; the program starts itself so")
		server  = flag.String("spire-server", "", "measure this spire-server in the place of assay-server")
		agent   = flag.String("spire-agent", "", "measure this spire-agent in the place of assay-agent")
		control = flag.String("obey", "", "be the workload in a container, told by this socket; the program starts itself so")
		socket  = flag.String("socket", "", "for -hold and -obey: the agent's socket")
	)
	flag.Parse()
	if *held > 0 || *control != "" {
		if err := asWorkload(*held, *control, *socket); err != nil {
			fmt.Fprintln(os.Stderr, "bench: as a workload:", err)
			os.Exit(1)
		}
		return
	}
	if *compare != "" {
		if err := printRatios(strings.Split(*compare, ",")); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	results, err := runScenes(ctx, options{*bin, *short, *verbose, *only, site.SPIRE{Server: *server, Agent: *agent}})
	stop()
	printTable(results)
	if err == nil && *out != "" {
		err = writeJSON(*out, results)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// asWorkload is what this program does when it started itself.
func asWorkload(held int, control, socket string) error {
	if held > 0 {
		return hold(socket, held)
	}
	return obey(control, socket)
}

func runScenes(ctx context.Context, o options) ([]result, error) {
	match, err := regexp.Compile(o.only)
	if err != nil {
		return nil, err
	}
	var all []result
	var least *primitives
	for _, s := range scenes {
		if !match.MatchString(s.name) || s.ours && o.spire != (site.SPIRE{}) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s…\n", s.name)
		start := time.Now()
		b, err := newBench(ctx, o)
		if err != nil {
			return all, err
		}
		if least == nil {
			p, err := measure(ctx, b.Dir)
			if err != nil {
				return all, err
			}
			least = &p
		}
		err = s.run(ctx, b)
		for _, r := range b.results {
			if limit := limits[r.Name]; limit != nil {
				least := limit(*least)
				r.Limit = &least
			}
			all = append(all, r)
		}
		b.close()
		if err != nil {
			return all, fmt.Errorf("%s: %w", s.name, err)
		}
		fmt.Fprintf(os.Stderr, "bench: %s: %.0f s\n", s.name, time.Since(start).Seconds())
	}
	return all, nil
}

func printTable(results []result) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tSPIRE v1.15.3\tmust reach\tlimit\ttoday\tof the bar\tof the limit\t")
	over := 0
	for _, r := range results {
		var bar, limit, ofBar, ofLimit, mark string
		if r.Bar > 0 {
			bar, ofBar = number(r.Bar)+" "+r.Unit, fmt.Sprintf("%.2f", r.Value/r.Bar)
			if r.Value > r.Bar {
				mark = "OVER "
				over++
			}
		}
		if r.Limit != nil {
			limit = number(*r.Limit) + " " + r.Unit
			if *r.Limit > 0 {
				ofLimit = fmt.Sprintf("%.1f", r.Value / *r.Limit)
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s %s\t%s\t%s\t%s%s\n", r.Name, r.Spire, bar, limit, number(r.Value), r.Unit, ofBar, ofLimit, mark, r.More)
	}
	w.Flush()
	fmt.Printf("%d figures, %d over their bar\n", len(results), over)
}

func number(v float64) string {
	switch {
	case v == 0:
		return "0"
	case v < 0.1:
		return fmt.Sprintf("%.4f", v)
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.0f", v)
}

func writeJSON(path string, results []result) error {
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func printRatios(paths []string) error {
	if len(paths) != 2 {
		return fmt.Errorf("compare wants before.json,after.json, got %d files", len(paths))
	}
	var runs [2]map[string]result
	var order []string
	for i, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		var list []result
		if err := json.Unmarshal(text, &list); err != nil {
			return fmt.Errorf("parse %s: %w", path, err)
		}
		runs[i] = map[string]result{}
		for _, r := range list {
			if runs[i][r.Name] = r; i == 0 {
				order = append(order, r.Name)
			}
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "figure\tbefore\tafter\tratio")
	for _, name := range order {
		before := runs[0][name]
		after, found := runs[1][name]
		if !found {
			fmt.Fprintf(w, "%s\t%s %s\tnot measured\t\n", name, number(before.Value), before.Unit)
			continue
		}
		fmt.Fprintf(w, "%s\t%s %s\t%s %s\t%.2f\n", name, number(before.Value), before.Unit, number(after.Value), after.Unit, after.Value/before.Value)
	}
	return w.Flush()
}
