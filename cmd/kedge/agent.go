package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent"
	"kedge/sync/ec2"
	"kedge/sync/secret"
)

func (a *app) agentCommand() *cobra.Command {
	var file string
	c := &cobra.Command{
		Use:   "agent",
		Short: "Converge this node, and stay: the daemon of every node",
		Long: `Watches what this node's stage and roles should run, and converges to it: at boot, and at
every change.

Configured by a file, the environment and flags: what is --state-dir here is KEDGE_STATE_DIR in the environment, and
state_dir in the file, which is YAML. A flag wins over the environment, and that over the file. Under systemd,
Type=notify reports READY once every unit has converged or has failed for good, or after --ready-timeout.

At --listen it serves:
  /ready     200 while the node serves: for a load balancer; else 503 and why
  /converged 200 while every unit runs what it should: for lifecycle hooks,
             systemd and cloud-init; else 503 and why
  /live      200 while the agent works, 503 if it hangs
At agent.sock in the state directory, at --listen-status, and at --listen if that is a loopback address, also:
  /status    what it runs and why, as JSON
  /metrics   for Prometheus

One agent at a time uses a state directory. Stopped in mid-deployment, it ends its commands in order, and the next
start finishes or takes back what it had begun.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			from := origins{}
			conf, err := readAgentConfig(file, from)
			err = errors.Join(err, override(&conf, cmd.Flags(), from))
			if err := errors.Join(err, conf.check(from), checkVariables(os.Environ())); err != nil {
				return usageError{err}
			}
			return a.runAgent(cmd.Context(), cmp.Or(file, defaultAgentConfig), conf)
		},
	}
	f, def := c.Flags(), agentDefaults()
	f.StringVar(&file, "config", os.Getenv("KEDGE_CONFIG"),
		"configuration `file` (default "+defaultAgentConfig+" where it exists)")
	f.String("stage", "", "this node's stage, as in prod")
	f.String("roles", "", "this node's `roles`, separated by commas")
	f.String(
		"node",
		"",
		"this node's name (default: what Consul's agent on this machine calls it, or else the host's up to the first dot)",
	)
	f.String("state-dir", "", "`directory` of lock, journal and last known state (default /var/lib/kedge)")
	f.String(
		"listen",
		"",
		"`address` that serves /ready, /converged and /live, as in :7070; a loopback one serves /status and /metrics, too "+
			"(default: none)",
	)
	f.String("listen-status", "",
		"`address` that serves /status and /metrics to other machines, as in 10.0.0.7:7071 (default: none)")
	f.String("sources", "", "URL `prefixes` that releases may come from, separated by commas (default: any, except "+
		"http:// of other machines; URLs of this machine, as file:// is, only with --local-sources)")
	f.Bool(
		"local-sources",
		false,
		"let releases come from this machine (file://, its own and link-local addresses), without naming it in --sources",
	)
	f.String(
		"mirrors",
		"",
		"`PREFIX=MIRROR`: URL prefixes to read releases from before their own place, separated by commas (default: none)",
	)
	f.String("dests", "", "`directories` that dest may lie in (default: any)")
	f.String("users", "", "`users` that commands may run as (default: any)")
	f.Bool("no-commands", false, "refuse releases with commands")
	f.String(
		"secrets",
		"",
		"`references` of secrets that releases may use here, or prefixes of them, as in ssm:/prod/ (default: none)",
	)
	f.String("signers", "", "allowed_signers `file`: with it, a release without a signature by one of them is refused")
	f.Bool("allow-older-pins", false,
		"with --signers, let pins go back to releases made before this node's version floor")
	f.Bool("allow-empty", false,
		"be ready even if the stage and roles have no unit (default: that counts as a mistake)")
	f.String(
		"observe",
		"",
		"fetch and verify releases, compare them with what lies at dest, report that, and touch nothing; of all units, or "+
			"with = of these `units`: STAGE/ROLE/UNIT, each a name or *, separated by commas",
	)
	f.Lookup("observe").NoOptDefVal = "true"
	f.Bool(
		"adopt",
		false,
		"adopt what lies at dest before a unit's first release if it equals the release; same as adopt: true in its file",
	)
	f.Bool("maintenance", false,
		"have the node in Consul's maintenance mode while a unit is drained (its token needs node:write)")
	f.String("snapshot", "", "`URL` of the mirror's copy of the desired state, for a first boot while the store is away; "+
		"it needs --snapshot-signers")
	f.String("snapshot-signers", "", "allowed_signers `file`: who may sign the snapshot")
	f.Duration("snapshot-max-age", def.SnapshotMaxAge,
		"refuse a snapshot that is older (the mirror writes it anew every hour)")
	f.Bool("ec2", false,
		"take stage and roles, where nothing else gives them, from the instance's tags kedge:stage and kedge:roles")
	f.String(
		"lifecycle-hook",
		"",
		"complete this AutoScaling `hook`: CONTINUE once every unit runs what it should, ABANDON after --lifecycle-timeout",
	)
	f.Duration("lifecycle-timeout", def.LifecycleTimeout,
		"with --lifecycle-hook: how long a new instance may take to converge before the hook is told ABANDON")
	f.String("autoscaling-group", "", "the hook's `group` (default: the one that the instance's tags name)")
	f.String("max-bandwidth", "", "bound of all downloads, as in 20MB/s (default: none)")
	f.Duration("start-delay", 0, "wait a random time up to this before a fetch, to spread a large fleet's load")
	f.Duration("verify-every", def.VerifyEvery, "compare live trees with their indexes this often; 0: never")
	f.String(
		"verify",
		"",
		"always: hash each file of the running release before the next one reuses it (default: only files that changed on "+
			"disk since they were last hashed, by inode, size and times)",
	)
	f.Duration("ready-timeout", def.ReadyTimeout, "tell systemd READY after this long, converged or not")
	return c
}

// override replaces those of the file's settings that a flag or a non-empty environment variable gives; a flag wins.
// For each setting that it replaces, it puts the name of the flag or variable into the map from.
func override(c *agentConfig, flags *pflag.FlagSet, from origins) error {
	var errs []error
	text := func(name string) (string, bool) {
		field := strings.ReplaceAll(name, "-", "_")
		f := flags.Lookup(name)
		if f.Changed {
			from[field] = "--" + name
			return f.Value.String(), true
		}
		variable := "KEDGE_" + strings.ToUpper(field)
		v := os.Getenv(variable)
		if v != "" {
			from[field] = variable
		}
		return v, v != ""
	}
	wrong := func(name string, err error) {
		errs = append(errs, fmt.Errorf("%s: %w", from.nameOf(strings.ReplaceAll(name, "-", "_")), err))
	}
	str := func(name string, into *string) {
		if v, ok := text(name); ok {
			*into = v
		}
	}
	strs := func(name string, into *words) {
		if v, ok := text(name); ok {
			*into = splitList(v)
		}
	}
	boolean := func(name string, into *bool) {
		v, ok := text(name)
		if !ok {
			return
		}
		var err error
		if *into, err = strconv.ParseBool(v); err != nil {
			wrong(name, fmt.Errorf("%q: want true or false", v))
		}
	}
	duration := func(name string, into *time.Duration) {
		v, ok := text(name)
		if !ok {
			return
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			wrong(name, fmt.Errorf("%q: want a duration, as in 30s or 5m", v))
		}
		*into = d
	}
	str("stage", &c.Stage)
	strs("roles", &c.Roles)
	str("node", &c.Node)
	str("state-dir", &c.StateDir)
	str("listen", &c.Listen)
	str("listen-status", &c.ListenStatus)
	strs("sources", &c.Sources)
	boolean("local-sources", &c.LocalSources)
	if v, ok := text("mirrors"); ok {
		var err error
		if c.Mirrors, err = readMirrors(v); err != nil {
			errs = append(errs, err)
		}
	}
	strs("dests", &c.Dests)
	strs("users", &c.Users)
	boolean("no-commands", &c.NoCommands)
	strs("secrets", &c.Secrets)
	str("signers", &c.Signers)
	boolean("allow-older-pins", &c.AllowOlderPins)
	boolean("allow-empty", &c.AllowEmpty)
	if v, ok := text("observe"); ok {
		if err := c.Observe.Set(v); err != nil {
			errs = append(errs, err)
		}
	}
	boolean("adopt", &c.Adopt)
	boolean("maintenance", &c.Maintenance)
	str("snapshot", &c.Snapshot)
	str("snapshot-signers", &c.SnapshotSigners)
	duration("snapshot-max-age", &c.SnapshotMaxAge)
	boolean("ec2", &c.EC2)
	str("lifecycle-hook", &c.LifecycleHook)
	duration("lifecycle-timeout", &c.LifecycleTimeout)
	str("autoscaling-group", &c.AutoScalingGroup)
	str("max-bandwidth", &c.MaxBandwidth)
	duration("start-delay", &c.StartDelay)
	duration("verify-every", &c.VerifyEvery)
	str("verify", &c.Verify)
	duration("ready-timeout", &c.ReadyTimeout)
	return errors.Join(errs...)
}

// runAgent runs the agent until ctx ends or it fails. Errors about missing settings name file as a place for them.
func (a *app) runAgent(ctx context.Context, file string, conf agentConfig) error {
	log, err := a.logger()
	if err != nil {
		return err
	}
	if conf.EC2 && (conf.Stage == "" || len(conf.Roles) == 0) {
		instance, err := ec2.Describe(ctx)
		if err != nil {
			return fmt.Errorf("reading this node's stage and roles from its EC2 tags: %w", err)
		}
		conf.Stage = cmp.Or(conf.Stage, instance.Tags[ec2.TagStage])
		if len(conf.Roles) == 0 {
			conf.Roles = splitList(instance.Tags[ec2.TagRoles])
		}
		if conf.Stage == "" || len(conf.Roles) == 0 {
			return fmt.Errorf(
				"this node's stage and roles: the instance %s needs the tags %s and %s, as in prod and web",
				instance.ID,
				ec2.TagStage,
				ec2.TagRoles,
			)
		}
	}
	switch noRoles := len(conf.Roles) == 0; {
	case conf.Stage == "" && noRoles:
		return usagef(
			"this node's stage and roles are not set: give --stage and --roles, KEDGE_STAGE and KEDGE_ROLES, or %s",
			file,
		)
	case conf.Stage == "":
		return usagef("this node's stage is not set: give --stage, KEDGE_STAGE, or stage in %s", file)
	case noRoles:
		return usagef("this node's roles are not set: give --roles, KEDGE_ROLES, or roles in %s", file)
	}
	mirrors, err := conf.Mirrors.parse()
	if err != nil {
		return usageError{err}
	}
	bandwidth, err := byteRate(conf.MaxBandwidth)
	if err != nil {
		return usageError{err}
	}
	store, err := a.open(log)
	if err != nil {
		return err
	}
	defer store.Close()

	bounds := policy.Bounds{
		Sources: conf.Sources, NoLocal: !conf.LocalSources, Dests: conf.Dests, Users: conf.Users, NoCommands: conf.NoCommands,
	}
	objects := object.New(object.Config{
		MaxBandwidth: bandwidth, Sources: bounds.Sources, NoLocal: bounds.NoLocal, Redirect: bounds.CheckSource,
		Mirrors: mirrors, Log: log,
	})
	trust, err := trustSigners(conf.Signers, objects, log)
	if err != nil {
		return err
	}
	secrets, err := secret.New(conf.Secrets, log)
	if err != nil {
		return usageError{err}
	}
	snapshot, err := snapshotReader(conf.Snapshot, conf.SnapshotSigners, conf.SnapshotMaxAge,
		object.New(object.Config{Log: log}), log)
	if err != nil {
		return usageError{err}
	}
	var maintenance func(context.Context, bool, string) error
	if conf.Maintenance {
		maintainer, ok := store.(kv.Maintainer)
		if !ok {
			return usagef("--maintenance needs Consul: %s has no maintenance mode", store)
		}
		maintenance = maintainer.SetMaintenance
	}
	traces, stopTraces, err := startTraces("kedge-agent", log)
	if err != nil {
		return usageError{err}
	}
	defer stopTraces()
	metrics := prometheus.NewRegistry()
	registerProcess(metrics)
	node, err := agent.New(agent.Config{
		Store: store, Node: conf.Node, Stage: conf.Stage, Roles: conf.Roles, StateDir: conf.StateDir,
		Objects:        objects,
		Bounds:         bounds,
		Trust:          trust,
		Secrets:        secrets,
		AllowOlderPins: conf.AllowOlderPins,
		AllowEmpty:     conf.AllowEmpty,
		Observe:        conf.Observe,
		Adopt:          conf.Adopt,
		Maintenance:    maintenance,
		Snapshot:       snapshot,
		Listen:         conf.Listen,
		ListenStatus:   conf.ListenStatus,
		StartDelay:     conf.StartDelay,
		VerifyEvery:    conf.VerifyEvery,
		HashAlways:     conf.Verify == "always",
		FreeMemory:     debug.FreeOSMemory,
		Version:        version(),
		Metrics:        metrics,
		Trace:          traces,
		Log:            log,
	})
	if err != nil {
		return err
	}
	// An idle agent needs little memory: what a deployment allocated is returned sooner than by Go's default.
	debug.SetGCPercent(50)
	log.Info("agent starts", "version", version(), "node", node.Node(), "stage", conf.Stage,
		"roles", strings.Join(conf.Roles, ","), "store", store.String(), "listen", node.Addr())
	defer logWhenDone(ctx, log, "agent stops")()
	notify, stop := context.WithCancel(ctx)
	defer stop()
	go reportToSystemd(notify, node, conf.ReadyTimeout, log)
	go retryOnHangup(notify, node, log)
	if conf.LifecycleHook != "" {
		go completeHook(notify, conf, node.Converged(), log)
	}
	return node.Run(ctx)
}

// completeHook completes the instance's lifecycle action in AutoScaling: see ec2.Hook. It only logs errors, as the
// agent runs even if the hook fails.
func completeHook(ctx context.Context, conf agentConfig, converged <-chan struct{}, log *slog.Logger) {
	hook := ec2.Hook{Name: conf.LifecycleHook, Group: conf.AutoScalingGroup, Timeout: conf.LifecycleTimeout, Log: log}
	for began := time.Now(); ; {
		var err error
		if hook.Instance, err = ec2.Describe(ctx); err == nil ||
			hook.Instance.ID != "" && hook.Group != "" { // then tags are not needed
			hook.Timeout = max(time.Second, conf.LifecycleTimeout-time.Since(began))
			break
		}
		log.Warn("could not read this instance's EC2 metadata for the lifecycle hook: trying again",
			"hook", hook.Name, "error", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(10 * time.Second):
		}
	}
	if err := hook.Run(ctx, converged); err != nil && ctx.Err() == nil {
		log.Error("could not complete the lifecycle hook: AutoScaling goes by the hook's own timeout and default result",
			"hook", hook.Name, "group", hook.Group, "instance", hook.Instance.ID, "error", err)
	}
}

// retryOnHangup retries, at each SIGHUP (systemctl reload kedge-agent), the releases that failed on this node.
func retryOnHangup(ctx context.Context, node *agent.Agent, log *slog.Logger) {
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	for {
		select {
		case <-ctx.Done():
			return
		case <-hangup:
			log.Info("SIGHUP: releases that failed on this node are tried again", "has_units", node.Retry(deployments.UnitID{}))
		}
	}
}
