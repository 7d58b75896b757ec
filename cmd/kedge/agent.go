package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/agent"
)

func (a *app) agentCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "agent",
		Short: "Converge this node, and stay: the daemon of every node",
		Long: `Watches what this node's stage and roles should run, and converges to it: at boot, and at every change.

Configured by a file, the environment and flags; a flag wins over KEDGE_STAGE, KEDGE_ROLES and so on, which win over the
file. Under systemd, Type=notify reports READY after the first convergence, or after --ready-timeout.

It serves, where --listen says so:
  /ready     200 when every unit is converged and healthy, else 503 with the reason: for load balancers
  /live      200 while the loop turns
  /status    what it runs and why, as JSON
  /metrics   for Prometheus

One agent at a time uses a state directory. Stopped in mid-deployment, it ends its commands in order, and the next start
finishes or takes back what it had begun.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			conf, err := readAgentConfig(file)
			if err != nil {
				return usageError{err}
			}
			if err := override(&conf, cmd.Flags()); err != nil {
				return err
			}
			return a.runAgent(cmd.Context(), conf)
		},
	}
	f := c.Flags()
	f.StringVar(&file, "config", os.Getenv("KEDGE_CONFIG"), "configuration `file` (default "+defaultAgentConfig+" where it exists)")
	f.String("stage", "", "this node's stage, as in prod")
	f.String("roles", "", "this node's `roles`, separated by commas")
	f.String("node", "", "this node's name (default: the host's name)")
	f.String("state-dir", "", "`directory` of lock, journal and last known state (default /var/lib/kedge)")
	f.String("listen", "", "`address` of /ready, /live, /status and /metrics, as in 127.0.0.1:7070 (default: none)")
	f.String("sources", "", "URL `prefixes` that releases may come from, separated by commas (default: any)")
	f.String("dests", "", "`directories` that dest may lie in (default: any)")
	f.String("users", "", "`users` that commands may run as (default: any)")
	f.Bool("no-commands", false, "refuse releases with commands")
	f.String("signers", "", "allowed_signers `file`: with it, a release without a signature by one of them is refused")
	f.Bool("allow-older-pins", false, "with --signers, let pins go back to releases older than the one that this node has settled on")
	f.String("max-bandwidth", "", "bound of all downloads, as in 20MB/s (default: none)")
	f.Duration("start-delay", 0, "wait a random time up to this before a fetch, to spread a large fleet's load")
	f.Duration("verify-every", 24*time.Hour, "compare live trees with their indexes this often; 0: never")
	f.Duration("ready-timeout", 15*time.Minute, "tell systemd READY after this long, converged or not")
	return c
}

// override lays environment and flags over what the file says.
func override(c *agentConfig, flags *pflag.FlagSet) error {
	var firstErr error
	text := func(name string) (string, bool) {
		f := flags.Lookup(name)
		if f.Changed {
			return f.Value.String(), true
		}
		v := os.Getenv("KEDGE_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_")))
		return v, v != ""
	}
	str := func(name string, into *string) {
		if v, ok := text(name); ok {
			*into = v
		}
	}
	strs := func(name string, into *[]string) {
		if v, ok := text(name); ok {
			*into = list(v)
		}
	}
	duration := func(name string, into *time.Duration) {
		v, ok := text(name)
		if !ok {
			if *into == 0 {
				*into, _ = flags.GetDuration(name)
			}
			return
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			firstErr = usagef("%s %q: want a duration, as in 30s or 5m", name, v)
		}
		*into = d
	}
	str("stage", &c.Stage)
	strs("roles", &c.Roles)
	str("node", &c.Node)
	str("state-dir", &c.StateDir)
	str("listen", &c.Listen)
	strs("sources", &c.Sources)
	strs("dests", &c.Dests)
	strs("users", &c.Users)
	if v, ok := text("no-commands"); ok {
		c.NoCommands = v != "false" && v != "0"
	}
	str("signers", &c.Signers)
	if v, ok := text("allow-older-pins"); ok {
		c.AllowOlderPins = v != "false" && v != "0"
	}
	str("max-bandwidth", &c.MaxBandwidth)
	duration("start-delay", &c.StartDelay)
	duration("verify-every", &c.VerifyEvery)
	duration("ready-timeout", &c.ReadyTimeout)
	return firstErr
}

func (a *app) runAgent(ctx context.Context, conf agentConfig) error {
	log, err := a.logger()
	if err != nil {
		return err
	}
	if conf.Stage == "" || len(conf.Roles) == 0 {
		return usagef("this node's stage and roles are not set: give --stage and --roles, KEDGE_STAGE and KEDGE_ROLES, or %s", defaultAgentConfig)
	}
	bandwidth, err := byteRate(conf.MaxBandwidth)
	if err != nil {
		return usageError{err}
	}
	if conf.Node == "" {
		host, err := os.Hostname()
		if err != nil {
			return fmt.Errorf("this node's name: %w; set --node", err)
		}
		conf.Node, _, _ = strings.Cut(host, ".")
	}
	store, err := a.open(ctx, log)
	if err != nil {
		return err
	}
	defer store.Close()

	objects := object.New(object.Config{MaxBandwidth: bandwidth, Log: log})
	trust, err := trustSigners(conf.Signers, objects, log)
	if err != nil {
		return err
	}
	metrics := prometheus.NewRegistry()
	metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	node, err := agent.New(agent.Config{
		Store: store, Node: conf.Node, Stage: conf.Stage, Roles: conf.Roles, StateDir: conf.StateDir,
		Objects:        objects,
		Bounds:         policy.Bounds{Sources: conf.Sources, Dests: conf.Dests, Users: conf.Users, NoCommands: conf.NoCommands},
		Trust:          trust,
		AllowOlderPins: conf.AllowOlderPins,
		Listen:         conf.Listen,
		StartDelay:     conf.StartDelay,
		VerifyEvery:    conf.VerifyEvery,
		Version:        version(),
		Metrics:        metrics,
		Log:            log,
	})
	if err != nil {
		return err
	}
	// An idle agent is small: what a deployment allocated is given back sooner than Go would by itself.
	debug.SetGCPercent(50)
	log.Info("agent starts", "version", version(), "node", conf.Node, "stage", conf.Stage, "roles", strings.Join(conf.Roles, ","), "store", store.String(), "listen", node.Addr())
	notify, stop := context.WithCancel(ctx)
	defer stop()
	go supervised(notify, node, conf.ReadyTimeout, log)
	go retryOnHangup(notify, node, log)
	return node.Run(ctx)
}

// retryOnHangup lets every release that failed here be tried once more when SIGHUP comes (systemctl reload kedge-agent).
func retryOnHangup(ctx context.Context, node *agent.Agent, log *slog.Logger) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			log.Info("SIGHUP: tries again what failed", "any", node.Retry(deployments.UnitID{}))
		}
	}
}
