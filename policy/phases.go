package policy

import (
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
)

// checkFleet summarizes the fleet while a rollout goes forward. If nodes are no longer healthy, or if the node that the
// rollout waited for begins to change, deadlines count from now, and the bake starts over.
func checkFleet(in *inputs, st state) (state, summary) {
	v := summarize(in, st)
	if awaitedBegan(st, v) {
		st.p.Since, st.p.HealthySince = in.Now, time.Time{}
		v = summarize(in, st)
	}
	if !st.p.HealthySince.IsZero() && (v.setback || v.late > 0 && v.failed > limit(in, st, v)) {
		st.p.Since, st.p.HealthySince = in.Now, time.Time{}
		st = st.because(deployments.ReasonBakingAgain, nil)
		v = summarize(in, st)
	}
	return st, v
}

// awaitedBegan reports whether the node that the rollout waited for has begun to change. Its deadline must then count
// from now, or the node would be late at once.
func awaitedBegan(st state, v summary) bool {
	if st.p.Reason != deployments.ReasonUnaware && st.p.Reason != deployments.ReasonStorageUnavailable {
		return false
	}
	return slices.ContainsFunc(v.nodes, func(n rolloutNode) bool {
		return n.node.Name == st.p.Facts["node"] && n.overdue && n.node.Report.State != deployments.StateConverged
	})
}

// limit returns how many failed nodes the rollout tolerates: max_failures, plus the failed nodes
// that a resume accepted or that an earlier rollout left.
func limit(in *inputs, st state, v summary) int {
	limit := st.p.Tolerated
	if u := in.Unit.Rollout; u != nil {
		limit += u.MaxFailures.Of(v.live)
	}
	return limit
}

// stopIfFailing stops the rollout if more nodes have failed than are tolerated, and reports whether it did. Nodes of a
// unit without a rollout, and those that go from superseded targets back to stable, are never stopped.
func stopIfFailing(in *inputs, st state, v summary) (state, bool) {
	if in.Unit.Rollout == nil {
		return st, false // every node goes at once: each protects itself
	}
	if st.r.Stable == st.r.Target && len(st.p.Superseded) > 0 {
		// Git went back: a node that fails on stable must not keep others on the release that Git left
		return st, false
	}
	limit := limit(in, st, v)
	if v.failed <= limit {
		return st, false
	}
	return stop(in, st, tooManyFailed(v, limit)), true
}

func tooManyFailed(v summary, limit int) cause {
	facts := v.failure.With("failed", fmt.Sprint(v.failed)).With("of", fmt.Sprint(v.live)).With("limit", fmt.Sprint(limit))
	return cause{deployments.ReasonTooManyFailed, facts}
}

// mustWait reports whether the rollout has to wait now, for a freeze or for live nodes, and sets the reason.
func mustWait(in *inputs, st state, v summary) (state, bool) {
	frozen := in.Freeze.Frozen && in.Freeze.Wait && !st.p.Forced && !st.p.SkipsGates && st.r.Stable != st.r.Target
	if !frozen && st.p.HeldUp() {
		st = st.orBecause(deployments.ReasonFreezeEnded, nil)
	}
	switch {
	case frozen:
		st = st.recheckBy(in.Freeze.ChangesAt)
		if v.pending == 0 && st.p.HealthySince.IsZero() {
			// this lets checkFleet restart the deadlines if nodes begin to change before the freeze ends
			st.p.HealthySince = in.Now
		}
		return st.becauseFrozen(in), true
	case v.live == 0 && v.followers > 0: // no node has to be admitted
	// without this wait all nodes would run the target at once, untried, when their pins end
	case v.live == 0 && v.pinned > 0 && v.gone == 0:
		return st.because(deployments.ReasonAllPinned, deployments.Facts{"nodes": fmt.Sprint(v.pinned)}), true
	case v.live == 0:
		return st.because(deployments.ReasonNoLiveNodes, deployments.Facts{"known": fmt.Sprint(v.gone)}), true
	}
	return st, false
}

