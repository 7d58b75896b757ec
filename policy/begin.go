package policy

import (
	"slices"
	"time"

	"kedge/deployments"
)

// followTarget begins the rollout of the release that Git or a unit pin names, unless the record deals with it
// already. A rollback begins, or goes on, if a freeze would hold up the new rollout before its first node, as nodes
// must not stay on a failed release for that long. Progress.Next then names the release that waits. Its rollout begins
// when the rollback or the freeze ends.
func followTarget(in *inputs, st state) state {
	st.p.Next = deployments.Pointer{}
	next := named(in, st)
	if next.isIn(deployments.PhaseFrozen) {
		if back, needed := neededRollback(in, st); needed {
			back.p.Next = next.r.Target
			next = back.recheckBy(in.Freeze.ChangesAt)
		}
	}
	next.r.After, next.r.Drift, next.r.Adopt = in.Unit.After, in.Unit.Drift, in.Unit.Adopt
	next.r.Paced = in.Unit.Rollout != nil && in.Pin != nil
	if in.Unit.Rollout == nil {
		next.r.Joined = 0 // all nodes go at once
	}
	return next
}

// neededRollback returns the state of the rollback that is under way, or that has to begin because too many nodes have
// failed. needed is false if there is neither.
func neededRollback(in *inputs, st state) (back state, needed bool) {
	switch {
	case !st.on:
		return st, false
	case st.p.Phase == deployments.PhaseCanary, st.p.Phase == deployments.PhasePendingApproval,
		st.p.Phase == deployments.PhaseRolling:
		var v summary
		st, v = checkFleet(in, st)
		st, _ = stopIfFailing(in, st, v)
	}
	return st, st.p.Phase == deployments.PhaseRollingBack
}

// named returns the state in which the rollout of the release that Git or a unit pin names begins, or the current state
// if the record deals with that release already.
func named(in *inputs, st state) state {
	pin, pinned := activePin(in)
	switch {
	case pinned && st.r.Pinned == nil && in.Record.Generation > 0 && !st.on && st.r.Target == pin.Release:
		return st.recheckBy(pin.Until) // every node runs the target already
	case pinned && st.r.Pinned == nil && in.Record.Generation == 0:
		return begin(in, st, in.Unit.Release) // a pin of a unit without a record waits for a record
	case pinned && (st.r.Pinned == nil || st.r.Target != pin.Release):
		return beginPin(in, st, pin)
	case pinned:
		return st.recheckBy(pin.Until)
	case st.r.Pinned != nil:
		return endPin(in, st)
	case in.Record.Generation == 0 || handledRelease(in) != in.Unit.Release:
		return begin(in, st, in.Unit.Release)
	}
	return st
}

// activePin returns the unit pin whose release the mirror rolls out, and whether there is one. There is none if the pin
// is missing, invalid, expired or a hold. A unit without a rollout has none either, as its nodes follow pins by
// themselves.
func activePin(in *inputs) (deployments.Pin, bool) {
	if in.Pin == nil || !in.Pin.Present || in.Pin.Err != nil || in.Unit.Rollout == nil {
		return deployments.Pin{}, false
	}
	p := in.Pin.Value
	return p, !p.Hold && !p.Expired(in.Now)
}

// handledRelease returns the release that the record deals with already: its target, or Git's
// release if the record's rollout is rolling that release back, or has done so. No other rollout
// begins while Git names the release that is returned.
func handledRelease(in *inputs) deployments.Pointer {
	if p := in.Record.Rollout; p != nil && p.Failed == in.Unit.Release.Digest && !p.Failed.IsZero() {
		return in.Unit.Release
	}
	return in.Record.Target
}

// successor returns the state with which the rollout of a target, named by Git or by a pin, begins. ok is false if the
// record has no room for all the releases that nodes may run. Nodes then have to converge first, and next is the
// current state, which waits or rolls back.
func successor(in *inputs, st state, target deployments.Pointer) (next state, ok bool) {
	was := in.Record
	next = state{on: true, recheckAt: st.recheckAt, p: deployments.Progress{Since: in.Now}}
	next.r = deployments.Record{Target: target, Stable: was.Target, Generation: was.Generation + 1,
		Retry: was.Retry, Commit: in.Commit,
		Joined: was.Joined, Nodes: was.Nodes}
	if in.Unit.Rollout != nil {
		next.r.Nodes = len(in.Nodes)
		if unlisted, until := in.unlisted(was.Nodes); unlisted > 0 {
			next.r.Nodes = was.Nodes
			next = next.recheckBy(until)
		}
	}
	if was.Rollout != nil {
		next.r.Stable, next.p.StablePinned = was.Stable, was.Rollout.StablePinned
		if was.Rollout.Phase != deployments.PhaseRolledBack {
			next.p.Superseded = superseded(in, was)
		}
	} else {
		next.p.StablePinned = targetPinned(was)
		next.p.Unproven = !was.Stable.IsZero() && was.Stable != was.Target && was.Pinned == nil
	}
	if len(next.p.Superseded) > deployments.MaxSuperseded {
		if unlisted, until := in.unlisted(was.Nodes); unlisted > 0 { // a node that isn't listed may run any of them
			return st.recheckBy(until), false
		}
		switch {
		case st.r.Stable.IsZero(): // nodes have nothing to converge on
			return st.because(deployments.ReasonReplacedTooOften, deployments.Facts{"stable": "none"}), false
		case st.p.Phase != deployments.PhaseRollingBack && st.r.Stable != st.r.Target:
			return turnBack(in, st, cause{deployments.ReasonReplacedTooOften, nil}), false
		case st.p.Phase == deployments.PhasePaused:
			st = st.because(deployments.ReasonReplacedTooOften, deployments.Facts{"paused": "true"})
		}
		return st, false
	}
	next.r.Joined = nextJoined(in, next)
	return next, true
}

