// Package agent makes one node converge: it watches what the node's stage and roles should run, decides what that
// means for this node (package policy), deploys it (package deploy), and reports.
//
// One loop decides for all units at once, from what is known at that moment. It has no queue of
// events, so a wake-up that is missed, repeated or late does no harm. Each unit has a worker, which
// does one job at a time and then chooses the next. A new decision cancels a job that conflicts
// with it. Package deploy then stops as soon as that is safe.
//
// The loop decides by the first of these sources that has an answer: the store, once a view of it
// is synced; the last known state on this node's disk; a snapshot. Newer records of a view that
// isn't synced count, too. The units of a role stay as they are until both the records and the pins
// of the role are known. A unit also stays as it is if its record goes missing later. An error of
// the store removes nothing from what is known.
//
// # Ready
//
// /ready answers 200 as soon as every unit serves a release, and has converged or can't go on by
// itself. For example, a unit that is held, invalid or refused, or that failed and went back, can't
// go on by itself. After a reboot, the health checks of the running release must also have passed
// in this boot. Earlier results say little of services that are still starting. Agent.Idle and
// /converged don't wait for these checks, as systemd may start such services only after Agent.Idle
// (kedge-apps.target). Once it was 200, /ready is 503 only while a unit is unhealthy or drained. A
// unit is drained from before its switch until it is healthy. It stays drained after a failure if
// it has no good release to go back to. Neither a fetch, nor an outage, nor a typo in a pin changes
// /ready: a load balancer must not lose a node that serves as well as before.
//
// /converged answers 200 while every unit is healthy, and runs what it should or what a pin holds.
// A node that failed and went back serves, but hasn't converged. A node without any unit doesn't
// become ready, and hasn't converged, unless Config.AllowEmpty is set. A node that only observes a
// unit, and runs nothing of that unit, is neither ready nor converged.
//
// # On disk
//
// Only the agent writes its state directory (0700):
//
//	lock                      locked while the agent runs; the id of its process
//	last-known.json           what the store last held for this node
//	floors.json               which releases are too old for this node: see deploy.Floors
//	node.json                 the name that the store's agent last gave this node
//	starting.json             since when this node has been starting; removed once Agent.Idle is closed
//	agent.sock                what Config.ListenStatus serves, and POST /retry, for this machine's root
//	units/STAGE/ROLE/UNIT/    a unit's files, which package deploy writes
//
// # Reading order
//
// agent.go has Config and New, reconcile.go Run and the loop, siblings.go the dependencies between a node's units.
// unit.go has what is known of a unit, and condition.go derives the unit's state and reason from that. worker.go
// chooses and runs a unit's jobs, which are in jobs.go. watch.go reads the store. status.go builds the node's reports
// and status; report.go writes the reports to the store, and http.go serves the status.
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/destwatch"
	"kedge/sync/agent/drain"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// DefaultStateDir is the default of Config.StateDir.
const DefaultStateDir = "/var/lib/kedge"

