package keys

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
)

func TestDisk(t *testing.T) {
	ctx := t.Context()
	// made returns the path of a closed file with the keys "a" and "b", and a's public half.
	made := func(t *testing.T) (string, any) {
		t.Helper()
		path := filepath.Join(t.TempDir(), "keys.json")
		d := openDisk(t, path)
		a, err := d.Generate(ctx, "a", EC256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Generate(ctx, "b", EC384); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		return path, a.Public()
	}
	refused := func(t *testing.T, path, because string) {
		t.Helper()
		d, err := OpenDisk(path, quiet())
		if err == nil {
			_ = d.Close()
			t.Fatal("opened")
		}
		if !strings.Contains(err.Error(), because) || !strings.Contains(err.Error(), path) {
			t.Errorf("want %q and the path in %q", because, err)
		}
	}

	t.Run("keys survive a restart", func(t *testing.T) {
		path, a := made(t)
		d := openDisk(t, path)
		if got, err := d.Get(ctx, "a"); err != nil || !equal(got.Public(), a) {
			t.Errorf("got another key back: %v", err)
		}
		if names, _ := d.List(ctx); len(names) != 2 {
			t.Errorf("names %v", names)
		}
	})

	t.Run("every file is its owner's alone and no other is left", func(t *testing.T) {
		path, _ := made(t)
		found, err := os.ReadDir(filepath.Dir(path))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, f := range found {
			stat, err := f.Info()
			if err != nil || stat.Mode() != 0o600 {
				t.Errorf("%s: mode %v, %v", f.Name(), stat.Mode(), err)
			}
			names = append(names, f.Name())
		}
		if got := strings.Join(names, " "); got != "keys.json keys.json.lock keys.json.prev" {
			t.Errorf("files %s", got)
		}
	})

	t.Run("a file that others may read is refused", func(t *testing.T) {
		for _, mode := range []os.FileMode{0o640, 0o604, 0o660, 0o602} {
			path, _ := made(t)
			if err := os.Chmod(path, mode); err != nil {
				t.Fatal(err)
			}
			refused(t, path, "can be read or written by others")
		}
	})

	t.Run("a deleted key is in no file", func(t *testing.T) {
		path, _ := made(t)
		d := openDisk(t, path)
		if err := d.Delete(ctx, "a"); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{path, path + ".prev"} {
			if keys, err := readOpen(p); err != nil || len(keys) != 1 || keys["b"] == nil {
				t.Errorf("%s holds %v, %v", p, keys, err)
			}
		}
	})

	damage := map[string]func(text []byte) []byte{
		"empty":              func([]byte) []byte { return nil },
		"truncated":          func(text []byte) []byte { return text[:len(text)/2] },
		"with a flipped bit": func(text []byte) []byte { text[bytes.Index(text, []byte(`"pkcs8"`))+40] ^= 1; return text },
		"zeroed":             func(text []byte) []byte { return make([]byte, len(text)) },
		"oversized":          func([]byte) []byte { return bytes.Repeat([]byte(" "), maxFile+1) },
		"of another version": func(text []byte) []byte {
			return bytes.Replace(text, []byte(`"version": 1`), []byte(`"version": 0`), 1)
		},
	}
	t.Run("a file that a newer server wrote is refused, and the older twin does not take its place", func(t *testing.T) {
		path, _ := made(t)
		spoil(t, path, func(text []byte) []byte {
			return bytes.Replace(text, []byte(`"version": 1`), []byte(`"version": 2`), 1)
		})
		refused(t, path, "newer")
		if _, err := os.Stat(path + ".damaged"); err == nil {
			t.Error("it was set aside as damaged")
		}
	})
	for name, harm := range damage {
		t.Run("a file that is "+name+" is replaced by its twin, loudly", func(t *testing.T) {
			path, a := made(t)
			spoil(t, path, harm)
			var out bytes.Buffer
			log := logrus.New()
			log.SetOutput(&out)
			d, err := OpenDisk(path, log)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			if got, err := d.Get(ctx, "a"); err != nil || !equal(got.Public(), a) {
				t.Errorf("got another key back: %v", err)
			}
			if !strings.Contains(out.String(), "level=error") || !strings.Contains(out.String(), "damaged") {
				t.Errorf("logged %q", out.String())
			}
			if _, err := os.Stat(path + ".damaged"); err != nil {
				t.Errorf("the damaged file was thrown away: %v", err)
			}
			if keys, err := readOpen(path); err != nil || len(keys) != 2 {
				t.Errorf("file was not restored: %v", err)
			}
		})
		t.Run("a file that is "+name+" and whose twin is too is refused", func(t *testing.T) {
			path, _ := made(t)
			spoil(t, path, harm)
			spoil(t, path+".prev", harm)
			refused(t, path, "damaged")
		})
	}

	t.Run("an error does not quote the file", func(t *testing.T) {
		path, _ := made(t)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var f file
		if err := json.Unmarshal(text, &f); err != nil {
			t.Fatal(err)
		}
		f.Keys[0].PKCS8 = f.Keys[0].PKCS8[:50]
		f.Sum = f.sum()
		text, _ = json.Marshal(&f)
		for _, spoilt := range [][]byte{text, append([]byte{'x'}, text...), text[:len(text)-1]} {
			if _, err := decode(spoilt); err == nil || len(err.Error()) > 60 {
				t.Errorf("got %v", err)
			}
		}
	})

	t.Run("a file that was removed is replaced by its twin, loudly", func(t *testing.T) {
		path, a := made(t)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		log := logrus.New()
		log.SetOutput(&out)
		d, err := OpenDisk(path, log)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if got, err := d.Get(ctx, "a"); err != nil || !equal(got.Public(), a) {
			t.Errorf("got another key back: %v", err)
		}
		if !strings.Contains(out.String(), "level=error") || !strings.Contains(out.String(), "missing") {
			t.Errorf("logged %q", out.String())
		}
		if keys, err := readOpen(path); err != nil || len(keys) != 2 {
			t.Errorf("file was not restored: %v", err)
		}
	})
	t.Run("a file that was removed and whose twin is damaged is refused", func(t *testing.T) {
		path, _ := made(t)
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		spoil(t, path+".prev", func([]byte) []byte { return nil })
		refused(t, path, "cannot stand in for it")
	})

	t.Run("reading alone gives what opening would, and changes nothing", func(t *testing.T) {
		gone := func(t *testing.T, path string) {
			t.Helper()
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		for _, c := range []struct {
			name   string
			harm   func(t *testing.T, path string)
			note   string
			refuse string
		}{
			{"whole", func(*testing.T, string) {}, "", ""},
			{"damaged", func(t *testing.T, path string) { t.Helper(); spoil(t, path, damage["truncated"]) }, "is damaged", ""},
			{"removed", gone, "no such file", ""},
			{"removed with its twin", func(t *testing.T, path string) { t.Helper(); gone(t, path); gone(t, path+".prev") }, "", "no such file"},
			{"damaged with its twin", func(t *testing.T, path string) {
				t.Helper()
				spoil(t, path, damage["empty"])
				spoil(t, path+".prev", damage["empty"])
			}, "", "cannot stand in"},
			{"readable by others", func(t *testing.T, path string) {
				t.Helper()
				if err := os.Chmod(path, 0o644); err != nil {
					t.Fatal(err)
				}
			}, "", "by others"},
		} {
			t.Run(c.name, func(t *testing.T) {
				path, a := made(t)
				d := openDisk(t, path) // a server may be running
				defer d.Close()
				c.harm(t, path)
				before := folder(t, filepath.Dir(path))
				m, note, err := ReadDisk(path, nil)
				if after := folder(t, filepath.Dir(path)); after != before {
					t.Errorf("was:\n%s\nis:\n%s", before, after)
				}
				if c.refuse != "" {
					if err == nil || !strings.Contains(err.Error(), c.refuse) {
						t.Errorf("error %v", err)
					}
					return
				}
				if err != nil || !strings.Contains(note, c.note) || (c.note == "") != (note == "") {
					t.Fatalf("note %q, error %v", note, err)
				}
				if got, err := m.Get(ctx, "a"); err != nil || !equal(got.Public(), a) || !m.Persistent() {
					t.Errorf("got another key back: %v", err)
				}
			})
		}
	})

	t.Run("a second process is refused until the first one ends", func(t *testing.T) {
		path, _ := made(t)
		d := openDisk(t, path)
		refused(t, path, "in use by another process")
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		openDisk(t, path)
		if _, err := d.Generate(ctx, "c", EC256); err == nil {
			t.Error("a closed manager wrote to the file of another")
		}
	})

	t.Run("a folder, a pipe or no folder in the file's place is refused", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "folder"), 0o700); err != nil {
			t.Fatal(err)
		}
		refused(t, filepath.Join(dir, "folder"), "not a regular file")
		if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
			t.Fatal(err)
		}
		refused(t, filepath.Join(dir, "pipe"), "not a regular file")
		refused(t, filepath.Join(dir, "none", "keys.json"), "no such file")
	})

	t.Run("a write that fails changes nothing", func(t *testing.T) {
		path, _ := made(t)
		d := openDisk(t, path)
		// A folder in the place of the temporary file stops even root.
		if err := os.MkdirAll(filepath.Join(path+".tmp", "x"), 0o700); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Generate(ctx, "c", EC256); err == nil {
			t.Fatal("a key was given away that is not on disk")
		}
		if err := d.Delete(ctx, "a"); err == nil {
			t.Fatal("delete claims to have happened")
		}
		if names, _ := d.List(ctx); strings.Join(names, " ") != "a b" {
			t.Errorf("keys %v", names)
		}
		if keys, err := readOpen(path); err != nil || len(keys) != 2 {
			t.Errorf("file: %v", err)
		}
		if err := os.RemoveAll(path + ".tmp"); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Generate(ctx, "c", EC256); err != nil {
			t.Errorf("did not recover: %v", err)
		}
	})
}

