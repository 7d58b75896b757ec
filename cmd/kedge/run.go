package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/artifact/object"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
	"kedge/sync/secret"
)

// stretcherName is the name of a link through which kedge acts as stretcher.
const stretcherName = "stretcher"

// stretcherFlags are the long flags of stretcher's versions. Versions before 2025 used Go's flag package, which
// takes one dash.
var stretcherFlags = []string{
	"max-band-width", "max-bandwidth", "timeout", "random-delay", "retry", "retry-wait", "rsync-verbose", "version",
}

// translateArgs returns kedge's arguments for a program called by name with args. A program called stretcher acts as
// kedge run, and takes stretcher's long flags with one dash, too: they get the second dash here.
func translateArgs(name string, args []string) []string {
	if filepath.Base(name) != stretcherName {
		return args
	}
	out := []string{"run"}
	for _, a := range args {
		flag, _, _ := strings.Cut(a, "=")
		if long, one := strings.CutPrefix(flag, "-"); one && slices.Contains(stretcherFlags, long) {
			a = "-" + a
		}
		out = append(out, a)
	}
	return out
}

// startedByConsulWatch reports whether consul watch started this process. If so, the process must
// exit with 0 even if the deployment fails: consul watch would end, and the next event would be
// lost.
func startedByConsulWatch() bool { return os.Getenv("CONSUL_INDEX") != "" }

