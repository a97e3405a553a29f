// Package keep holds what an agent must still have after a restart while its server is away: its own
// SVID and key, the bundle it trusts, its picture of entries, bundles and verdicts, and the SVIDs of its
// workloads with their keys.
//
// Each of the four is one file in the data directory, sealed with AES-256-GCM under the key of the
// agent's key store and replaced whole (temporary file, fsync, rename, fsync of the directory). The
// file's name is bound into the seal, so that one file cannot be put in the place of another:
//
//	own.sealed     own SVID                    written when it changes, before it is used
//	bundle.sealed  trusted bundle              the same
//	picture.sealed entries, bundles, verdicts  soon after a change
//	svids.sealed   workloads' SVIDs            soon after a change
//
// A sealed file is 8 bytes of magic, one of format version, 12 of nonce, then ciphertext and tag. In
// it is JSON with a version of its own; entries and bundles are in their public protobuf form,
// verdicts in that of the feed.
//
// Why it is so: a file that was cut short, tampered with or sealed under another key is worth less
// than an agent that runs. It is named in the log, put aside, and the agent starts as if it had
// never been there: the server has the truth of everything but the keys, and those can be made anew.
package keep

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	magic         = "ASSAYKEP"
	formatVersion = 1
	jsonVersion   = 1
	// maxFile bounds what is read back. A thousand SVIDs take some 3 MB, ten thousand entries 10 MB.
	maxFile = 256 << 20
)

const (
	ownFile     = "own.sealed"
	bundleFile  = "bundle.sealed"
	pictureFile = "picture.sealed"
	svidsFile   = "svids.sealed"
)

var (
	errTampered = errors.New("damaged, tampered with, or sealed under another key")
	errVersion  = errors.New("format version is not known to this agent")
)

// Keep is a data directory. Use Open. It is safe for concurrent use.
type Keep struct {
	dir  string
	keys *Keys
	aead cipher.AEAD
	log  logrus.FieldLogger

	// fileMu serializes writes to the directory; taken before mu where both are.
	fileMu sync.Mutex
	// mu guards later and lost.
	mu    sync.Mutex
	later map[string]func() (any, error)
	lost  []error
	kick  chan struct{}
	// trouble is with the files that could not be written when that was last tried. Only Run touches it.
	trouble map[string]*trouble
}

// trouble is what is wrong with a file.
type trouble struct {
	unsaid int // failures since the log last spoke of it
	saidAt time.Time
}

// Open opens the data directory, making it with mode 0700 if it is missing. It reads nothing yet.
func Open(dir string, keys *Keys, log logrus.FieldLogger) (*Keep, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make data directory: %w", err)
	}
	block, err := aes.NewCipher(keys.seal)
	if err != nil {
		return nil, fmt.Errorf("open seal key: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("open seal key: %w", err)
	}
	k := &Keep{
		dir: dir, keys: keys, aead: aead, log: log,
		later: map[string]func() (any, error){},
		kick:  make(chan struct{}, 1), trouble: map[string]*trouble{},
	}
	if keys.lost != nil {
		k.lost = append(k.lost, keys.lost)
		log.WithError(keys.lost).Error("agent's key store is damaged and was replaced; what was sealed under it cannot be used any more")
	}
	return k, nil
}

// Lost returns what was kept before and could not be used, nil if there was nothing of the kind.
func (k *Keep) Lost() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return errors.Join(k.lost...)
}

