package policy

import (
	"slices"

	"kedge/deployments"
)

// Refusal returns why an order would change nothing about a record; an empty reason: the order would change something.
// Next also refuses a promote if Git or a pin has named another target meanwhile.
func Refusal(order string, r deployments.Record) (deployments.Reason, deployments.Facts) {
	c := refusal(order, r)
	return c.reason, c.facts
}

func refusal(order string, r deployments.Record) cause {
	is := func(reason deployments.Reason) cause { return cause{reason, deployments.Facts{"order": order}} }
	p := r.Rollout
	switch {
	case !slices.Contains(deployments.Verbs(), deployments.Verb(order)):
		return is(deployments.ReasonUnknownOrder)
	case IsOrphaned(r):
		return is(deployments.ReasonOrphaned)
	case order == "retry" && p != nil && p.Phase == deployments.PhaseRollingBack:
		return is(deployments.ReasonRollingBack)
	case order == "retry", order == "promote" && p.WaitsForRollback():
		return cause{}
	case p == nil:
		return is(deployments.ReasonNothingUnderWay)
	case p.Phase == deployments.PhaseRollingBack:
		return is(deployments.ReasonRollingBack)
	case p.Phase == deployments.PhaseRolledBack:
		return is(deployments.ReasonRolledBack)
	case order == "promote" && p.Phase == deployments.PhasePaused:
		return is(deployments.ReasonPausedAlready)
	case order == "promote" && p.Phase == deployments.PhaseRolling && !p.HeldUp():
		return is(deployments.ReasonRollingAlready)
	case order == "pause" && p.Phase == deployments.PhasePaused:
		return is(deployments.ReasonPausedAlready)
	case order == "resume" && p.Phase != deployments.PhasePaused:
		return is(deployments.ReasonNotPaused)
	}
	return cause{}
}

// MarkOrphaned returns r, marked as a record whose unit was removed from Git. The rollout stays
// where it is until the unit file is back; then Next continues it. Meanwhile nodes follow pins at
// once, as the budget is unknown.
func MarkOrphaned(r deployments.Record) deployments.Record {
	r.Orphaned, r.Paced = true, false
	if r.Rollout == nil || r.Rollout.Reason == deployments.ReasonOrphaned {
		return r
	}
	p := *r.Rollout
	p.Reason, p.Facts = deployments.ReasonOrphaned, p.Facts.With("was", string(p.Reason))
	p.Next = deployments.Pointer{}
	r.Rollout = &p
	return r
}

// IsOrphaned reports whether a record's unit was removed from Git, so that no mirror continues its rollout.
// Mirrors of the previous version marked only the rollout.
func IsOrphaned(r deployments.Record) bool {
	return r.Orphaned || r.Rollout != nil && r.Rollout.Reason == deployments.ReasonOrphaned
}

// applyOrder applies an operator's order. did is what the order did; refused is why it changed nothing.
func applyOrder(in *inputs, st state) (next state, did, refused cause) {
	seen := in.Record.Rollout == nil || in.Record.Rollout.Next == st.p.Next
	if (st.r.Target != in.Record.Target || !seen) && in.Order == "promote" {
		return st, cause{}, cause{deployments.ReasonNotSeenYet, nil}
	}
	if refused = refusal(in.Order, st.record()); refused.reason != "" {
		return st, cause{}, refused
	}
	switch in.Order {
	case "retry":
		st = retry(in, st)
	case "promote":
		switch {
		case st.p.WaitsForRollback():
			thawed := *in
			thawed.Freeze = FreezeState{}
			st = followTarget(&thawed, stateOf(in.Situation))
			st = st.because(deployments.ReasonForced, deployments.Facts{"starts": "true"})
			st.p.Forced = true
		case st.p.Phase == deployments.PhaseFrozen: // the step that follows starts the rollout
			st = st.because(deployments.ReasonForced, deployments.Facts{"starts": "true"})
			st.p.Forced = true
		case st.p.HeldUp(): // only the freeze ends: whoever lifts it may still want the canaries to bake
			st = st.because(deployments.ReasonForced, nil)
			st.p.Forced = true
		default:
			st = st.roll(in).because(deployments.ReasonPromoted, nil)
		}
	case "pause":
		st = st.enter(in, deployments.PhasePaused).because(deployments.ReasonPaused, nil)
	case "resume":
		st.p.Tolerated = summarize(in, st).failed
		if st.p.Promoted {
			st = st.roll(in)
		} else {
			st = start(in, st)
		}
		st = st.because(deployments.ReasonResumed, nil)
	case "abort":
		st = turnBack(in, st, cause{deployments.ReasonAborted, nil})
	}
	return st, st.why, cause{}
}

// retry begins the rollout anew. Nodes that run the target keep it. Nodes on which the target
// failed are admitted once more, in their turn. If no rollout is under way and unconverged counts
// any nodes, a rollout to them begins. If it counts none, the nodes on which the target failed try
// it again at once.
func retry(in *inputs, st state) state {
	st.r.Retry++
	if !st.on {
		st = st.because(deployments.ReasonRetried, deployments.Facts{"ended": "true"})
		if tolerated := unconverged(in, st.r.Target.Digest); tolerated > 0 {
			st.r.Generation++
			st.on, st.p = true, deployments.Progress{Tolerated: tolerated, StablePinned: targetPinned(st.r)}
			st = st.roll(in)
			st.r.Joined = nextJoined(in, st)
		}
		return st
	}
	list := superseded(in, st.record())
	st.r.Generation++
	st.p = deployments.Progress{Forced: st.p.Forced, Superseded: list, StablePinned: st.p.StablePinned}
	st.r.Joined = nextJoined(in, st)
	return start(in, st).because(deployments.ReasonRetried, nil)
}
