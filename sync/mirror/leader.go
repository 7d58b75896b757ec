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
	// badOrderBurst is how many log lines about orders that can't be obeyed are written at once, as operators mistype.
	// After that, one is written every badOrderEvery at most.
	badOrderBurst = 5
	badOrderEvery = 10 * time.Second
)

// leader is a Mirror while it holds the lease. Its loop observes the store, accepts a commit of the branch,
// reconciles the store with it, and writes the difference.
type leader struct {
	*Mirror
	lease    kv.Lease
	observer *observer
	snapshot *snapshots

	// Only loop uses the fields below.
	acceptor  *acceptor
	writer    *writer
	history   *historyKeeper
	folders   *folderKeeper
	dead      *deadNodes
	ranks     map[deployments.UnitID]*policy.Ranks
	lostSince map[deployments.UnitID]time.Time // as inputs.lostSince
	badOrders string                           // the orders that can't be obeyed, as last logged
	// waitedForReports is set if units waited for their nodes' reports in the last round.
	waitedForReports bool
	// consulNode is the Consul node that the lease's session belongs to; empty: unknown, or warnShared is done.
	consulNode string
	// badOrderLines bounds the log lines about orders that can't be obeyed: whoever may write control/ can change them at
	// any rate.
	badOrderLines *rate.Limiter
	clock         clockSteps
}

func newLeader(m *Mirror, lease kv.Lease) *leader {
	l := &leader{
		Mirror: m, lease: lease,
		observer:      newObserver(m.c.Log, m.refresh),
		snapshot:      &snapshots{save: m.c.Snapshot, log: m.c.Log, offers: make(chan []kv.Entry, 1)},
		folders:       &folderKeeper{store: m.c.Store, log: m.c.Log, made: map[string]time.Time{}},
		ranks:         map[deployments.UnitID]*policy.Ranks{},
		lostSince:     map[deployments.UnitID]time.Time{},
		badOrderLines: rate.NewLimiter(rate.Every(badOrderEvery), badOrderBurst),
		clock:         clockSteps{log: m.c.Log},
	}
	l.history = newHistoryKeeper(m.c.Store, l.commit, m.c.Log)
	l.writer = &writer{
		written: written{records: map[deployments.UnitID]writtenRecord{}, orders: map[deployments.UnitID]uint64{}},
		name:    m.c.Name, commit: l.commit, history: l.history, metrics: m.metrics, trace: m.c.Trace,
		log: m.c.Log,
	}
	l.acceptor = &acceptor{
		follower: m.branch, own: &l.writer.written, repo: m.c.Repo, override: m.c.Accept, releases: m.c.Releases,
		hookPause: m.hookPause, metrics: m.metrics, log: m.c.Log, inspectionEnded: l.observer.changed,
		releaseRetry: wait.NewBackoff(m.releaseRetry, max(m.releaseRetry, maxReleaseRetry)),
	}
	l.dead = &deadNodes{commit: l.commit, after: m.forgetAfter, log: m.c.Log, absent: map[string]absence{}}
	return l
}

// commit commits ops in a transaction that fails if the lease is lost, and counts them if it succeeds.
func (l *leader) commit(ctx context.Context, ops ...kv.Op) error {
	err := l.c.Store.Commit(ctx, l.lease, ops...)
	if err == nil {
		l.metrics.countOps(len(ops))
	}
	return err
}

// lead waits for the lease, runs the leader while the lease holds, and starts over, until ctx ends.
func (m *Mirror) lead(ctx context.Context) {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	for ctx.Err() == nil {
		lease, err := m.c.Store.Lease(ctx, kv.MirrorLease, m.c.Name, m.c.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if retry.Tries() == 0 {
				m.c.Log.Warn("could not ask for the mirror's lease: trying again", "store", m.c.Store, "error", err)
			}
			_ = retry.Wait(ctx)
			continue
		}
		retry.Reset()
		m.work(ctx, lease)
		_ = wait.For(ctx, wait.Jitter(time.Second, 0.2)) // lets another mirror that waits go first
	}
}