// begin returns the state in which the rollout of Git's new target begins or has ended, as launch decides. If successor
// has no room for another target, begin returns successor's state, which waits or rolls back.
func begin(in *inputs, st state, target deployments.Pointer) state {
	next, ok := successor(in, st, target)
	if !ok {
		return next
	}
	return launch(in, next)
}

// launch starts a new rollout, or ends it at once. It ends the rollout if nodes run the target
// already. If the unit has no rollout and no freeze holds up the target, it ends the rollout, too,
// so that all nodes go at once.
func launch(in *inputs, st state) state {
	revert := st.r.Stable == st.r.Target
	was := in.Record
	switch {
	case revert && len(st.p.Superseded) == 0:
		if was.Rollout != nil {
			st.p.Tolerated = unconverged(in, st.r.Target.Digest)
		}
		if st.p.Tolerated > 0 {
			return start(in, st)
		}
		return st.end().because(deployments.ReasonRunsAlready, nil)
	case in.Freeze.Frozen && !revert && !st.p.Forced && !stableBefore(in, st.r.Target):
		return start(in, st)
	case in.Unit.Rollout == nil:
		return st.end().because(deployments.ReasonEveryNode, nil)
	default:
		return start(in, st)
	}
}

// firstRelease ends the rollout of a unit's first release once every live node without a pin has
// reported that nothing else serves at dest. All nodes then take the release at once. At least one
// node must have reported. A node that refuses the release counts as if it had reported that
// nothing serves. If a node reports that something serves, firstRelease sets Serving, and the
// rollout goes on within its budget. ended reports whether firstRelease ended the rollout.
func firstRelease(in *inputs, st state) (next state, ended bool) {
	if in.Unit.Rollout == nil || !st.r.Stable.IsZero() || st.p.Serving {
		return st, false
	}
	switch st.p.Phase {
	case deployments.PhaseCanary, deployments.PhasePendingApproval, deployments.PhaseRolling:
	default:
		return st, false
	}
	reported := 0
	for i := range in.Nodes {
		u := &in.Nodes[i].Report
		switch {
		case in.Nodes[i].Gone || pinned(u):
		case u.OtherServes, !u.Running.IsZero() && u.Running.Digest != st.r.Target.Digest:
			st.p.Serving = true
			return st, false
		case u.Generation == st.r.Generation && (u.Want.Digest == st.r.Target.Digest || u.State == deployments.StateInvalid):
			reported++
		default:
			reported -= len(in.Nodes) // it has yet to look at dest
		}
	}
	if reported <= 0 {
		return st, false
	}
	return st.end().because(deployments.ReasonFirstRelease, nil), true
}

// stableBefore reports whether a target may skip the gates because it was stable in one of the last generations, and
// the unit's fast_back allows that.
func stableBefore(in *inputs, target deployments.Pointer) bool {
	return in.Unit.Rollout != nil && in.Unit.Rollout.FastBack && slices.Contains(in.StableBefore, target.Digest)
}

// start sets the first phase of a rollout. After a pause the bake starts over, because nothing watched the nodes
// meanwhile.
func start(in *inputs, st state) state {
	u := in.Unit.Rollout
	// Git went back while nodes were on the way: gates would only keep them on the release that Git left
	revert := st.r.Stable == st.r.Target
	st.p.SkipsGates = stableBefore(in, st.r.Target) || st.r.Pinned != nil
	st.p.NoCanary = u == nil || u.Canary.N == 0
	switch {
	case in.Freeze.Frozen && !st.p.Forced && !revert && !st.p.SkipsGates:
		st = st.enter(in, deployments.PhaseFrozen).becauseFrozen(in)
	case u == nil || revert || u.Canary.N == 0 || st.p.SkipsGates:
		st = st.roll(in).because(deployments.ReasonRolling, nil)
	default:
		st = st.enter(in, deployments.PhaseCanary).because(deployments.ReasonCanary, nil)
	}
	st.p.HealthySince = time.Time{}
	return st
}

