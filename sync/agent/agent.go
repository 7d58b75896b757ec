// Package agent converges one node: it watches what its stage and roles should run, works out what that means for
// this node (package policy), brings it to life (package deploy), and reports.
//
// One loop decides, for all units at once, from what is known at that moment; it keeps no queue of events, so a
// wake-up that is missed, doubled or late changes nothing. Each unit has a worker of its own, which does one thing
// at a time and asks after it what is next. What a worker is doing is called off when the loop's answer changes, as
// soon as package deploy says that is safe.
//
// What decides comes from the first of these that has it: the store, once a view of it is settled; the last known
// state on this node's disk; a snapshot. Until both the records and the pins of a role are known from one of them,
// the role's units stay as they are; a key that is missing later leaves its unit as it is, too. Trouble with the
// store takes nothing away from what is known.
//
// # Ready
//
// /ready answers 200 from the moment when every unit has converged, or is held, or failed and went back to a
// release that serves; and when, after a reboot, the checks of what runs have passed in this boot: that it was
// healthy before says little of services that are only starting. Converged doesn't wait for that, as it is what
// starts them. From then on it is 503 only while a unit is unhealthy, or drained, which a unit is from before its
// switch until it is healthy, or after a failure with nothing good to go back to. Neither a fetch, nor an outage,
// nor a typo in a pin turns it: a load balancer must not lose a node that serves as well as before.
//
// /converged answers 200 while every unit runs what it should, or what a pin holds. A node that failed and went
// back serves, but hasn't converged. A node without any unit is neither, unless Config.AllowEmpty says so.
//
// # On disk
//
// The agent alone writes its state directory (0700):
//
//	lock                      held while it runs; the process's id
//	last-known.json           what the store last held for this node
//	floors.json               which releases are too old for this node: see deploy.Floors
//	node.json                 what the store's agent called this node last
//	agent.sock                /status, /ready and POST /retry for this machine's root
//	units/STAGE/ROLE/UNIT/    package deploy's
package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// DefaultStateDir is where an agent keeps its state.
const DefaultStateDir = "/var/lib/kedge"

// Config configures an Agent.
type Config struct {
	Store kv.Store
	// Node is this node's name. Empty: what the store's agent on this machine calls it; where there is none, or it
	// doesn't say, the host's name up to its first dot.
	Node  string
	Stage string
	Roles []string // at least one
	// StateDir holds the lock, the last known state and every unit's journal. Default DefaultStateDir.
	StateDir string
	Objects  *object.Client
	Bounds   policy.Bounds
	// Trust checks a manifest's signature before anything of it is used; nil: the pointer's digest is enough.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// AllowOlderPins lets a pin name a release that is older than the one that this node has settled on. It gives
	// whoever writes pins all that was ever signed. Without Trust it has no meaning.
	AllowOlderPins bool
	// Maintenance turns the node's maintenance mode in the service catalog while a unit is drained. It is tried again
	// until it succeeds, but a switch does not wait for it longer than 5 s: an outage of the store must not stop a
	// boot. nil: nothing.
	Maintenance func(ctx context.Context, on bool, reason string) error
	// Snapshot returns what the mirror last saved of desired/, for a node that boots while the store is away and has
	// no last known state. It is asked only then. The pins can't be known in that case, and are taken for absent. nil:
	// there is none.
	Snapshot func(ctx context.Context) ([]kv.Entry, error)
	// AllowEmpty lets a node without any unit be ready and converged. Else that is taken for a mistake.
	AllowEmpty bool
	// Observe names units of which the agent fetches and verifies what they should run, compares it with what lies at
	// dest, and reports that. It touches nothing of theirs.
	Observe []string
	// Adopt lets every unit take over a tree that lies at dest before its first release, as Record.Adopt does.
	Adopt bool
	// Secrets reads what manifests name by reference; nil: releases with secrets are refused.
	Secrets deploy.SecretReader
	// Listen serves /ready, /converged and /live, and, if it is a loopback address, what ListenStatus serves; empty:
	// nowhere. ":0" is fine: see Agent.Addr.
	Listen string
	// ListenStatus serves /status (JSON) and /metrics as well; empty: nowhere.
	ListenStatus string
	// StartDelay: a random time up to this is waited before a fetch, to spread a large fleet's load. Default 0.
	StartDelay time.Duration
	// VerifyEvery checks live trees against their indexes in the background; 0: never.
	VerifyEvery time.Duration
	// HashAlways has files of the running release hashed before they are shared with the next, though nothing touched
	// them.
	HashAlways bool
	Version    string
	Metrics    *prometheus.Registry // nil: none
	// Trace takes the spans of deployments; nil: nothing is traced. Its owner runs it.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none

	uptime func() time.Duration // the machine's; tests have their own
}

