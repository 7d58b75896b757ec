package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/policy"
	"kedge/sync/deploy"
)

func (a *app) runCommand() *cobra.Command {
	var signers, bandwidth string
	var bounds policy.Bounds
	c := &cobra.Command{
		Use:   "run [URL|POINTER]",
		Short: "Converge once on a manifest, as stretcher does",
		Long: `Fetches a manifest and does what it says, once: no agent, no state. The manifest is named by the argument, or on standard
input: a URL, or what consul watch -type event gives (with CONSUL_INDEX set, or beginning with "["; the last event counts).

  echo s3://acme-releases/web/manifest.yml | kedge run
  consul watch -type event -name deploy kedge run

A URL alone may change under the node, as stretcher's may; a pointer (URL@sha256:HEX) may not.
Exit code 0 when it is deployed, or when there is no event; 1 on every failure, also from consul watch.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			log, err := a.logger()
			if err != nil {
				return err
			}
			rate, err := byteRate(bandwidth)
			if err != nil {
				return usageError{err}
			}
			var url string
			if len(args) == 1 {
				url = args[0]
			} else if url, err = deploy.ParseInput(a.stdin, os.Getenv); err != nil {
				return usageError{err}
			}
			if url == "" {
				log.Info("no event: nothing to do")
				return nil
			}
			objects := object.New(object.Config{MaxBandwidth: rate, Log: log})
			trust, err := trustSigners(signers, objects, log)
			if err != nil {
				return err
			}
			host, _ := os.Hostname()
			node, _, _ := strings.Cut(host, ".")
			return deploy.Once(cmd.Context(), deploy.OneShot{URL: url, Node: node, Objects: objects, Bounds: bounds, Trust: trust, Log: log})
		},
	}
	f := c.Flags()
	f.StringVar(&signers, "signers", os.Getenv("KEDGE_SIGNERS"), "allowed_signers `file`: refuse a manifest without a signature by one of them")
	f.StringVar(&bandwidth, "max-bandwidth", os.Getenv("KEDGE_MAX_BANDWIDTH"), "bound of the download, as in 20MB/s (default: none)")
	f.StringSliceVar(&bounds.Sources, "sources", nil, "URL `prefixes` that it may come from (default: any)")
	f.StringSliceVar(&bounds.Dests, "dests", nil, "`directories` that dest may lie in (default: any)")
	return c
}

func (a *app) verifyCommand() *cobra.Command {
	var bandwidth string
	c := &cobra.Command{
		Use:   "verify DEST",
		Short: "Compare a live release on this node with its index",
		Long: `Reads every file of the release that DEST resolves to, and names what differs from what was published: missing, extra,
content, mode, link or type. Changes nothing. Exit code 1 where something differs.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			dest, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			rate, err := byteRate(bandwidth)
			if err != nil {
				return usageError{err}
			}
			releases := artifact.Open(dest, object.New(object.Config{}), nil)
			live, err := releases.Current()
			if errors.Is(err, artifact.ErrNoRelease) {
				return hintError{fmt.Errorf("%s is no release of kedge's: %w", dest, err), "only sync_strategy: release keeps what it needs to verify a tree"}
			}
			if err != nil {
				return err
			}
			differences, err := releases.Verify(cmd.Context(), live, rate)
			if err != nil {
				return err
			}
			if a.json {
				if err := a.printJSON(differences); err != nil {
					return err
				}
			} else {
				for _, d := range differences {
					fmt.Fprintf(a.stdout, "%-8s %s\n", d.What, d.Path)
				}
			}
			if len(differences) > 0 {
				return fmt.Errorf("%s differs from %s in %s", dest, live.Pointer, count(len(differences), "path"))
			}
			fmt.Fprintf(a.stderr, "%s is %s, as published\n", dest, live.Pointer)
			return nil
		},
	}
	c.Flags().StringVar(&bandwidth, "max-bandwidth", "", "read no faster than this, as in 50MB/s (default: as fast as it can)")
	a.jsonFlag(c, "the differences")
	return c
}
