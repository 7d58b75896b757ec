package policy

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"kedge/deployments"
)

// rebuildWait is how long the simulated mirror lets nodes report before it makes a record from what they say.
const rebuildWait = 5 * time.Second

// store is what the simulated store holds beside the records.
type store struct {
	history []deployments.History
	unitPin Value[deployments.Pin]
}

// snapshot is a copy of all that the store held at a time.
type snapshot struct {
	record deployments.Record
	joins  uint64
	store
	pins    map[*member]Value[deployments.Pin]
	reports map[*member]entry
}

// entry is a node's key in status/.
type entry struct {
	listed bool
	joined uint64
	report deployments.UnitReport
}

// leader is what a mirror remembers while it holds the lease.
type leader struct {
	own     deployments.Record // what it wrote, or found; generation 0: nothing
	stables []deployments.Digest
	listed  time.Time // since when it looks on
	left    map[string]time.Time
	looked  time.Time
	began   time.Time // when it took over
	waits   bool      // for nodes to report
	lostAt  time.Time // since when nodes are ahead of the store; zero: they are not
	ranks   Ranks
}

// putBack puts the clock back. What a mirror remembers is told by elapsed time.
func (w *world) putBack(by time.Duration) {
	if until := w.unitPin.Value.Until; !until.IsZero() && !w.now.Before(until) && w.now.Add(-by).Before(until) {
		w.wished = w.unitPin.Present // it had ended, and asks for its release anew
	}
	w.now, w.back = w.now.Add(-by), w.back+by
	for _, at := range []*time.Time{&w.listed, &w.looked, &w.began, &w.lostAt} {
		if !at.IsZero() {
			*at = at.Add(-by)
		}
	}
	for name, at := range w.left {
		w.left[name] = at.Add(-by)
	}
}

// latest is the record that the store holds; generation 0: none.
func (w *world) latest() deployments.Record { return w.records[len(w.records)-1] }

// put writes a record, or removes it (generation 0).
func (w *world) put(r deployments.Record) {
	w.records, w.lived = append(w.records, r), append(w.lived, w.live)
}

// takeOver lets another mirror lead: it knows what the store's leader holds, and nothing else.
func (w *world) takeOver() {
	w.leader = leader{stables: stableIn(w.history), listed: w.now, began: w.now, left: map[string]time.Time{}}
	w.look()
}

// stableIn is what was stable in the generations that are known, and has not failed since.
func stableIn(history []deployments.History) (stable []deployments.Digest) {
	for _, h := range history {
		if !h.Stable.IsZero() && !slices.Contains(stable, h.Stable.Digest) {
			stable = append(stable, h.Stable.Digest)
		}
		stable = slices.DeleteFunc(stable, func(d deployments.Digest) bool { return d == h.Failed })
	}
	return stable
}

// look brings the mirror's view of the fleet up to date.
func (w *world) look() {
	before := w.seenBy
	w.looked = w.now
	w.seenBy, w.live = make([]Node, 0, len(w.nodes)), make([]bool, w.names+1)
	defer func() {
		now := make(map[string]bool, len(w.seenBy))
		for _, n := range w.seenBy {
			now[n.Name] = true
		}
		for _, n := range before {
			if !now[n.Name] {
				w.left[n.Name] = w.now
			}
		}
		maps.DeleteFunc(w.left, func(name string, _ time.Time) bool { return now[name] })
	}()
	for _, n := range w.nodes {
		u := &n.told.report
		w.live[n.number] = !u.Pinned && (!n.serves || u.OtherServes)
		if !n.left && n.told.listed {
			w.seenBy = append(w.seenBy, Node{Name: n.name, Gone: n.gone, Started: n.started, Joined: n.told.joined,
				Report: n.told.report})
			at := &w.seenBy[len(w.seenBy)-1]
			if n.gone {
				at.GoneSince = n.goneAt
			}
			if u.State != deployments.StateUnhealthy && !u.RollingBack {
				n.seenOut = time.Time{}
				continue
			}
			if n.seenOut.IsZero() || !u.Since.Equal(n.toldOut) {
				n.seenOut, n.toldOut = w.passed(), u.Since
			}
			at.UnhealthySince = w.now.Add(n.seenOut.Sub(w.passed()))
		}
	}
}

// refresh brings the mirror's view up to date if it is older than a watch may be: one that is later says so.
func (w *world) refresh() {
	if w.now.Sub(w.looked) > time.Minute {
		w.look()
	}
}

