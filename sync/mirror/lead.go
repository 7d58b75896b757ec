package mirror

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// lead waits for the lease, works while it holds, and waits again.
func (m *Mirror) lead(ctx context.Context) {
	retry := newBackOff(500*time.Millisecond, 30*time.Second)
	failed := false
	for ctx.Err() == nil {
		lease, err := m.c.Store.Lease(ctx, kv.MirrorLease, m.c.Name, m.c.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if !failed {
				m.c.Log.Warn("cannot ask for the mirror's lease", "store", m.c.Store, "error", err)
			}
			failed = true
			_ = wait(ctx, retry.NextBackOff())
			continue
		}
		failed = false
		retry.Reset()
		m.work(ctx, lease)
		_ = wait(ctx, jitter(time.Second)) // whoever else waits goes first
	}
}

// work holds the lease until it is lost or ctx ends, and gives it back.
func (m *Mirror) work(ctx context.Context, lease kv.Lease) {
	m.c.Log.Info("this mirror holds the lease", "name", m.c.Name)
	m.setLeading(true)
	defer m.setLeading(false)
	defer m.setScene(nil)
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

func (m *Mirror) setLeading(leading bool) {
	m.mu.Lock()
	m.leading = leading
	m.mu.Unlock()
	m.metrics.led(leading)
}

// leader is a Mirror while it holds the lease: what it has seen of the store, and what it wrote there.
type leader struct {
	*Mirror
	lease kv.Lease

	mu       sync.Mutex
	desired  kv.View
	control  kv.View
	status   kv.View
	state    kv.View       // of mirror/
	wake     chan struct{} // holds one
	snapshot chan []kv.Entry

	// The rest belongs to run's goroutine.
	written    Status // what mirror/state holds
	writtenAt  time.Time
	accepted   *loaded // the commit that KV holds, or is to hold; nil: it can't be read
	recalled   string  // the branch's head when accepted was last looked for
	judged     string  // the head that was last judged, against accepted's, and the verdict
	verdict    error
	inspection *inspection // of judged's releases; nil: none was needed yet
	inspecting sync.WaitGroup
	owned      map[deployments.UnitID]own
	obeyed     map[deployments.UnitID]uint64  // versions of orders that were consumed
	complaint  string                         // the orders that can't be obeyed, as they were last logged
	reports    map[string]parsedReport        // by key in status/
	folders    map[[2]string]bool             // the roles whose folders are there
	past       map[deployments.UnitID]History // newest generations, of the roles in pastOf
	pastOf     map[[2]string]bool
	ranks      map[deployments.UnitID]*policy.Ranks
}

func newLeader(m *Mirror, lease kv.Lease) *leader {
	return &leader{
		Mirror: m, lease: lease,
		wake: make(chan struct{}, 1), snapshot: make(chan []kv.Entry, 1),
		owned: map[deployments.UnitID]own{}, obeyed: map[deployments.UnitID]uint64{}, folders: map[[2]string]bool{},
		past: map[deployments.UnitID]History{}, pastOf: map[[2]string]bool{},
		ranks: map[deployments.UnitID]*policy.Ranks{},
	}
}

// run works until ctx ends, or the lease is found to be lost.
func (l *leader) run(ctx context.Context) error {
	if err := l.persist(ctx, "begin", l.begin); err != nil {
		return err
	}
	defer l.inspecting.Wait()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.DesiredPrefix, l.sawDesired) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.ControlPrefix, l.sawControl) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.StatusPrefix, l.sawStatus) })
	g.Go(func() error { return l.c.Store.Watch(ctx, kv.MirrorPrefix, l.sawState) })
	if l.c.Snapshot != nil {
		g.Go(func() error { return l.keepSnapshot(ctx) })
	}
	g.Go(func() error { return l.loop(ctx) })
	return g.Wait()
}

// begin reads what the mirror before this one left.
func (l *leader) begin(ctx context.Context) error {
	if err := l.c.Store.EnsureFolders(ctx, kv.DesiredPrefix, kv.PinsPrefix, kv.ControlPrefix, kv.StatusPrefix, kv.HistoryPrefix, kv.MirrorPrefix); err != nil {
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
		if err := json.Unmarshal(e.Value, &l.written); err != nil {
			l.c.Log.Warn("the mirror's own state doesn't parse, it is written anew", "key", e.Key, "error", err)
			l.written = Status{}
		}
	}
	return nil
}

