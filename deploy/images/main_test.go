package main

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// packed puts this program into an image, and returns the folder with it.
func packed(t *testing.T) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(self, filepath.Join(dir, "assay-x")); err != nil {
		t.Fatal(err)
	}
	if err := (image{"assay-x", "Is tried", "1:1"}).write(dir, dir, "v1", "amd64"); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestImage(t *testing.T) {
	dir := packed(t)
	t.Run("the same binary gives the same file", func(t *testing.T) {
		again := packed(t)
		for _, file := range []string{"assay-x.tar", "assay-x.cdx.json"} {
			one, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				t.Fatal(err)
			}
			two, err := os.ReadFile(filepath.Join(again, file))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(one, two) {
				t.Errorf("%s is another one the second time", file)
			}
		}
	})
	t.Run("tags are in one order, which they are not as the library writes them", func(t *testing.T) {
		refs := map[name.Tag]v1.Image{}
		for _, tag := range []string{"x:v1", "x:latest"} {
			ref, err := name.NewTag(tag, name.WithDefaultRegistry("docker.io"))
			if err != nil {
				t.Fatal(err)
			}
			refs[ref] = empty.Image
		}
		files := map[string]bool{}
		for range 50 {
			var file bytes.Buffer
			if err := tarball.MultiWrite(refs, &file); err != nil {
				t.Fatal(err)
			}
			content, err := ordered(&file)
			if err != nil {
				t.Fatal(err)
			}
			files[string(content)] = true
		}
		if len(files) != 1 {
			t.Errorf("there are %d files", len(files))
		}
	})
	t.Run("it is one that engines take, under both tags", func(t *testing.T) {
		for _, tag := range []string{"assay-x:v1", "assay-x:latest"} {
			ref, err := name.NewTag(tag, name.WithDefaultRegistry("docker.io"))
			if err != nil {
				t.Fatal(err)
			}
			img, err := tarball.ImageFromPath(filepath.Join(dir, "assay-x.tar"), &ref)
			if err != nil {
				t.Fatal(err)
			}
			config, err := img.ConfigFile()
			if err != nil || config.Config.User != "1:1" || !slices.Equal(config.Config.Entrypoint, []string{"/bin/assay-x"}) {
				t.Errorf("%+v (%v)", config, err)
			}
			layers, err := img.Layers()
			if err != nil || len(layers) != 1 {
				t.Errorf("%d layers (%v)", len(layers), err)
			}
		}
	})
	t.Run("the bill of materials has every module of the binary, and the standard library", func(t *testing.T) {
		text, err := os.ReadFile(filepath.Join(dir, "assay-x.cdx.json"))
		if err != nil {
			t.Fatal(err)
		}
		var bill billOfMaterials
		if err := json.Unmarshal(text, &bill); err != nil {
			t.Fatal(err)
		}
		info, err := buildinfo.ReadFile(filepath.Join(dir, "assay-x"))
		if err != nil {
			t.Fatal(err)
		}
		if about := bill.Metadata.Component; about.Version != "v1" || about.PURL != "pkg:golang/"+info.Path+"@v1" {
			t.Errorf("it is about %+v", about)
		}
		if len(info.Deps) == 0 || len(bill.Components) != len(info.Deps)+1 || bill.Components[0].Name != "stdlib" {
			t.Errorf("%d components of %d modules", len(bill.Components), len(info.Deps))
		}
		for _, m := range info.Deps {
			if !slices.ContainsFunc(bill.Components, func(c component) bool { return c.PURL == "pkg:golang/"+m.Path+"@"+m.Version }) {
				t.Errorf("%s is missing", m.Path)
			}
		}
	})
}
