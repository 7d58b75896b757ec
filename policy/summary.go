package policy

import (
	"cmp"
	"slices"
	"time"

	"kedge/deployments"
)

// summary counts the nodes of a record's rollout by what they report.
type summary struct {
	live, gone, pinned int
	// followers are pinned nodes that go by themselves to the release that the record's own pin
	// names. unconvergedFollowers are the live followers that have yet to converge on it.
	followers, unconvergedFollowers int
	// away are gone nodes that had not converged on the target when they left. missing are gone canaries: they were
	// admitted, had converged on the target, and have been gone for less than a deadline.
	away, missing int
	// awayUntil is the latest of the away nodes' deadlines (see due); zero: no node is away. A rollout
	// waits for away nodes no longer than that, unless most are away or missing (see maxAway).
	awayUntil time.Time
	// nodes are the live nodes without a pin, by rank.
	nodes []rolloutNode
	// inflight are nodes that are changing, may begin to at any time, or are out of service.
	// pending are the nodes in flight that the rollout told to change: it admitted them or, in a
	// rollback, admits them no longer. missing nodes are pending, too.
	inflight, pending int
	// failed are nodes on which the target failed, that are late, or that left on their way to the
	// target and are past their deadline; failure is the cause on the first of them.
	failed  int
	failure deployments.Facts
	// overdue are nodes in flight whose deadline has passed, except pending ones that can't reach
	// the storage. late are the pending ones among them, apart from stuck ones. due is when the
	// next deadline passes; zero: never.
	overdue, late int
	firstLate     *Node
	due           time.Time
	// stuck is a node that was told to change, is past its deadline, and still serves its old
	// release; nil: none. It reports that it is healthy, or that it can't reach the storage: that
	// is no failure of the release.
	stuck *Node
	// setback is set if a pending node runs a release and is not overdue, or if a canary is missing. In the rolling phase,
	// a node that started since the bake began is no setback.
	setback bool
	// unlisted are nodes that had an entry in status/ and have none now: they may still act on the record. unlistedUntil
	// is when the first of them stops counting.
	unlisted      int
	unlistedUntil time.Time
	// waiting are nodes that came back, and would change if the record applied to them: see readmit.
	waiting []*rolloutNode
}

// rolloutNode is one live node in a rollout.
type rolloutNode struct {
	rank     uint64
	node     *Node
	applies  bool // the record applies to it
	admitted bool // by its rank
	replaced bool // it runs a target that was superseded
	inflight bool
	overdue  bool // it is in flight, and its deadline has passed
	// outsideBudget is set if the node may be admitted, or go back, even if the budget has no room. It has arrived
	// already, is out of service anyway, or goes later, by readmit.
	outsideBudget bool
}

const defaultDeadline = 10 * time.Minute

func (in *inputs) deadline() time.Duration {
	if u := in.Unit.Rollout; u != nil && u.Deadline > 0 {
		return u.Deadline
	}
	return defaultDeadline
}

// due returns the deadline of a node in flight. For a gone node it counts from the node's departure, if that is known.
// For others it counts from the rollout's last step, the store's last outage or the start of the node's agent,
// whichever is latest. No node can report during an outage, and a node that restarts late in a bake would be overdue at
// once.
func (in *inputs) due(st state, n *Node) time.Time {
	from, deadline := st.p.Since, in.deadline()
	if in.Seen.After(from) {
		from = in.Seen
	}
	if n.Started.After(from) && n.Started.Before(in.Now.Add(deadline)) { // a later time comes from a wrong clock
		from = n.Started
	}
	if n.Gone && !n.GoneSince.IsZero() && !n.GoneSince.After(in.Now) {
		from = n.GoneSince // a later step for other nodes doesn't prolong it
	}
	return from.Add(deadline)
}

