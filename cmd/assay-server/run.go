package main

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/cmd/daemon"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/server"
	"github.com/assay-id/assay/server/api/roles"
	"github.com/assay-id/assay/server/ca"
	"github.com/assay-id/assay/server/ca/keys"
	"github.com/assay-id/assay/server/verdict/image"
	"github.com/assay-id/assay/server/verdict/rules"
)

// defaultConfig is the file of "run" and "validate" if -config names none.
const defaultConfig = "/etc/assay/server.hcl"

// garbage is what may pile up in memory: little beside what the records of a trust domain take, and enough
// for some hundred signatures.
const garbage = 24 << 20

// settings adds the flags that "run" and "validate" have.
func settings(c *cobra.Command) *cli.Settings {
	s := new(cli.Settings)
	s.AddTo(c, defaultConfig)
	s.Key(c, "trustDomain", "server.trust_domain", "Trust domain of the server")
	s.Key(c, "bindAddress", "server.bind_address", "IP address to listen on")
	s.Key(c, "serverPort", "server.bind_port", "TCP port to listen on")
	s.Key(c, "socketPath", "server.socket_path", "Path of the private Unix socket")
	s.Key(c, "dataDir", "server.data_dir", "Directory for the store and the keys")
	s.Key(c, "logLevel", "server.log_level", "debug, info, warn or error")
	s.Key(c, "logFormat", "server.log_format", "text or json")
	s.Switch(c, "logSourceLocation", "server.log_source_location", "Put the place in the code into every line of the log")
	s.Key(c, "logFile", "server.log_file", "File for the log; standard error without it")
	return s
}

// load reads the configuration.
func load(s *cli.Settings) (*conf.Server, error) {
	options := s.Options()
	options.TryCredentials = func(path string) error {
		_, err := image.OpenAuths(path)
		return err
	}
	options.TrySecret = func(path string) error {
		_, err := keys.ReadSecret(path)
		return err
	}
	options.TryUpstream = tryUpstream
	options.Named, options.CheckNamed = append(rules.Kinds(), clusterKind(), roles.Kind()), checkNamed
	c, err := conf.LoadServer(s.Path(), judges(), options)
	if err != nil {
		return nil, cli.Invalid("Assay server configuration", err)
	}
	return c, nil
}

func validate() *cobra.Command {
	return cli.ValidateCommand("Assay server", settings, func(s *cli.Settings) error {
		from, err := load(s)
		if err == nil {
			_, err = evidence(from)
		}
		return err
	})
}

func run() *cobra.Command {
	c := &cobra.Command{
		Use: "run", Short: "Runs the server", Args: cli.NoArgs,
		Long: "Runs the server until SIGTERM or SIGINT. SIGHUP opens the log files anew, and applies log_level and everything about evidence.",
	}
	s := settings(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		from, err := load(s)
		if err != nil {
			return err
		}
		var running atomic.Pointer[server.Running]
		var granted *roles.Set
		d, err := daemon.Start(daemon.Config{
			Name: "assay_server", Version: cli.VersionText(), Log: from.Log, Health: from.Health, Metrics: from.Metrics, Garbage: garbage,
			Reload: func() (conf.Log, error) {
				now, err := load(s)
				if err != nil {
					return conf.Log{}, err
				}
				if granted != nil {
					granted.Replace(conf.NamedOf[*roles.Holder](now.Named, roles.BlockType))
				}
				if r := running.Load(); r != nil {
					err = reloadEvidence(c.Context(), now, r)
				}
				return now.Log, err
			},
		})
		if err != nil {
			return err
		}
		granted, err = roles.NewSet(conf.NamedOf[*roles.Holder](from.Named, roles.BlockType), nil, d.Log.WithField("component", "roles"))
		if err != nil {
			return errors.Join(err, d.Close())
		}
		config := serverConfig(from, d)
		config.Roles = granted
		if config.Evidence, err = evidence(from); err != nil {
			return errors.Join(err, d.Close())
		}
		ready := config.Ready
		config.Ready = func(r server.Running) {
			running.Store(&r)
			ready(r)
		}
		d.Log.WithField("version", cli.VersionText()).WithField("trust_domain", from.TrustDomain).Info("starting")
		return d.Run(c.Context(), func(ctx context.Context) error { return server.Run(ctx, config) })
	}
	return c
}

// serverConfig hands the file's keys to the server.
func serverConfig(from *conf.Server, d *daemon.Daemon) server.Config {
	c := server.Defaults()
	c.TrustDomain = from.TrustDomain
	c.BindAddress, c.BindPort = from.BindAddress, from.BindPort
	c.SocketPath, c.DataDir, c.AuditPath = from.SocketPath, from.DataDir, from.AuditFile
	c.SnapshotInterval, c.SnapshotKeep = from.SnapshotInterval, from.SnapshotKeep
	c.KeyManager, c.KeysPath, c.KeysSeal = from.KeyManager, from.KeysPath, from.KeysSeal
	c.Keys = keyManager(from.Keys)
	c.CA = server.CA{
		TTL: from.CATTL, KeyType: from.CAKeyType, JWTKeyType: from.JWTKeyType, Subject: from.CASubject,
		X509SVIDTTL: from.X509SVIDTTL, JWTSVIDTTL: from.JWTSVIDTTL, AgentTTL: from.AgentTTL,
		JWTIssuer: from.JWTIssuer, DisableJWT: from.DisableJWT, NewAuthorityOnLostKey: from.NewAuthorityOnLostKey,
	}
	c.PruneExpiredFor, c.PruneOnce = from.PruneExpiredFor, from.PruneOnce
	c.AdminIDs, c.RequirePQKEM, c.RequireSigned = from.AdminIDs, from.RequirePQKEM, from.Evidence.RequireSigned
	c.Federation, c.Clusters = federation(from.Federation), clusters(from)
	c.Upstream = upstreamAuthority(from.Upstream)
	c.OIDC = oidcDiscovery(from.OIDC)
	c.CA.WIT, c.CA.WITIssuer = from.WIT, from.WITIssuer
	for _, p := range from.JWTProfiles {
		c.CA.JWTProfiles = append(c.CA.JWTProfiles, ca.JWTProfile(p))
	}
	orDefault(&c.Limits.MaxConnections, from.Limits.MaxConnections)
	orDefault(&c.Limits.MaxPerSource, from.Limits.MaxPerSource)
	orDefault(&c.Limits.AttestPerSecond, from.Limits.AttestPerSecond)
	orDefault(&c.Limits.SignPerSecond, from.Limits.SignPerSecond)
	for _, j := range from.Judges {
		c.Judges = append(c.Judges, server.Judge{Kind: j.Kind, Config: j.Config})
	}
	c.Log, c.Level, c.Metrics = d.Log, d.Log, d.Registry
	c.Ready = func(r server.Running) {
		d.OnReload("audit log", r.Reopen)
		d.Up(r.Live, r.Ready)
	}
	return c
}

// orDefault sets a limit that the file gives.
func orDefault[T int | float64](to *T, value T) {
	if value != 0 {
		*to = value
	}
}
