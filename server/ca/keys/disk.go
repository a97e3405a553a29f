package keys

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"

	"github.com/assay-id/assay/server/store/durable"
)

// maxFile is the largest key file that is read. A thousand RSA-4096 keys stay below it.
const maxFile = 8 << 20

// OnDisk is a Manager whose keys live in one JSON file, readable by its owner only.
//
// Every write goes to <path>.prev first and to <path> last, each as a new file that is synced,
// renamed over the old one and made to last by syncing the directory. The rename of <path> is what
// decides; <path>.prev is the same generation, or one beside it after a crash, and is there for the
// day when <path> comes back from a broken disk unreadable. A deleted key is in neither.
//
// A lock on <path>.lock keeps a second server from writing to the same file.
type OnDisk struct {
	path string
	log  logrus.FieldLogger
	lock *os.File
	seal *seal

	mu     sync.Mutex         // held while writing
	keys   map[string]*signer // guarded by mu
	closed bool               // guarded by mu
}

var _ Manager = (*OnDisk)(nil)

// OpenDisk reads the keys of the file, which need not exist yet; its folder must. It refuses a file
// that others may read. A file that is damaged or gone is replaced, with an error in the log, by what
// <path>.prev holds, and refused if that is damaged too: keys are never thrown away in silence.
func OpenDisk(path string, log logrus.FieldLogger) (*OnDisk, error) {
	return OpenSealed(path, nil, log)
}

// OpenSealed is OpenDisk for a file that is sealed with a secret; see seal.go. A file that is not sealed yet
// is, at once. Without a secret it is OpenDisk, and a sealed file is refused.
func OpenSealed(path string, secret []byte, log logrus.FieldLogger) (*OnDisk, error) {
	d := &OnDisk{path: path, log: log, seal: newSeal(secret)}
	var err error
	if d.lock, err = lockFile(path + ".lock"); err != nil {
		return nil, err
	}
	if err := d.load(); err != nil {
		_ = d.lock.Close()
		return nil, err
	}
	return d, nil
}

// Close lets another process have the file. Keys that were handed out go on signing.
func (d *OnDisk) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	return d.lock.Close()
}

// Generate implements Manager.
func (d *OnDisk) Generate(ctx context.Context, name string, kind Kind) (crypto.Signer, error) {
	made, err := newSigner(ctx, name, kind)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, found := d.keys[name]; found {
		return nil, fmt.Errorf("generate key %s: %w", name, ErrExists)
	}
	next := maps.Clone(d.keys)
	next[name] = made
	if err := d.write(next); err != nil {
		return nil, fmt.Errorf("generate key %s: %w", name, err)
	}
	return made, nil
}

// Get implements Manager.
func (d *OnDisk) Get(_ context.Context, name string) (crypto.Signer, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s, found := d.keys[name]; found {
		return s, nil
	}
	return nil, fmt.Errorf("get key %s: %w", name, ErrNotFound)
}

// Delete implements Manager.
func (d *OnDisk) Delete(_ context.Context, name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, found := d.keys[name]; !found {
		return nil
	}
	next := maps.Clone(d.keys)
	delete(next, name)
	if err := d.write(next); err != nil {
		return fmt.Errorf("delete key %s: %w", name, err)
	}
	return nil
}

// List implements Manager.
func (d *OnDisk) List(context.Context) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Sorted(maps.Keys(d.keys)), nil
}

// Persistent implements Manager: it is true.
func (d *OnDisk) Persistent() bool { return true }

// write makes next the keys, on disk first. An error leaves the keys as they were. Callers hold mu.
func (d *OnDisk) write(next map[string]*signer) error {
	if d.closed {
		return errors.New("key file is closed")
	}
	text, err := encode(next)
	if err != nil {
		return err
	}
	if text, err = d.seal.close(text); err != nil {
		return err
	}
	for _, path := range []string{d.path + ".prev", d.path} {
		if err := durable.Replace(path, 0o600, text); err != nil {
			return fmt.Errorf("write key file: %w", err)
		}
	}
	d.keys = next
	return nil
}

// load fills keys from the file, or from the one beside it if the file is damaged or gone. A rename
// leaves no gap, so a file that is gone while its twin is there was removed, or a crash came between
// the two at the very first write.
func (d *OnDisk) load() error {
	var err error
	var open bool
	d.keys, open, err = readKeys(d.path, d.seal)
	var damaged *damageError
	gone := errors.Is(err, fs.ErrNotExist)
	switch {
	case err == nil && open && d.seal.there():
		if err := d.write(d.keys); err != nil {
			return fmt.Errorf("seal key file: %w", err)
		}
		d.log.WithField("path", d.path).Info("Key file is sealed now; copies that were made before are not")
		return nil
	case err == nil:
		return nil
	case !gone && !errors.As(err, &damaged):
		return err
	}
	previous, _, prevErr := readKeys(d.path+".prev", d.seal)
	if gone && errors.Is(prevErr, fs.ErrNotExist) {
		d.keys = map[string]*signer{}
		return nil
	}
	if prevErr != nil {
		return fmt.Errorf("%w; %s.prev cannot stand in for it: %w; put a copy of the key file back, or move both away and set new_authority_on_lost_key once to start with a new authority", err, d.path, prevErr)
	}
	log := d.log.WithError(err).WithFields(logrus.Fields{"path": d.path, "keys": len(previous)})
	if !gone {
		kept := d.path + ".damaged"
		if err := os.Rename(d.path, kept); err != nil {
			return fmt.Errorf("set damaged key file aside: %w", err)
		}
		log = log.WithField("kept", kept)
	}
	if err := d.write(previous); err != nil {
		return fmt.Errorf("restore key file: %w", err)
	}
	if gone {
		log.Error("Key file is missing: the copy in .prev took its place")
	} else {
		log.Error("Key file is damaged: the copy in .prev took its place")
	}
	return nil
}

