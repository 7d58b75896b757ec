package policy

import (
	"reflect"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

// admitted checks what a node switches to against the record that it acts on.
func (w *world) admitted(n *member, r deployments.Record) {
	p := r.Rollout
	switch to := n.going; {
	case n.pin.Present && to == n.pin.Value.Release:
	case p == nil && to == r.Target:
	case p != nil && to == r.Stable:
	case p != nil && to == r.Target && p.Phase != deployments.PhaseRollingBack && p.Phase != deployments.PhaseRolledBack && Rank(n.name, to.Digest) <= p.Cutoff:
	case p != nil && to == r.Target && p.Phase != deployments.PhaseRollingBack && partOf(&r, n.running.Digest) &&
		Rank(n.name, to.Digest) <= p.SupersededCutoff:
	case p != nil && to == r.Target && r.Stable.IsZero() && n.running.IsZero() && !n.serves && admitsIdle(p):
	default:
		w.breaks("%s goes to %s, which is neither admitted nor stable nor pinned by %s", n.name, to.URL, brief(r))
	}
}

// takesRoom reports whether a node is out of service by what a rollout had it do.
func (n *member) takesRoom() bool {
	return !n.free && (n.ends || !n.going.IsZero() || n.unserved && !n.excused)
}

// check holds the fleet against the budget.
func (w *world) check() {
	live, switching := 0, 0
	for _, n := range w.nodes {
		if n.gone && !n.going.IsZero() && !w.passed().Before(n.away.Add(w.unit.Rollout.Deadline)) {
			n.free = true // it has had its time
		}
		if n.unknown() && !w.passed().Before(n.silent.Add(shortList)) {
			n.free = true // its entry was removed
		}
		ends := n.ends || n.epoch < w.epoch && !n.going.IsZero() // by the unit's former name
		if ends && n.told.report.State != deployments.StateSwitching && !w.passed().Before(w.named.Add(reportWithin)) {
			n.free = true // it has yet to say so
		}
		p := w.latest().Rollout
		n.excused = n.excused || p != nil && p.Unproven || !w.passed().Before(n.outSince.Add(w.unit.Rollout.Deadline))
		if n.left || n.gone && n.going.IsZero() && !n.ends {
			continue
		}
		if !n.gone && !n.pin.Present {
			live++
		}
		if n.takesRoom() && (n.serves || !n.running.IsZero()) {
			switching++
		}
	}
	known := 0
	for _, n := range w.seenBy {
		if !n.Gone && !n.Report.Pinned {
			known++
		}
	}
	budget := max(1, w.unit.Rollout.MaxUnavailable.Of(max(live, known)))
	// A fleet that shrinks has a smaller budget, but who was admitted by the larger one may yet begin.
	mayBegin := func(n *member) bool { return !n.free && !n.running.IsZero() && w.unsettled(n) }
	if switching == 0 && w.cap > budget && !slices.ContainsFunc(w.nodes, mayBegin) {
		w.cap = 0
	}
	w.cap = max(w.cap, budget)
	if switching > w.cap {
		var names []string
		for _, n := range w.nodes {
			if n.takesRoom() && !n.left {
				names = append(names, n.name)
			}
		}
		w.breaks("%d nodes in flight (%s), the budget is %d: %s", switching, strings.Join(names, " "), w.cap, brief(w.latest()))
	}
}

// stepped checks a step against the record before it.
func (w *world) stepped(before deployments.Record, m Transition, order string) {
	r, was, p := m.Record, before.Rollout, m.Record.Rollout
	switch {
	case r.Generation < before.Generation || r.Retry < before.Retry:
		w.breaks("the generation went back from %d to %d", before.Generation, r.Generation)
	case p != nil && len(p.Superseded) > deployments.MaxSuperseded+1:
		w.breaks("%d targets replaced", len(p.Superseded))
	case !m.Recheck.IsZero() && !m.Recheck.After(w.now):
		w.breaks("it looks again at %v, which has been: %s", m.Recheck, brief(r))
	case was != nil && p == nil && r.Target == before.Target && !before.Stable.IsZero() && r.Stable != r.Target:
		w.breaks("it ended, and its target is not stable: %s", brief(r))
	case before.Pinned != nil && r.Stable == before.Pinned.Stable:
	case r.Stable != before.Stable && r.Stable != before.Target && (p != nil || r.Stable != r.Target):
		w.breaks("stable is what was neither that nor a target, of %s: %s", brief(before), brief(r))
	case r.Pinned != nil || before.Pinned != nil:
	case was != nil && !was.Failed.IsZero() && was.Failed == w.unit.Release.Digest && order != "retry" && (p == nil || p.Failed != was.Failed):
		w.breaks("what was rolled back is let in again: %s", brief(r))
	case p != nil && (p.Phase == deployments.PhaseRollingBack || p.Phase == deployments.PhaseRolledBack) && p.Failed != r.Target.Digest:
		w.breaks("what is rolled back is forgotten: %s", brief(r))
	}
}

// goesBack checks that no freeze ends a rollback while a node still runs the failed release, and may yet leave it.
func (w *world) goesBack(before deployments.Record, m Transition) {
	was, p := before.Rollout, m.Record.Rollout
	if p.WaitsForRollback() && !was.WaitsForRollback() {
		w.count("rollbacks that what is frozen waits for")
	}
	if was.WaitsForRollback() && p != nil && p.Forced {
		w.count("and that promote ended")
	}
	if was == nil || was.Phase != deployments.PhaseRollingBack || p == nil || p.Phase != deployments.PhaseFrozen ||
		!w.now.Before(was.Since.Add(w.unit.Rollout.Deadline)) {
		return
	}
	w.count("frozen after a rollback")
	for i := range w.seenBy {
		u := &w.seenBy[i].Report
		leaves := u.Leavable
		if !before.Stable.IsZero() {
			leaves = !slices.Contains(u.Quarantined, before.Stable.Digest)
		}
		if u.Running == before.Target && leaves && !w.seenBy[i].Gone && !pinned(u) && u.State != deployments.StateInvalid {
			w.breaks("%s stays on %s as what comes next is frozen: %s", w.seenBy[i].Name, u.Running.URL, brief(m.Record))
		}
	}
}

// sleeps checks that where a step changed nothing, time alone changes nothing before the time that it asked for.
func (w *world) sleeps(s Situation, m Transition) {
	if slices.ContainsFunc(s.Nodes, func(n Node) bool { return n.Started.After(w.now) }) {
		return // clocks were put back since: when they are where they were, such nodes are believed
	}
	later := w.now.Add(time.Duration(w.aside.IntN(240)) * time.Minute)
	if !m.Recheck.IsZero() && !later.Before(m.Recheck) {
		later = m.Recheck.Add(-1)
	}
	s.Now, s.Order, s.Ranks = later, "", &w.ranks
	if then := Next(s); !reflect.DeepEqual(then.Record, m.Record) {
		w.breaks("at %v it goes on unasked, to %s, from %s", later, brief(then.Record), brief(m.Record))
	}
}
