package policy

import (
	"time"

	"kedge/deployments"
)

// Transition is the result of Next.
type Transition struct {
	// Record is the next record; equal to the old one if nothing is to be done.
	Record deployments.Record
	// Reason, with its Facts, is what was done, or why nothing was; may be empty.
	Reason deployments.Reason
	Facts  deployments.Facts
	// Refused is set if an order changes nothing because of the record, or of an invalid pin; Reason then says why.
	// OrderReason, with OrderFacts, is the reason code of what an order did; empty: no order did anything.
	Refused     bool
	OrderReason deployments.Reason
	OrderFacts  deployments.Facts
	// Recheck is when time alone could change the answer; zero: never.
	Recheck time.Time
}

// Next computes the next record of a unit from its record, its unit file and pin, the fleet's reports, an order and the
// time. It changes nothing but Ranks, and the same Situation gives the same Transition. The mirror calls Next again
// once it has written the record. An order is always consumed: one that makes no sense in the rollout's phase changes
// nothing, and Reason says so.
//
// A new target goes to the canaries, bakes, and waits for approval if that is configured. Then it
// goes to as many nodes at a time as max_unavailable leaves room for. A unit pin, and with
// fast_back a target that was stable before, skip the gates and keep the budget. A pin with at_once
// goes to all nodes. While a pin is invalid, the record stays as it is, if there is one.
//
// A new target begins in any phase, but waits for a rollback if a freeze would hold it up: see
// followTarget.
//
// Three kinds of nodes are in flight, each node until its deadline, or for longer while it can't
// reach the storage. Live nodes that were admitted, are changing, or are out of service by the
// target count until they converge. Nodes that may still act on an earlier record count until their
// reports name the newest generation. Nodes that left on their way to the target, or in the middle
// of a switch, count until they are back. The record doesn't apply to a node that comes back before
// there is room for it: see Record.Joined. Pinned and held nodes don't count. If all nodes are
// pinned or held, the rollout waits, unless its target is a unit pin's and one of these nodes
// follows that pin by itself: see followsPin.
func Next(s Situation) Transition {
	if s.Seen.After(s.Now) {
		s.Seen = s.Now
	}
	s.Record.Orphaned = false // whoever calls Next has the unit file
	if s.Listed.After(s.Now) {
		s.Listed = s.Now
	}
	in := &inputs{s}
	if in.Ranks == nil {
		in.Ranks = new(Ranks)
	}
	st := stateOf(s)
	// an invalid pin leaves the record as it is, if there is one
	if s.Pin != nil && s.Pin.Err != nil && s.Record.Generation > 0 {
		return Transition{Record: s.Record, Reason: deployments.ReasonInvalidPin,
			Facts: deployments.Facts{"error": clipped(s.Pin.Err.Error())}, Refused: s.Order != ""}
	}
	st = followTarget(in, st)
	var did, refused cause
	if s.Order != "" {
		st, did, refused = applyOrder(in, st)
	}
	for range 6 { // at most frozen, canary, pending-approval, rolling, rolling-back, rolled-back
		next, more := advance(in, st)
		if st = next; !more {
			break
		}
	}
	if st.isIn(deployments.PhaseRolledBack) && !stateOf(s).isIn(deployments.PhaseRolledBack) {
		// No record may tell who waits for the release that Git names that it was rolled back: that was another one.
		ended := *in
		ended.Record = st.record()
		st = followTarget(&ended, st)
	}
	if st.on && st.why.reason != "" && st.p.Phase != deployments.PhaseRolledBack {
		st.p.Reason, st.p.Facts = st.why.reason, st.why.facts
	}
	if !st.on {
		in.Ranks.forget()
	}
	m := Transition{Record: st.record(), Reason: st.why.reason, Facts: st.why.facts, Recheck: st.recheckAt,
		OrderReason: did.reason, OrderFacts: did.facts}
	if refused.reason != "" {
		m.Reason, m.Facts, m.Refused = refused.reason, refused.facts, true
	}
	return m
}

// advance is the table of transitions: it runs the step of the current phase. more is set if another step may
// follow at once.
func advance(in *inputs, st state) (next state, more bool) {
	if !st.on {
		return readmitReturned(in, st), false
	}
	st, ended := firstRelease(in, st)
	if ended {
		return st, false
	}
	switch st.p.Phase {
	case deployments.PhaseFrozen:
		return stepFrozen(in, st)
	case deployments.PhaseCanary:
		return stepCanary(in, st)
	case deployments.PhasePendingApproval:
		return stepPendingApproval(in, st)
	case deployments.PhaseRollingBack:
		return stepRollingBack(in, st)
	case deployments.PhaseRolledBack:
		return readmitReturned(in, st), false
	case deployments.PhasePaused:
		return st, false
	default:
		return stepRolling(in, st)
	}
}
