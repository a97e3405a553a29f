package backup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/records"
	"github.com/assay-id/assay/server/store/boltkv"
)

// Place is where a server's state is.
type Place struct {
	DataDir string
	// KeysPath is the key file of the disk key manager. Empty: keys.json in DataDir.
	KeysPath string
	// KeysSeal is the file with the secret that seals the key file. Empty: it is not sealed.
	KeysSeal string
	// KeysInMemory says that there is no key file, KeysElsewhere that keys are where they cannot be looked at
	// from here.
	KeysInMemory, KeysElsewhere bool
}

func (p Place) store() string { return filepath.Join(p.DataDir, StoreFile) }

func (p Place) snapshots() string { return filepath.Join(p.DataDir, SnapshotsDir) }

func (p Place) keys() string {
	if p.KeysPath == "" {
		return filepath.Join(p.DataDir, "keys.json")
	}
	return p.KeysPath
}

// Part is one part of a Report.
type Part struct {
	Name string
	// State says in a few words how it is if nothing is wrong.
	State string
	// Wrong is what is damaged or does not fit, in words for an operator.
	Wrong []string
	// Advice is what to do about it.
	Advice string
}

// Report is what Check found.
type Report struct {
	Parts []Part
	// Snapshots are those there are, the newest first, each read from end to end.
	Snapshots []Snapshot
}

// OK reports whether nothing is wrong. Damaged snapshots do not count.
func (r *Report) OK() bool {
	for _, p := range r.Parts {
		if len(p.Wrong) > 0 {
			return false
		}
	}
	return true
}

// Check reads a data directory that no server is using: every page of the store, every record, the
// keys that go together, the journal of authorities against the key file and the bundle, and the
// snapshots. It changes nothing. The error says that it could not be read, boltkv.ErrLocked among
// others.
func Check(ctx context.Context, p Place, now time.Time) (*Report, error) {
	all, err := List(p.snapshots())
	if err != nil {
		return nil, err
	}
	all = Verify(all)
	r := &Report{Snapshots: all}
	back := backTo(p.DataDir, all)

	damages, err := boltkv.Inspect(p.store())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		pages := Part{Name: "store", State: "there is none: the next start makes one"}
		if lost := Missing(p); lost != nil {
			pages.Wrong, pages.Advice = []string{lost.Error()}, back
		}
		r.Parts = []Part{pages}
		return r, nil
	case err != nil:
		return nil, err
	}
	pages := Part{Name: "store", State: "every page is whole"}
	for _, d := range damages {
		pages.Wrong = append(pages.Wrong, d.Error())
	}
	if len(damages) > 0 {
		pages.Advice = back
		r.Parts = []Part{pages}
		return r, nil
	}
	return r, r.inside(ctx, p, now, pages, back)
}

// inside looks at the records of a store whose pages are whole.
func (r *Report) inside(ctx context.Context, p Place, now time.Time, pages Part, back string) (err error) {
	store, err := boltkv.Open(p.store(), boltkv.Config{ReadOnly: true, LockTimeout: time.Millisecond})
	if errors.Is(err, boltkv.ErrDamaged) {
		pages.Wrong, pages.Advice = []string{err.Error()}, back
		r.Parts = []Part{pages}
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	c, err := records.Check(ctx, store)
	if err != nil {
		return err
	}
	rec := Part{Name: "records", State: fmt.Sprintf("%d entries, %d agents, %d bundles, %d join tokens of %s at revision %d fit together",
		c.Entries, c.Nodes, c.Bundles, c.Tokens, c.TrustDomain.Name(), c.Rev)}
	for _, f := range c.Findings {
		rec.Wrong = append(rec.Wrong, f.String())
	}
	if len(rec.Wrong) > 0 {
		rec.Advice = back
	}
	r.Parts = []Part{pages, rec}
	if !c.TrustDomain.IsZero() {
		r.Parts = append(r.Parts, checkKeys(ctx, p, c, now))
	}
	return nil
}

// checkKeys compares the journal with the keys and the bundle.
func checkKeys(ctx context.Context, p Place, c *records.Checked, now time.Time) Part {
	part := Part{Name: "authorities", State: fmt.Sprintf("%d in the journal, each with what it needs", len(c.Journal))}
	var km keys.Manager = keys.Memory()
	switch {
	case p.KeysElsewhere:
		km = nil
		part.State = fmt.Sprintf("%d in the journal, each with its place in the bundle; their keys are elsewhere and were not looked at", len(c.Journal))
	case !p.KeysInMemory:
		secret, err := keys.ReadSecret(p.KeysSeal)
		if err != nil {
			part.Wrong = append(part.Wrong, err.Error())
			part.Advice = "name the file with the secret in seal_credential_path"
			km = nil
			break
		}
		read, note, err := keys.ReadDisk(p.keys(), secret)
		switch {
		case err != nil && len(c.Journal) == 0 && errors.Is(err, fs.ErrNotExist):
		case err != nil:
			part.Wrong = append(part.Wrong, err.Error())
			part.Advice = "put the key file back from your own copy of it; without one, set new_authority_on_lost_key once"
			km = nil
		case note != "":
			part.Wrong = append(part.Wrong, note)
			part.Advice = "start the server: it takes the previous generation by itself and says so"
			km = read
		default:
			km = read
		}
	}
	part.Wrong = append(part.Wrong, ca.Check(ctx, c.Journal, c.Bundle, km, c.TrustDomain, now)...)
	return part
}

// Missing returns an error if the store's file is not there although it must have been: a server does
// not make a new one beside what is left of the old. nil: it is there, or this is a first start.
func Missing(p Place) error { return missing(p, os.Lstat) }

func missing(p Place, lstat func(path string) (fs.FileInfo, error)) error {
	// What is left is looked for first. Another server that starts for the first time makes its store
	// before all else, so the store is there if anything else is.
	left := ""
	if all, err := List(p.snapshots()); err == nil && len(all) > 0 {
		left = p.snapshots()
	} else if _, err := lstat(p.keys()); err == nil && !p.KeysInMemory && !p.KeysElsewhere {
		left = p.keys()
	}
	if left == "" {
		return nil
	}
	if _, err := lstat(p.store()); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return nil // if it cannot be looked at, who opens it says why
	}
	return fmt.Errorf("%w: %s is missing, but %s is there; to begin a new trust domain, move that away too", boltkv.ErrDamaged, p.store(), left)
}

// Explain adds to an error of the start what an operator can do about a damaged store. Other errors
// come back as they are.
func Explain(p Place, err error) error {
	if !errors.Is(err, boltkv.ErrDamaged) && !errors.Is(err, records.ErrDamaged) {
		return err
	}
	all, listErr := List(p.snapshots())
	if listErr != nil {
		return errors.Join(err, listErr)
	}
	return fmt.Errorf("%w; %s; \"assay-server check -dataDir %s\" says more", err, backTo(p.DataDir, all), p.DataDir)
}

// backTo says how to go back to the newest good snapshot.
func backTo(dataDir string, all []Snapshot) string {
	good, found := newestGood(all)
	if !found {
		return fmt.Sprintf("there is no good snapshot in %s: restore a backup with \"assay-server restore -from FILE -dataDir %s -force\"",
			filepath.Join(dataDir, SnapshotsDir), dataDir)
	}
	return fmt.Sprintf("the newest good snapshot was made %s at revision %d: to go back to it, run \"assay-server restore -from %s -dataDir %s -force\"",
		good.Made.Format(time.RFC3339), good.Rev, good.Path, dataDir)
}
