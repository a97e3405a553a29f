package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/agent/broker"
	"github.com/assay-id/assay/agent/join"
	"github.com/assay-id/assay/agent/keep"
	externalkeys "github.com/assay-id/assay/agent/keep/external"
	"github.com/assay-id/assay/attestor"
	"github.com/assay-id/assay/attestor/measures"
	"github.com/assay-id/assay/attestor/tpmchip"
	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/cmd/daemon"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/workloadapi"
	"github.com/assay-id/assay/workloadapi/sds"
)

// defaultConfig is the file of "run" and "validate" if -config names none.
const defaultConfig = "/etc/assay/agent.hcl"

// settings adds the flags that "run" and "validate" have.
func settings(c *cobra.Command) *cli.Settings {
	s := new(cli.Settings)
	s.AddTo(c, defaultConfig)
	s.Key(c, "trustDomain", "agent.trust_domain", "Trust domain of the agent")
	s.Key(c, "serverAddress", "agent.server_address", "Host name or IP address of the server")
	s.Key(c, "serverPort", "agent.server_port", "TCP port of the server")
	s.Key(c, "joinToken", "agent.join_token", "Join token of the first start")
	s.Key(c, "joinTokenFile", "agent.join_token_file", "File with the join token")
	s.Key(c, "trustBundle", "agent.trust_bundle_path", "File with the server's bundle")
	s.Key(c, "trustBundleUrl", "agent.trust_bundle_url", "URL of the server's bundle")
	s.Key(c, "trustBundleConfigMap", "agent.trust_bundle_config_map", "ConfigMap with the server's bundle, for an agent that is a pod")
	s.Key(c, "trustBundleFormat", "agent.trust_bundle_format", "pem or spiffe")
	s.Switch(c, "insecureBootstrap", "agent.insecure_bootstrap", "Trust whoever answers first as the server")
	s.Key(c, "rebootstrapMode", "agent.rebootstrap_mode", "When the bootstrap source is believed again: auto, always or never")
	s.Key(c, "rebootstrapDelay", "agent.rebootstrap_delay", "How long the server must be unknown before, with auto")
	s.Key(c, "socketPath", "agent.socket_path", "Path of the Workload API's Unix socket")
	s.Key(c, "adminSocketPath", "agent.admin_socket_path", "Path of the admin Unix socket")
	s.Key(c, "dataDir", "agent.data_dir", "Directory for what is kept over a restart")
	s.Switch(c, "allowUnauthenticatedVerifiers", "agent.allow_unauthenticated_verifiers", "Let processes without an identity fetch bundles")
	s.Switch(c, "disableWorkloadAPI", "agent.disable_workload_api", "Do not serve SPIFFE's Workload API")
	s.Switch(c, "disableSDSAPI", "agent.disable_sds_api", "Do not serve Envoy's secret discovery service")
	s.Key(c, "logLevel", "agent.log_level", "debug, info, warn or error")
	s.Key(c, "logFormat", "agent.log_format", "text or json")
	s.Switch(c, "logSourceLocation", "agent.log_source_location", "Put the place in the code into every line of the log")
	s.Key(c, "logFile", "agent.log_file", "File for the log; standard error without it")
	return s
}

func tryBundle(td spiffeid.TrustDomain, path, format string) error {
	return join.Bootstrap{Path: path, SPIFFE: format == agent.BundleSPIFFE}.Check(td)
}

// load reads the configuration.
func load(s *cli.Settings) (*conf.Agent, error) {
	options := s.Options()
	options.TryBundle = tryBundle
	c, err := conf.LoadAgent(s.Path(), nodes(), workloads(), options)
	if err != nil {
		return nil, cli.Invalid("Assay agent configuration", err)
	}
	return c, nil
}

func validate() *cobra.Command {
	return cli.ValidateCommand("Assay agent", settings, func(s *cli.Settings) error {
		_, err := load(s)
		return err
	})
}

func run() *cobra.Command {
	c := &cobra.Command{
		Use: "run", Short: "Runs the agent", Args: cli.NoArgs,
		Long: "Runs the agent until SIGTERM or SIGINT. SIGHUP opens the log file anew and applies log_level.",
	}
	s := settings(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		from, err := load(s)
		if err != nil {
			return err
		}
		d, err := daemon.Start(daemon.Config{
			Name: "assay_agent", Version: cli.VersionText(), DataDir: from.DataDir, Log: from.Log, Health: from.Health, Metrics: from.Metrics,
			Reload: func() (conf.Log, error) {
				// A join token file may be gone by now, and with it the file would be refused.
				now, err := load(s)
				if err != nil {
					return conf.Log{}, err
				}
				return now.Log, nil
			},
		})
		if err != nil {
			return err
		}
		config, err := agentConfig(from, d)
		if err != nil {
			_ = d.Close()
			return err
		}
		d.Log.WithField("version", cli.VersionText()).WithField("trust_domain", from.TrustDomain).Info("starting")
		return d.Run(c.Context(), func(ctx context.Context) error { return agent.Run(ctx, config) })
	}
	return c
}

