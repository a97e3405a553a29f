package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/assay-id/assay/agent"
	"github.com/assay-id/assay/cmd/cli"
	"github.com/assay-id/assay/cmd/daemon"
	"github.com/assay-id/assay/conf"
	"github.com/assay-id/assay/workloadapi/files"
)

// defaultFiles is the file of "files" if -config names none.
const defaultFiles = "/etc/assay/files.hcl"

// filesCommand keeps an identity in files, as a client of any SPIFFE Workload API.
func filesCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "files", Short: "Keeps an identity in files, for a program that reads nothing else", Args: cli.NoArgs,
		Long: `Keeps certificate, key, bundle, tokens and the list of revoked certificates of a
workload in files, and tells their reader when they change. It is a client of
any SPIFFE Workload API and attests as the user that runs it.

The configuration file has spiffe-helper's keys, and more: conf/files.hcl is a
commented sample. The agent does the same by itself for each block
files "NAME" { … } in its own file.`,
	}
	s := new(cli.Settings)
	s.AddTo(c, defaultFiles)
	s.Key(c, "agentAddress", "agent_address", "Path of the Workload API's Unix socket")
	s.Switch(c, "daemon-mode", "daemon_mode", "false writes everything once and ends")
	s.Key(c, "logLevel", "log_level", "debug, info, warn or error")
	validate := c.Flags().Bool("validate", false, "Only say everything that is wrong with the file")
	c.RunE = func(c *cobra.Command, _ []string) error {
		from, err := conf.LoadFiles(s.Path(), s.Options())
		if err != nil {
			return cli.Invalid("Assay files configuration", err)
		}
		if *validate {
			_, err := fmt.Fprintln(c.OutOrStdout(), "Assay files configuration file is valid.")
			return err
		}
		return keepFiles(c.Context(), from, s)
	}
	return c
}

func keepFiles(ctx context.Context, from *conf.FilesClient, s *cli.Settings) error {
	api, err := files.Dial(workloadAddress(from.Socket), from.SPIFFEID)
	if err != nil {
		return err
	}
	defer func() { _ = api.Close() }()
	d, err := daemon.Start(daemon.Config{
		Name: "assay_files", Version: cli.VersionText(), Log: from.Log, Health: from.Health,
		Reload: func() (conf.Log, error) {
			now, err := conf.LoadFiles(s.Path(), s.Options())
			if err != nil {
				return conf.Log{}, err
			}
			return now.Log, nil
		},
	})
	if err != nil {
		return err
	}
	config := filesConfig(&from.Files)
	config.Process, config.Stdout, config.Stderr = from.Process, os.Stdout, os.Stderr
	config.Log = d.Log
	k := files.New(api, config)
	if !from.Daemon {
		err := d.Run(ctx, k.Once)
		if errors.Is(err, files.ErrNoIdentity) {
			return fmt.Errorf("%w; \"assay-agent explain -pid PID\" says why", err)
		}
		return err
	}
	d.Log.WithFields(map[string]any{"version": cli.VersionText(), "dir": config.Dir, "names": config.Files()}).Info("keeping files")
	d.Up(k.Live, k.Ready)
	return d.Run(ctx, k.Run)
}

// workloadAddress is where the Workload API is.
func workloadAddress(configured string) string {
	if configured != "" {
		return configured
	}
	if address := os.Getenv("SPIFFE_ENDPOINT_SOCKET"); address != "" {
		return address
	}
	return conf.DefaultAgentSocket
}

// filesConfig hands the keys of a block to the keeper.
func filesConfig(f *conf.Files) files.Config {
	c := files.Config{
		Name: f.Name, Dir: f.Dir, Cert: f.Cert, Key: f.Key, Bundle: f.Bundle, CRL: f.CRL, JWTBundle: f.JWTBundle, JWKS: f.JWKS,
		CertMode: f.CertMode, KeyMode: f.KeyMode, JWTMode: f.JWTMode, JWTBundleMode: f.JWTBundleMode, Owner: f.Owner, Group: f.Group,
		SPIFFEID: f.SPIFFEID, Hint: f.Hint,
		IntermediatesInBundle: f.IntermediatesInBundle, Federated: f.Federated, OmitExpired: f.OmitExpired, Withdrawn: f.Withdrawn,
		PIDFile: f.PIDFile, Signal: f.Signal, Command: f.Command, CommandTimeout: f.CommandTimeout,
	}
	for _, j := range f.JWTs {
		c.JWTs = append(c.JWTs, files.JWT{Audience: j.Audience, File: j.File})
	}
	return c
}

// filesOf hands the blocks of the agent's file to the agent.
func filesOf(blocks []conf.Files) []agent.Files {
	var all []agent.Files
	for n := range blocks {
		all = append(all, agent.Files{Selectors: blocks[n].Selectors, Config: filesConfig(&blocks[n])})
	}
	return all
}