// folder returns what is in a folder, contents and all.
func folder(t *testing.T, dir string) string {
	t.Helper()
	found, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for _, f := range found {
		text, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s %s\n", f.Name(), text)
	}
	return all.String()
}

func spoil(t *testing.T, path string, harm func([]byte) []byte) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, harm(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestMain lets the test binary be the process that is killed.
func TestMain(m *testing.M) {
	if os.Getenv("KEYS_TEST_WRITER") != "" {
		writer("keys.json") // in the folder it was started in
		return
	}
	os.Exit(m.Run())
}

// writer makes and deletes keys until it is killed, and says on standard output what is done.
func writer(path string) {
	d, err := OpenDisk(path, quiet())
	if err != nil {
		fmt.Println("error", err)
		return
	}
	for i := 0; ; i++ {
		name := fmt.Sprintf("k%d-%d", os.Getpid(), i)
		if _, err := d.Generate(context.Background(), name, EC256); err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println("made", name)
		if i%3 == 0 {
			fmt.Println("deleting", name)
			if err := d.Delete(context.Background(), name); err != nil {
				fmt.Println("error", err)
				return
			}
			fmt.Println("deleted", name)
		}
	}
}

func TestKill(t *testing.T) {
	t.Run("a process killed while writing loses no key that it had", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "keys.json")
		held := map[string]bool{}
		for round := range 6 {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), "KEYS_TEST_WRITER=1")
			cmd.Dir = filepath.Dir(path)
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			unsure := ""
			lines := bufio.NewScanner(out)
			for n := 0; lines.Scan(); n++ {
				word, name, _ := strings.Cut(lines.Text(), " ")
				switch word {
				case "made":
					held[name] = true
				case "deleting":
					unsure = name
				case "deleted":
					delete(held, name)
					unsure = ""
				default:
					t.Fatalf("writer: %s", lines.Text())
				}
				if n == 3+5*round { // and read on what it got to say before it was gone
					_ = cmd.Process.Kill()
				}
			}
			_ = cmd.Wait()
			d, err := OpenDisk(path, quiet())
			if err != nil {
				t.Fatal(err)
			}
			for name := range held {
				if _, err := d.Get(t.Context(), name); err != nil && name != unsure {
					t.Errorf("round %d: %v", round, err)
				}
			}
			delete(held, unsure)
			_ = d.Close()
		}
	})
}

