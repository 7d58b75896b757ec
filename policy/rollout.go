package policy

import (
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

// Situation are the inputs of Next for one unit's record: plain data, read by the mirror.
type Situation struct {
	Now time.Time
	// Unit is the unit's file in the commit that is mirrored; Commit is that one's hash.
	Unit   deployments.Unit
	Commit string
	// Record is the one that stands; the zero Record: none.
	Record deployments.Record
	// Nodes are those that have an entry in status/ for the unit's role.
	Nodes []Node
	// Seen is since when Nodes are as they report themselves, without a gap: while the store is away nothing that
	// they do is told. Zero: always. It is told by elapsed time, so that a clock that is put right counts for
	// nothing.
	Seen time.Time
	// Left is when each node left Nodes that is not back, as far as this mirror saw that; Listed is since when it looks
	// on, zero: always. A node whose key in status/ was removed may be as alive as ever, and act on the record.
	Left   []time.Time
	Listed time.Time
	// Pin is what pins/ holds for the unit. Nil: this mirror does not read pins, and nodes follow them by themselves.
	Pin *Value[deployments.Pin]
	// StableBefore are the digests that were stable in one of the last generations, as the history tells.
	StableBefore []deployments.Digest
	// Order is what an operator put at control/: promote, pause, resume, abort, retry; empty: nothing.
	Order string
	// Freeze is Frozen's answer for the unit now.
	Freeze Verdict
	// Ranks, if it is kept from one call for a unit to the next, spares hashing and sorting a fleet that has not
	// changed; it has no influence on the answer. Nil: all is computed anew.
	Ranks *Ranks
}

// Node is what the mirror knows of one node.
type Node struct {
	Name string
	// Gone is set if the node's session has ended: it died, or is cut off. A node that deregistered isn't there at
	// all.
	Gone bool
	// GoneSince is when that was seen, by the mirror's clock; zero: unknown, or not gone.
	GoneSince time.Time
	// Started is when its agent started, by the node's clock; zero: unknown.
	Started time.Time
	// Joined is Report.Joined: larger after each restart and each time that the node was cut off. 0: the agent
	// doesn't tell.
	Joined uint64
	// Report is the node's for the unit; zero: it has said nothing of it yet.
	Report deployments.UnitReport
}

// Move is Next's answer.
type Move struct {
	// Record is what the record becomes; the same as before if nothing is to be done.
	Record deployments.Record
	// Reason, with its Facts, is what was done, or why nothing is; empty if there is nothing to say.
	Reason deployments.Reason
	Facts  deployments.Facts
	// Refused is set if an order changes nothing, and Reason says why. Did is what an order has done, if it changed
	// something.
	Refused  bool
	Did      deployments.Reason
	DidFacts deployments.Facts
	// Again is when time alone could change the answer; zero: never.
	Again time.Time
}

// Next is the step of a rollout: from the record, the unit's file, the fleet's reports, an order and the time to
// the next record. It has no side effects, and the same Situation gives the same Move; once its record is written,
// Next is asked again. An order is always consumed: one that makes no sense where the rollout stands changes
// nothing, and Reason says so.
//
// A new target goes to a canary, bakes, waits for approval if that is asked for, and then goes on by as many nodes
// as max_unavailable leaves room for. A unit pin, and a target that was stable before, skip the gates and keep the
// budget.
//
// In flight is every live node that was admitted and has yet to converge, every one that may still act on an
// earlier record, as its report doesn't name the newest generation, and every one that left in mid-switch, until
// its deadline. A node that comes back is not told before there is room for it: see Record.Joined. Pinned and held
// nodes are no part of it, and if all are it waits.
func Next(s Situation) Move {
	if s.Seen.After(s.Now) {
		s.Seen = s.Now
	}
	s.Record.Orphaned = false // who asks for the next step has the unit's file
	if s.Listed.After(s.Now) {
		s.Listed = s.Now
	}
	in := &inputs{s}
	if in.Ranks == nil {
		in.Ranks = new(Ranks)
	}
	st := stateOf(s)
	if s.Pin != nil && s.Pin.Err != nil && s.Record.Generation > 0 { // else there is nothing yet that could stay as it is
		return Move{Record: s.Record, Reason: deployments.ReasonInvalidPin,
			Facts: deployments.Facts{"error": clipped(s.Pin.Err.Error())}}
	}
	st = aim(in, st)
	st.r.After, st.r.Drift, st.r.Adopt = s.Unit.After, s.Unit.Drift, s.Unit.Adopt
	st.r.Paced = s.Unit.Rollout != nil && s.Pin != nil
	if s.Unit.Rollout == nil {
		st.r.Joined = 0 // all nodes go at once
	}
	var did, refused cause
	if s.Order != "" {
		st, did, refused = obey(in, st)
	}
	for range 6 { // canary, waiting, rolling, rolling back, finished at most
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

// maxQuoted bounds what nodes and settings say in a fact, in bytes: no node takes a record that is too large.
const maxQuoted = 300

func clipped(s string) string {
	if len(s) <= maxQuoted {
		return s
	}
	return strings.ToValidUTF8(s[:maxQuoted-3], "") + "..."
}

// inputs are what a step reads, and never writes.
type inputs struct{ Situation }

// state is a record in the making, with its reasons: what a step takes and returns.
type state struct {
	r deployments.Record // its Rollout is p, if on
	p deployments.Progress
	// on is set while a rollout is under way.
	on    bool
	why   cause
	again time.Time
}

// stateOf takes up the record that stands. Times that are yet to come are of a clock that went back, or of another
// mirror's: counted from them, a rollout would stand for as long.
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

// record is the record that a state stands for.
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

// orBecause is because, unless the state has a reason already.
func (st state) orBecause(reason deployments.Reason, facts deployments.Facts) state {
	if st.why.reason == "" {
		st.why = cause{reason, facts}
	}
	return st
}

// wake asks to look again at a time; zero: never.
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

// advance is the table of transitions: what each phase leads to. more: another step may follow at once.
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