// Agent converges one node. Make it with New, then Run it once.
type Agent struct {
	c       Config  // Node changes once at most, under mu: see findName
	naming  *naming // nil: the name was given
	started time.Time
	begun   time.Time // statedir.Dir.StartingSince
	booted  bool      // the machine had just started when the agent did
	dir     *statedir.Dir
	// nil: none
	listener, statusListener net.Listener
	metrics                  *metrics
	floors                   *deploy.Floors
	drains                   *drains
	drift                    *driftWatcher
	// Each holds one: units fetch one after another, which bounds memory and load, and what is wanted now doesn't wait
	// for what is fetched ahead. Who is slow gives its turn back: see holdTurn.
	fetching, ahead chan struct{}

	kicked    wait.Signal   // asks the loop for a turn
	reportNow wait.Signal   // asks for a look at the reports
	pulse     chan struct{} // Alive's
	idle      chan struct{} // closed once
	converged chan struct{} // closed once

	snapshot sync.Once // the search for one

	mu      sync.Mutex
	cache   *cache.Cache
	making  map[*cache.Source]bool // folder keys: see makeFolder
	units   map[deployments.UnitID]*unit
	onDisk  map[deployments.UnitID]bool // of which something is kept since before the start
	ready   bool                        // once it was ready
	joined  map[string]uint64           // by role, since when the store holds its report; absent: not known yet
	ctx     context.Context
	workers sync.WaitGroup
}

// New checks c and locks the state directory: statedir.ErrLocked if another agent has it. An Agent that was
// made must be Run.
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
			return nil, fmt.Errorf("this host's name: %w", err)
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
		c.uptime = uptime
	}
	a := &Agent{
		c:         c,
		started:   time.Now().Truncate(time.Millisecond),
		booted:    c.uptime() < bootWithin,
		making:    map[*cache.Source]bool{},
		units:     map[deployments.UnitID]*unit{},
		onDisk:    map[deployments.UnitID]bool{},
		fetching:  make(chan struct{}, 1),
		ahead:     make(chan struct{}, 1),
		kicked:    wait.NewSignal(),
		reportNow: wait.NewSignal(),
		pulse:     make(chan struct{}),
		idle:      make(chan struct{}),
		converged: make(chan struct{}),
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
	a.begun = a.dir.StartingSince(a.started)
	a.drains = newDrains(c.Maintenance, a.idle, c.Log)
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
		c.Metrics.MustRegister(gauges{a})
	}
	a.drift = newDriftWatcher(c.Log)
	return a, nil
}