func (a *app) runCommand() *cobra.Command {
	var signers, bandwidth, rsyncVerbose string
	var allowedSecrets []string
	var bounds policy.Bounds
	var fetch deploy.FetchLimits
	var randomDelay time.Duration
	var showVersion bool
	fetch.RetryWait = 3 * time.Second
	c := &cobra.Command{
		Use:   "run [URL|POINTER]",
		Short: "Converge once on a manifest, as stretcher does",
		Long: `Fetches a manifest and does what it says, once: no agent, no state. The manifest is named by the argument, or by the first line of
standard input: a URL, or what consul watch -type event gives (with CONSUL_INDEX set, or beginning with "["; the last event counts).

  echo s3://acme-releases/web/manifest.yml | kedge run
  consul watch -type event -name deploy kedge run

A URL alone may change under the node, as stretcher's may; a pointer (URL@sha256:HEX) may not.

It takes stretcher's flags, and may stand in its place: called by that name, as through a link, it is kedge run.

  ln -s /usr/bin/kedge /usr/local/bin/stretcher

Exit code 0 when it is deployed, or when there is no event; 1 when it fails; 2 for wrong flags or input. Run by
consul watch (CONSUL_INDEX is set), it logs a failed deployment and exits 0, as stretcher does: the watch would end
with it. Wrong flags or files still fail.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if showVersion {
				fmt.Fprintln(a.stdout, "kedge run, for stretcher:", version())
				return nil
			}
			log, err := a.logger()
			if err != nil {
				return err
			}
			rate, err := byteRate(bandwidth)
			if err != nil {
				return usageError{err}
			}
			if !slices.Contains([]string{"", "-v", "-vv", "-vvv"}, rsyncVerbose) {
				return usagef(`--rsync-verbose %q: want -v, -vv, -vvv or ""`, rsyncVerbose)
			}
			objects := object.New(object.Config{
				MaxBandwidth: rate, Sources: bounds.Sources, Redirect: bounds.CheckSource, Log: log,
			})
			trust, err := trustSigners(signers, objects, log)
			if err != nil {
				return err
			}
			secrets, err := secret.New(allowedSecrets, log)
			if err != nil {
				return usageError{err}
			}
			host, _ := os.Hostname()
			node, _, _ := strings.Cut(host, ".")
			one := deploy.OneShot{
				Node:         node,
				Objects:      objects,
				Bounds:       bounds,
				Trust:        trust,
				Fetch:        fetch,
				Secrets:      secrets,
				RsyncVerbose: strings.Fields(rsyncVerbose),
				Log:          log,
			}
			err = a.runOnce(cmd.Context(), one, args, randomDelay)
			if err != nil && startedByConsulWatch() {
				log.Error("not deployed; the exit code is 0, so that consul watch goes on", "error", err)
				return nil
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&signers, "signers", os.Getenv("KEDGE_SIGNERS"),
		"allowed_signers `file`: refuse a manifest without a signature by one of them")
	f.StringVar(&bandwidth, "max-bandwidth", os.Getenv("KEDGE_MAX_BANDWIDTH"),
		"bound of the download, as in 20MB/s (default: none); stretcher's --max-band-width")
	f.StringSliceVar(&bounds.Sources, "sources", nil,
		"URL `prefixes` that the release may come from (default: any, but no http:// of other machines)")
	f.StringSliceVar(&bounds.Dests, "dests", nil, "`directories` that dest may lie in (default: any)")
	f.StringSliceVar(&allowedSecrets, "secrets", nil,
		"`references` of secrets that the manifest may use, or prefixes of them, as in ssm:/prod/ (default: none)")
	f.Var((*seconds)(&fetch.Timeout), "timeout",
		"bound of the time that fetching the archive takes, with its retries (default: none)")
	f.IntVar(&fetch.Retry, "retry", 0,
		"how many more `times` to fetch the archive if it fails, beyond each request's own retries")
	f.Var((*seconds)(&fetch.RetryWait), "retry-wait", "how long to wait before each --retry")
	f.Var((*seconds)(&randomDelay), "random-delay", "wait a random time up to this first, to spread a fleet's load")
	f.StringVar(&rsyncVerbose, "rsync-verbose", "-v", "how much sync_strategy: rsync says: -v, -vv, -vvv or nothing")
	f.BoolVarP(&showVersion, "version", "v", false, "print the version, and end")
	f.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		if name == "max-band-width" {
			name = "max-bandwidth"
		}
		return pflag.NormalizedName(name)
	})
	return c
}

// runOnce waits for a random part of randomDelay, and deploys the manifest that the argument or
// standard input names. If standard input has no event, it deploys nothing.
func (a *app) runOnce(ctx context.Context, one deploy.OneShot, args []string, randomDelay time.Duration) error {
	if randomDelay > 0 {
		delay := rand.N(randomDelay)
		one.Log.Info("random delay before the deployment", "duration", delay.Round(time.Millisecond))
		if err := wait.For(ctx, delay); err != nil {
			return err
		}
	}
	if len(args) == 1 {
		one.URL = args[0]
		return deploy.Once(ctx, one)
	}
	url, err := readEvent(ctx, a.stdin, one.Log)
	if err != nil {
		return err
	}
	if url == "" {
		one.Log.Info("no event: nothing to do")
		return nil
	}
	one.URL = url
	return deploy.Once(ctx, one)
}

// readEvent reads the manifest's URL from standard input; empty: there is no event. It reads no more than it needs.
// When ctx ends, it returns an error.
func readEvent(ctx context.Context, in io.Reader, log *slog.Logger) (url string, err error) {
	read := make(chan struct{})
	log.Debug("reads a manifest's URL or Consul's events from standard input")
	var got string
	var failed error
	go func() { // if nothing is written to in, this runs until the process ends
		got, failed = deploy.ParseInput(in, os.Getenv)
		close(read)
	}()
	select {
	case <-read:
	case <-ctx.Done():
		return "", fmt.Errorf("waiting for a manifest's URL on standard input: %w", context.Cause(ctx))
	}
	if failed != nil {
		return "", usageError{failed}
	}
	return got, nil
}

// seconds is a duration, or a number of seconds as in stretcher's versions before 2025.
type seconds time.Duration

func (s *seconds) Set(text string) error {
	d, err := time.ParseDuration(text)
	if n, failed := strconv.ParseFloat(text, 64); failed == nil && n < 1e9 {
		d, err = time.Duration(n*float64(time.Second)), nil
	}
	if err != nil || d < 0 {
		return errors.New("want a duration, as in 30s or 5m, or a number of seconds")
	}
	*s = seconds(d)
	return nil
}

func (s *seconds) Type() string { return "duration" }

func (s *seconds) String() string {
	if *s == 0 {
		return ""
	}
	return time.Duration(*s).String()
}
