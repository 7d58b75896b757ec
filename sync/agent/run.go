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
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/destwatch"
	"kedge/sync/agent/drain"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
)

// New checks c and locks the state directory; it returns statedir.ErrLocked if another agent holds it. Run must be
// called on the Agent.
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
		c.uptime = sinceBoot
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
		changed:   wait.NewSignal(),
		reportDue: wait.NewSignal(),
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
	a.drained = drain.New(c.Maintenance, a.idle, c.Log)
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
		c.Metrics.MustRegister(gauges{reports: a.Report, fetched: c.Objects.Requests})
	}
	a.drift = destwatch.New(c.Log)
	return a, nil
}

// Run deploys, reports and waits for changes until ctx ends, and then returns nil. It stops in order: commands
// under way end first. Errors of the store, storage or a release don't end it.
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
	// Decide by what is known from before, before there is news: so a restart doesn't forget what was to be settled
	// on.
	a.reconcile(time.Now())
	g.Go(func() error { return a.serve(ctx) })
	g.Go(func() error { return a.serveStatus(ctx) })
	g.Go(func() error { return a.serveSocket(ctx) })
	g.Go(func() error { a.drained.Run(ctx); return nil })
	g.Go(func() error { a.drift.Run(ctx); return nil })
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

// Addr returns the address of Listen; empty without one.
func (a *Agent) Addr() string {
	if a.listener == nil {
		return ""
	}
	return a.listener.Addr().String()
}

// StatusAddr returns the address of ListenStatus; empty without one.
func (a *Agent) StatusAddr() string {
	if a.statusListener == nil {
		return ""
	}
	return a.statusListener.Addr().String()
}

// Idle returns a channel that is closed when every unit has, for the first time since the start, converged or can't
// continue without a person: systemd's READY.
func (a *Agent) Idle() <-chan struct{} { return a.idle }

// Converged returns a channel that is closed when, for the first time since the start, every unit runs what it
// should, for AutoScaling.
func (a *Agent) Converged() <-chan struct{} { return a.converged }

// findUnitsOnDisk records the units of this node's roles that it has ever deployed: an interrupted deployment is
// recovered, whatever the store says.
func (a *Agent) findUnitsOnDisk() {
	for _, r := range a.c.Roles {
		ids, err := a.dir.Units(a.c.Stage, r)
		if err != nil {
			a.c.Log.Error("could not list the units on disk", "role", r, "error", err)
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
			// The wall clock may jump, and timers stop while the machine sleeps: so decide at least once a minute.
			timer = time.After(min(max(time.Until(next), 10*time.Millisecond), time.Minute))
		}
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return
			case <-a.pulse:
			case <-a.changed.C():
				again = true
			case <-timer:
				again = true
			}
		}
	}
}

// bootWithin is how long after the machine's boot an agent may start and still count as started by the boot.
const bootWithin = 5 * time.Minute

// sinceBoot returns how long the machine has been up; the maximum if unknown.
func sinceBoot() time.Duration {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return time.Duration(info.Uptime) * time.Second
}

// kept reports whether this node's disk has files of a unit. a.mu is held.
func (a *Agent) kept(id deployments.UnitID) bool {
	if u := a.units[id]; u != nil {
		return !u.state().Empty()
	}
	return a.onDisk[id]
}
