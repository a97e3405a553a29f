package main

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// table keeps mounts in memory; the real ones are tested with the real kubelet in test/labk8s.
type table map[string]string

func (m table) mounted(target string) (bool, error) { _, ok := m[target]; return ok, nil }
func (m table) unmount(target string) error         { delete(m, target); return nil }
func (m table) mount(source, target string) error {
	if _, mounted := m[target]; mounted {
		return errors.New("mounted over what is mounted")
	}
	m[target] = source
	return nil
}

func newDriver(t *testing.T) (*driver, table, string) {
	t.Helper()
	dir := t.TempDir()
	volume := filepath.Join(dir, "pods", "uid", "volumes", "kubernetes.io~csi", "spiffe")
	for _, d := range []string{volume, filepath.Join(dir, "public")} {
		if err := os.MkdirAll(d, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	log := logrus.New()
	log.SetOutput(io.Discard)
	mounts := table{}
	return &driver{
		settings: settings{name: "csi.spiffe.io", node: "n1", sockets: filepath.Join(dir, "public"), kubeletDir: dir},
		log:      log, mounts: mounts, version: "1",
	}, mounts, filepath.Join(volume, "mount")
}

func request(target string) *csi.NodePublishVolumeRequest {
	return &csi.NodePublishVolumeRequest{
		VolumeId: "csi-1", TargetPath: target, Readonly: true, VolumeContext: map[string]string{ephemeral: "true"},
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
	}
}

func TestPublish(t *testing.T) {
	d, mounts, target := newDriver(t)
	for range 2 { // asked again, it does nothing
		if _, err := d.NodePublishVolume(t.Context(), request(target)); err != nil {
			t.Fatal(err)
		}
		if len(mounts) != 1 || mounts[target] != d.sockets {
			t.Fatalf("mounts are %v", mounts)
		}
	}
	for range 2 {
		if _, err := d.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: target}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(target); len(mounts) != 0 || !os.IsNotExist(err) {
			t.Fatalf("mounts are %v, the target's state is %v", mounts, err)
		}
	}
}

func TestRefused(t *testing.T) {
	d, mounts, target := newDriver(t)
	outside := t.TempDir()
	link, inward, beside := filepath.Join(d.kubeletDir, "pods", "link"), filepath.Join(outside, "pods"), filepath.Join(d.kubeletDir, "pods-too")
	for from, to := range map[string]string{link: outside, inward: filepath.Join(d.kubeletDir, "pods"), beside: filepath.Join(d.kubeletDir, "pods")} {
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(d.kubeletDir, "pods", "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for why, spoil := range map[string]func(*csi.NodePublishVolumeRequest){
		"no volume ID":                   func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" },
		"no target":                      func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "" },
		"a target outside":               func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "/etc/x" },
		"a target that climbs out":       func(r *csi.NodePublishVolumeRequest) { r.TargetPath = d.kubeletDir + "/pods/../../x" },
		"a target through a link":        func(r *csi.NodePublishVolumeRequest) { r.TargetPath = link + "/x" },
		"a target outside that leads in": func(r *csi.NodePublishVolumeRequest) { r.TargetPath = inward + "/x" },
		"a target beside that leads in":  func(r *csi.NodePublishVolumeRequest) { r.TargetPath = beside + "/x" },
		"a target that is not plain":     func(r *csi.NodePublishVolumeRequest) { r.TargetPath = filepath.Dir(target) + "/./mount" },
		"a target below a file":          func(r *csi.NodePublishVolumeRequest) { r.TargetPath = file + "/x/y" },
		"a relative target":              func(r *csi.NodePublishVolumeRequest) { r.TargetPath = "pods/x" },
		"no capability":                  func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil },
		"a block device":                 func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{} },
		"a file system":                  func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" },
		"mount options":                  func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().MountFlags = []string{"suid"} },
		"a volume that is persistent":    func(r *csi.NodePublishVolumeRequest) { r.VolumeContext = nil },
		"a volume to write to":           func(r *csi.NodePublishVolumeRequest) { r.Readonly = false },
	} {
		t.Run(why, func(t *testing.T) {
			r := request(target)
			spoil(r)
			if _, err := d.NodePublishVolume(t.Context(), r); status.Code(err) != codes.InvalidArgument {
				t.Errorf("error is %v", err)
			}
			if len(mounts) != 0 {
				t.Errorf("mounts are %v", mounts)
			}
		})
	}
	t.Run("what is outside is not unmounted", func(t *testing.T) {
		mounts["/etc"] = "x"
		_, err := d.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: "/etc"})
		if status.Code(err) != codes.InvalidArgument || len(mounts) != 1 {
			t.Errorf("error is %v, mounts %v", err, mounts)
		}
	})
	t.Run("what is in a target is not removed with it", func(t *testing.T) {
		delete(mounts, "/etc")
		inside := filepath.Join(target, "x")
		if err := os.Mkdir(target, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(inside, []byte("mine"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := d.NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: target})
		if _, there := os.Stat(inside); status.Code(err) != codes.Internal || there != nil {
			t.Errorf("error is %v, the file's state is %v", err, there)
		}
	})
	t.Run("an agent that is not there is waited for", func(t *testing.T) {
		d.sockets = "/nowhere"
		if _, err := d.NodePublishVolume(t.Context(), request(target)); status.Code(err) != codes.Unavailable {
			t.Errorf("error is %v", err)
		}
		if _, err := d.Probe(t.Context(), &csi.ProbeRequest{}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("error of the probe is %v", err)
		}
	})
}

func TestServe(t *testing.T) {
	dir, err := os.MkdirTemp("", "csi") //nolint:usetesting // sockets must have short paths
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := settings{name: "csi.example.org", node: "n1", sockets: dir, kubeletDir: dir}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- serve(ctx, s) }()
	dial := func(path string) *grpc.ClientConn {
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			}))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	within, done := context.WithTimeout(t.Context(), time.Minute)
	defer done()
	info, err := registration.NewRegistrationClient(dial(filepath.Join(dir, "plugins_registry", "csi.example.org-reg.sock"))).
		GetInfo(within, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil || info.GetName() != "csi.example.org" || info.GetType() != "CSIPlugin" {
		t.Fatalf("the kubelet is told %v, %v", info, err)
	}
	node, err := csi.NewNodeClient(dial(info.GetEndpoint())).NodeGetInfo(within, &csi.NodeGetInfoRequest{}, grpc.WaitForReady(true))
	if err != nil || node.GetNodeId() != "n1" {
		t.Errorf("node is %v, %v", node, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSettings(t *testing.T) {
	for why, s := range map[string]settings{
		"a name that is none": {name: "csi/x", node: "n", sockets: "/a", kubeletDir: "/b"},
		"no node":             {name: "x", sockets: "/a", kubeletDir: "/b"},
		"a relative folder":   {name: "x", node: "n", sockets: "a", kubeletDir: "/b"},
	} {
		if s.check() == nil {
			t.Errorf("%s is accepted", why)
		}
	}
}
