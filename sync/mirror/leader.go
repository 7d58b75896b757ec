package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

const (
	// badOrderBurst lines about orders that can't be obeyed are logged at once, as an operator mistypes them; after those
	// one each badOrderEvery.
	badOrderBurst = 5
	badOrderEvery = 10 * time.Second
)

// leader is a Mirror while it holds the lease. Its loop observes the store, accepts a commit of the branch,
// reconciles the one with the other, and writes the difference.
type leader struct {
	*Mirror
	lease    kv.Lease
	observer *observer
	snapshot *snapshots

	// The rest belongs to loop.
	acceptor  *acceptor
	written   *writer
	history   *archive
	folders   *folderKeeper
	dead      *deadNodes
	ranks     map[deployments.UnitID]*policy.Ranks
	lostSince map[deployments.UnitID]time.Time // since when nodes are ahead of the store
	badOrders string                           // the orders that can't be obeyed, as they were last logged
	// consulNode is to which the lease's session belongs; empty: unknown, or warnShared is done.
	consulNode string
	// badOrderLines bounds the lines about them: whoever may write control/ can change one after the other.
	badOrderLines *rate.Limiter
}

func newLeader(m *Mirror, lease kv.Lease) *leader {
	l := &leader{
		Mirror: m, lease: lease,
		observer:      newObserver(m.c.Log, m.heed),
		snapshot:      &snapshots{save: m.c.Snapshot, log: m.c.Log, offers: make(chan []kv.Entry, 1)},
		folders:       &folderKeeper{store: m.c.Store, log: m.c.Log, made: map[string]time.Time{}},
		ranks:         map[deployments.UnitID]*policy.Ranks{},
		lostSince:     map[deployments.UnitID]time.Time{},
		badOrderLines: rate.NewLimiter(rate.Every(badOrderEvery), badOrderBurst),
	}
	l.history = newArchive(m.c.Store, l.commit, m.c.Log)
	l.written = &writer{
		written: written{records: map[deployments.UnitID]writtenRecord{}, orders: map[deployments.UnitID]uint64{}},
		name:    m.c.Name, commit: l.commit, history: l.history, metrics: m.metrics, trace: m.c.Trace,
		log: m.c.Log,
	}
	l.acceptor = &acceptor{
		branch: m.branch, own: &l.written.written, repo: m.c.Repo, override: m.c.Accept, releases: m.c.Releases,
		hookPause: m.hookPause, metrics: m.metrics, log: m.c.Log, inspected: l.observer.changed,
		patience: wait.NewBackoff(m.patience, max(m.patience, maxPatience)),
	}
	l.dead = &deadNodes{commit: l.commit, after: m.forgetAfter, log: m.c.Log, absent: map[string]absence{}}
	return l
}

// commit writes under the lease.
func (l *leader) commit(ctx context.Context, ops ...kv.Op) error {
	err := l.c.Store.Commit(ctx, l.lease, ops...)
	if err == nil {
		l.metrics.wrote(len(ops))
	}
	return err
}

// lead waits for the lease, works while it holds, and waits again.
func (m *Mirror) lead(ctx context.Context) {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	for ctx.Err() == nil {
		lease, err := m.c.Store.Lease(ctx, kv.MirrorLease, m.c.Name, m.c.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if retry.Tries() == 0 {
				m.c.Log.Warn("cannot ask for the mirror's lease", "store", m.c.Store, "error", err)
			}
			_ = retry.Wait(ctx)
			continue
		}
		retry.Reset()
		m.work(ctx, lease)
		_ = wait.For(ctx, wait.Jitter(time.Second, 0.2)) // whoever else waits goes first
	}
}

// work runs as leader until the lease is lost or ctx ends, and gives the lease back.
func (m *Mirror) work(ctx context.Context, lease kv.Lease) {
	m.c.Log.Info("this mirror holds the lease", "name", m.c.Name)
	m.setLeading(lease)
	defer m.setLeading(nil)
	m.Trigger() // a webhook may have come to the mirror before this one, or while none led
	defer m.units.scene.Store(nil)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := lease.Release(ctx); err != nil && !errors.Is(err, kv.ErrLeaseLost) {
			m.c.Log.Warn("cannot give back the mirror's lease, it will run out", "error", err)
		}
	}()
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(lease.Context(), func() { cancel(context.Cause(lease.Context())) })()

	err := newLeader(m, lease).run(held)
	if ctx.Err() == nil {
		m.c.Log.Warn("this mirror lost the lease", "name", m.c.Name, "error", err)
	}
}