// dueBack returns the time until which a node that is out of service counts as in flight. The rollout doesn't wait for
// the node. If UnhealthySince is known, the rollout's steps for other nodes don't prolong that time.
func (in *inputs) dueBack(st state, n *Node) time.Time {
	if n.Gone || n.UnhealthySince.IsZero() || n.UnhealthySince.After(in.Now) {
		return in.due(st, n)
	}
	return later(n.UnhealthySince, in.Seen).Add(in.deadline())
}

// shortList is how long nodes must have been missing from the list before the rollout goes on without them. A shorter
// deadline counts instead. Old agents take up to a minute to write a deleted status key again.
const shortList = 2 * time.Minute

// unlisted returns how many nodes without an entry in status/ still take room in the budget. until is when the first of
// them stops counting, as a live node would have written its entry again by then; zero: there are none. known is how
// many nodes the record knows of. For a unit without a rollout, which has no budget, unlisted returns none.
func (in *inputs) unlisted(known int) (nodes int, until time.Time) {
	if in.Unit.Rollout == nil {
		return 0, time.Time{}
	}
	counts := min(in.deadline(), shortList)
	for _, at := range in.Left {
		if ends := at.Add(counts); in.Now.Before(ends) {
			nodes++
			until = earlier(until, ends)
		}
	}
	ends := in.Listed.Add(counts)
	if gone := known - len(in.Nodes); gone > nodes && !in.Listed.IsZero() && in.Now.Before(ends) {
		return gone, earlier(until, ends)
	}
	return nodes, until
}

// applies reports whether a record applies to a node. It does if the node had joined when the record was written, or is
// idle: nothing serves there that a release would replace. It does, too, if the record or the node has no Joined.
func applies(r *deployments.Record, joined uint64, idle bool) bool {
	return r.Joined == 0 || joined <= r.Joined || idle
}

// servesNothing reports whether a node runs no release of the unit, and nothing else is known to serve at dest.
func servesNothing(u *deployments.UnitReport) bool { return u.Running.IsZero() && !u.OtherServes }

// destUnknown reports whether it isn't known if something serves on a node, as no release runs
// there and the agent has yet to examine dest.
func destUnknown(u *deployments.UnitReport) bool { return servesNothing(u) && u.Want.IsZero() }

// pinned reports whether a pin, not the record, decides for a node, or the node only observes.
func pinned(u *deployments.UnitReport) bool { return u.Pinned || u.State == deployments.StateHeld }

