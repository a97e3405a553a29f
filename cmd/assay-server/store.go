package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server/backup"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
	"github.com/assay-id/assay/server/store/durable"
	"github.com/assay-id/assay/server/wire/adminv1"
)

// This file has the commands that look after the store: check, backup, restore and snapshot. check,
// restore and "snapshot list" work on a data directory, for when the server does not start; the others
// ask the running server.

// offline are the flags that say where a server's data directory is.
type offline struct {
	config, dataDir, keysPath string
}

func (o *offline) addTo(c *cobra.Command) {
	c.Flags().StringVar(&o.config, "config", defaultConfig, "Path of the server's configuration file, to find the data directory")
	c.Flags().StringVar(&o.dataDir, "dataDir", "", "The server's data directory, in place of the one in the configuration file")
	c.Flags().StringVar(&o.keysPath, "keysPath", "", "The server's key file (default keys.json in the data directory)")
}

// find returns the place, and the trust domain if a configuration file says it.
func (o *offline) find() (backup.Place, spiffeid.TrustDomain, error) {
	if o.dataDir != "" {
		dir, err := filepath.Abs(o.dataDir)
		if err != nil {
			return backup.Place{}, spiffeid.TrustDomain{}, fmt.Errorf("find %s: %w", o.dataDir, err)
		}
		return backup.Place{DataDir: dir, KeysPath: o.keysPath}, spiffeid.TrustDomain{}, nil
	}
	c, err := conf.LoadServer(o.config, judges(), conf.Options{})
	if err != nil {
		return backup.Place{}, spiffeid.TrustDomain{}, fmt.Errorf("%w\nName the data directory itself with -dataDir", cli.Invalid("Assay server configuration", err))
	}
	p := backup.Place{DataDir: c.DataDir, KeysPath: c.KeysPath, KeysSeal: c.KeysSeal, KeysInMemory: c.KeyManager == "memory", KeysElsewhere: keyManager(c.Keys) != nil}
	if o.keysPath != "" {
		p.KeysPath = o.keysPath
	}
	return p, c.TrustDomain, nil
}

// stopped explains that a server is running.
func stopped(err error) error {
	if errors.Is(err, boltkv.ErrLocked) {
		return fmt.Errorf("%w; stop the server, or look at a copy: assay-server backup -path FILE", err)
	}
	return err
}

func check() *cobra.Command {
	var where offline
	var output cli.Output
	c := &cobra.Command{
		Use: "check", Short: "Says whether a stopped server's store is whole, and what to do if it is not", Args: cli.NoArgs,
		Long: "Reads every page of the store, every record, the keys that go together, the journal of\n" +
			"authorities against the key file and the bundle, and the snapshots. Changes nothing.\n" +
			"The exit status is 0 if all is well and 1 if something is wrong.",
		Example: "  assay-server check -dataDir /var/lib/assay/server",
	}
	where.addTo(c)
	output.AddTo(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		at, _, err := where.find()
		if err != nil {
			return err
		}
		r, err := backup.Check(c.Context(), at, time.Now())
		if err != nil {
			return stopped(err)
		}
		if err := output.PrintValue(c, func(w io.Writer) error { return printReport(w, r) }, reportJSON(r)); err != nil {
			return err
		}
		if !r.OK() {
			return &cli.Exit{Status: 1}
		}
		return nil
	}
	return c
}

// printReport shows the parts, what is wrong with each, and what to do.
func printReport(w io.Writer, r *backup.Report) error {
	for _, p := range r.Parts {
		if len(p.Wrong) == 0 {
			fmt.Fprintf(w, "%-12s ok: %s\n", p.Name, p.State)
			continue
		}
		fmt.Fprintf(w, "%-12s DAMAGED\n", p.Name)
		for _, wrong := range p.Wrong {
			fmt.Fprintf(w, "  - %s\n", wrong)
		}
		if p.Advice != "" {
			fmt.Fprintf(w, "  What to do: %s\n", p.Advice)
		}
	}
	good := 0
	for _, s := range r.Snapshots {
		if s.Damage == nil {
			good++
		}
	}
	_, err := fmt.Fprintf(w, "%-12s %s, %d of them good\n", "snapshots", cli.Count(len(r.Snapshots), "snapshot", "snapshots"), good)
	return err
}

type partJSON struct {
	Name   string   `json:"name"`
	OK     bool     `json:"ok"`
	State  string   `json:"state,omitempty"`
	Wrong  []string `json:"wrong,omitempty"`
	Advice string   `json:"advice,omitempty"`
}