// setLeading notes the lease that is held; nil: none.
func (m *Mirror) setLeading(lease kv.Lease) {
	m.mu.Lock()
	m.holds = lease
	m.mu.Unlock()
	m.metrics.led(lease != nil)
}

// run works until ctx ends, or the lease is found to be lost.
func (l *leader) run(ctx context.Context) error {
	if err := l.persist(ctx, "begin", l.begin); err != nil {
		return err
	}
	defer l.acceptor.inspecting.Wait()
	l.consulNode = l.nodeName(ctx)
	g, ctx := errgroup.WithContext(ctx)
	for prefix, view := range map[string]func(kv.View){
		kv.DesiredPrefix: l.observer.records,
		kv.ControlPrefix: l.observer.orders,
		kv.StatusPrefix:  l.observer.fleet,
		kv.PinsPrefix:    l.observer.pins,
		kv.MirrorPrefix:  l.observer.state,
	} {
		g.Go(func() error { return l.c.Store.Watch(ctx, prefix, view) })
	}
	if l.c.Snapshot != nil {
		g.Go(func() error { return l.snapshot.run(ctx) })
	}
	if l.c.Leading != nil {
		g.Go(func() error { return l.c.Leading(ctx) })
	}
	g.Go(func() error { return l.loop(ctx) })
	return g.Wait()
}

// begin reads the state that the last mirror left.
func (l *leader) begin(ctx context.Context) error {
	if err := l.c.Store.EnsureFolders(ctx, topFolders...); err != nil {
		return err
	}
	entries, err := l.c.Store.List(ctx, kv.MirrorPrefix)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Key != kv.MirrorKey {
			continue
		}
		if err := json.Unmarshal(e.Value, &l.written.state); err != nil {
			l.c.Log.Warn("the mirror's own state doesn't parse, it is written anew", "key", e.Key, "error", err)
			l.written.state = deployments.MirrorState{}
		}
	}
	return nil
}

// nodeName returns the name of the node whose agent this mirror talks to; empty: it can't be known.
func (l *leader) nodeName(ctx context.Context) string {
	namer, has := l.c.Store.(kv.Namer)
	if !has {
		return ""
	}
	name, err := namer.NodeName(ctx)
	if err != nil {
		l.c.Log.Debug("the name of this node can't be asked for", "error", err)
		return ""
	}
	return name
}

// warnShared says once that a node's agent has a token for the Consul node of this mirror, with which its lease can
// be ended.
func (l *leader) warnShared(fleet observedFleet) {
	if l.consulNode == "" || !fleet.synced {
		return
	}
	for role, nodes := range fleet.roles {
		for _, n := range nodes {
			if n.node == l.consulNode && !n.gone {
				l.c.Log.Warn(
					"an agent of kedge runs on this mirror's Consul node: whoever has its token can end the mirror's session, "+
						"so run mirrors on machines of their own",
					"node",
					n.node,
					"role",
					role,
				)
				l.consulNode = ""
				return
			}
		}
	}
	l.consulNode = "" // asked of the fleet that was there
}