func FuzzDecode(f *testing.F) {
	d := Memory()
	if _, err := d.Generate(f.Context(), "a", EC256); err != nil {
		f.Fatal(err)
	}
	text, err := encode(d.keys)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(`{"version":1,"sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","keys":[]}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		keys, err := decode(text)
		if err != nil {
			return
		}
		again, err := encode(keys)
		if err != nil {
			t.Fatal(err)
		}
		if other, err := decode(again); err != nil || len(other) != len(keys) {
			t.Fatalf("round trip: %d of %d keys, %v", len(other), len(keys), err)
		}
	})
}

func readOpen(path string) (map[string]*signer, error) {
	keys, _, err := readKeys(path, newSeal(nil))
	return keys, err
}

func TestSeal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keys.json")
	d := openDisk(t, path)
	if _, err := d.Generate(t.Context(), "a", EC256); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open := func(secret string) (*OnDisk, error) {
		d, err := OpenSealed(path, []byte(secret), quiet())
		if err == nil {
			t.Cleanup(func() { _ = d.Close() })
		}
		return d, err
	}
	t.Run("a file that was open is sealed at once, with its twin", func(t *testing.T) {
		d, err := open("secret")
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{path, path + ".prev"} {
			text, err := os.ReadFile(p)
			if err != nil || strings.Contains(string(text), "pkcs8") || !strings.Contains(string(text), "sealed") {
				t.Errorf("%s, %v", text, err)
			}
		}
		if _, err := d.Get(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for secret, want := range map[string]string{"": "name the file with its secret in seal_credential_path", "other": "sealed with another secret"} {
		t.Run("with the secret "+secret+" it is refused, and not taken for damaged", func(t *testing.T) {
			if _, err := open(secret); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
			if _, _, err := ReadDisk(path, []byte(secret)); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("read: got %v, want %q", err, want)
			}
			if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
				t.Errorf("it was changed: %v", err)
			}
		})
	}
	t.Run("a file that was changed is damaged, and its twin stands in", func(t *testing.T) {
		var f sealed
		if err := json.Unmarshal(before, &f); err != nil {
			t.Fatal(err)
		}
		f.Text[3] ^= 1
		text, err := json.Marshal(&f)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := open("secret")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Get(t.Context(), "a"); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path + ".damaged"); err != nil {
			t.Error(err)
		}
	})
}