// base is what the mirror goes on from, as the mirror's reconcile finds it. until is when it may: nodes have to report
// first.
func (w *world) base(stored deployments.Record) (b Base, until time.Time) {
	switch {
	case w.own.Generation > 0 && !reflect.DeepEqual(stored, w.own):
		w.count("records put back")
		return Base{Record: w.own, Floor: w.own.Generation, Restored: true}, until
	case stored.Generation > 0:
		b = Base{Record: stored, Floor: stored.Generation}
	case len(w.history) > 0:
		h := w.history[len(w.history)-1]
		b = Base{Record: FromHistory(w.unit, h, w.now), Floor: h.Generation}
	}
	if stored.Generation == 0 {
		settled := slices.MaxFunc(append(slices.Collect(maps.Values(w.left)), w.listed), time.Time.Compare)
		if until := settled.Add(rebuildWait); w.now.Before(until) {
			return b, until // it may be that all have yet to report
		}
		w.hear()
	}
	if !IsLost(w.seenBy, b.Floor) {
		w.lostAt = time.Time{}
		return b, until
	}
	if w.lostAt.IsZero() {
		w.lostAt = w.now
	}
	if until = w.lostAt.Add(rebuildWait); w.now.Before(until) {
		return b, until
	}
	w.hear()
	w.count("records rebuilt")
	r := Rebuild(w.unit, w.commit(), w.seenBy, b.Floor, w.now)
	w.say("rebuilt: %s", brief(r))
	return Base{Record: r, Floor: r.Generation, Rebuilt: true}, time.Time{}
}

// hear lets each node see that its record is gone, and report, for which it has had the time.
func (w *world) hear() {
	for _, n := range w.nodes {
		if !n.gone && !n.left {
			n.read(w, len(w.records)-1)
			w.tell(n)
		}
	}
	w.look()
}

// commit is the hash of the commit that Git is at.
func (w *world) commit() string { return fmt.Sprint("commit ", w.pushes) }

func (w *world) mirror(order string) (again time.Time) {
	stored := w.latest()
	base, until := w.base(stored)
	if w.waits = !until.IsZero(); w.waits {
		return until
	}
	before := base.Record
	var was deployments.Progress
	if before.Rollout != nil {
		was = *before.Rollout
		was.Superseded = slices.Clone(was.Superseded)
	}
	s := Situation{Now: w.now, Unit: w.unit, Commit: w.commit(), Record: before, Nodes: w.seenBy, Listed: w.listed,
		Left: slices.SortedFunc(maps.Values(w.left), time.Time.Compare), Order: order, Freeze: w.freeze,
		Ranks: &w.ranks, Pin: &w.unitPin, StableBefore: w.stables}
	m := Next(s)
	if s.Ranks = nil; len(w.nodes) < 100 && !reflect.DeepEqual(m, Next(s)) {
		w.breaks("what is remembered of ranks changed the answer")
	}
	if before.Rollout != nil {
		if !reflect.DeepEqual(was, *before.Rollout) {
			w.breaks("Next changed the record that stood")
		}
		// Those that hang have had their time: they give up their room.
		if !w.now.Before(before.Rollout.Since.Add(w.unit.Rollout.Deadline)) {
			for _, n := range w.nodes {
				// or so the mirror thinks; and a node that has yet to see its unit's new name begins anew
				if w.unsettled(n) || busy(&n.told.report) || n.epoch < w.epoch {
					n.free = true
				}
			}
		}
	}
	until = w.began.Add(rebuildWait)
	if w.waits = m.Record.Generation > base.Record.Generation && w.now.Before(until); w.waits {
		return until
	}
	w.asks(before, m.Record)
	w.stepped(before, m, order)
	w.goesBack(before, m)
	plain := reflect.DeepEqual(before, stored)
	var at *deployments.Record
	if stored.Generation > 0 {
		at = &stored
	}
	m.Record = base.WithGeneration(m.Record, at, w.seenBy)
	if w.refused && !reflect.DeepEqual(m.Record, stored) { // the folder key that it compares is gone: it makes it again
		w.refused, w.waits = false, true
		w.count("writes refused")
		return m.Recheck
	}
	if w.own = m.Record; reflect.DeepEqual(m.Record, stored) {
		if plain {
			w.sleeps(s, m)
		}
		return m.Recheck
	}
	if m.Record.Generation > base.Floor {
		w.remember(before, m.Record)
	}
	if w.put(m.Record); w.named.IsZero() {
		w.named = w.passed()
	}
	if m.Record.Rollout == nil || m.Record.Rollout.Phase == deployments.PhaseRolledBack {
		w.ended++
	}
	if m.Record.Rollout == nil && m.Record.Stable.IsZero() {
		for _, n := range w.nodes { // every node at once
			n.free = true
		}
	}
	if w.keep {
		w.say("mirror %q: %s", order, brief(m.Record))
	}
	return m.Recheck
}