// summarize counts the live, in-flight, late and failed nodes of a rollout.
func summarize(in *inputs, st state) summary {
	r := st.record()
	p := r.Rollout
	order := in.Ranks.of(r.Target.Digest, in.Nodes)
	ranks := make([][]uint64, len(p.Superseded)) // the nodes' ranks for each superseded target
	for i, o := range p.Superseded {
		ranks[i] = in.Ranks.of(o.Digest, in.Nodes).ranks
	}
	v := summary{nodes: make([]rolloutNode, 0, len(in.Nodes))}
	v.unlisted, v.unlistedUntil = in.unlisted(r.Nodes)
	back := p.Phase == deployments.PhaseRollingBack
	for _, i := range order.byRank {
		n := &in.Nodes[i]
		u := &n.Report
		if pinned(u) {
			v.pinned++
			if followsPin(&r, u) {
				v.followers++
				if u.State != deployments.StateConverged && !n.Gone {
					v.unconvergedFollowers++
				}
			}
			continue
		}
		onTarget := u.Running.Digest == r.Target.Digest
		x := rolloutNode{rank: order.ranks[i], node: n, applies: applies(&r, n.Joined, servesNothing(u) && !destUnknown(u))}
		x.replaced = !onTarget && partOf(&r, u.Running.Digest)
		x.admitted = x.rank <= p.Cutoff || x.rank <= p.SupersededCutoff && (x.replaced || onTarget)
		aware := u.Generation == r.Generation
		there := u.State == deployments.StateConverged && onTarget
		if n.Gone {
			v.countGone(in, st, n, x, back, aware, there)
			continue
		}
		v.live++
		final := aware && (u.State == deployments.StateQuarantined || u.State == deployments.StateInvalid)
		sick := false // it is out of service, and isn't waited for
		broken := p.Unproven && !x.admitted && brokenByStable(&r, u)
		switch {
		case actsOnOlder(&r, u, int(i), ranks):
			x.inflight = true
		case back:
			on := goesBack(&r, u)
			x.outsideBudget = !on || final && u.Want.Digest == r.Stable.Digest
			x.inflight = !final && (busy(u) || x.applies && (on && !x.admitted || runsUnnamed(&r, u)))
			if !x.applies && !x.inflight && !final && (on && !x.admitted || runsUnnamed(&r, u)) {
				x.outsideBudget = true // it goes in its own turn
				waits := x             // copied only here, as it costs an allocation
				v.waiting = append(v.waiting, &waits)
			}
		// the node refuses the target, which failed there or isn't allowed
		case final && (u.Want.Digest == r.Target.Digest || x.admitted && u.Want.IsZero()):
			x.outsideBudget = true
			if x.admitted {
				cause := deployments.ReasonQuarantined
				if u.State == deployments.StateInvalid {
					cause = deployments.ReasonInvalidRecord
				}
				v.countFailed(n, cause, cmp.Or(u.Error, string(u.State)))
			}
		// it is out of service until its deadline, and isn't waited for
		case u.State == deployments.StateUnhealthy && onTarget:
			x.outsideBudget, x.inflight, sick = true, true, true
			v.countFailed(n, deployments.ReasonUnhealthy, u.Error)
		case x.admitted && failedThere(&r, u):
			x.outsideBudget, x.inflight, sick = true, true, true
			v.countFailed(n, deployments.ReasonQuarantined, cmp.Or(u.Error, string(u.State)))
		case broken:
			x.outsideBudget = true
		default:
			x.outsideBudget = there
			x.inflight = !there && !final && (busy(u) || x.applies && (x.admitted || runsUnnamed(&r, u)))
			if !x.applies && !x.inflight && !final && !there && (x.admitted || runsUnnamed(&r, u)) {
				waits := x // copied only here, as it costs an allocation
				v.waiting = append(v.waiting, &waits)
			}
		}
		if u.RollingBack && !x.inflight && !broken { // whatever it should run by now
			x.inflight, sick = true, true
		}
		if x.inflight {
			due := in.due(st, n)
			if sick {
				due = in.dueBack(st, n)
			}
			x.overdue = v.countInFlight(in, st, n, due, x.applies && x.admitted != back && !sick)
		}
		v.nodes = append(v.nodes, x)
	}
	if !back && v.late > 0 {
		u := &v.firstLate.Report
		v.countFailed(v.firstLate, deployments.ReasonNotInTime, cmp.Or(u.Error, string(u.State), "no report about the unit"))
		v.failed += v.late - 1
	}
	slices.SortFunc(v.waiting, byJoined)
	return v
}

// followsPin reports whether a pinned node goes by itself to the record's target, which a unit pin names. Either its
// agent is too old to let the mirror roll pins out, or its node pin names the same release. The rollout waits for such
// a node.
func followsPin(r *deployments.Record, u *deployments.UnitReport) bool {
	return r.Pinned != nil && u.State != deployments.StateHeld && u.Want.Digest == r.Target.Digest
}

func byJoined(a, b *rolloutNode) int { return cmp.Compare(a.node.Joined, b.node.Joined) }