// work runs the leader until the lease is lost, ctx ends or Config.Leading fails, and releases the lease.
func (m *Mirror) work(ctx context.Context, lease kv.Lease) {
	m.c.Log.Info("this mirror holds the lease", "name", m.c.Name)
	m.setLeading(lease)
	defer m.setLeading(nil)
	m.Trigger() // a webhook may have reached the last leader, or come while none led
	defer m.unitMetrics.observed.Store(nil)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := lease.Release(ctx); err != nil && !errors.Is(err, kv.ErrLeaseLost) {
			m.c.Log.Warn("could not release the mirror's lease: another mirror takes over once it has expired", "error", err)
		}
	}()
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(lease.Context(), func() { cancel(context.Cause(lease.Context())) })()

	err := newLeader(m, lease).run(held)
	switch {
	case ctx.Err() != nil:
	case lease.Context().Err() != nil || errors.Is(err, kv.ErrLeaseLost):
		m.c.Log.Warn("this mirror lost the lease: another one may lead, and this one asks for the lease again",
			"name", m.c.Name, "error", err)
	default:
		m.c.Log.Warn("this mirror gives up the lease and asks for it again, as one of its tasks failed",
			"name", m.c.Name, "error", err)
	}
}

// setLeading records the lease that this mirror holds; nil: none.
func (m *Mirror) setLeading(lease kv.Lease) {
	m.mu.Lock()
	m.heldLease = lease
	m.mu.Unlock()
	m.metrics.setLeading(lease != nil)
}

// run leads until ctx ends, the lease turns out to be lost or Config.Leading fails, and returns why.
func (l *leader) run(ctx context.Context) error {
	if err := l.persist(ctx, "begin to lead", l.begin); err != nil {
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
		g.Go(func() error { return l.c.Leading(ctx, l.lease) })
	}
	g.Go(func() error { return l.loop(ctx) })
	return g.Wait()
}

// begin makes the top folder keys, and reads the state that the last leader left at mirror/state. A state that doesn't
// parse counts as none.
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
		if err := json.Unmarshal(e.Value, &l.writer.state); err != nil {
			l.c.Log.Warn("the mirror's own state doesn't parse: writing a new one", "key", e.Key, "error", err)
			l.writer.state = deployments.MirrorState{}
		}
	}
	l.metrics.setState(l.writer.state)
	return nil
}

// nodeName returns the name of the node whose Consul agent this mirror uses; empty: unknown, or the store isn't Consul.
func (l *leader) nodeName(ctx context.Context) string {
	namer, has := l.c.Store.(kv.Namer)
	if !has {
		return ""
	}
	name, err := namer.NodeName(ctx)
	if err != nil {
		l.c.Log.Debug("could not read the name of this machine's Consul node: not checking whether an agent runs there",
			"error", err)
		return ""
	}
	return name
}

// warnShared logs if the first synced view of status/ has a live agent on this mirror's Consul node: the agent's token
// can end the lease.
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
	l.consulNode = "" // the check is done once
}

// persist calls f until f succeeds, the lease is lost or ctx ends. Only success returns nil. what names f in the log.
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
			l.c.Log.Warn("a request to the store failed: trying again", "doing", what, "store", l.c.Store, "error", err)
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
}

// loop runs a round at once, after each change of the branch or the store, after a webhook, and when a round asked for
// another. It retries a round that failed. It returns an error when the lease is lost or ctx ends.
func (l *leader) loop(ctx context.Context) error {
	retry := wait.NewBackoff(200*time.Millisecond, 30*time.Second)
	var lastErr error
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
			if lastErr != nil {
				l.c.Log.Info("the mirror works without errors again", "store", l.c.Store, "earlier", lastErr)
			}
			lastErr = nil
			conflicts = 0
			retry.Reset()
		case errors.Is(err, kv.ErrConflict): // somebody else wrote; the watch will show it
			again = wait.Jitter(time.Second, 0.2)
			if conflicts++; conflicts >= conflictsLogged {
				l.reportConflict(ctx, err, conflicts)
			}
			if conflicts > 1 { // the watch didn't show it soon: see conflictsLogged
				if err := wait.For(ctx, again); err != nil {
					return err
				}
				continue
			}
		default:
			if lastErr == nil {
				l.c.Log.Warn("could not bring the store up to date with Git: trying again", "store", l.c.Store, "error", err)
			}
			lastErr = err
			again = retry.Next()
			gitChanged = nil
			// Wake-ups in quick succession, as from a fleet that reports, must not shorten the backoff.
			pause := min(again, wait.Jitter(time.Second, 0.2))
			if err := wait.For(ctx, pause); err != nil {
				return err
			}
			again = max(time.Millisecond, again-pause)
		}
		var nextRound <-chan time.Time
		if again > 0 {
			nextRound = time.After(min(again, longestWait))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-gitChanged:
		case <-l.recheck.C():
			l.acceptor.recheckSoon()
		case <-l.observer.changed.C():
		case <-nextRound:
		}
	}
}