// agentConfig hands the file's keys to the agent and opens its attestors.
func agentConfig(from *conf.Agent, d *daemon.Daemon) (agent.Config, error) {
	c := agent.Defaults()
	c.TrustDomain = from.TrustDomain
	c.ServerAddress, c.ServerPort = from.ServerAddress, from.ServerPort
	c.DataDir, c.KeyManager, c.KeyDir, c.Standby = from.DataDir, from.KeyManager, from.KeysDir, from.Standby
	if from.KeyManager == agent.KeysTPM {
		path := from.TPMPath
		if path == "" {
			var err error
			if path, err = tpmchip.Find("/dev"); err != nil {
				return c, fmt.Errorf("open key manager \"tpm\": %w (set tpm_path)", err)
			}
		}
		c.TPM = &keep.TPM{Path: path, OwnerPassword: from.TPMOwnerPassword, PCRs: from.TPMPCRs}
	}
	c.SocketPath, c.AdminSocketPath = from.SocketPath, from.AdminSocketPath
	c.AuthorizedDelegates = from.AuthorizedDelegates
	c.Broker = agent.Broker{SocketPath: from.Broker.SocketPath, Address: from.Broker.Address}
	for _, g := range from.Broker.Allow {
		c.Broker.Grants = append(c.Broker.Grants, broker.Grant{ID: g.ID, Types: g.Types})
	}
	c.TrustBundlePath, c.TrustBundleURL, c.TrustBundleFormat = from.TrustBundlePath, from.TrustBundleURL, from.TrustBundleFormat
	c.TrustBundleConfigMap = from.TrustBundleConfigMap
	c.InsecureBootstrap, c.Rebootstrap = from.InsecureBootstrap, from.Rebootstrap
	c.DisableWorkloadAPI, c.DisableSDSAPI = from.DisableWorkloadAPI, from.DisableSDSAPI
	c.WorkloadKeyType = from.WorkloadKeyType
	c.X509CacheSize, c.JWTCacheSize = from.X509CacheSize, from.JWTCacheSize
	c.SyncInterval, c.WorkloadHold, c.VerdictLease = from.SyncInterval, from.WorkloadHold, from.VerdictLease
	c.AllowUnauthenticatedVerifiers = from.AllowUnauthenticatedVerifiers
	c.AllowedForeignJWTClaims, c.LogSelectors = from.AllowedForeignJWTClaims, from.LogSelectors
	c.Files = filesOf(from.Files)
	c.SDS = sds.Config{
		DefaultSVIDName: from.SDS.DefaultSVIDName, DefaultBundleName: from.SDS.DefaultBundleName,
		DefaultAllBundlesName: from.SDS.DefaultAllBundlesName, DisableSPIFFEValidation: from.SDS.DisableSPIFFEValidation,
		KeepWithdrawn: from.SDS.KeepWithdrawn, CRL: from.SDS.CRL,
	}
	switch from.AuditFile {
	case "":
	case "-":
		c.Audit = workloadapi.AuditTo(os.Stderr, d.Log.WithField("component", "audit"))
	default:
		file, err := daemon.OpenFile(from.AuditFile)
		if err != nil {
			return c, fmt.Errorf("audit log: %w", err)
		}
		d.OnReload("audit log", file.Reopen)
		c.Audit = workloadapi.AuditTo(file, d.Log.WithField("component", "audit"))
	}
	measured, err := measures.New(d.Registry)
	if err != nil {
		return c, err
	}
	needs := func(component string) attestor.Needs {
		return attestor.Needs{
			Measure:     measured.Take,
			TrustDomain: from.TrustDomain, Log: d.Log.WithField("component", component), Now: time.Now, JoinToken: from.JoinToken,
			Audit: func(event, about string, err error) {
				if c.Audit != nil {
					c.Audit.Audit(workloadapi.OwnLine(event, about, err))
				}
			},
		}
	}
	if from.KeysPlugin != nil {
		c.Elsewhere = func() (keep.Elsewhere, error) {
			return externalkeys.Open(from.KeysPlugin, needs("keys/"+from.KeysPlugin.Name))
		}
	}
	if err := openAttestors(&c, from, needs); err != nil {
		return c, err
	}
	c.Log, c.Metrics, c.Version = d.Log, d.Registry, cli.VersionText()
	c.Health = new(agent.Health)
	c.Ready = func() { d.Up(c.Health.Live, c.Health.Ready) }
	c.StandingBy = c.Ready
	return c, nil
}

// openAttestors opens what the file configures.
func openAttestors(c *agent.Config, from *conf.Agent, needs func(component string) attestor.Needs) error {
	kind := attestor.TypeOf(from.Node.Kind.Type, from.Node.Config)
	node, err := from.Node.Kind.Open(from.Node.Config, needs("attestor/"+kind))
	if err != nil {
		return fmt.Errorf("open node attestor %q: %w", kind, err)
	}
	c.NodeAttestor = agent.NodeAttestor{Type: kind, Node: node}
	for _, w := range from.Workloads {
		kind := attestor.TypeOf(w.Kind.Type, w.Config)
		opened, err := w.Kind.Open(w.Config, needs("attestor/"+kind))
		if err != nil {
			return fmt.Errorf("open workload attestor %q: %w", kind, err)
		}
		c.WorkloadAttestors = append(c.WorkloadAttestors, agent.WorkloadAttestor{Type: kind, Workload: opened})
	}
	return nil
}