// remember notes a generation in the history.
func (w *world) remember(before, r deployments.Record) {
	h := deployments.History{Generation: r.Generation, Release: r.Target, Stable: r.Stable, Claim: r.RequestGeneration(),
		Retry: r.Retry, Pinned: r.Pinned}
	failed := before.Target.Digest
	quarantines := func(n Node) bool { return slices.Contains(n.Report.Quarantined, failed) }
	switch {
	case r.Rollout != nil && !r.Rollout.Failed.IsZero():
		h.Failed = r.Rollout.Failed
	case failed != r.Target.Digest && slices.ContainsFunc(w.seenBy, quarantines):
		h.Failed = failed
	}
	w.history = append(w.history, h)
	if w.history = w.history[max(0, len(w.history)-deployments.HistoryKept):]; !h.Stable.IsZero() {
		w.stables = stableIn(w.history)
	}
}

func brief(r deployments.Record) string {
	s := fmt.Sprintf("generation %d target %s stable %s", r.Generation, r.Target.URL, r.Stable.URL)
	if r.Joined > 0 {
		s += fmt.Sprintf(" joined %d", r.Joined)
	}
	if p := r.Rollout; p != nil {
		s += fmt.Sprintf(" %s cutoff %d over %d: %s", p.Phase, p.Cutoff, len(p.Superseded), p.Reason)
	}
	return s
}

// lose removes some of the keys, or all of them together with the store's counters, as where its servers are made anew.
func (w *world) lose() {
	record, history, pins, status := w.chance(0.5), w.chance(0.4), w.chance(0.3), w.chance(0.4)
	anew := w.chance(0.2)
	if anew {
		record, history, pins, status = true, true, true, true
		w.joins = 10 // no session is the first thing that a store holds
	}
	w.say("lost: record %v history %v pins %v status %v, all anew %v", record, history, pins, status, anew)
	for _, n := range w.nodes {
		if pins && n.pin.Present {
			n.pin, n.free = Value[deployments.Pin]{}, true
		}
		if status {
			n.unsaid(w)
			n.free = n.free || record && n.unknown()
		}
		if anew {
			n.acts, n.seen = -1, len(w.records) // the numbers of the record of before are of another store
			n.joined = 0
		}
	}
	if pins {
		w.unitPin = Value[deployments.Pin]{}
	}
	if history {
		w.history = nil
	}
	if record {
		w.put(deployments.Record{})
	}
	if anew || w.chance(0.3) {
		w.takeOver()
	}
	for kind, lost := range map[string]bool{
		"records": record, "history": history, "pins": pins, "reports": status, "everything": anew,
	} {
		if lost {
			w.count("losses of " + kind)
		}
	}
}

// save keeps what the store holds, as consul snapshot save does.
func (w *world) save() {
	s := &snapshot{record: w.latest(), joins: w.joins, store: store{slices.Clone(w.history), w.unitPin},
		pins: map[*member]Value[deployments.Pin]{}, reports: map[*member]entry{}}
	for _, n := range w.nodes {
		s.pins[n], s.reports[n] = n.pin, n.told
	}
	w.saved = s
	w.say("a snapshot is saved of generation %d", s.record.Generation)
}

// restore puts back what was saved. Sessions end, so that the lease may pass to another mirror.
func (w *world) restore() {
	w.wished = w.wished || w.saved.unitPin.Present && w.saved.unitPin != w.unitPin
	w.store = store{slices.Clone(w.saved.history), w.saved.unitPin}
	for _, n := range w.nodes {
		if pin := w.saved.pins[n]; pin != n.pin {
			n.pin, n.free = pin, true
		}
		was := n.told
		if n.told = w.saved.reports[n]; !n.told.listed {
			n.unsaid(w)
		}
		n.stale = n.stale || !reflect.DeepEqual(n.told, was)
		n.free = n.free || n.unknown()
	}
	w.joins = max(w.joins, w.saved.joins) // as Raft's index is
	w.put(w.saved.record)
	w.count("snapshots restored")
	w.say("the snapshot of generation %d is restored", w.saved.record.Generation)
	if w.chance(0.7) {
		w.takeOver()
	}
}

// asks notes that somebody asked for a record's target from now on: by a commit, a pin or a retry.
func (w *world) asks(before, r deployments.Record) {
	asked, git := r.Retry > before.Retry, before.Target
	if before.Pinned != nil {
		git = before.Pinned.Target
	}
	switch {
	case w.pushed && r.Pinned == nil && r.Target == w.unit.Release:
		asked, w.pushed = asked || r.Target != git, false
	case w.wished && r.Pinned != nil && r.Target == w.unitPin.Value.Release:
		asked, w.wished = true, false
	}
	if asked {
		w.asked[r.Target.Digest] = len(w.records)
	}
	if r.Retry > before.Retry && r.Pinned != nil { // it counts for what Git names as well, once the pin has ended
		w.asked[w.unit.Release.Digest] = len(w.records)
	}
}

func keys(failed map[deployments.Digest]string) []deployments.Digest {
	return slices.Collect(maps.Keys(failed))
}