// Config configures an Agent.
type Config struct {
	Store kv.Store
	// Node is this node's name. If it is empty, the agent asks the store's agent on this machine
	// for the name: see findName. Until the store's agent answers, or if it can't tell the name,
	// the name that it gave at an earlier start counts. Without such a name, the node has the
	// host's name up to its first dot.
	Node  string
	Stage string
	Roles []string // at least one
	// StateDir holds the lock, the last known state and every unit's journal; default DefaultStateDir.
	StateDir string
	Objects  *object.Client
	Bounds   policy.Bounds
	// Trust checks a manifest's signature before the manifest is used; nil: only the pointer's digest is checked.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// AllowOlderPins lets a pin name a release that was made before this node's version floor (deploy.Floors). With it,
	// whoever writes pins can deploy anything that was ever signed. Without Trust it has no effect.
	AllowOlderPins bool
	// Maintenance sets the node's maintenance mode in the service catalog: on while a unit is drained, off otherwise.
	// It is retried until it succeeds. A switch waits for it at most 5 s, so that an outage of the store doesn't stop a
	// boot. nil: the node has no maintenance mode.
	Maintenance func(ctx context.Context, on bool, reason string) error
	// Snapshot returns the mirror's last snapshot of desired/. It is called after an error of the store, if nothing is
	// known of a role's records or pins, until it succeeds. If nothing is known of a role's pins, they then count as
	// absent. nil: there is no snapshot.
	Snapshot func(ctx context.Context) ([]kv.Entry, error)
	// AllowEmpty lets a node without any unit be ready and converged. By default that counts as a mistake.
	AllowEmpty bool
	// Observe names units, as patterns STAGE/ROLE/UNIT, that the agent only observes. The agent fetches and verifies
	// what they should run, compares that with the tree at the manifest's dest, and reports the result. It changes no
	// dest and runs no commands.
	Observe []string
	// Adopt lets every unit take over the tree that is at dest before the unit's first release, like Record.Adopt.
	Adopt bool
	// Secrets reads the secrets that manifests refer to; nil: releases with secrets are refused.
	Secrets deploy.SecretReader
	// Listen is the address that serves /ready, /converged and /live, and, if it is a loopback address, also what
	// ListenStatus serves; empty: none. ":0" chooses a free port: see Agent.Addr.
	Listen string
	// ListenStatus is the address that also serves /status (JSON) and /metrics; empty: none.
	ListenStatus string
	// StartDelay is the upper limit of a random delay before a release to deploy is fetched from
	// storage. It spreads a large fleet's load. Default 0.
	StartDelay time.Duration
	// VerifyEvery is the average time between two background checks of a live tree against its index; 0: no checks.
	VerifyEvery time.Duration
	// HashAlways makes the agent hash files of the running release before it shares them with the next release, even if
	// the files look untouched.
	HashAlways bool
	// FreeMemory is called some time after a job that changed something, as an idle agent doesn't need what a deployment
	// allocated; for example debug.FreeOSMemory. nil: nothing is called.
	FreeMemory func()
	Version    string
	Metrics    *prometheus.Registry // nil: none
	// Trace sends the spans of deployments; nil: nothing is traced. The caller runs the Sender.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none

	uptime func() time.Duration // how long the machine has been up; tests have their own
}

// Agent makes one node converge. Create it with New and call Run once.
type Agent struct {
	c             Config  // Node changes at most once, under mu: see findName
	naming        *naming // nil: Config.Node was given
	started       time.Time
	startingSince time.Time // what statedir.Dir.StartingSince returned
	booted        bool      // the machine had just booted when the agent started
	dir           *statedir.Dir
	// listener and statusListener serve Config.Listen and Config.ListenStatus; nil if the address is empty.
	listener, statusListener net.Listener
	metrics                  *metrics
	floors                   *deploy.Floors
	drainTracker             *drain.Tracker
	destWatcher              *destwatch.Watcher
	// fetchSlot and prefetchSlot have room for one token each. Units fetch one after another, which bounds memory and
	// load. A release that is wanted now uses fetchSlot, and so doesn't wait for one that is fetched in advance. A slow
	// fetch returns its token: see holdTurn.
	fetchSlot, prefetchSlot chan struct{}

	changed   wait.Signal   // wakes the loop
	reportDue wait.Signal   // wakes report
	pulse     chan struct{} // answers Alive
	idle      chan struct{} // closed once: see Idle
	converged chan struct{} // closed once: see Converged

	snapshot sync.Once // starts useSnapshot

	mu      sync.Mutex  // guards the fields from freeing to ctx, c.Node, and the units' fields that unit names
	freeing *time.Timer // calls Config.FreeMemory; nil: nothing has changed yet
	cache   *cache.Cache
	making  map[*cache.Source]bool // the sources whose folder keys are being made: see makeFolder
	units   map[deployments.UnitID]*unit
	onDisk  map[deployments.UnitID]bool // units with files from before the start
	ready   bool                        // the node was ready once
	joined  map[string]uint64           // by role, the number from kv.Presence.Join; 0 or absent: not joined
	ctx     context.Context
	workers sync.WaitGroup
}

