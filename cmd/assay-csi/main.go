// Command assay-csi is a CSI driver that gives pods the agent's socket: an inline ephemeral volume, read-only,
// that shows the folder with the Workload API's socket. Pods need no hostPath, which most clusters forbid them,
// and the name of the driver is that of SPIFFE's own, so that manifests made for it go on working.
//
// Why it is so: it is a program of its own because it alone must be privileged, to mount into the kubelet's
// folders; the agent beside it need not be. It registers itself with the kubelet, so that one container does.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/assay-id/assay/cmd/cli"
)

func main() { os.Exit(cli.Main(root())) }

// settings are the flags.
type settings struct {
	name, node, sockets   string
	kubeletDir, pluginDir string
	registryDir           string
}

func root() *cobra.Command {
	var s settings
	run := &cobra.Command{
		Use: "run", Short: "Serves the kubelet until it is ended", Args: cli.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(c.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			return serve(ctx, s)
		},
		Example: "  assay-csi run -nodeID $MY_NODE_NAME -socketDir /run/assay/agent/public",
	}
	f := run.Flags()
	f.StringVar(&s.name, "driverName", "csi.spiffe.io", "Name of the driver, as pods and the CSIDriver object have it")
	f.StringVar(&s.node, "nodeID", os.Getenv("MY_NODE_NAME"), "Name of the node; the variable MY_NODE_NAME if it is not set")
	f.StringVar(&s.sockets, "socketDir", "/run/assay/agent/public", "Folder with the Workload API's socket, which pods are shown")
	f.StringVar(&s.kubeletDir, "kubeletDir", "/var/lib/kubelet", "The kubelet's folder; volumes are mounted below its pods only")
	f.StringVar(&s.pluginDir, "pluginDir", "", "Folder for the driver's socket; plugins/<driver name> in the kubelet's folder if it is not set")
	f.StringVar(&s.registryDir, "registryDir", "", "Folder in which the kubelet looks for drivers; plugins_registry in its own if it is not set")
	return cli.Group("assay-csi", "Gives pods the agent's socket as a volume", run, cli.VersionCommand())
}

var driverName = regexp.MustCompile(`^[a-zA-Z0-9]([-a-zA-Z0-9.]{0,61}[a-zA-Z0-9])?$`) // CSI spec, GetPluginInfoResponse.name

// check says what is wrong with the flags, and fills in what follows from others.
func (s *settings) check() error {
	if !driverName.MatchString(s.name) {
		return fmt.Errorf("-driverName: %q is no name of a driver: at most 63 letters, digits, dots and dashes", s.name)
	}
	if s.node == "" {
		return errors.New("-nodeID must be set, or the variable MY_NODE_NAME from spec.nodeName")
	}
	if s.pluginDir == "" {
		s.pluginDir = filepath.Join(s.kubeletDir, "plugins", s.name)
	}
	if s.registryDir == "" {
		s.registryDir = filepath.Join(s.kubeletDir, "plugins_registry")
	}
	for flag, dir := range map[string]string{"socketDir": s.sockets, "kubeletDir": s.kubeletDir, "pluginDir": s.pluginDir, "registryDir": s.registryDir} {
		if !filepath.IsAbs(dir) || filepath.Clean(dir) != dir {
			return fmt.Errorf("-%s: %q is no clean absolute path", flag, dir)
		}
	}
	return nil
}

// serve registers the driver with the kubelet and serves it until ctx ends.
func serve(ctx context.Context, s settings) error {
	if err := s.check(); err != nil {
		return err
	}
	log := logrus.New()
	endpoint := filepath.Join(s.pluginDir, "csi.sock")
	for _, dir := range []string{s.pluginDir, s.registryDir} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return fmt.Errorf("make folder for socket: %w", err)
		}
	}
	d := &driver{settings: s, log: log, mounts: system{}, version: cli.Version}
	plugin, err := listen(endpoint)
	if err != nil {
		return err
	}
	registry, err := listen(filepath.Join(s.registryDir, s.name+"-reg.sock"))
	if err != nil {
		_ = plugin.Close() // nothing was served
		return err
	}
	volumes, registrar := grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest)), grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest))
	csi.RegisterIdentityServer(volumes, d)
	csi.RegisterNodeServer(volumes, d)
	registration.RegisterRegistrationServer(registrar, &registrant{name: s.name, endpoint: endpoint, log: log})
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return volumes.Serve(plugin) })
	group.Go(func() error { return registrar.Serve(registry) })
	group.Go(func() error {
		<-ctx.Done()
		registrar.Stop() // first, so that the kubelet asks no more
		ended := time.AfterFunc(10*time.Second, volumes.Stop)
		defer ended.Stop()
		volumes.GracefulStop()
		return nil
	})
	log.WithFields(logrus.Fields{"driver": s.name, "socket": endpoint, "shows": s.sockets}).Info("driver is ready")
	return group.Wait()
}

// listen opens a Unix socket for root alone, in place of one that a driver left behind.
func listen(path string) (net.Listener, error) {
	if stat, err := os.Lstat(path); err == nil {
		if stat.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listen at %s: something that is no socket is there", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove old socket: %w", err)
		}
	}
	listener, err := new(net.ListenConfig).Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("restrict socket: %w", err), listener.Close())
	}
	return listener, nil
}

// registrant tells the kubelet of the driver.
type registrant struct {
	registration.UnimplementedRegistrationServer
	name, endpoint string
	log            logrus.FieldLogger
}

// GetInfo answers the kubelet that found the socket.
func (r *registrant) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{Type: registration.CSIPlugin, Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

// NotifyRegistrationStatus hears whether the kubelet took it.
func (r *registrant) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.log.Info("kubelet has registered the driver")
	} else {
		r.log.WithField("err", s.GetError()).Error("kubelet refuses the driver")
	}
	return &registration.RegistrationStatusResponse{}, nil
}