// beginPin returns the state in which the release of a unit pin is rolled out, without gates and within the budget. A
// pin with at_once has no rollout: nodes follow it by themselves. If successor has no room, the result is as in begin.
func beginPin(in *inputs, st state, pin deployments.Pin) state {
	git := gitsRecord(st)
	next, ok := successor(in, st, pin.Release)
	if !ok {
		return next
	}
	next.r.Pinned, next.r.Commit = &git, in.Record.Commit
	next = next.recheckBy(pin.Until)
	if pin.AtOnce { // nodes go by themselves; when the pin ends, they stay on its release until their turn
		next.p.Superseded = nil
		return next.end().because(deployments.ReasonPinned, nil)
	}
	return launch(in, next)
}

// gitsRecord returns what the record keeps of Git's wishes while a pin overrides them. endPin goes back to what Git
// names then.
func gitsRecord(st state) deployments.Pinned {
	if st.r.Pinned != nil {
		git := *st.r.Pinned
		if st.r.Target == git.Target {
			// The pin was the last to ask for Git's release. This claim keeps the release off nodes where it has failed since.
			git.Claim = st.r.RequestGeneration()
		}
		return git
	}
	git := deployments.Pinned{Target: st.r.Target, Stable: st.r.Stable, Claim: st.r.RequestGeneration(),
		StablePinned: st.p.StablePinned, Failed: st.p.Failed}
	if !st.on {
		git.Stable, git.StablePinned = st.r.Target, false
	}
	return git
}

// targetPinned reports whether a record's target comes from pins alone, and wasn't Git's stable release before.
func targetPinned(r deployments.Record) bool {
	return r.Pinned != nil && (r.Target != r.Pinned.Stable || r.Pinned.StablePinned)
}

// endPin goes back to the release that Git names. If the pin's rollout had ended on that release, endPin only clears
// Pinned and sets Commit. A release that was rolled back before the pin isn't rolled out again: its rollback goes on. A
// release that was stable before the pin goes without gates, any other as a new target. If successor has no room, the
// result is as in begin. While a freeze would hold up a new target, and nodes have yet to leave the release that was
// rolled back before the pin, that rollback goes on first.
func endPin(in *inputs, st state) state {
	git := gitsRecord(st)
	target := in.Unit.Release
	if target == in.Record.Target && !st.on {
		st.r.Pinned, st.r.Commit = nil, in.Commit
		return st
	}
	next, ok := successor(in, st, target)
	if !ok {
		return next
	}
	switch claim := in.Record.RequestGeneration(); {
	case target == git.Target:
		next.r.Claim = git.Claim
	case target == in.Record.Target && claim < 0:
		next.r.Claim = claim // the store may have lost that Git asked for it before the pin did
	}
	if target.Digest == git.Failed && !git.Failed.IsZero() {
		own := deployments.Superseded{Digest: in.Record.Target.Digest, Cutoff: everyRank, Generation: in.Record.Generation}
		next.r.Stable, next.p.StablePinned = git.Stable, git.StablePinned
		if next.r.Stable.IsZero() && own.Digest != git.Failed && !st.on {
			// the pin's rollout has ended, so that every node runs its release
			next.r.Stable, next.p.StablePinned = in.Record.Target, true
		}
		if len(next.p.Superseded) == 0 && own.Digest != next.r.Stable.Digest && own.Digest != git.Failed {
			next.p.Superseded = []deployments.Superseded{own}
		}
		next.p.Phase, next.p.Cutoff, next.p.Failed = deployments.PhaseRollingBack, everyRank, git.Failed
		next.p.Unproven = false
		next.r.Joined = in.Record.Joined // what successor returned is for another stable release
		next.r.Joined = nextJoined(in, next)
		next = next.because(deployments.ReasonRolledBack, deployments.Facts{"pin": "ended"})
		next.p.Reason, next.p.Facts = next.why.reason, next.why.facts
		return next
	}
	if target == git.Stable {
		next.p.Forced = true
		next = launch(in, next)
		if next.on {
			next = next.roll(in).because(deployments.ReasonRolling, nil)
			next.p.SkipsGates = true
		}
		return next
	}
	next = launch(in, next)
	unfinished := func(o deployments.Superseded) bool { return o.Digest == git.Failed && o.Digest == git.Target.Digest }
	if next.isIn(deployments.PhaseFrozen) && slices.ContainsFunc(next.p.Superseded, unfinished) {
		older := *in
		older.Unit.Release, older.Commit = git.Target, in.Record.Commit
		next = endPin(&older, st)
		next.p.Next = target
	}
	return next
}
