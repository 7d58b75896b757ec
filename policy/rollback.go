package policy

import (
	"fmt"
	"slices"

	"kedge/deployments"
)

// stop applies the unit's on_failure: it pauses the rollout, or turns it back. The rollout of a pin is always paused.
func stop(in *inputs, st state, why cause) state {
	if u := in.Unit.Rollout; u != nil && u.OnFailure == deployments.Pause || st.r.Pinned != nil {
		st = st.enter(in, deployments.PhasePaused) // only the pin's operator can tell what to go back to
		st.why = why
		return st
	}
	return turnBack(in, st, why)
}

// canGoBack is Record.CanGoBack for a state.
func canGoBack(st state) bool {
	r := st.r
	r.Rollout = &st.p
	return r.CanGoBack()
}

// turnBack begins a rollback, or pauses the rollout if there is nothing to go back to. A rollback raises the
// generation, so that reports show which nodes know of it.
func turnBack(in *inputs, st state, why cause) state {
	if !canGoBack(st) {
		why.facts = why.facts.With("stable", "none")
		st = st.enter(in, deployments.PhasePaused)
		st.why = why
		return st
	}
	list := superseded(in, st.record())
	st.r.Claim = st.r.RequestGeneration()
	st.r.Generation++
	st.p = deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: everyRank, Since: in.Now,
		Reason: why.reason, Facts: why.facts, Failed: st.r.Target.Digest, Superseded: list, Forced: st.p.Forced,
		StablePinned: st.p.StablePinned}
	st.r.Joined = nextJoined(in, st)
	st.why = why
	return st
}

// stepRollingBack lets nodes go back to stable, as many at a time as the budget allows. It ends
// once no live node has to go back, none is unlisted, and none but nodes past their deadline are in
// flight. If all known nodes are gone or pinned, it waits.
func stepRollingBack(in *inputs, st state) (state, bool) {
	v := summarize(in, st)
	if v.live == 0 && v.gone+v.pinned > 0 {
		return st, false
	}
	st, left, moved := lowerCutoff(in, st, v)
	if !moved {
		since := st.p.HealthySince
		st, moved = readmit(in, st, v, len(v.waiting))
		st.p.HealthySince = since
	}
	if left || moved || v.inflight > v.overdue || len(v.waiting) > 0 || v.unlisted > 0 {
		return recheckAtDeadline(in, st, v, moved), false
	}
	p := st.p
	facts := p.Facts
	if v.overdue > 0 { // they go on trying, and count as in flight in the next rollout
		facts = facts.With("left", fmt.Sprint(v.overdue))
	}
	st.p = deployments.Progress{Phase: deployments.PhaseRolledBack, Since: in.Now, Failed: p.Failed,
		Reason: p.Reason, Facts: facts, Message: p.Message, StablePinned: p.StablePinned}
	st.r.Nodes = v.live + v.gone + v.pinned
	return st.because(p.Reason, facts), false
}

// lowerCutoff lowers the cutoff, so that the next nodes leave the failed release, as many as the budget has room for.
// left reports whether nodes have to stay for now, moved whether nodes were told to go back.
func lowerCutoff(in *inputs, st state, v summary) (next state, left, moved bool) {
	room, spent := room(in, v)
	stay := uint64(0) // the highest rank that stays for now
	for _, n := range slices.Backward(v.nodes) {
		if n.rank > st.p.Cutoff || n.outsideBudget {
			continue
		}
		counted := n.inflight && !(spent && n.overdue)
		if counted && room < 0 || !counted && room <= 0 {
			stay = n.rank
			break
		}
		if !counted {
			room--
		}
		moved = true
	}
	if moved {
		st.p.Cutoff, st.p.Since = stay, in.Now
	}
	return st, stay > 0, moved
}
