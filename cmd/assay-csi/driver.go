package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxRequest is the largest request in bytes; the kubelet's have some hundred.
const maxRequest = 1 << 20

// ephemeral is how the kubelet says that a volume is written into its pod.
const ephemeral = "csi.storage.k8s.io/ephemeral"

// driver is the CSI identity and node service, by the CSI specification v1.12.0.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer

	settings
	log     logrus.FieldLogger
	mounts  mounter
	version string

	mu sync.Mutex // one mount at a time: the kubelet may ask twice for the same
}

// mounter changes what is mounted; the machine's own is system.
type mounter interface {
	mounted(target string) (bool, error)
	mount(source, target string) error
	unmount(target string) error
}

// GetPluginInfo names the driver.
func (d *driver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: d.name, VendorVersion: d.version}, nil
}

// GetPluginCapabilities has none: there is no controller.
func (*driver) GetPluginCapabilities(context.Context, *csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil
}

// Probe answers that the driver is there, and refuses while there is nothing to show.
func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	if _, err := os.Stat(d.sockets); err != nil {
		return nil, status.Errorf(codes.FailedPrecondition, "the agent's socket folder is not there: %v", err)
	}
	return &csi.ProbeResponse{}, nil
}

// NodeGetCapabilities has none: volumes are not staged, do not grow and have no statistics.
func (*driver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

// NodeGetInfo names the node.
func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.node}, nil
}

// NodePublishVolume shows a pod the folder with the agent's socket. Asked again it does nothing.
func (d *driver) NodePublishVolume(_ context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	capability := r.GetVolumeCapability()
	switch {
	case r.GetVolumeId() == "":
		return nil, status.Error(codes.InvalidArgument, "volume has no ID")
	case capability == nil:
		return nil, status.Error(codes.InvalidArgument, "volume has no capability")
	case capability.GetMount() == nil:
		return nil, status.Error(codes.InvalidArgument, "volume must be mounted: it is no block device")
	case capability.GetMount().GetFsType() != "" || len(capability.GetMount().GetMountFlags()) > 0:
		return nil, status.Error(codes.InvalidArgument, "volume has no file system of its own, and takes no mount options")
	case r.GetVolumeContext()[ephemeral] != "true":
		return nil, status.Error(codes.InvalidArgument, "volume must be ephemeral: written into its pod")
	case !r.GetReadonly():
		return nil, status.Error(codes.InvalidArgument, `volume must be read-only: write "readOnly: true" beside the driver's name`)
	}
	target, err := d.target(r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := os.Stat(d.sockets); err != nil {
		return nil, status.Errorf(codes.Unavailable, "the agent's socket folder is not there: %v (does the agent run?)", err)
	}
	mounted, err := d.mounts.mounted(target)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "look at mounts: %v", err)
	}
	if mounted {
		return &csi.NodePublishVolumeResponse{}, nil
	}
	if err := os.Mkdir(target, 0o750); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, status.Errorf(codes.Internal, "make target: %v", err)
	}
	if err := d.mounts.mount(d.sockets, target); err != nil {
		_ = os.Remove(target) // the kubelet tries again
		return nil, status.Errorf(codes.Internal, "mount: %v", err)
	}
	context := r.GetVolumeContext()
	d.log.WithFields(logrus.Fields{
		"volume": r.GetVolumeId(), "namespace": context["csi.storage.k8s.io/pod.namespace"], "pod": context["csi.storage.k8s.io/pod.name"],
	}).Info("volume is mounted")
	return &csi.NodePublishVolumeResponse{}, nil
}

// NodeUnpublishVolume takes it away. What is gone already is no mistake.
func (d *driver) NodeUnpublishVolume(_ context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	if r.GetVolumeId() == "" {
		return nil, status.Error(codes.InvalidArgument, "volume has no ID")
	}
	target, err := d.target(r.GetTargetPath())
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		mounted, err := d.mounts.mounted(target)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "look at mounts: %v", err)
		}
		if !mounted {
			break
		}
		if err := d.mounts.unmount(target); err != nil {
			return nil, status.Errorf(codes.Internal, "unmount: %v", err)
		}
	}
	// Not with what is in it: were it still mounted, that would be the agent's socket.
	if err := os.Remove(target); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, status.Errorf(codes.Internal, "remove target: %v", err)
	}
	d.log.WithField("volume", r.GetVolumeId()).Info("volume is unmounted")
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// target accepts paths of pods' volumes only: whoever else reached the socket must not have the driver mount
// over, or unmount, what it likes.
func (d *driver) target(path string) (string, error) {
	pods := filepath.Join(d.kubeletDir, "pods") + "/"
	switch {
	case path == "":
		return "", status.Error(codes.InvalidArgument, "there is no target path")
	case !filepath.IsAbs(path) || filepath.Clean(path) != path || !strings.HasPrefix(path, pods):
		return "", status.Errorf(codes.InvalidArgument, "target path is not below %s", pods)
	}
	// A link in it could lead elsewhere.
	parent, err := filepath.EvalSymlinks(filepath.Dir(path))
	if errors.Is(err, os.ErrNotExist) {
		return path, nil // nothing can be mounted there
	}
	root, rootErr := filepath.EvalSymlinks(d.kubeletDir)
	if err != nil || rootErr != nil || !strings.HasPrefix(parent+"/", filepath.Join(root, "pods")+"/") {
		return "", status.Errorf(codes.InvalidArgument, "target path leads out of %s", pods)
	}
	return path, nil
}

// system is the machine's own mounts.
type system struct{}

// mounted looks for a mount at exactly the target, see proc_pid_mountinfo(5).
func (system) mounted(target string) (bool, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	defer file.Close()
	escaped := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(target)
	lines := bufio.NewScanner(file)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && fields[4] == escaped {
			return true, nil
		}
	}
	return false, lines.Err()
}

// mount shows source at target, read-only and without anything that could be run or be a device. A bind mount
// takes the flags of its source, so they need a second step.
func (system) mount(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	const flags = unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("", target, "", flags, ""); err != nil {
		return errors.Join(err, unix.Unmount(target, 0))
	}
	return nil
}

func (system) unmount(target string) error {
	return unix.Unmount(target, unix.UMOUNT_NOFOLLOW)
}