// persist does f until it succeeds, the lease is lost or ctx ends.
func (l *leader) persist(ctx context.Context, what string, f func(context.Context) error) error {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	for {
		err := f(ctx)
		if err == nil || errors.Is(err, kv.ErrLeaseLost) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if retry.Tries() == 0 {
			l.c.Log.Warn("the store is in trouble", "doing", what, "store", l.c.Store, "error", err)
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
}

// loop makes a round whenever something changed.
func (l *leader) loop(ctx context.Context) error {
	retry := wait.NewBackoff(200*time.Millisecond, 30*time.Second)
	var trouble error
	conflicts := 0 // in a row
	for {
		branch, gitChanged := l.branch.awaitChange()
		began := time.Now()
		again, err := l.round(ctx, branch)
		l.metrics.rounds.Observe(time.Since(began).Seconds())
		switch {
		case errors.Is(err, kv.ErrLeaseLost):
			return err
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err == nil:
			if trouble != nil {
				l.c.Log.Info("the store takes writes again", "store", l.c.Store)
			}
			trouble = nil
			conflicts = 0
			retry.Reset()
		case errors.Is(err, kv.ErrConflict): // somebody else wrote, and the watch will show it
			again = wait.Jitter(time.Second, 0.2)
			if conflicts++; conflicts >= conflictsTold {
				l.tellConflict(ctx, err, conflicts)
			}
		default:
			if trouble == nil {
				l.c.Log.Warn("the store takes no writes", "store", l.c.Store, "error", err)
			}
			trouble = err
			again = retry.Next()
			gitChanged = nil
			// Wakes that come one after the other, as from a fleet that reports, must not hurry it.
			pause := min(again, wait.Jitter(time.Second, 0.2))
			if err := wait.For(ctx, pause); err != nil {
				return err
			}
			again = max(time.Millisecond, again-pause)
		}
		var clock <-chan time.Time
		if again > 0 {
			clock = time.After(again)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-gitChanged:
		case <-l.hurry.C():
			l.acceptor.hurried()
		case <-l.observer.changed.C():
		case <-clock:
		}
	}
}

// conflictsTold is how many conflicts in a row, a second apart, are more than a watch that is late.
const conflictsTold = 5

// tellConflict shows where people look that the store and its watch disagree, which is so for the nth time in a row.
func (l *leader) tellConflict(ctx context.Context, err error, nth int) {
	if nth == conflictsTold || nth%60 == 0 { // a minute
		l.c.Log.Warn("the store holds something else than its watch shows", "store", l.c.Store, "times", nth, "error", err)
	}
	l.written.tell(
		ctx,
		fmt.Sprintf("the store refuses what the commit asks for, as it holds something else than its watch shows, again "+
			"and again (%v): look for another writer below desired/ and control/, and for lost folder keys", err),
		time.Now(),
	)
}

// round does all that there is to do now. again is when to look even if nothing changes; 0: never.
func (l *leader) round(ctx context.Context, branch gitState) (again time.Duration, err error) {
	seen := l.observer.latest()
	if !seen.desired.synced {
		return 0, nil
	}
	now := time.Now()
	cells := seen.desired.cells
	l.written.confirm(cells)
	l.warnShared(seen.fleet)
	head := l.acceptor.accept(ctx, branch, cells)
	if head.taken {
		clear(l.ranks) // of units that may be gone
	}

	status := l.written.state
	status.Holder, status.Refused, status.Error = l.c.Name, "", ""
	var todo plan
	commit, vouched := l.acceptor.basis(cells)
	if commit != nil {
		if todo, err = l.plan(ctx, commit, vouched, seen, now); err != nil {
			return 0, err
		}
		if !todo.again.IsZero() {
			again = max(time.Millisecond, todo.again.Sub(now))
		}
	}
	if commit != nil && vouched {
		if !todo.whole && commit.Hash != l.written.state.Head {
			if !seen.fleet.synced && seen.fleet.err != nil {
				l.written.reportFailure(ctx, fmt.Errorf("the nodes' reports can't be read: %w", seen.fleet.err), now)
			}
			return watchLag, nil // a commit is taken whole: it waits until the watch shows the writes of the last one
		}
		status.Applying = ""
		if commit.Hash != status.Head {
			status.Head, status.Author, status.Past, status.Rules = commit.Hash, commit.Author, commit.Past, rulesOf(commit)
			status.At = now.UTC().Truncate(time.Millisecond)
		}
		status.Freeze, status.FreezeMore = deployments.FreezeWindows(commit.Tree.Settings.Freeze)
		if branch.head == commit.Hash { // else it was read of what an earlier mirror had fetched, maybe from elsewhere
			status.Repo = l.c.Repo
		}
	}
	switch {
	case head.refused != nil:
		status.Refused, status.Error = branch.head, clip(head.refused.Error(), maxError)
	case head.unsure != nil:
		status.Error = clip(head.unsure.Error(), maxError)
		again = sooner(again, head.retry)
	case branch.away != nil:
		status.Error = clip(branch.away.Error(), maxError)
	}
	branchKnown := branch.head != "" || branch.away != nil
	if !branchKnown || !worthWriting(l.written.state, status, l.written.stateAt, now) {
		status = l.written.state
	}
	lost, at := l.written.lostState(seen.state, now)
	if !lost && !at.IsZero() {
		again = sooner(again, max(time.Millisecond, at.Sub(now)))
	}
	if err := l.written.write(ctx, todo.changes, status, lost, now); err != nil {
		l.written.reportFailure(ctx, err, now)
		return 0, err
	}
	if vouched {
		l.written.adopt(todo.agreed, cells)
	}
	if vouched && todo.whole {
		l.snapshot.offer(l.written.records)
	}
	noted, err := l.history.audit(ctx, seen, now)
	if err != nil {
		return 0, err
	}
	again = sooner(again, noted)
	due, err := l.dead.forget(ctx, seen, now)
	if err != nil {
		return 0, err
	}
	again = sooner(again, due)
	if l.folders.late {
		again = sooner(again, folderLag)
	}
	if l.written.unconfirmed() {
		again = sooner(again, watchLag) // should a write not show by then, it is looked for again
	}
	return again, nil
}

// plan compares a commit with what the store shows; vouched is as in basis.
func (l *leader) plan(
	ctx context.Context,
	commit *git.Commit,
	vouched bool,
	seen observed,
	now time.Time,
) (plan, error) {
	cells := seen.desired.cells
	if err := l.folders.ensure(ctx, commit, seen.folders, now); err != nil {
		return plan{}, err
	}
	if err := l.history.readNeeded(ctx, commit, seen, l.written.records, now); err != nil {
		return plan{}, err
	}
	pins := seen.pins.units
	if !seen.pins.synced {
		pins = nil
	}
	shown := seen.pins.shown
	if !seen.pins.synced || seen.pins.err != nil {
		shown = nil
	}
	since := seen.fleet.since
	if seen.fleet.err != nil { // there may be a gap yet
		since = now
	}
	l.units.scene.Store(&scene{units: commit.Tree.Units, cells: cells, fleet: seen.fleet.roles, pins: pins})
	return reconcile(inputs{
		overruled:   commit.Hash == l.acceptor.overruled,
		commit:      commit,
		unvouched:   !vouched,
		now:         now,
		cells:       cells,
		own:         l.written.records,
		orders:      l.pendingOrders(commit, seen.orders),
		history:     l.history.newest,
		stable:      l.history.stable,
		pastPins:    l.history.pins,
		pastRead:    l.history.read,
		pins:        pins,
		shownPins:   shown,
		fleet:       seen.fleet.roles,
		blind:       !seen.fleet.synced || !seen.pins.synced && !errors.Is(seen.pins.err, kv.ErrDenied),
		fleetSince:  since,
		leftSince:   seen.fleet.leftSince,
		ranks:       l.ranks,
		lostSince:   l.lostSince,
		rebuildWait: l.rebuildWait,
	}), nil
}

// pendingOrders returns the orders that were not obeyed yet, and logs which can't be.
func (l *leader) pendingOrders(commit *git.Commit, seen observedOrders) map[deployments.UnitID]order {
	pending, bad := map[deployments.UnitID]order{}, slices.Clone(seen.bad)
	units := map[deployments.UnitID]bool{}
	for _, u := range commit.Tree.Units {
		units[u.ID] = true
	}
	for _, id := range slices.SortedFunc(maps.Keys(seen.good), deployments.UnitID.Compare) {
		switch o := seen.good[id]; {
		case l.written.orders[id] == o.version: // it has yet to vanish from the watch
		case !units[id]:
			bad = append(bad, fmt.Errorf("%s: the commit has no such unit, and one that comes later would be met by it: "+
				"remove the key", kv.ControlKey(id)))
		default:
			pending[id] = o
		}
	}
	// Past the limit nothing is remembered either, so that the last state is logged by a later round.
	if words := text(errors.Join(bad...)); words != l.badOrders && (words == "" || l.badOrderLines.Allow()) {
		if l.badOrders = words; words != "" {
			l.c.Log.Warn("an operator's order can't be obeyed", "orders", len(bad), "error", clip(words, maxLogged))
		}
	}
	return pending
}