// New checks c, locks the state directory and listens; it returns statedir.ErrLocked if another agent holds the
// directory. The caller must call Run, which unlocks the directory and closes the listeners when it ends.
func New(c Config) (_ *Agent, err error) {
	if c.Store == nil || c.Objects == nil {
		return nil, errors.New("an agent needs a store and a client for objects")
	}
	for _, s := range append([]string{c.Stage}, c.Roles...) {
		if err := deployments.CheckSegment("stage or role", s); err != nil {
			return nil, err
		}
	}
	c.Roles = slices.Compact(slices.Sorted(slices.Values(c.Roles)))
	if len(c.Roles) == 0 {
		return nil, errors.New("an agent needs at least one role")
	}
	if c.StateDir == "" {
		c.StateDir = DefaultStateDir
	}
	var host string
	if c.Node == "" {
		if host, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("reading this host's name: %w", err)
		}
		c.Node, _, _ = strings.Cut(host, ".")
	}
	if err := deployments.CheckSegment("node", c.Node); err != nil {
		return nil, err
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.uptime == nil {
		c.uptime = sinceBoot
	}
	a := &Agent{
		c:            c,
		started:      time.Now().Truncate(time.Millisecond),
		booted:       c.uptime() < bootWithin,
		making:       map[*cache.Source]bool{},
		units:        map[deployments.UnitID]*unit{},
		onDisk:       map[deployments.UnitID]bool{},
		fetchSlot:    make(chan struct{}, 1),
		prefetchSlot: make(chan struct{}, 1),
		changed:      wait.NewSignal(),
		reportDue:    wait.NewSignal(),
		pulse:        make(chan struct{}),
		idle:         make(chan struct{}),
		converged:    make(chan struct{}),
	}
	if a.dir, err = statedir.Open(c.StateDir, c.Log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.dir.Close())
		}
	}()
	if host != "" {
		a.naming = &naming{host: host, saved: a.dir.NodeName(host)}
		a.c.Node = cmp.Or(a.naming.saved, c.Node)
	}
	a.findUnitsOnDisk()
	if a.cache, err = cache.Open(cache.Config{
		Node: a.c.Node, Stage: c.Stage, Roles: c.Roles, File: a.dir.Path(statedir.LastKnownFile), Kept: a.kept, Log: c.Log,
	}); err != nil {
		return nil, err
	}
	if a.floors, err = deploy.OpenFloors(a.dir.Path(statedir.FloorsFile), c.Log); err != nil {
		return nil, err
	}
	a.startingSince = a.dir.StartingSince(a.started)
	a.drainTracker = drain.New(c.Maintenance, a.idle, c.Log)
	if c.Listen != "" {
		if a.listener, err = net.Listen("tcp", c.Listen); err != nil {
			return nil, fmt.Errorf("listening for /ready: %w", err)
		}
	}
	if c.ListenStatus != "" {
		if a.statusListener, err = net.Listen("tcp", c.ListenStatus); err != nil {
			if a.listener != nil {
				err = errors.Join(err, a.listener.Close())
			}
			return nil, fmt.Errorf("listening for /status and /metrics: %w", err)
		}
	}
	a.metrics = newMetrics(c.Metrics)
	if c.Metrics != nil {
		c.Metrics.MustRegister(gauges{reports: a.Report, fetched: c.Objects.Requests, storeUp: a.storeUp})
	}
	a.destWatcher = destwatch.New(c.Log)
	return a, nil
}

// bootWithin is how long after the machine's boot an agent may start and still count as started by the boot.
const bootWithin = 5 * time.Minute

// sinceBoot returns how long the machine has been up; the longest Duration if that is unknown.
func sinceBoot() time.Duration {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return time.Duration(info.Uptime) * time.Second
}

// findUnitsOnDisk records in a.onDisk the units of this node's roles that have files on this node. Run starts a worker
// for each of them, so that an interrupted deployment is recovered even if the store no longer names its unit.
func (a *Agent) findUnitsOnDisk() {
	for _, r := range a.c.Roles {
		ids, err := a.dir.Units(a.c.Stage, r)
		if err != nil {
			a.c.Log.Error("could not list the units on disk: an interrupted deployment goes on only if the store names its unit",
				"role", r, "error", err)
		}
		for _, id := range ids {
			a.onDisk[id] = true
		}
	}
}

// kept reports whether this node keeps anything of a unit: files from before the start or, once the
// unit's state was opened, a state that isn't empty (deploy.State.Empty). a.mu is held.
func (a *Agent) kept(id deployments.UnitID) bool {
	if u := a.units[id]; u != nil && u.deploy != nil {
		return !u.state().Empty()
	}
	return a.onDisk[id]
}

// Addr returns the address at which Config.Listen is served; empty if Config.Listen is empty.
func (a *Agent) Addr() string {
	if a.listener == nil {
		return ""
	}
	return a.listener.Addr().String()
}

