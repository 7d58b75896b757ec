package policy

import (
	"slices"

	"kedge/deployments"
)

// Refusal returns why an order would change nothing about a record; empty: it would change something.
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
	case order == "retry":
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

// Orphaned marks a record whose unit was removed from Git. Its rollout stays where it is until the unit file is
// back; then Next continues it. Meanwhile nodes follow pins at once, as the budget is unknown.
func Orphaned(r deployments.Record) deployments.Record {
	r.Orphaned, r.Paced = true, false
	if r.Rollout == nil || r.Rollout.Reason == deployments.ReasonOrphaned {
		return r
	}
	p := *r.Rollout
	p.Reason, p.Facts = deployments.ReasonOrphaned, p.Facts.With("was", string(p.Reason))
	r.Rollout = &p
	return r
}

// IsOrphaned reports whether a record's unit was removed from Git, so that no mirror continues its rollout.
// Mirrors of the previous version marked only the rollout.
func IsOrphaned(r deployments.Record) bool {
	return r.Orphaned || r.Rollout != nil && r.Rollout.Reason == deployments.ReasonOrphaned
}

// obey applies an operator's order. did is what the order did; refused is why it changed nothing.
func obey(in *inputs, st state) (next state, did, refused cause) {
	if st.r.Target != in.Record.Target && in.Order == "promote" {
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
		case st.p.Phase == deployments.PhaseFrozen: // the step that follows starts it
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

// retry begins the rollout anew. Nodes on the target stay there. Nodes on which it failed are admitted once more,
// in their turn.
func retry(in *inputs, st state) state {
	st.r.Retry++
	if !st.on {
		st = st.because(deployments.ReasonRetried, deployments.Facts{"ended": "true"})
		if tolerated := unconverged(in, st.r.Target.Digest); tolerated > 0 {
			st.r.Generation++
			st.on, st.p = true, deployments.Progress{Tolerated: tolerated}
			st = st.roll(in)
			st.r.Joined = tell(in, st)
		}
		return st
	}
	list := superseded(in, st.record())
	st.r.Generation++
	st.p = deployments.Progress{Forced: st.p.Forced, Superseded: list}
	st.r.Joined = tell(in, st)
	return start(in, st).because(deployments.ReasonRetried, nil)
}

// unconverged counts the nodes that run something else and would, without a rollout, all try the target again at
// once. Their failures were tolerated before.
func unconverged(in *inputs, target deployments.Digest) (nodes int) {
	if in.Unit.Rollout == nil {
		return 0
	}
	for i := range in.Nodes {
		u := &in.Nodes[i].Report
		if !in.Nodes[i].Gone && !pinned(u) && !bare(u) && u.Running.Digest != target {
			nodes++
		}
	}
	return nodes
}

// pinned reports whether a pin, not the record, decides for a node.
func pinned(u *deployments.UnitReport) bool { return u.Pinned || u.State == deployments.StateHeld }

// stop applies the unit's on_failure: it pauses the rollout, or rolls it back. The rollout of a pin is always
// paused.
func stop(in *inputs, st state, why cause) state {
	if u := in.Unit.Rollout; u != nil && u.OnFailure == deployments.Pause || st.r.Pinned != nil {
		st = st.enter(in, deployments.PhasePaused) // only the pin's operator can tell what to go back to
		st.why = why
		return st
	}
	return turnBack(in, st, why)
}

// hasWayBack reports whether a rollout has something to go back to: a stable release or, for a first release, what
// served before, if it wasn't replaced yet or can be put back.
func hasWayBack(st state) bool {
	return !st.r.Stable.IsZero() && st.r.Stable != st.r.Target || st.r.Stable.IsZero() && st.p.Serving
}

// turnBack begins a rollback. It raises the generation, so that reports show which nodes know of it.
func turnBack(in *inputs, st state, why cause) state {
	if !hasWayBack(st) {
		why.facts = why.facts.With("stable", "none")
		st = st.enter(in, deployments.PhasePaused)
		st.why = why
		return st
	}
	list := superseded(in, st.record())
	st.r.Claim = ClaimOf(st.r)
	st.r.Generation++
	st.p = deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: everyRank, Since: in.Now,
		Reason: why.reason, Facts: why.facts, Failed: st.r.Target.Digest, Superseded: list, Forced: st.p.Forced}
	st.r.Joined = tell(in, st)
	st.why = why
	return st
}