// mayAdmit reports in goesOn whether the rollout may admit its next nodes. It may not if too many have failed, if it
// has to wait, or if nodes have yet to report. more is then what advance has to return.
func mayAdmit(in *inputs, st state) (_ state, v summary, goesOn, more bool) {
	st, v = checkFleet(in, st)
	st, failed := stopIfFailing(in, st, v)
	if failed {
		return st, v, false, true
	}
	st, waiting := mustWait(in, st, v)
	if waiting {
		return recheckAtDeadline(in, st, v, false), v, false, false
	}
	st, unheard := awaitReports(in, st)
	return st, v, !unheard, false
}

// bake reports whether the nodes have been healthy for the bake time, and have had time to report
// since the store was last away. It sets HealthySince when the bake begins. who names the nodes in
// the reason.
func bake(in *inputs, st state, who string) (state, bool) {
	u := in.Unit.Rollout
	if st.p.HealthySince.IsZero() {
		st.p.HealthySince = in.Now
	}
	if u == nil {
		return st, true
	}
	ends, reportsDue := st.p.HealthySince.Add(u.Bake), in.Seen.Add(min(u.Bake, reportWithin))
	switch {
	case in.Now.Before(ends):
		until := ends.UTC().Format("2006-01-02 15:04:05Z")
		return st.recheckBy(ends).orBecause(deployments.ReasonBaking, deployments.Facts{"who": who, "until": until}), false
	case in.Now.Before(reportsDue):
		return st.recheckBy(reportsDue).orBecause(deployments.ReasonAwaitingReports, deployments.Facts{"who": who}), false
	}
	return st, true
}

// awaitReports delays a first release, before it admits nodes, until every live node that runs nothing has reported on
// it, at most for reportWithin. A node may be out of service because of another unit that had the same dest and was
// removed from Git. unheard reports whether the rollout still waits.
func awaitReports(in *inputs, st state) (next state, unheard bool) {
	until := st.p.Since.Add(reportWithin)
	if !st.r.Stable.IsZero() || st.p.Cutoff > 0 || !in.Now.Before(until) {
		return st, false
	}
	for i := range in.Nodes {
		n := &in.Nodes[i]
		u := &n.Report
		if !n.Gone && !pinned(u) && u.Running.IsZero() && u.Generation < st.r.Generation {
			return st.recheckBy(until).because(deployments.ReasonUnheard, deployments.Facts{"node": n.Name}), true
		}
	}
	return st, false
}

// reportWithin is how long a rollout waits for reports: on a first release, and after the store was away.
const reportWithin = 30 * time.Second

// stepFrozen starts the rollout, once the freeze window has ended or an operator forces it.
func stepFrozen(in *inputs, st state) (state, bool) {
	if in.Freeze.Frozen && !st.p.Forced && !st.p.SkipsGates {
		return st.becauseFrozen(in).recheckBy(in.Freeze.ChangesAt), false
	}
	return start(in, st), true
}

// stepCanary admits the first nodes, lets them bake, and then asks for approval or goes on to the
// others.
func stepCanary(in *inputs, st state) (state, bool) {
	if in.Unit.Rollout == nil {
		return st.roll(in).because(deployments.ReasonRolling, nil), true
	}
	st, v, goesOn, more := mayAdmit(in, st)
	if !goesOn {
		return st, more
	}
	want := min(max(1, in.Unit.Rollout.Canary.Of(v.live)), v.live+v.missing)
	st, admitted, moved := admit(in, st, v, want)
	if admitted < want && !moved { // only nodes that came back are left
		st, moved = readmit(in, st, v, want-admitted)
	}
	if moved {
		st = st.because(deployments.ReasonCanary, deployments.Facts{"admitted": fmt.Sprint(admitted), "of": fmt.Sprint(want)})
	}
	if !moved && v.stuck != nil {
		st = st.because(v.waitsFor())
	}
	if moved || admitted < want || v.pending > v.late {
		return recheckAtDeadline(in, st, v, moved), false
	}
	st, done := bake(in, st, "the canaries")
	switch {
	case !done:
		return st.recheckBy(v.unlistedUntil), false
	case in.Unit.Rollout.Approval == deployments.Manual:
		return st.enter(in, deployments.PhasePendingApproval).because(deployments.ReasonAwaitingApproval, nil), false
	}
	return st.roll(in).because(deployments.ReasonRolling, nil), true
}