// conflictsLogged is how many conflicts in a row are needed before they are reported. From the
// second on they are at least 0.8 s apart, however often the store changes. So conflictsLogged of
// them take longer than watchLag, and a late watch doesn't explain them.
const conflictsLogged = 9

// reportConflict writes to mirror/state that the store keeps refusing the mirror's writes, and logs
// it about once a minute. nth is the number of conflicts in a row.
func (l *leader) reportConflict(ctx context.Context, err error, nth int) {
	if nth == conflictsLogged || nth%60 == 0 { // about once a minute
		l.c.Log.Warn("the store refuses the mirror's writes, as its keys differ from what its watch shows: is there another "+
			"writer below desired/ or control/?", "store", l.c.Store, "times", nth, "error", err)
	}
	l.writer.writeError(
		ctx,
		fmt.Sprintf("the store keeps refusing the mirror's writes: its keys differ from what its watch shows (%v); "+
			"look for another writer below desired/ and control/, and for lost folder keys", err),
		time.Now(),
	)
}

// round takes the branch's head if it is acceptable, writes what reconcile asks for, and does all
// other work that is due. It does nothing until desired/ is known, and writes no record while a
// unit of a new commit has to wait. again is the time after which to run another round even if
// nothing changes; 0: never.
func (l *leader) round(ctx context.Context, branch gitState) (again time.Duration, err error) {
	seen := l.observer.latest()
	if !seen.desired.synced {
		return 0, nil
	}
	now := time.Now()
	cells := seen.desired.cells
	l.writer.confirm(cells)
	l.warnShared(seen.fleet)
	head := l.acceptor.accept(ctx, branch, cells)
	if head.taken {
		clear(l.ranks) // their units may be gone
	}

	status := l.writer.state
	status.Holder, status.Refused, status.Error = l.c.Name, "", ""
	var todo plan
	commit, vouched := l.acceptor.basis(cells)
	if commit != nil {
		if todo, err = l.plan(ctx, commit, vouched, seen, now); err != nil {
			return 0, err
		}
		if todo.waitingForReports > 0 && !l.waitedForReports {
			l.c.Log.Info("the records of some units are not written yet: waiting for their nodes to report",
				"units", todo.waitingForReports, "until", todo.again)
		}
		l.waitedForReports = todo.waitingForReports > 0
		if !todo.again.IsZero() {
			again = max(time.Millisecond, todo.again.Sub(now))
		}
	}
	if commit != nil && vouched {
		if !todo.whole && commit.Hash != l.writer.state.Head {
			if !seen.fleet.synced && seen.fleet.err != nil {
				l.writer.reportFailure(ctx, fmt.Errorf("the nodes' reports can't be read: %w", seen.fleet.err), now)
			}
			// A commit is written as a whole: it waits as long as one of its units has to.
			return minWait(again, watchLag), nil
		}
		status.Applying = ""
		if commit.Hash != status.Head {
			status.Head, status.Author = commit.Hash, commit.Author
			status.Ancestors, status.Rules = commit.Past, rulesOf(commit)
			status.At = now.UTC().Truncate(time.Millisecond)
		}
		status.Freeze, status.FreezeOmitted = deployments.FreezeWindows(commit.Tree.Settings.Freeze)
		if branch.head == commit.Hash { // otherwise an earlier mirror may have fetched it elsewhere
			status.Repo = l.c.Repo
		}
	}
	switch {
	case head.refused != nil:
		status.Refused, status.Error = branch.head, clip(head.refused.Error(), maxError)
	case head.unsure != nil:
		status.Error = clip(head.unsure.Error(), maxError)
		again = minWait(again, head.retry)
	case branch.away != nil:
		status.Error = clip(branch.away.Error(), maxError)
	}
	branchKnown := branch.head != "" || branch.away != nil
	if !branchKnown || !worthWriting(l.writer.state, status, l.writer.stateAt, now) {
		status = l.writer.state
	}
	lost, at := l.writer.lostState(seen.state, now)
	if !lost && !at.IsZero() {
		again = minWait(again, max(time.Millisecond, at.Sub(now)))
	}
	if err := l.writer.write(ctx, todo.changes, status, lost, now); err != nil {
		l.writer.reportFailure(ctx, err, now)
		return 0, err
	}
	if vouched {
		l.writer.adopt(todo.agreed, cells)
	}
	if vouched && todo.whole {
		l.snapshot.offer(l.writer.records)
	}
	noted, err := l.history.recordPins(ctx, seen, now)
	if err != nil {
		return 0, err
	}
	again = minWait(again, noted)
	due, err := l.dead.forget(ctx, seen, now)
	if err != nil {
		return 0, err
	}
	again = minWait(again, due)
	if l.folders.late {
		again = minWait(again, folderLag)
	}
	if l.writer.unconfirmed() {
		again = minWait(again, watchLag) // a write that does not show by then counts as lost
	}
	return again, nil
}