// Idle returns a channel that is closed the first time that every unit has converged or can't go on
// by itself. kedge agent then tells systemd that the service is ready.
func (a *Agent) Idle() <-chan struct{} { return a.idle }

// Converged returns a channel that is closed the first time that /converged would answer 200. kedge
// agent then completes the lifecycle hook of the EC2 instance, if one is configured.
func (a *Agent) Converged() <-chan struct{} { return a.converged }

// Node returns this node's name. It may change once if Config gave none.
func (a *Agent) Node() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.c.Node
}

// naming is the state of the search for the name of a node whose configuration has none.
type naming struct {
	host string // the host's own name
	// saved is the name that the store's agent gave this node at an earlier start; empty: unknown.
	// A name saved by another host doesn't count: this disk may be a copy of that host's.
	saved string
}

// findName sets the node's name, if Config.Node is empty, to the name that the store's agent on this machine has for
// the node. Other tools use that name, too, and the store notices the node's death by it. If the store's agent doesn't
// give a name, findName keeps the saved name. Without a saved name it tries again while the store is away or doesn't
// know the token yet, and calls unknown after each such try. After any other error without a saved name, it keeps the
// host's name. Until findName returns, the agent reports nothing and reads no records, because pins and the order of a
// rollout depend on the name. Nothing is lost by that: a store that can't give the name can't give records either.
func (a *Agent) findName(ctx context.Context, unknown func(why error)) {
	namer, ok := a.c.Store.(kv.Namer)
	if a.naming == nil || !ok {
		return
	}
	retry := newBackoff()
	for answers := false; ; {
		name, err := namer.NodeName(ctx)
		if err == nil && name != "" {
			err = deployments.CheckSegment("node", name)
		}
		switch {
		case err == nil && name == "": // the store's agent is on another machine
			return
		case err == nil:
			a.rename(name)
			return
		case ctx.Err() != nil:
			return
		case a.naming.saved != "":
			a.c.Log.Debug("using this node's last known name", "node", a.naming.saved, "error", err)
			return
		case !retryable(err) || answers && !errors.Is(err, kv.ErrTokenUnknown):
			a.c.Log.Info("using the host's name as this node's name", "node", a.Node(), "error", err)
			return
		}
		if answers = a.storeAnswers(ctx); answers && !errors.Is(err, kv.ErrTokenUnknown) {
			continue // once more: the store may have come up just now
		}
		if retry.Tries() == 0 {
			a.c.Log.Warn("could not ask Consul for this node's name: asking again, and reading no records until then",
				"error", err)
		}
		unknown(fmt.Errorf("this node's name isn't known yet: %w", err))
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// retryable reports whether a later call may succeed: once the store is back, or all of Consul knows a new token.
func retryable(err error) bool {
	return errors.Is(err, kv.ErrUnavailable) || errors.Is(err, kv.ErrDenied)
}

// storeAnswers reports whether the store answers a request for a role's records, even if it doesn't give this node's
// name.
func (a *Agent) storeAnswers(ctx context.Context) bool {
	_, err := a.c.Store.List(ctx, a.cache.Roles()[0].Records.Prefix)
	return err == nil
}

func (a *Agent) rename(name string) {
	a.mu.Lock()
	was := a.c.Node
	a.c.Node = name
	a.cache.Rename(name)
	a.mu.Unlock()
	if name == a.naming.saved {
		return
	}
	if name != was {
		a.c.Log.Info("using the name that the Consul agent has for this node", "node", name, "was", was)
	}
	if err := a.dir.SetNodeName(a.naming.host, name); err != nil {
		a.c.Log.Warn("could not save this node's name: a start without the store would use an older name, or the host's",
			"node", name, "error", err)
	}
}

// maxRetry is the longest pause between two tries.
const maxRetry = 30 * time.Second

// newBackoff returns the pauses between tries after a failure of this node or the store.
func newBackoff() *wait.Backoff { return wait.NewBackoff(250*time.Millisecond, maxRetry/2) }

// closeOnce closes c, and reports whether it was open. It isn't safe for concurrent use: a.mu is held.
func closeOnce(c chan struct{}) bool {
	if closed(c) {
		return false
	}
	close(c)
	return true
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