// stepPendingApproval waits for promote, as long as approval is manual and the canaries stay
// healthy.
func stepPendingApproval(in *inputs, st state) (state, bool) {
	st, v := checkFleet(in, st)
	st, failed := stopIfFailing(in, st, v)
	switch {
	case failed:
		return st, true
	case st.p.HealthySince.IsZero():
		st.p.Phase = deployments.PhaseCanary
		return st.because(deployments.ReasonUnhealthy, nil), true
	case in.Unit.Rollout == nil || in.Unit.Rollout.Approval != deployments.Manual:
		return st.roll(in).because(deployments.ReasonRolling, nil), true
	}
	return recheckAtDeadline(in, st, v, false), false
}

// stepRolling admits the remaining nodes, as many at a time as the budget allows. Without canaries, and unless
// SkipsGates is set, all nodes bake in the end. The rollout ends when every known node has converged, apart from
// tolerated failures, other pins, and nodes away for a deadline or missing for shortList. If most are away or missing,
// maxAway counts instead. If nodes failed, no node runs the target, and there is something to go back to, stepRolling
// stops the rollout.
func stepRolling(in *inputs, st state) (state, bool) {
	if in.Unit.Rollout == nil {
		return st.end().because(deployments.ReasonEveryNode, nil), false
	}
	st, v, goesOn, more := mayAdmit(in, st)
	if !goesOn {
		return st, more
	}
	st, admitted, moved := admit(in, st, v, v.live)
	if moved {
		facts := deployments.Facts{"admitted": fmt.Sprint(admitted), "of": fmt.Sprint(v.live)}
		st = st.because(deployments.ReasonRolling, facts)
	} else {
		st, moved = readmit(in, st, v, len(v.waiting))
	}
	if !moved && v.stuck != nil {
		st = st.because(v.waitsFor())
	}
	if moved || admitted < v.live || v.inflight > v.overdue || v.stuck != nil || v.unconvergedFollowers > 0 {
		return recheckAtDeadline(in, st, v, moved), false
	}
	if in.Unit.Rollout.Canary.N == 0 && !st.p.SkipsGates { // without canaries all nodes bake
		var done bool
		if st, done = bake(in, st, "all nodes"); !done {
			return st.recheckBy(v.unlistedUntil), false
		}
	}
	if known := v.live + v.gone + v.pinned; v.away > 0 || known < st.r.Nodes {
		if st.p.HealthySince.IsZero() {
			st.p.HealthySince = in.Now
		}
		until := v.awayUntil
		switch here := v.live + v.pinned + v.gone - v.away; {
		case 2*here < max(known, st.r.Nodes):
			until = st.p.HealthySince.Add(max(in.deadline(), maxAway))
		case known < st.r.Nodes:
			until = later(until, st.p.HealthySince.Add(min(in.deadline(), shortList)))
		}
		until = later(until, v.unlistedUntil)
		if in.Now.Before(until) {
			return st.recheckBy(v.unlistedUntil).recheckBy(until).because(deployments.ReasonNodesMissing,
				deployments.Facts{"live": fmt.Sprint(v.live), "known": fmt.Sprint(max(known, st.r.Nodes))}), false
		}
	}
	if v.failed > 0 && canGoBack(st) && !runsSomewhere(in, st.r.Target.Digest) {
		// even if the failures are tolerated: a target that runs nowhere must not become stable
		return stop(in, st, tooManyFailed(v, limit(in, st, v))), true
	}
	st.r.Stable, st.r.Nodes = st.r.Target, v.live+v.gone+v.pinned
	return st.end().because(deployments.ReasonConverged, nil), false
}

// runsSomewhere reports whether a node runs a release, or did when it last reported.
func runsSomewhere(in *inputs, digest deployments.Digest) bool {
	return slices.ContainsFunc(in.Nodes, func(n Node) bool { return n.Report.Running.Digest == digest })
}

// maxAway is the least time that a rollout waits before it ends while more than half of its nodes
// are away or missing from the list.
const maxAway = time.Hour