// countGone counts a node that is gone. back says that the rollout rolls back, aware that the node had noticed its
// admission, there that it had converged on the target. Until its deadline, a node that left in the middle of a switch
// is in flight. So is, unless back is set, a node that left on its way to the target; it counts as failed after the
// deadline, or at once if the target failed on it. If a converged canary is gone, no other node takes its place before
// the canary's deadline.
func (v *summary) countGone(in *inputs, st state, n *Node, x rolloutNode, back, aware, there bool) {
	u := &n.Report
	v.gone++
	if !there {
		v.away++
		v.awayUntil = later(v.awayUntil, in.due(st, n))
	}
	due := in.due(st, n)
	overdue := !in.Now.Before(due)
	changing := (u.State == deployments.StateSwitching || u.RollingBack) && !overdue
	toTarget := aware && x.admitted && !there && u.Want.Digest == st.r.Target.Digest
	switch {
	case back:
		if changing {
			v.countInFlight(in, st, n, due, false)
		}
	case toTarget && (u.State == deployments.StateQuarantined || failedThere(&st.r, u)):
		v.countFailed(n, deployments.ReasonQuarantined, cmp.Or(u.Error, string(u.State)))
		if changing {
			v.countInFlight(in, st, n, due, false)
		}
	case toTarget && overdue:
		v.countFailed(n, deployments.ReasonGone, u.Error)
	case toTarget:
		v.countInFlight(in, st, n, due, true)
	case changing: // by an earlier record
		v.countInFlight(in, st, n, due, false)
	case there && x.admitted && !overdue && st.p.Phase != deployments.PhaseRolling:
		v.missing++
		v.pending++
		v.setback = true
		v.due = earlier(v.due, due)
	}
}

// countInFlight counts a node that is in flight until due. overdue reports whether due has passed; a pending node that
// can't reach the storage is never overdue.
func (v *summary) countInFlight(in *inputs, st state, n *Node, due time.Time, pending bool) (overdue bool) {
	overdue = !in.Now.Before(due)
	v.inflight++
	if pending {
		v.pending++
	}
	switch {
	case overdue && pending && unreached(&n.Report): // it stays in flight: once the storage is back it switches at once
		v.stuck = cmp.Or(v.stuck, n)
		return false
	case overdue:
		v.overdue++
	default:
		v.due = earlier(v.due, due)
	}
	switch u := &n.Report; {
	case !pending:
	case overdue && u.State == deployments.StateConverged && st.p.Phase != deployments.PhaseRollingBack:
		v.stuck = cmp.Or(v.stuck, n)
	case overdue:
		v.firstLate = cmp.Or(v.firstLate, n)
		v.late++
	case st.p.Phase == deployments.PhaseRolling && n.Started.After(st.p.HealthySince):
		// In a large fleet some node always restarts during a bake: that is no setback.
	case !u.Running.IsZero():
		v.setback = true
	}
	return overdue
}

// countFailed counts a failed node, and keeps the cause of the first one.
func (v *summary) countFailed(n *Node, cause deployments.Reason, text string) {
	if v.failed++; v.failed == 1 {
		v.failure = deployments.Facts{"node": n.Name, "cause": string(cause), "error": clipped(text)}
	}
}

// unreached reports whether a node could not fetch the release yet, as the storage or the network failed.
func unreached(u *deployments.UnitReport) bool {
	return u.Reason == deployments.ReasonStorageUnavailable &&
		(u.State == deployments.StateRetrying || u.State == deployments.StateFetching)
}

// waitsFor returns the reason why the rollout waits for the stuck node.
func (v summary) waitsFor() (deployments.Reason, deployments.Facts) {
	u := &v.stuck.Report
	if unreached(u) {
		return deployments.ReasonStorageUnavailable, deployments.Facts{"node": v.stuck.Name, "error": clipped(u.Error)}
	}
	return deployments.ReasonUnaware, deployments.Facts{"node": v.stuck.Name}
}

// partOf reports whether a release is the target of a record's rollout, or one that it superseded, and is not stable.
func partOf(r *deployments.Record, d deployments.Digest) bool {
	if d.IsZero() || d == r.Stable.Digest || r.Rollout == nil {
		return false
	}
	is := func(o deployments.Superseded) bool { return o.Digest == d }
	return d == r.Target.Digest || slices.ContainsFunc(r.Rollout.Superseded, is)
}

