package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"math"
	"slices"
	"time"

	"kedge/deployments"
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
	// Seen is the time since which the mirror has read Nodes without a gap; zero: always. While the store is away, no node
	// can report. The mirror derives Seen from elapsed time, so that setting the clock doesn't change it.
	Seen time.Time
	// Left has, for each node that left Nodes lately, when this mirror saw it go. Such a node may still be alive, and act
	// on the record.
	Left []time.Time
	// Listed is the time since which this mirror has watched Nodes; zero: always.
	Listed time.Time
	// Pin is the unit's value in pins/; nil: this mirror does not read pins, and nodes follow them by themselves.
	Pin *Value[deployments.Pin]
	// StableBefore are the digests of the releases that were stable in one of the last generations, as the history says.
	StableBefore []deployments.Digest
	// Order is an operator's order at control/: promote, pause, resume, abort or retry; empty: none.
	Order string
	// Freeze is the result of FreezeAt, or of Freezes.Of, for the unit now.
	Freeze FreezeState
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
	// GoneSince is when the mirror saw the session's end, by its own clock; zero: unknown, or not gone.
	GoneSince time.Time
	// UnhealthySince is when the mirror first saw that the unit is unhealthy or rolls back on the node, by the mirror's
	// own clock; zero: unknown, or the unit does neither.
	UnhealthySince time.Time
	// Started is when the node's agent started, by the node's clock; zero: unknown.
	Started time.Time
	// Joined is Report.Joined: larger after each restart and each time that the node was cut off. 0: it has no number
	// yet, or doesn't report it. A record applies to such a node.
	Joined uint64
	// Report is the node's report on the unit; zero: the node has not reported on the unit yet.
	Report deployments.UnitReport
}

// inputs are what a step reads. Steps never change them.
type inputs struct{ Situation }

// Rank returns a node's place in the order in which a target's rollout admits nodes. It is a hash of the node's name
// and the target's digest, so that each target has other canaries. It is never 0, so that a cutoff of 0 admits none.
func Rank(node string, target deployments.Digest) uint64 {
	var room [len(target) + 64]byte // enough for most names
	sum := sha256.Sum256(append(append(room[:0], target[:]...), node...))
	return max(1, binary.BigEndian.Uint64(sum[:]))
}

// Ranks caches the nodes' ranks for the targets of one unit's record, so that a step hashes only new names, and
// sorts only a fleet that has changed. It is emptied when no rollout is under way. The zero Ranks is empty and
// ready to use. It is not safe for concurrent use.
type Ranks struct {
	known []*ranking // most recently used first
}

// ranking is the order of a fleet's nodes for one target.
type ranking struct {
	target deployments.Digest
	names  []string
	ranks  []uint64 // of the nodes in names
	byRank []int32  // indices into names, lowest rank first
}

// of returns the order of the nodes for a target.
func (r *Ranks) of(target deployments.Digest, nodes []Node) *ranking {
	i := slices.IndexFunc(r.known, func(k *ranking) bool { return k.target == target })
	if i < 0 {
		i = 0
		// a target, those that it supersedes, and one more while a record changes
		if len(r.known) > deployments.MaxSuperseded+1 {
			r.known = r.known[:deployments.MaxSuperseded+1]
		}
		r.known = slices.Insert(r.known, 0, &ranking{target: target})
	}
	k := r.known[i]
	copy(r.known[1:i+1], r.known[:i])
	r.known[0] = k
	if !slices.EqualFunc(k.names, nodes, func(name string, n Node) bool { return name == n.Name }) {
		k.update(nodes)
	}
	return k
}

func (r *Ranks) forget() { r.known = nil }

// update recomputes the ranks after the list of nodes changed. The old and the new list are mostly sorted by name. If
// either isn't, a known name may be hashed once more.
func (k *ranking) update(nodes []Node) {
	names, ranks := make([]string, len(nodes)), make([]uint64, len(nodes))
	old := 0
	for i := range nodes {
		name := nodes[i].Name
		for old < len(k.names) && k.names[old] < name {
			old++
		}
		names[i] = name
		if old < len(k.names) && k.names[old] == name {
			ranks[i] = k.ranks[old]
			continue
		}
		ranks[i] = Rank(name, k.target)
	}
	byRank := make([]int32, len(nodes))
	for i := range byRank {
		byRank[i] = int32(i)
	}
	slices.SortFunc(byRank,
		func(a, b int32) int { return cmp.Or(cmp.Compare(ranks[a], ranks[b]), cmp.Compare(names[a], names[b])) })
	k.names, k.ranks, k.byRank = names, ranks, byRank
}

// state is a record being built, with the reason for the change. A step takes a state, and returns the next one.
type state struct {
	r deployments.Record // its Rollout is in p, if on
	p deployments.Progress
	// on is set while a rollout is under way.
	on        bool
	why       cause
	recheckAt time.Time
}

type cause struct {
	reason deployments.Reason
	facts  deployments.Facts
}

// stateOf returns the state of the record in force. A time in the future comes from a clock that was set back, or from
// another mirror's clock. The rollout would wait for that time, so stateOf replaces it by now. It also puts back the
// reason that MarkOrphaned replaced.
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

// isIn reports whether a rollout is under way, and is in a phase.
func (st state) isIn(phase deployments.Phase) bool { return st.on && st.p.Phase == phase }

func (st state) record() deployments.Record {
	r := st.r
	if st.on {
		p := st.p
		p.Superseded = slices.Clone(p.Superseded)
		r.Rollout = &p
	}
	return r
}

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

// becauseFrozen returns the state with the freeze window as its reason.
func (st state) becauseFrozen(in *inputs) state {
	return st.because(deployments.ReasonFrozen, in.Freeze.Facts())
}

// recheckBy schedules another call of Next at a time, unless an earlier call is scheduled. The zero
// time schedules none.
func (st state) recheckBy(at time.Time) state {
	st.recheckAt = earlier(st.recheckAt, at)
	return st
}

// end ends the rollout: every node may run the target.
func (st state) end() state {
	st.on, st.p = false, deployments.Progress{}
	return st
}

func (st state) enter(in *inputs, phase deployments.Phase) state {
	st.p.Phase, st.p.Since = phase, in.Now
	return st
}

// roll enters PhaseRolling: nodes other than the canaries may be admitted, and no bake is under
// way.
func (st state) roll(in *inputs) state {
	st = st.enter(in, deployments.PhaseRolling)
	st.p.Promoted, st.p.HealthySince = true, time.Time{}
	return st
}

// everyRank is the cutoff that admits all nodes.
const everyRank = math.MaxUint64
