package lab_test

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/assay-id/assay/test/lab"
	"github.com/assay-id/assay/test/lab/site"
)

// TestCSISanity puts the built driver before Kubernetes' own suite for CSI drivers. The suite makes volumes by a
// controller, and the driver's are written into pods and need none: a stand-in makes them, and says of each what the
// kubelet says of a pod's.
func TestCSISanity(t *testing.T) {
	if os.Geteuid() != 0 {
		lab.Missing(t, "a place to mount volumes at", os.ErrPermission)
	}
	tools, err := filepath.Abs("../../bin/tools")
	if err != nil {
		t.Fatal(err)
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", tools+"/", "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity")
	build.Dir = "../../tools/deploy"
	if text, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build csi-sanity: %v\n%s", err, text)
	}
	dir, err := os.MkdirTemp("", "csi") //nolint:usetesting // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	volumes := filepath.Join(dir, "kubelet/pods/u/volumes/v")
	for _, d := range []string{volumes, filepath.Join(dir, "sockets")} {
		if err := os.MkdirAll(d, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "sockets/api.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "log")
	driver, err := site.Start(log, nil, "../../bin/assay-csi", "run", "-nodeID", "n1", "-kubeletDir", filepath.Join(dir, "kubelet"), "-socketDir", filepath.Join(dir, "sockets"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = driver.Stop(15 * time.Second) })
	conn, err := grpc.NewClient("unix://"+filepath.Join(dir, "kubelet/plugins/csi.spiffe.io/csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	kubelet := &podVolumes{identity: csi.NewIdentityClient(conn), node: csi.NewNodeClient(conn)}
	if _, err := kubelet.identity.Probe(t.Context(), &csi.ProbeRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("%v\n%s", err, site.Tail(log, 20))
	}
	socket := filepath.Join(dir, "kubelet.sock")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, kubelet)
	csi.RegisterNodeServer(server, kubelet)
	csi.RegisterControllerServer(server, kubelet)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})

	out, err := exec.CommandContext(t.Context(), filepath.Join(tools, "csi-sanity"), "-ginkgo.no-color", "-ginkgo.focus", "Identity Service|Node Service",
		"-csi.endpoint", "unix://"+socket, "-csi.mountdir", filepath.Join(volumes, "mount"), "-csi.stagingdir", filepath.Join(dir, "staging")).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s\n%s", err, out, site.Tail(log, 20))
	}
	passed := regexp.MustCompile(`(\d+) Passed`).FindSubmatch(out)
	if passed == nil || len(passed[1]) < 2 { // at least ten
		t.Errorf("hardly anything was tried:\n%s", out)
	} else {
		t.Logf("csi-sanity: %s passed", passed[1])
	}
	if kubelet.published == 0 {
		t.Error("no volume was mounted")
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("something is still mounted (%v)", err)
	}
}

// podVolumes stands between the suite and the driver.
type podVolumes struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	csi.UnimplementedControllerServer

	identity  csi.IdentityClient
	node      csi.NodeClient
	published int // the suite asks for one thing at a time
}

func (p *podVolumes) GetPluginInfo(ctx context.Context, r *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return p.identity.GetPluginInfo(ctx, r)
}

func (p *podVolumes) GetPluginCapabilities(ctx context.Context, r *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return p.identity.GetPluginCapabilities(ctx, r)
}

func (p *podVolumes) Probe(ctx context.Context, r *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return p.identity.Probe(ctx, r)
}

func (p *podVolumes) NodeGetInfo(ctx context.Context, r *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return p.node.NodeGetInfo(ctx, r)
}

func (p *podVolumes) NodeGetCapabilities(ctx context.Context, r *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return p.node.NodeGetCapabilities(ctx, r)
}

// NodePublishVolume adds what the kubelet says of a volume that is written into a pod, read-only.
func (p *podVolumes) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	r.Readonly = true
	r.VolumeContext = map[string]string{"csi.storage.k8s.io/ephemeral": "true"}
	if m := r.GetVolumeCapability().GetMount(); m != nil {
		m.MountFlags = nil
	}
	resp, err := p.node.NodePublishVolume(ctx, r)
	if err == nil {
		if _, err := os.Stat(filepath.Join(r.GetTargetPath(), "api.sock")); err != nil {
			return nil, status.Error(codes.Internal, err.Error())
		}
		p.published++
	}
	return resp, err
}

func (p *podVolumes) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	return p.node.NodeUnpublishVolume(ctx, r)
}

// ControllerGetCapabilities says that volumes can be made.
func (*podVolumes) ControllerGetCapabilities(context.Context, *csi.ControllerGetCapabilitiesRequest) (*csi.ControllerGetCapabilitiesResponse, error) {
	return &csi.ControllerGetCapabilitiesResponse{Capabilities: []*csi.ControllerServiceCapability{{
		Type: &csi.ControllerServiceCapability_Rpc{Rpc: &csi.ControllerServiceCapability_RPC{Type: csi.ControllerServiceCapability_RPC_CREATE_DELETE_VOLUME}},
	}}}, nil
}

// CreateVolume makes nothing: the kubelet does not ask for a pod's own.
func (*podVolumes) CreateVolume(_ context.Context, r *csi.CreateVolumeRequest) (*csi.CreateVolumeResponse, error) {
	return &csi.CreateVolumeResponse{Volume: &csi.Volume{VolumeId: r.GetName(), CapacityBytes: r.GetCapacityRange().GetRequiredBytes()}}, nil
}

// DeleteVolume likewise.
func (*podVolumes) DeleteVolume(context.Context, *csi.DeleteVolumeRequest) (*csi.DeleteVolumeResponse, error) {
	return &csi.DeleteVolumeResponse{}, nil
}