// goesBack reports whether a node would leave its release if told to go back: for stable or, if there is none, for
// what it served before the first release. It stays if nothing served before, or if that can't be put back.
func goesBack(r *deployments.Record, u *deployments.UnitReport) bool {
	return partOf(r, u.Running.Digest) && (!r.Stable.IsZero() || u.Leavable)
}

// busy reports whether a node on which something served is changing, or waits in the middle of a deployment.
func busy(u *deployments.UnitReport) bool {
	switch u.State {
	case deployments.StateFetching, deployments.StateSwitching, deployments.StateRetrying:
		return !u.Running.IsZero() || u.OtherServes
	case deployments.StateWaiting:
		return !u.Running.IsZero() && !u.Want.IsZero() && u.Want.Digest != u.Running.Digest
	}
	return false
}

// brokenByStable reports whether a node is out of service because of the record's stable release.
func brokenByStable(r *deployments.Record, u *deployments.UnitReport) bool {
	switch u.State {
	case deployments.StateSwitching, deployments.StateUnhealthy, deployments.StateQuarantined:
		return u.Want.Digest == r.Stable.Digest
	}
	return false
}

// failedThere reports whether the target failed on a node in the record's generation, and what the node went back to
// does not serve yet.
func failedThere(r *deployments.Record, u *deployments.UnitReport) bool {
	return u.Generation == r.Generation && !u.Failed.IsZero() && u.Failed == r.Target.Digest
}

// actsOnOlder reports whether a node may still act on an earlier record that admitted it: it hasn't reported that it
// knows this one. ranks holds all nodes' ranks for each superseded target; i is this node's index.
func actsOnOlder(r *deployments.Record, u *deployments.UnitReport, i int, ranks [][]uint64) bool {
	if u.Generation >= r.Generation {
		return false
	}
	for k, o := range r.Rollout.Superseded {
		if ranks[k][i] > o.Cutoff {
			continue
		}
		switch {
		case u.State == deployments.StateConverged && u.Running.Digest == o.Digest && !o.RollingBack:
		case u.State == deployments.StateQuarantined && slices.Contains(u.Quarantined, o.Digest) &&
			u.Generation >= o.Generation:
		default:
			return true
		}
	}
	return false
}

// runsUnnamed reports whether a node will go to stable by itself, as it runs or serves something that the record
// doesn't name. It won't if stable failed there, or if there is none.
func runsUnnamed(r *deployments.Record, u *deployments.UnitReport) bool {
	stable := r.Stable.Digest
	return !servesNothing(u) && u.Running.Digest != stable && !partOf(r, u.Running.Digest) &&
		!stable.IsZero() && !slices.Contains(u.Quarantined, stable)
}

// unconverged returns how many live nodes without a pin serve something other than the target. When a rollout has
// ended, these are the nodes whose failures it tolerated. Without another rollout they would all try the target again
// at once. It returns 0 if the unit has no rollout.
func unconverged(in *inputs, target deployments.Digest) (nodes int) {
	if in.Unit.Rollout == nil {
		return 0
	}
	for i := range in.Nodes {
		u := &in.Nodes[i].Report
		if !in.Nodes[i].Gone && !pinned(u) && !servesNothing(u) && u.Running.Digest != target {
			nodes++
		}
	}
	return nodes
}

// recheckAtDeadline schedules the next call for the next deadline of a node in flight, or for the
// end of unlisted nodes' count.
func recheckAtDeadline(in *inputs, st state, v summary, moved bool) state {
	st = st.recheckBy(v.unlistedUntil)
	if moved { // their deadlines all count from now
		return st.recheckBy(in.Now.Add(in.deadline()))
	}
	return st.recheckBy(v.due)
}