// recall reads the commit that the store holds, so that it can be kept up while a newer one is not taken. It is tried again
// with each new head, which may have brought it along.
func (l *leader) recall(head string) {
	if l.accepted != nil || l.written.taken() == "" || l.recalled == head {
		return
	}
	l.recalled = head
	commit, err := l.load(plumbing.NewHash(l.written.taken()))
	if err != nil {
		l.c.Log.Warn("the commit that was mirrored last can't be read: until there is another, changes by hand stay", "commit", l.written.taken(), "error", err)
		return
	}
	l.accepted = commit
}

// persist does f until it succeeds, the lease is lost or ctx ends.
func (l *leader) persist(ctx context.Context, what string, f func(context.Context) error) error {
	retry := newBackOff(500*time.Millisecond, 30*time.Second)
	for tries := 0; ; tries++ {
		err := f(ctx)
		if err == nil || errors.Is(err, kv.ErrLeaseLost) {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if tries == 0 {
			l.c.Log.Warn("the store is in trouble", "doing", what, "store", l.c.Store, "error", err)
		}
		if err := wait(ctx, retry.NextBackOff()); err != nil {
			return err
		}
	}
}

// sawDesired takes the newest view of desired/.
func (l *leader) sawDesired(v kv.View) {
	l.mu.Lock()
	l.desired = v
	l.mu.Unlock()
	l.poked()
	if v.Settled && v.Err == nil && l.c.Snapshot != nil {
		select {
		case <-l.snapshot: // the one before was not taken yet
		default:
		}
		l.snapshot <- v.Entries
	}
}

// sawControl takes the newest view of control/.
func (l *leader) sawControl(v kv.View) {
	l.mu.Lock()
	l.control = v
	l.mu.Unlock()
	l.poked()
}

// sawStatus takes the newest view of status/.
func (l *leader) sawStatus(v kv.View) {
	l.mu.Lock()
	l.status = v
	l.mu.Unlock()
	l.poked()
}

// sawState takes the newest view of mirror/.
func (l *leader) sawState(v kv.View) {
	l.mu.Lock()
	l.state = v
	l.mu.Unlock()
	l.poked()
}

func (l *leader) poked() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// loop observes, decides, acts and reports, whenever something changed.
func (l *leader) loop(ctx context.Context) error {
	retry := newBackOff(200*time.Millisecond, 30*time.Second)
	var trouble error
	for {
		git, gitChanged := l.gitChanged()
		again, err := l.round(ctx, git)
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
			retry.Reset()
		case errors.Is(err, kv.ErrConflict): // somebody else wrote, and the watch will show it
			again = jitter(time.Second)
		default:
			if trouble == nil {
				l.c.Log.Warn("the store takes no writes", "store", l.c.Store, "error", err)
			}
			trouble = err
			again = retry.NextBackOff()
			gitChanged = nil
			// Wakes that come one after the other, as from a fleet that reports, must not hurry it.
			pause := min(again, jitter(time.Second))
			if err := wait(ctx, pause); err != nil {
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
		case <-l.wake:
		case <-clock:
		}
	}
}

// round does once what there is to do. again is when to look even if nothing changes; 0: never.
func (l *leader) round(ctx context.Context, git gitState) (again time.Duration, err error) {
	l.mu.Lock()
	view, control, fleet, state := l.desired, l.control, l.status, l.state
	l.mu.Unlock()
	if !view.Settled {
		return 0, nil
	}
	now := time.Now()
	cells := l.observe(view)
	l.recall(cmp.Or(git.head, "none"))
	refused, unsure := l.judge(ctx, git, cells)

	status := l.written
	status.Holder, status.Refused, status.Error = l.c.Name, "", ""
	var writes []write
	if l.accepted != nil {
		if err := l.prepare(ctx, cells, now); err != nil {
			return 0, err
		}
		var all bool
		var at time.Time
		nodes := l.fleet(fleet)
		l.setScene(&scene{units: l.accepted.tree.Units, cells: cells, fleet: nodes})
		writes, all, at = decide(facts{commit: l.accepted, now: now, cells: cells, owned: l.owned, orders: l.orders(control), past: l.past,
			fleet: nodes, blind: !fleet.Settled, ranks: l.ranks})
		if !at.IsZero() {
			again = max(time.Millisecond, at.Sub(now))
		}
		if !all && l.accepted.Hash != l.written.Head {
			return settle, nil // a commit is taken whole: it waits until the watch shows the writes of the last one
		}
		status.Applying = ""
		if l.accepted.Hash != status.Head {
			status.Head, status.Author, status.At, status.Rules = l.accepted.Hash, l.accepted.Author, now.UTC().Truncate(time.Millisecond), rulesOf(l.accepted)
			status.Past = l.accepted.past
		}
	}
	switch {
	case refused != nil:
		status.Refused, status.Error = git.head, clip(refused.Error(), maxError)
	case unsure != nil:
		status.Error = clip(unsure.Error(), maxError)
		again = sooner(again, settle)
	case git.away != nil:
		status.Error = clip(git.away.Error(), maxError)
	}
	gitKnown := git.head != "" || git.away != nil
	if !gitKnown || !worthWriting(l.written, status, l.writtenAt, now) {
		status = l.written
	}
	lost, at := l.lostState(state, now)
	if !lost && !at.IsZero() {
		again = sooner(again, max(time.Millisecond, at.Sub(now)))
	}
	if err := l.act(ctx, writes, status, lost, now); err != nil {
		l.complain(ctx, err, now)
		return 0, err
	}
	for _, o := range l.owned {
		if o.version == 0 {
			again = sooner(again, settle) // should its write not show by then, it is looked for again
		}
	}
	return again, nil
}

// observe sorts the view by unit, and notes which writes of this mirror it shows.
func (l *leader) observe(view kv.View) map[deployments.UnitID]cell {
	cells := make(map[deployments.UnitID]cell, len(view.Entries))
	for _, e := range view.Entries {
		id, err := deployments.ParseUnitID(strings.TrimPrefix(e.Key, kv.DesiredPrefix))
		if err != nil {
			continue // not a record's key
		}
		c := cell{present: true, version: e.Version, value: e.Value}
		c.record, c.err = deployments.ParseRecord(e.Value)
		cells[id] = c
	}
	for id, o := range l.owned {
		c := cells[id]
		switch {
		case o.value == nil && !c.present:
			delete(l.owned, id)
		case o.value != nil && string(c.value) == string(o.value):
			o.version = c.version
			l.owned[id] = o
		}
	}
	return cells
}

// lostState reports whether mirror/state isn't what this mirror wrote there: somebody removed or changed it by hand. at is when it
// may be told, where a write may have yet to show.
func (l *leader) lostState(view kv.View, now time.Time) (lost bool, at time.Time) {
	if !view.Settled || view.Err != nil || l.writtenAt.IsZero() {
		return false, at
	}
	for _, e := range view.Entries {
		if e.Key == kv.MirrorKey && bytes.Equal(e.Value, writeStatus(l.written).ops[0].Value) {
			return false, at
		}
	}
	at = l.writtenAt.Add(settle)
	return !now.Before(at), at
}

// sooner is the shorter of two times to wait, where 0 is for ever.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// parsedReport is a report as it was parsed, so that of a fleet's reports only those that changed are parsed again.
type parsedReport struct {
	version uint64
	value   []byte // a restored store gives versions out again
	report  deployments.Report
}

// fleet sorts the view of status/ by role. A node whose report doesn't parse has said nothing yet.
func (l *leader) fleet(view kv.View) map[[2]string][]reported {
	byRole := map[[2]string][]reported{}
	reports := make(map[string]parsedReport, len(view.Entries))
	for _, e := range view.Entries {
		parts := strings.Split(strings.TrimPrefix(e.Key, kv.StatusPrefix), "/")
		if len(parts) != 3 {
			continue
		}
		known, ok := l.reports[e.Key]
		if !ok || known.version != e.Version || !bytes.Equal(known.value, e.Value) {
			report, err := deployments.ParseReport(e.Value)
			if err != nil {
				l.c.Log.Warn("a node's report doesn't parse", "key", e.Key, "error", err)
			}
			known = parsedReport{e.Version, e.Value, report}
		}
		reports[e.Key] = known
		role := [2]string{parts[0], parts[1]}
		byRole[role] = append(byRole[role], reported{node: parts[2], gone: e.Session == "", report: known.report})
	}
	l.reports = reports
	return byRole
}

// orders are those that were not obeyed yet.
func (l *leader) orders(view kv.View) map[deployments.UnitID]order {
	good, bad := orders(view)
	for _, id := range slices.SortedFunc(maps.Keys(good), compareIDs) {
		if l.obeyed[id] == good[id].version {
			delete(good, id) // it has yet to vanish from the watch
		} else if !slices.ContainsFunc(l.accepted.tree.Units, func(u deployments.Unit) bool { return u.ID == id }) {
			bad = append(bad, fmt.Errorf("%s: the commit has no such unit, and one that comes later would be met by it: remove the key", kv.ControlKey(id)))
		}
	}
	if complaint := text(errors.Join(bad...)); complaint != l.complaint {
		l.complaint = complaint
		if complaint != "" {
			l.c.Log.Warn("an operator's order can't be obeyed", "error", complaint)
		}
	}
	return good
}

// judge decides whether the branch's head becomes the commit to write, and else why not: refused is for good, unsure may pass.
func (l *leader) judge(ctx context.Context, git gitState, cells map[deployments.UnitID]cell) (refused, unsure error) {
	switch {
	case git.head == "" || l.accepted != nil && git.head == l.accepted.Hash:
		return nil, nil
	case git.bad != nil:
		return git.bad, nil
	}
	m := move{from: l.written.taken(), rules: l.written.Rules, to: git.good}
	if l.accepted != nil {
		m.from, m.rules = l.accepted.Hash, rulesOf(l.accepted)
		for _, u := range l.accepted.tree.Units {
			m.had = append(m.had, u.ID)
		}
	} else {
		for id, c := range cells {
			if c.err == nil && ours(c.record) {
				m.had = append(m.had, id)
			}
		}
	}
	if judged := m.from + ".." + git.head; l.judged != judged {
		if m.from == "" {
			m.rules = rulesOf(git.good)
		} else {
			var err error
			if m.descends, err = l.descends(ctx, m.from, git.head); err != nil {
				return nil, fmt.Errorf("history from %s to %s: %w", short(m.from), short(git.head), err)
			}
		}
		l.judged, l.verdict = judged, refuse(m)
		l.refused(git.head)
	}
	if l.verdict != nil || l.accepted == git.good {
		return l.verdict, nil
	}
	done, err := l.inspect(ctx, git.good)
	switch {
	case errors.As(err, new(deployments.Problems)):
		l.verdict = err
		l.refused(git.head)
		return err, nil
	case err != nil:
		return nil, fmt.Errorf("commit %s is not taken yet: %w", short(git.head), err)
	case done:
		l.metrics.judged(nil)
		l.c.Log.Info("the commit is taken", "commit", git.head, "after", m.from)
		l.accepted = git.good
		clear(l.ranks) // of units that may be gone
	}
	return nil, nil
}

// refused notes that the commit is not to be taken, where that is the verdict.
func (l *leader) refused(commit string) {
	if l.verdict != nil {
		l.metrics.judged(l.verdict)
		l.c.Log.Error("the commit is refused", "commit", commit, "error", l.verdict)
	}
}

func (l *leader) descends(ctx context.Context, from, to string) (bool, error) {
	in, err := l.repo.open()
	if err != nil {
		return false, err
	}
	defer in.Close()
	return descends(ctx, in, plumbing.NewHash(from), plumbing.NewHash(to))
}

// prepare makes the folders of new roles, and reads the history of units whose record is not there to go on from.
func (l *leader) prepare(ctx context.Context, cells map[deployments.UnitID]cell, now time.Time) error {
	var folders []string
	all := roles(l.accepted.tree)
	for _, r := range all {
		if !l.folders[r] {
			for _, kind := range []string{kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix, kv.ControlPrefix, kv.HistoryPrefix} {
				folders = append(folders, kv.RolePrefix(kind, r[0], r[1]))
			}
		}
	}
	if len(folders) > 0 {
		if err := l.c.Store.EnsureFolders(ctx, folders...); err != nil {
			return fmt.Errorf("folders of %d keys: %w", len(folders), err)
		}
		for _, r := range all {
			l.folders[r] = true
		}
	}
	for _, u := range l.accepted.tree.Units {
		role := [2]string{u.ID.Stage, u.ID.Role}
		o, known := l.owned[u.ID]
		if l.pastOf[role] || stand(cells[u.ID], o, known, now) != unknown {
			continue
		}
		entries, err := l.c.Store.List(ctx, kv.RolePrefix(kv.HistoryPrefix, role[0], role[1]))
		if err != nil {
			return fmt.Errorf("history of %s/%s: %w", role[0], role[1], err)
		}
		l.pastOf[role] = true
		for _, e := range entries {
			name := strings.TrimPrefix(e.Key, kv.HistoryPrefix)
			id, err := deployments.ParseUnitID(name[:max(0, strings.LastIndex(name, "/"))])
			if err != nil {
				continue
			}
			var h History
			if err := json.Unmarshal(e.Value, &h); err == nil && h.Generation > l.past[id].Generation && h.Generation < absurd {
				l.past[id] = h
			}
		}
	}
	return nil
}

// act writes. What takes several transactions is announced in the first and confirmed in the last, so that a mirror that
// takes over in between knows which commit it finds half written.
//
// The state is written where it differs from what it was, or where lost says that it isn't there.
func (l *leader) act(ctx context.Context, writes []write, status Status, lost bool, now time.Time) error {
	all := writes
	if lost || status != l.written {
		all = append(slices.Clone(writes), writeStatus(status))
	}
	todo := batches(all)
	if len(todo) > 1 && status.Head != l.written.Head {
		announced := l.written
		announced.Holder, announced.Applying, announced.Rules = status.Holder, status.Head, status.Rules
		todo = batches(append([]write{writeStatus(announced)}, all...))
	}
	for _, batch := range todo {
		var ops []kv.Op
		for _, w := range batch {
			ops = append(ops, w.ops...)
		}
		if err := l.c.Store.Commit(ctx, l.lease, ops...); err != nil {
			if !errors.Is(err, kv.ErrConflict) && !errors.Is(err, kv.ErrLeaseLost) {
				for _, w := range batch {
					delete(l.owned, w.unit) // it may have been written all the same: take what the store shows
				}
			}
			return fmt.Errorf("write %d keys: %w", len(ops), err)
		}
		l.metrics.wrote(len(ops))
		for _, w := range batch {
			l.done(w, now)
		}
	}
	return nil
}

// complain says in mirror/state why the store refuses what the commit asks for, where it takes at least that.
func (l *leader) complain(ctx context.Context, err error, now time.Time) {
	for _, passes := range []error{kv.ErrConflict, kv.ErrLeaseLost, kv.ErrUnavailable} {
		if errors.Is(err, passes) {
			return
		}
	}
	status := l.written
	status.Holder, status.Error = l.c.Name, clip("the store does not take the commit: "+err.Error(), maxError)
	if ctx.Err() != nil || !worthWriting(l.written, status, l.writtenAt, now) {
		return
	}
	w := writeStatus(status)
	if err := l.c.Store.Commit(ctx, l.lease, w.ops...); err == nil {
		l.done(w, now)
	}
}

// done notes a write that the store has taken.
func (l *leader) done(w write, now time.Time) {
	if w.status != nil {
		l.written, l.writtenAt = *w.status, now
		l.metrics.applied(l.written)
		return
	}
	if w.order.version != 0 {
		l.obeyed[w.unit] = w.order.version
		l.c.Log.Info("order taken", "unit", w.unit, "order", w.order.verb, "outcome", w.reason)
	}
	if w.kind == "none" {
		return
	}
	l.owned[w.unit] = own{record: w.after, value: w.value, over: w.over, at: now}
	if w.value == nil {
		delete(l.past, w.unit)
		delete(l.pastOf, [2]string{w.unit.Stage, w.unit.Role})
	}
	l.c.Log.Info("record written", "unit", w.unit, "kind", w.kind, "target", w.after.Target, "generation", w.after.Generation, "commit", w.after.Commit, "reason", w.reason)
}

// snapshotEvery is how often a snapshot is written anew though nothing changed: readers bound its age.
const snapshotEvery = time.Hour

// keepSnapshot hands the newest records to Config.Snapshot, until it takes them.
func (l *leader) keepSnapshot(ctx context.Context) error {
	retry := newBackOff(time.Second, time.Minute)
	var entries []kv.Entry
	var again <-chan time.Time
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case entries = <-l.snapshot:
		case <-again:
		}
		again = nil
		err := l.c.Snapshot(ctx, entries)
		switch {
		case err == nil:
			if failed {
				l.c.Log.Info("the snapshot of the desired state is written again")
			}
			failed = false
			retry.Reset()
			again = time.After(snapshotEvery)
		case ctx.Err() == nil:
			if !failed {
				l.c.Log.Warn("the snapshot of the desired state can't be written", "error", err)
			}
			failed = true
			again = time.After(retry.NextBackOff())
		}
	}
}