// ReadDisk returns the keys of the file at path, as OpenDisk would have them, without changing or
// locking anything. What is generated or deleted in the Manager stays in memory. note says, if it is
// not empty, what OpenDisk would say loudly.
func ReadDisk(path string, secret []byte) (m Manager, note string, err error) {
	seal := newSeal(secret)
	held, _, err := readKeys(path, seal)
	var damaged *damageError
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, &damaged) {
		previous, _, prevErr := readKeys(path+".prev", seal)
		switch {
		case prevErr == nil:
			held, note, err = previous, fmt.Sprintf("%v; the copy in %s.prev is whole and takes its place at the next start", err, path), nil
		case damaged != nil || !errors.Is(prevErr, fs.ErrNotExist):
			err = fmt.Errorf("%w; %s.prev cannot stand in for it: %w", err, path, prevErr)
		}
	}
	if err != nil {
		return nil, "", err
	}
	return persistent{&InMemory{keys: held}}, note, nil
}

// persistent is a copy of keys that are meant to last.
type persistent struct{ *InMemory }

func (persistent) Persistent() bool { return true }

// damageError marks a file that was read but makes no sense.
type damageError struct {
	path string
	err  error
}

func (e *damageError) Error() string { return fmt.Sprintf("key file %s is damaged: %v", e.path, e.err) }
func (e *damageError) Unwrap() error { return e.err }

// file is the stored form. Sum is the SHA-256 of the keys, so that a flipped bit is found when the
// file is read and not when a signature fails.
type file struct {
	Version int      `json:"version"`
	Sum     string   `json:"sha256"`
	Keys    []stored `json:"keys"`
}

type stored struct {
	Name  string `json:"name"`
	PKCS8 []byte `json:"pkcs8"`
}

const fileVersion = 1

func (f *file) sum() string {
	h := sha256.New()
	for _, k := range f.Keys {
		_, _ = fmt.Fprintf(h, "%d %s %d ", len(k.Name), k.Name, len(k.PKCS8))
		h.Write(k.PKCS8)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func encode(keys map[string]*signer) ([]byte, error) {
	f := file{Version: fileVersion, Keys: []stored{}}
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		der, err := x509.MarshalPKCS8PrivateKey(keys[name].key)
		if err != nil {
			return nil, fmt.Errorf("encode key %s: %w", name, err)
		}
		f.Keys = append(f.Keys, stored{Name: name, PKCS8: der})
	}
	f.Sum = f.sum()
	text, err := json.MarshalIndent(&f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode key file: %w", err)
	}
	return append(text, '\n'), nil
}

// errNewer is no damage: the copy in .prev may be from before the upgrade, and lack keys that sign by now.
var errNewer = fmt.Errorf("was written by a newer version of assay-server; this one knows versions up to %d", fileVersion)

// decode never puts anything of the text into an error: it may be a private key.
func decode(text []byte) (map[string]*signer, error) {
	var f file
	if err := json.Unmarshal(text, &f); err != nil {
		return nil, errors.New("not the JSON it was written as")
	}
	if f.Version > fileVersion {
		return nil, errNewer
	}
	if f.Version != fileVersion {
		return nil, fmt.Errorf("version %d, want %d", f.Version, fileVersion)
	}
	if f.Sum != f.sum() {
		return nil, errors.New("checksum does not fit")
	}
	keys := make(map[string]*signer, len(f.Keys))
	for _, k := range f.Keys {
		if err := checkName(k.Name); err != nil {
			return nil, err
		}
		parsed, err := x509.ParsePKCS8PrivateKey(k.PKCS8)
		if err != nil {
			return nil, fmt.Errorf("key %s cannot be parsed", k.Name)
		}
		key, ok := parsed.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("key %s cannot sign", k.Name)
		}
		if _, found := keys[k.Name]; found {
			return nil, fmt.Errorf("key %s is there twice", k.Name)
		}
		keys[k.Name] = &signer{name: k.Name, key: key}
	}
	return keys, nil
}

// readKeys returns the keys of a file, and whether it is not sealed.
func readKeys(path string, seal *seal) (keys map[string]*signer, open bool, err error) {
	text, err := readFile(path)
	if err != nil {
		return nil, false, err
	}
	text, open, err = seal.open(text)
	var other *otherSealError
	switch {
	case errors.As(err, &other):
		return nil, false, fmt.Errorf("key file %s %w", path, err)
	case err != nil:
		return nil, false, &damageError{path, err}
	}
	if keys, err = decode(text); errors.Is(err, errNewer) {
		return nil, false, fmt.Errorf("key file %s %w", path, err)
	} else if err != nil {
		return nil, false, &damageError{path, err}
	}
	return keys, open, nil
}

func readFile(path string) ([]byte, error) {
	// O_NONBLOCK: a pipe in the file's place is an error below, not a hang here.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	defer func() { _ = f.Close() }()
	stat, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read key file: %w", err)
	case !stat.Mode().IsRegular():
		return nil, fmt.Errorf("key file %s is not a regular file", path)
	case stat.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("key file %s can be read or written by others (mode %04o): its keys may be known to them; if not, run chmod 600 on it", path, stat.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil { // it was opened: the disk cannot give it back
		return nil, &damageError{path, err}
	}
	if len(text) > maxFile {
		return nil, &damageError{path, fmt.Errorf("over %d bytes", maxFile)}
	}
	return text, nil
}

// lockFile takes the lock or says who else may hold it. The kernel drops it with the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock key file: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("key file %s is in use by another process", path[:len(path)-len(".lock")])
		}
		return nil, fmt.Errorf("lock key file: %w", err)
	}
	return f, nil
}