// plan returns what to write so that the store holds commit. Before that, it makes missing folder keys, reads the
// history that reconcile needs, and gives unitMetrics what was observed. vouched is as basis returns it.
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
	if err := l.history.readNeeded(ctx, commit, seen, l.writer.records, now); err != nil {
		return plan{}, err
	}
	pins := seen.pins.units
	if !seen.pins.synced {
		pins = nil
	}
	shown := seen.pins.historyPins
	if !seen.pins.synced || seen.pins.err != nil {
		shown = nil
	}
	since := seen.fleet.since
	if seen.fleet.err != nil { // changes may be missed
		since = now
	}
	if step := l.clock.last(now); step.After(since) {
		since = step // no node is late by a clock that has only just gone forward
	}
	l.unitMetrics.observed.Store(&observedUnits{units: commit.Tree.Units, cells: cells, fleet: seen.fleet.roles,
		pins: pins})
	return reconcile(inputs{
		acceptedByFlag: commit.Hash == l.acceptor.acceptedByFlag,
		commit:         commit,
		unvouched:      !vouched,
		now:            now,
		cells:          cells,
		own:            l.writer.records,
		orders:         l.pendingOrders(commit, seen.orders),
		history:        l.history.newest,
		stable:         l.history.stable,
		pastPins:       l.history.pins,
		pastRead:       l.history.readRoles,
		pins:           pins,
		shownPins:      shown,
		fleet:          seen.fleet.roles,
		blind:          !seen.fleet.synced || !seen.pins.synced && !errors.Is(seen.pins.err, kv.ErrDenied),
		fleetSince:     since,
		leftSince:      seen.fleet.leftSince,
		ranks:          l.ranks,
		lostSince:      l.lostSince,
		rebuildWait:    l.rebuildWait,
	}), nil
}

// pendingOrders returns the orders for units of the commit that were not consumed yet. It logs orders for other units
// and those that don't parse, when they change.
func (l *leader) pendingOrders(commit *git.Commit, seen observedOrders) map[deployments.UnitID]order {
	pending, bad := map[deployments.UnitID]order{}, slices.Clone(seen.bad)
	units := map[deployments.UnitID]bool{}
	for _, u := range commit.Tree.Units {
		units[u.ID] = true
	}
	for _, id := range slices.SortedFunc(maps.Keys(seen.good), deployments.UnitID.Compare) {
		switch o := seen.good[id]; {
		case l.writer.orders[id] == o.version: // consumed; the watch has yet to show it
		case !units[id]:
			bad = append(bad, fmt.Errorf("%s: the mirrored commit has no such unit: remove the key, or the order applies "+
				"once a unit of that name is added", kv.ControlKey(id)))
		default:
			pending[id] = o
		}
	}
	// Beyond the limit badOrders stays as it is, so that a later round logs the last state.
	if words := text(errors.Join(bad...)); words != l.badOrders && (words == "" || l.badOrderLines.Allow()) {
		if l.badOrders = words; words != "" {
			l.c.Log.Warn("an operator's order can't be obeyed: its key stays until it is corrected or removed",
				"orders", len(bad), "error", clip(words, maxLogged))
		}
	}
	return pending
}