// Wipe forgets everything but the key store, on disk too.
func (k *Keep) Wipe() error {
	k.fileMu.Lock()
	defer k.fileMu.Unlock()
	k.mu.Lock()
	clear(k.later)
	k.mu.Unlock()
	var errs []error
	for _, name := range []string{ownFile, bundleFile, pictureFile, svidsFile} {
		if err := os.Remove(filepath.Join(k.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := syncDir(k.dir); err != nil {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("wipe kept state: %w", err)
	}
	return nil
}

// How often a file that keeps changing is written: soon, but never so often that writing takes more
// than a twentieth of the time, nor more seldom than every ten seconds.
const (
	soon      = 200 * time.Millisecond
	seldom    = 10 * time.Second
	costRatio = 20
)

// What cannot be written is tried again by itself, for until then a restart would begin with what was true
// before; and the log speaks of it when it begins, now and then, and when it is over.
const (
	tryAgain = 15 * time.Second
	remind   = 10 * time.Minute
)

// Run writes what SavePicture and SaveSVIDs ask for until ctx ends, and once more then.
func (k *Keep) Run(ctx context.Context) error {
	wait := soon
	for {
		var again <-chan time.Time
		if len(k.trouble) > 0 {
			again = time.After(tryAgain)
		}
		select {
		case <-ctx.Done():
			k.flush()
			return nil
		case <-k.kick:
		case <-again:
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			k.flush()
			return nil
		case <-timer.C:
		}
		began := time.Now()
		k.flush()
		wait = min(max(soon, costRatio*time.Since(began)), seldom)
	}
}

// soonest asks Run to write the file with what content returns at that time. A later call for the
// same file replaces it.
func (k *Keep) soonest(name string, content func() (any, error)) {
	if !k.keys.persistent {
		return
	}
	k.mu.Lock()
	k.later[name] = content
	k.mu.Unlock()
	select {
	case k.kick <- struct{}{}:
	default:
	}
}

func (k *Keep) flush() {
	k.fileMu.Lock()
	defer k.fileMu.Unlock()
	k.mu.Lock()
	todo := maps.Clone(k.later)
	clear(k.later)
	k.mu.Unlock()
	maps.DeleteFunc(k.trouble, func(name string, _ *trouble) bool { return todo[name] == nil }) // wiped meanwhile
	for name, content := range todo {
		v, err := content()
		if err == nil {
			err = k.write(name, v)
		}
		k.tell(name, err)
		if err == nil {
			continue
		}
		k.mu.Lock()
		if k.later[name] == nil {
			k.later[name] = content
		}
		k.mu.Unlock()
	}
}

// tell says what there is to say of an attempt to write a file.
func (k *Keep) tell(name string, err error) {
	log := k.log.WithField("file", filepath.Join(k.dir, name))
	t := k.trouble[name]
	switch {
	case err == nil && t == nil:
	case err == nil:
		delete(k.trouble, name)
		log.WithField("unsaid", t.unsaid).Info("state is kept on disk again")
	case t != nil && time.Since(t.saidAt) < remind:
		t.unsaid++
	default:
		if t == nil {
			t = &trouble{}
			k.trouble[name] = t
		}
		log.WithError(err).WithField("unsaid", t.unsaid).
			Warn("state cannot be kept on disk: a restart while the server is away would begin with what was true before; it is tried again")
		t.unsaid, t.saidAt = 0, time.Now()
	}
}

// save writes the file now. It does nothing with keys that end with the process.
func (k *Keep) save(name string, v any) error {
	if !k.keys.persistent {
		return nil
	}
	k.fileMu.Lock()
	defer k.fileMu.Unlock()
	if err := k.write(name, v); err != nil {
		return fmt.Errorf("keep %s: %w", filepath.Join(k.dir, name), err)
	}
	return nil
}

// write seals and replaces the file. fileMu is held.
func (k *Keep) write(name string, v any) error {
	plain, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("marshal: %w", err)
	}
	nonce := make([]byte, k.aead.NonceSize())
	_, _ = rand.Read(nonce) // crypto/rand.Read never fails
	out := make([]byte, 0, len(magic)+1+len(nonce)+len(plain)+k.aead.Overhead())
	out = append(out, magic...)
	out = append(out, formatVersion)
	out = append(out, nonce...)
	out = k.aead.Seal(out, nonce, plain, sealedName(name))
	return writeFile(filepath.Join(k.dir, name), out)
}

// sealedName is what is authenticated beside the content.
func sealedName(name string) []byte { return append([]byte{formatVersion}, name...) }

// load reads the file into v and reports whether there was one. A file that cannot be believed is
// put aside under a name ending in ".bad" and named in the log.
func (k *Keep) load(name string, v any) bool {
	if !k.keys.persistent {
		return false
	}
	path := filepath.Join(k.dir, name)
	err := k.read(path, name, v)
	switch {
	case err == nil:
		return true
	case errors.Is(err, fs.ErrNotExist):
		return false
	}
	k.spoilt(name, err)
	return false
}

// spoilt names a file that is of no use and puts it aside.
func (k *Keep) spoilt(name string, err error) {
	path := filepath.Join(k.dir, name)
	log := k.log.WithError(err).WithField("file", path)
	if mv := os.Rename(path, path+".bad"); mv != nil {
		log = log.WithField("put_aside", mv)
	}
	log.Error("kept state cannot be used; starting without it")
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lost = append(k.lost, fmt.Errorf("%s: %w", path, err))
}

func (k *Keep) read(path, name string, v any) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return fmt.Errorf("read: no regular file of at most %d bytes", maxFile)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	rest, ok := bytes.CutPrefix(raw, []byte(magic))
	if !ok || len(rest) < 1+k.aead.NonceSize()+k.aead.Overhead() {
		return errTampered
	}
	if rest[0] != formatVersion {
		return fmt.Errorf("version %d: %w", rest[0], errVersion)
	}
	nonce, sealed := rest[1:1+k.aead.NonceSize()], rest[1+k.aead.NonceSize():]
	plain, err := k.aead.Open(nil, nonce, sealed, sealedName(name))
	if err != nil {
		return errTampered
	}
	if err := json.Unmarshal(plain, v); err != nil {
		return fmt.Errorf("unmarshal: %w", err)
	}
	return nil
}
