// Command images puts the built binaries into container images made of nothing else, each as a file that
// "docker load", "ctr images import" and "skopeo copy docker-archive:" take, with a bill of materials
// (CycloneDX) beside it and inside.
//
//	go run ./deploy/images -bin bin -out bin/images -tag v1.2.3
//
// The same binaries give the same file: nothing in it has a time of its own, or anything of this machine; and
// the same source gives the same binaries, in whatever folder. The digest that is printed is that of the image's configuration, which scan reports and
// scan policies go by.
package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// image is a binary that gets an image.
type image struct {
	binary, about string
	// user is what it runs as unless told otherwise; agents need the node's runtime socket.
	user string
}

var images = []image{
	{"assay-server", "Signs the identities of a trust domain", "65532:65532"},
	{"assay-agent", "Attests the workloads of a node and serves their identities", "0:0"},
	{"assay-csi", "Gives pods the agent's socket as a volume", "0:0"},
	{"assay", "Pushes evidence about images from a pipeline", "65532:65532"},
}

func main() {
	bin := flag.String("bin", "bin", "folder with the built binaries")
	out := flag.String("out", "bin/images", "folder for the images")
	tag := flag.String("tag", "latest", "tag of the images")
	arch := flag.String("arch", runtime.GOARCH, "what the binaries were built for")
	flag.Parse()
	if err := run(*bin, *out, *tag, *arch); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(bin, out, tag, arch string) error {
	if err := os.MkdirAll(out, 0o750); err != nil {
		return err
	}
	for _, i := range images {
		if err := i.write(bin, out, tag, arch); err != nil {
			return fmt.Errorf("%s: %w", i.binary, err)
		}
	}
	return nil
}

func (i image) write(bin, out, tag, arch string) error {
	path := filepath.Join(bin, i.binary)
	binary, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("%w; build it first with make", err)
	}
	bill, err := billOf(path, tag)
	if err != nil {
		return err
	}
	img, err := i.build(binary, bill, arch)
	if err != nil {
		return err
	}
	// latest is what the quickstart in deploy/k8s asks for.
	refs := map[name.Tag]v1.Image{}
	for _, t := range []string{tag, "latest"} {
		ref, err := name.NewTag(i.binary+":"+t, name.WithDefaultRegistry("docker.io"))
		if err != nil {
			return err
		}
		refs[ref] = img
	}
	var file bytes.Buffer
	if err := tarball.MultiWrite(refs, &file); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	content, err := ordered(&file)
	if err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	if err := os.WriteFile(filepath.Join(out, i.binary+".tar"), content, 0o600); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(out, i.binary+".cdx.json"), bill, 0o600); err != nil {
		return err
	}
	digest, err := img.ConfigName()
	if err != nil {
		return fmt.Errorf("digest of image: %w", err)
	}
	fmt.Printf("%s:%s %s\n", i.binary, tag, digest)
	return nil
}

// ordered returns a file of images whose tags are in one order: the library has them as they come out of a map.
func ordered(file io.Reader) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for r := tar.NewReader(file); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			err = w.Close()
			return out.Bytes(), err
		}
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		if header.Name == "manifest.json" {
			var manifest tarball.Manifest
			if err := json.Unmarshal(content, &manifest); err != nil {
				return nil, err
			}
			for n := range manifest {
				slices.Sort(manifest[n].RepoTags)
			}
			if content, err = json.Marshal(manifest); err != nil {
				return nil, err
			}
			header.Size = int64(len(content))
		}
		if err := w.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
}

func (i image) build(binary, bill []byte, arch string) (v1.Image, error) {
	content, err := archive(map[string][]byte{"bin/" + i.binary: binary, "sbom.cdx.json": bill})
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
	if err != nil {
		return nil, fmt.Errorf("make layer: %w", err)
	}
	img, err := mutate.AppendLayers(empty.Image, layer)
	if err != nil {
		return nil, fmt.Errorf("add layer: %w", err)
	}
	file, err := img.ConfigFile()
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	file = file.DeepCopy()
	file.OS, file.Architecture = "linux", arch
	file.Config = v1.Config{
		Entrypoint: []string{"/bin/" + i.binary}, User: i.user, WorkingDir: "/",
		Env:    []string{"PATH=/bin"},
		Labels: map[string]string{"org.opencontainers.image.title": i.binary, "org.opencontainers.image.description": i.about},
	}
	return mutate.ConfigFile(img, file)
}

// archive returns a tar of the files, sorted and without times, owned by root.
func archive(files map[string][]byte) ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	names := make([]string, 0, len(files))
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	// The folders that the samples name; /tmp for what is extracted from requests too large for memory.
	for _, dir := range []string{"bin/", "etc/", "etc/assay/", "run/", "tmp/", "var/", "var/lib/"} {
		mode := int64(0o755)
		if dir == "tmp/" {
			mode = 0o1777
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: mode}); err != nil {
			return nil, fmt.Errorf("write archive: %w", err)
		}
	}
	for _, n := range names {
		mode := int64(0o444)
		if strings.HasPrefix(n, "bin/") {
			mode = 0o555
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: mode, Size: int64(len(files[n]))}); err != nil {
			return nil, fmt.Errorf("write archive: %w", err)
		}
		if _, err := w.Write(files[n]); err != nil {
			return nil, fmt.Errorf("write archive: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write archive: %w", err)
	}
	return out.Bytes(), nil
}

// The part of CycloneDX 1.5 that a list of Go modules needs.
type billOfMaterials struct {
	BOMFormat   string      `json:"bomFormat"`
	SpecVersion string      `json:"specVersion"`
	Version     int         `json:"version"`
	Metadata    billAbout   `json:"metadata"`
	Components  []component `json:"components"`
}

type billAbout struct {
	Component component `json:"component"`
}

type component struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl"`
	Ref     string `json:"bom-ref"`
}

// billOf lists the modules that a binary was built of, as the linker wrote them into it. Of the binary itself the
// linker knows no version, unless it was built as another's module.
func billOf(path, version string) ([]byte, error) {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read build information: %w", err)
	}
	purl := func(kind, name, version string) component {
		ref := "pkg:golang/" + name + "@" + version
		return component{Type: kind, Name: name, Version: version, PURL: ref, Ref: ref}
	}
	bill := billOfMaterials{BOMFormat: "CycloneDX", SpecVersion: "1.5", Version: 1}
	bill.Metadata.Component = purl("application", info.Path, version)
	bill.Components = []component{purl("library", "stdlib", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, m := range info.Deps {
		if m.Replace != nil {
			m = m.Replace
		}
		bill.Components = append(bill.Components, purl("library", m.Path, m.Version))
	}
	return json.MarshalIndent(bill, "", "  ")
}