// Run converges, reports and waits for changes until ctx ends, and returns nil then; it stops in order, with
// commands under way ended. Trouble with the store, storage or a release doesn't end it.
func (a *Agent) Run(ctx context.Context) error {
	defer a.dir.Close()
	g, ctx := errgroup.WithContext(ctx)
	a.mu.Lock()
	a.ctx = ctx
	a.mu.Unlock()
	a.mu.Lock()
	for id := range a.onDisk {
		a.addUnit(id)
	}
	a.mu.Unlock()
	// What is known from before is decided before there is news: what was to be settled on isn't forgotten by a restart.
	a.reconcile(time.Now())
	g.Go(func() error { return a.serve(ctx) })
	g.Go(func() error { return a.serveStatus(ctx) })
	g.Go(func() error { return a.serveSocket(ctx) })
	g.Go(func() error { a.drains.run(ctx); return nil })
	g.Go(func() error { a.drift.run(ctx); return nil })
	g.Go(func() error { a.loop(ctx); return nil })
	g.Go(func() error {
		a.findName(ctx)
		g.Go(func() error { a.report(ctx); return nil })
		for _, r := range a.cache.Roles() {
			for _, s := range r.Sources() {
				g.Go(func() error { a.watch(ctx, s); return nil })
			}
		}
		return nil
	})
	err := g.Wait()
	a.workers.Wait()
	return err
}

// Addr is the address of Listen; empty without one.
func (a *Agent) Addr() string {
	if a.listener == nil {
		return ""
	}
	return a.listener.Addr().String()
}

// StatusAddr is the address of ListenStatus; empty without one.
func (a *Agent) StatusAddr() string {
	if a.statusListener == nil {
		return ""
	}
	return a.statusListener.Addr().String()
}

// Idle is closed when, for the first time since the start, every unit has converged, or can't go on by itself:
// systemd's READY.
func (a *Agent) Idle() <-chan struct{} { return a.idle }

// Converged is closed when, for the first time since the start, every unit runs what it should: what AutoScaling
// waits for.
func (a *Agent) Converged() <-chan struct{} { return a.converged }

// Alive reports whether the agent's loop still runs: the watchdog and /live ask it. It takes up to 10 s to say no.
func (a *Agent) Alive() bool {
	t := time.NewTimer(10 * time.Second)
	defer t.Stop()
	select {
	case a.pulse <- struct{}{}:
		return true
	case <-t.C:
		return false
	}
}

// Retry tries again, now, what failed on this node and what waits for its next try: of one unit, or of all for the
// zero UnitID. It says whether there is such a unit.
func (a *Agent) Retry(id deployments.UnitID) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	found := false
	for _, u := range a.units {
		if id == (deployments.UnitID{}) || u.id == id {
			found = true
			u.log.Info("retry asked for on this node")
			u.forget, u.refused = true, nil
			u.retry.Reset()
			u.retryAt = time.Time{}
			u.nudge()
		}
	}
	a.kick()
	return found
}

// kick asks the loop to decide anew.
func (a *Agent) kick() {
	a.kicked.Set()
}

func (a *Agent) kickReport() {
	a.reportNow.Set()
}

// findUnitsOnDisk notes the units of this node's roles that it has ever deployed: one that was cut off is recovered,
// whatever the store says.
func (a *Agent) findUnitsOnDisk() {
	for _, r := range a.c.Roles {
		ids, err := a.dir.Units(a.c.Stage, r)
		if err != nil {
			a.c.Log.Error("units on disk can't be listed", "role", r, "error", err)
		}
		for _, id := range ids {
			a.onDisk[id] = true
		}
	}
}

// loop decides whenever something changed, until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	for {
		next := a.reconcile(time.Now())
		var timer <-chan time.Time
		if !next.IsZero() {
			// The wall clock may jump, and timers stand still while the machine sleeps: look again now and then.
			timer = time.After(min(max(time.Until(next), 10*time.Millisecond), time.Minute))
		}
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return
			case <-a.pulse:
			case <-a.kicked.C():
				again = true
			case <-timer:
				again = true
			}
		}
	}
}

// maxRetry is the longest pause between tries.
const maxRetry = 30 * time.Second

// newBackoff returns the pauses between tries after any failure, of this node or of the store.
func newBackoff() *wait.Backoff { return wait.NewBackoff(250*time.Millisecond, maxRetry/2) }