func reportJSON(r *backup.Report) any {
	out := struct {
		OK        bool           `json:"ok"`
		Parts     []partJSON     `json:"parts"`
		Snapshots []snapshotJSON `json:"snapshots"`
	}{OK: r.OK(), Parts: []partJSON{}, Snapshots: snapshotsJSON(r.Snapshots)}
	for _, p := range r.Parts {
		j := partJSON{Name: p.Name, OK: len(p.Wrong) == 0, Wrong: p.Wrong, Advice: p.Advice}
		if j.OK {
			j.State = p.State
		}
		out.Parts = append(out.Parts, j)
	}
	return out
}

// backupTimeout is how long the server may take to send the whole copy.
const backupTimeout = 30 * time.Minute

func backupCommand() *cobra.Command {
	var path string
	r := newLocal("backup", "Writes a consistent copy of the running server's store to a file", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		ctx, cancel := context.WithTimeout(ctx, backupTimeout)
		defer cancel()
		made, err := fetchBackup(ctx, adminv1.NewAdminClient(conn), path)
		if err != nil {
			return err
		}
		return r.output.PrintValue(r.Command, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Backup of revision %d written to %s (%d bytes, %s).\nThe signing keys are not in it.\n",
				made.Revision, made.Path, made.Size, cli.Count(made.Entries, "entry", "entries"))
			return err
		}, made)
	}).checked(func() error {
		if path == "" {
			return errors.New("the flag -path is required: the file to write")
		}
		return nil
	})
	r.Flags().StringVar(&path, "path", "", "The file to write, for its owner only; one that is there is replaced once the copy is whole")
	r.Long = "Copies the store as of one revision while the server goes on. \"assay-server restore\" puts a copy in\n" +
		"the place of a store. Signing keys are not in it: they are in the key file."
	r.Example = "  assay-server backup -path /backup/assay.db"
	return r.Command
}

type backupJSON struct {
	Path     string `json:"path"`
	Revision uint64 `json:"revision"`
	Size     int64  `json:"size"`
	Entries  int    `json:"entries"`
}

// fetchBackup receives a copy beside the file, looks at all of it, and puts it in the file's place.
func fetchBackup(ctx context.Context, client adminv1.AdminClient, path string) (made backupJSON, err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return made, fmt.Errorf("write backup: %w", err)
	}
	defer os.Remove(temp.Name()) //nolint:errcheck // it is gone once renamed
	made.Path = path
	made.Size, err = receive(ctx, client, temp)
	if err == nil {
		err = temp.Sync()
	}
	if err = errors.Join(err, temp.Close()); err != nil {
		return made, err
	}
	store, err := boltkv.Open(temp.Name(), boltkv.Config{ReadOnly: true})
	if err != nil {
		return made, fmt.Errorf("read backup again: %w", err)
	}
	c, err := records.Check(ctx, store)
	if err = errors.Join(err, store.Close()); err != nil {
		return made, fmt.Errorf("read backup again: %w", err)
	}
	if len(c.Findings) > 0 {
		return made, fmt.Errorf("read backup again: %w: %s", records.ErrDamaged, c.Findings[0])
	}
	made.Revision, made.Entries = uint64(c.Rev), c.Entries
	if err := os.Rename(temp.Name(), path); err != nil {
		return made, fmt.Errorf("write backup: %w", err)
	}
	if err := durable.SyncDir(filepath.Dir(path)); err != nil {
		return made, fmt.Errorf("write backup: %w", err)
	}
	return made, nil
}

// receive writes the parts of a backup and compares their sum with the server's.
func receive(ctx context.Context, client adminv1.AdminClient, w io.Writer) (size int64, err error) {
	stream, err := client.Backup(ctx, &adminv1.BackupRequest{})
	if err != nil {
		return 0, err
	}
	sum := sha256.New()
	for {
		msg, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return 0, errors.New("the server ended the backup before it was whole")
		case err != nil:
			return 0, err
		case len(msg.GetSum()) > 0:
			if !bytes.Equal(sum.Sum(nil), msg.GetSum()) {
				return 0, errors.New("the backup did not arrive as it was sent")
			}
			return size, nil
		}
		sum.Write(msg.GetPart())
		if _, err := w.Write(msg.GetPart()); err != nil {
			return 0, fmt.Errorf("write backup: %w", err)
		}
		size += int64(len(msg.GetPart()))
	}
}

