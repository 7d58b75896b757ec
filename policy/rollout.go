package policy

import (
	"maps"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// Situation holds the inputs of Next for one unit's record: plain data, read by the mirror.
type Situation struct {
	Now time.Time
	// Unit is the unit file in the mirrored commit, and Commit that commit's hash.
	Unit   deployments.Unit
	Commit string
	// Record is the record in force; zero: none.
	Record deployments.Record
	// Nodes are the nodes that have an entry in status/ for the unit's role.
	Nodes []Node
	// Seen is since when Nodes have been read without a gap: while the store is away, no node can report. Zero:
	// always. It is derived from elapsed time, so that setting the clock doesn't change it.
	Seen time.Time
	// Left has a time for each node that left Nodes, as far as this mirror saw it, and is not back: when it left.
	// Listed is since when this mirror has watched Nodes; zero: always. A node whose key in status/ was removed
	// may still be alive, and act on the record.
	Left   []time.Time
	Listed time.Time
	// Pin is the unit's value in pins/; nil: this mirror does not read pins, and nodes follow them by themselves.
	Pin *Value[deployments.Pin]
	// StableBefore are the digests that were stable in one of the last generations, by the history.
	StableBefore []deployments.Digest
	// Order is an operator's order at control/: promote, pause, resume, abort or retry; empty: none.
	Order string
	// Freeze is the result of Frozen for the unit now.
	Freeze Verdict
	// Ranks, if kept from one call to the next for a unit, saves hashing and sorting a fleet that has not changed.
	// It doesn't influence the answer. Nil: everything is computed anew.
	Ranks *Ranks
}

// Node is what the mirror knows of one node.
type Node struct {
	Name string
	// Gone is set if the node's session has ended: the node died, or is cut off. A node that deregistered isn't
	// listed at all.
	Gone bool
	// GoneSince is when the mirror saw that, by its own clock; zero: unknown, or not gone.
	GoneSince time.Time
	// Started is when its agent started, by the node's clock; zero: unknown.
	Started time.Time
	// Joined is Report.Joined: larger after each restart and each time that the node was cut off. 0: it has no number
	// yet, or doesn't report it. Such a node counts as told.
	Joined uint64
	// Report is the node's report on the unit; zero: it has not reported on it yet.
	Report deployments.UnitReport
}

// Move is the result of Next.
type Move struct {
	// Record is the next record; equal to the old one if nothing is to be done.
	Record deployments.Record
	// Reason, with its Facts, is what was done, or why nothing was; may be empty.
	Reason deployments.Reason
	Facts  deployments.Facts
	// Refused is set if an order changes nothing; Reason then says why. Did is what an order did, if it changed
	// something.
	Refused  bool
	Did      deployments.Reason
	DidFacts deployments.Facts
	// Again is when time alone could change the answer; zero: never.
	Again time.Time
}

// Next computes the next record of a unit from its record, its unit file, the fleet's reports, an order and the
// time. It has no side effects, and the same Situation gives the same Move. Once the record is written, Next is
// called again. An order is always consumed: one that makes no sense in the rollout's phase changes nothing, and
// Reason says so.
//
// A new target goes to the canaries, bakes, waits for approval if that is configured, and then goes to as many
// nodes at a time as max_unavailable leaves room for. A unit pin, and a target that was stable before, skip the
// gates and keep the budget.
//
// In flight are, each until its deadline: live nodes that were admitted and have yet to converge; nodes that may
// still act on an earlier record, as their reports don't name the newest generation; and nodes that left in the
// middle of a switch. The record doesn't apply to a node that comes back before there is room for it: see
// Record.Joined. Pinned and held nodes don't count; if all nodes are, the rollout waits.
func Next(s Situation) Move {
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
	// otherwise there is no record yet that could stay as it is
	if s.Pin != nil && s.Pin.Err != nil && s.Record.Generation > 0 {
		return Move{Record: s.Record, Reason: deployments.ReasonInvalidPin,
			Facts: deployments.Facts{"error": clipped(s.Pin.Err.Error())}}
	}
	st = setTarget(in, st)
	st.r.After, st.r.Drift, st.r.Adopt = s.Unit.After, s.Unit.Drift, s.Unit.Adopt
	st.r.Paced = s.Unit.Rollout != nil && s.Pin != nil
	if s.Unit.Rollout == nil {
		st.r.Joined = 0 // all nodes go at once
	}
	var did, refused cause
	if s.Order != "" {
		st, did, refused = obey(in, st)
	}
	for range 6 { // at most canary, waiting, rolling, rolling back, finished
		next, more := advance(in, st)
		if st = next; !more {
			break
		}
	}
	if st.on && st.why.reason != "" && st.p.Phase != deployments.PhaseRolledBack {
		st.p.Reason, st.p.Facts = st.why.reason, st.why.facts
	}
	if !st.on {
		in.Ranks.forget()
	}
	m := Move{Record: st.record(), Reason: st.why.reason, Facts: st.why.facts, Again: st.again,
		Did: did.reason, DidFacts: did.facts}
	if refused.reason != "" {
		m.Reason, m.Facts, m.Refused = refused.reason, refused.facts, true
	}
	return m
}

// cause is a reason with its facts.
type cause struct {
	reason deployments.Reason
	facts  deployments.Facts
}

// maxQuoted bounds text from nodes and settings in a fact, in bytes: no node takes a record that is too large.
const maxQuoted = 300

func clipped(s string) string { return safetext.Cut(s, maxQuoted) }

// inputs are what a step reads. Steps never change them.
type inputs struct{ Situation }

// state is a record being built, with its reasons: steps take one and return the next.
type state struct {
	r deployments.Record // its Rollout is in p, if on
	p deployments.Progress
	// on is set while a rollout is under way.
	on    bool
	why   cause
	again time.Time
}

// stateOf returns the state of the record in force. Times in the future come from a clock that was set back, or
// from another mirror's: the rollout would wait for them, so they are replaced by now.
func stateOf(s Situation) state {
	st := state{r: s.Record}
	if st.r.Rollout == nil {
		return st
	}
	st.p, st.on, st.r.Rollout = *st.r.Rollout, true, nil
	for _, at := range []*time.Time{&st.p.Since, &st.p.HealthySince} {
		if at.After(s.Now) {
			*at = s.Now
		}
	}
	if st.p.Reason == deployments.ReasonOrphaned {
		st.p.Reason, st.p.Facts = deployments.Reason(st.p.Facts["was"]), maps.Clone(st.p.Facts)
		if delete(st.p.Facts, "was"); len(st.p.Facts) == 0 {
			st.p.Facts = nil
		}
	}
	return st
}

// record returns the record of a state.
func (st state) record() deployments.Record {
	r := st.r
	if st.on {
		p := st.p
		p.Superseded = slices.Clone(p.Superseded)
		r.Rollout = &p
	}
	return r
}

// because returns the state with a reason.
func (st state) because(reason deployments.Reason, facts deployments.Facts) state {
	st.why = cause{reason, facts}
	return st
}

// orBecause returns the state with a reason, unless it has one already.
func (st state) orBecause(reason deployments.Reason, facts deployments.Facts) state {
	if st.why.reason == "" {
		st.why = cause{reason, facts}
	}
	return st
}

// wake schedules another call of Next at a time; zero: never.
func (st state) wake(at time.Time) state {
	st.again = earlier(st.again, at)
	return st
}

// end ends the rollout: every node may run the target.
func (st state) end() state {
	st.on, st.p = false, deployments.Progress{}
	return st
}

// enter begins a phase.
func (st state) enter(in *inputs, phase deployments.Phase) state {
	st.p.Phase, st.p.Since = phase, in.Now
	return st
}

// roll moves the rollout on from its canaries to the other nodes.
func (st state) roll(in *inputs) state {
	st = st.enter(in, deployments.PhaseRolling)
	st.p.Promoted, st.p.HealthySince = true, time.Time{}
	return st
}

// advance is the table of transitions: it runs the step of the current phase. more is set if another step may
// follow at once.
func advance(in *inputs, st state) (next state, more bool) {
	if !st.on {
		return returned(in, st), false
	}
	st, ended := firstRelease(in, st)
	if ended {
		return st, false
	}
	switch st.p.Phase {
	case deployments.PhaseFrozen:
		return frozen(in, st)
	case deployments.PhaseCanary:
		return canaries(in, st)
	case deployments.PhasePendingApproval:
		return pendingApproval(in, st)
	case deployments.PhaseRollingBack:
		return rollingBack(in, st)
	case deployments.PhaseRolledBack:
		return returned(in, st), false
	case deployments.PhasePaused:
		return st, false
	default:
		return rolling(in, st)
	}
}
