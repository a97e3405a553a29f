// Command netpol enforces NetworkPolicies on one node with kube-router's controller, which makes iptables rules and
// ipsets of them. kube-router's own program has the same and beside it a router and a proxy, which the labs need not.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/cloudnativelabs/kube-router/v2/pkg/controllers/netpol"
	"github.com/cloudnativelabs/kube-router/v2/pkg/healthcheck"
	"github.com/cloudnativelabs/kube-router/v2/pkg/options"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

func main() {
	kubeconfig := flag.String("kubeconfig", "", "whose rights to use")
	node := flag.String("node", "", "the node's name")
	services := flag.String("services", "10.96.0.0/16", "addresses of services")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *kubeconfig, *node, *services); err != nil {
		fmt.Fprintln(os.Stderr, "netpol:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kubeconfig, node, services string) error {
	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(rest)
	if err != nil {
		return err
	}
	config := options.NewKubeRouterConfig()
	config.EnableIPv4, config.RunFirewall, config.HostnameOverride, config.ClusterIPCIDRs = true, true, node, []string{services}

	from := informers.NewSharedInformerFactory(client, 0)
	pods := from.Core().V1().Pods().Informer()
	namespaces := from.Core().V1().Namespaces().Informer()
	policies := from.Networking().V1().NetworkPolicies().Informer()
	from.Start(ctx.Done())
	for kind, synced := range from.WaitForCacheSync(ctx.Done()) {
		if !synced {
			return fmt.Errorf("no list of %v", kind)
		}
	}
	iptables, ipsets, err := netpol.NewIPTablesHandlers(config)
	if err != nil {
		return err
	}
	controller, err := netpol.NewNetworkPolicyController(client, config, pods, policies, namespaces, &sync.Mutex{}, iptables, ipsets)
	if err != nil {
		return err
	}
	_, err1 := pods.AddEventHandler(controller.PodEventHandler)
	_, err2 := namespaces.AddEventHandler(controller.NamespaceEventHandler)
	_, err3 := policies.AddEventHandler(controller.NetworkPolicyEventHandler)
	if err := errors.Join(err1, err2, err3); err != nil {
		return err
	}
	beats := make(chan *healthcheck.ControllerHeartbeat)
	go func() {
		for range beats { // nobody asks
		}
	}()
	var running sync.WaitGroup
	running.Add(1)
	controller.Run(beats, ctx.Done(), &running)
	running.Wait()
	return nil
}