func restore() *cobra.Command {
	var where offline
	var output cli.Output
	var from string
	var force bool
	c := &cobra.Command{
		Use: "restore", Short: "Puts a backup or snapshot in the place of a stopped server's store", Args: cli.NoArgs,
		Long: "Puts a copy in the place of the store, with a new identity, so that every agent takes a full\n" +
			"picture. A store that is there is replaced with -force only, and kept under another name. What was\n" +
			"committed after the copy is lost, bans among it: the audit log has them.",
		Example: "  assay-server restore -from /backup/assay.db -dataDir /var/lib/assay/server",
	}
	where.addTo(c)
	output.AddTo(c)
	c.Flags().StringVar(&from, "from", "", "The backup or snapshot")
	c.Flags().BoolVar(&force, "force", false, "Replace a store that is there, and keep it under another name")
	c.PreRunE = func(*cobra.Command, []string) error {
		if from == "" {
			return errors.New("the flag -from is required: the backup or snapshot to restore")
		}
		return nil
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		at, td, err := where.find()
		if err != nil {
			return err
		}
		done, err := backup.Restore(c.Context(), backup.Restoring{From: from, DataDir: at.DataDir, Force: force, TrustDomain: td, Now: time.Now()})
		if err != nil {
			return err
		}
		return output.PrintValue(c, func(w io.Writer) error {
			fmt.Fprintf(w, "Restored %s: %s and %s of %s at revision %d.\n", done.Path,
				cli.Count(done.Records.Entries, "entry", "entries"), cli.Count(done.Records.Nodes, "agent", "agents"), done.Records.TrustDomain.Name(), done.Records.Rev)
			if done.Aside != "" {
				fmt.Fprintf(w, "The store that was there is kept as %s.\n", done.Aside)
			}
			_, err := fmt.Fprintln(w, "What was committed after that revision is lost. Look for it in the audit log, for bans (agent.ban) first.")
			return err
		}, map[string]any{
			"path": done.Path, "kept": done.Aside, "revision": uint64(done.Records.Rev), "entries": done.Records.Entries,
			"agents": done.Records.Nodes, "trust_domain": done.Records.TrustDomain.Name(),
		})
	}
	return c
}

func snapshotList() *cobra.Command {
	var where offline
	var output cli.Output
	c := &cobra.Command{
		Use: "list", Short: "Lists the snapshots in a server's data directory, the newest first", Args: cli.NoArgs,
		Long: "Lists the snapshots and reads each from end to end to say whether it is good. The server may be\nrunning or not.",
	}
	where.addTo(c)
	output.AddTo(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		at, _, err := where.find()
		if err != nil {
			return err
		}
		all, err := backup.List(filepath.Join(at.DataDir, backup.SnapshotsDir))
		if err != nil {
			return err
		}
		all = backup.Verify(all)
		return output.PrintValue(c, func(w io.Writer) error { return printSnapshots(w, all) }, snapshotsJSON(all))
	}
	return c
}

func printSnapshots(w io.Writer, all []backup.Snapshot) error {
	if len(all) == 0 {
		_, err := fmt.Fprintln(w, "No snapshots found.")
		return err
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MADE\tREVISION\tBYTES\tSTATE\tPATH")
	for _, s := range all {
		state := "good"
		if s.Damage != nil {
			state = "damaged"
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\n", s.Made.Format(time.RFC3339), s.Rev, s.Size, state, s.Path)
	}
	return t.Flush()
}

type snapshotJSON struct {
	Path     string `json:"path"`
	MadeAt   int64  `json:"made_at"`
	Revision uint64 `json:"revision"`
	Size     int64  `json:"size"`
	Damage   string `json:"damage,omitempty"`
}

func snapshotsJSON(all []backup.Snapshot) []snapshotJSON {
	out := make([]snapshotJSON, 0, len(all))
	for _, s := range all {
		j := snapshotJSON{Path: s.Path, MadeAt: s.Made.Unix(), Revision: uint64(s.Rev), Size: s.Size}
		if s.Damage != nil {
			j.Damage = s.Damage.Error()
		}
		out = append(out, j)
	}
	return out
}

func snapshotTake() *cobra.Command {
	return newLocal("take", "Makes a snapshot of the running server's store now", func(ctx context.Context, r *remote, conn *grpc.ClientConn) error {
		made, err := adminv1.NewAdminClient(conn).TakeSnapshot(ctx, &adminv1.TakeSnapshotRequest{})
		if err != nil {
			return err
		}
		return r.output.Print(r.Command, func(w io.Writer) error {
			_, err := fmt.Fprintf(w, "Snapshot of revision %d: %s\n", made.GetRevision(), made.GetPath())
			return err
		}, made)
	}).Command
}
