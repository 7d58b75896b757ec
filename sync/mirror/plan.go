package mirror

import (
	"bytes"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// Change is what a commit changes about one unit's record.
type Change struct {
	Unit deployments.UnitID `json:"unit"`
	// Kind is "create", "update", "remove", or "keep" if Git doesn't name the unit, but its record stays: pruning is off,
	// or no mirror wrote it.
	Kind   string              `json:"kind"`
	Before *deployments.Record `json:"before,omitempty"`
	After  *deployments.Record `json:"after,omitempty"`
	// How says how a new target is rolled out to the nodes; empty: there is none.
	How string `json:"how,omitempty"`
}

// Plan returns the changes that tree would make at the time at to the records in now, sorted by
// unit; pins don't count. A new target is shown as its rollout begins, before any node is admitted.
// Plan is pure.
func Plan(tree *deployments.Tree, commit string, now map[deployments.UnitID]deployments.Record, at time.Time) []Change {
	var changes []Change
	units := map[deployments.UnitID]bool{}
	freezes := policy.FreezesAt(tree.Settings.Freeze, at)
	for _, u := range tree.Units {
		units[u.ID] = true
		before, present := now[u.ID]
		after, how := recordFor(u, commit, before), ""
		if after.Generation > before.Generation {
			after, how = firstRecord(u, commit, before, freezes.Of(u.ID), at)
		}
		after.Paced = u.Rollout != nil // as a mirror that can read pins sets it
		switch {
		case !present:
			changes = append(changes, Change{Unit: u.ID, Kind: "create", After: &after, How: how})
		case !bytes.Equal(encode(before), encode(after)):
			changes = append(changes, Change{Unit: u.ID, Kind: "update", Before: &before, After: &after, How: how})
		}
	}
	for id, before := range now {
		switch {
		case units[id]:
		case tree.Settings.Prune && ours(before):
			changes = append(changes, Change{Unit: id, Kind: "remove", Before: &before})
		default:
			changes = append(changes, Change{Unit: id, Kind: "keep", Before: &before, After: &before})
		}
	}
	slices.SortFunc(changes, func(a, b Change) int { return a.Unit.Compare(b.Unit) })
	return changes
}

// firstRecord returns the record with which a new target begins, and how the target is rolled out,
// in words.
func firstRecord(
	u deployments.Unit,
	commit string,
	before deployments.Record,
	freeze policy.FreezeState,
	at time.Time,
) (deployments.Record, string) {
	// The fleet is unknown here: with one node that has not reported, a rollout begins and doesn't end.
	move := policy.Next(
		policy.Situation{Now: at, Unit: u, Commit: commit, Record: before, Nodes: []policy.Node{{Name: "any"}},
			Freeze: freeze},
	)
	r := move.Record
	r.Nodes, r.Joined = 0, 0
	if r.Rollout == nil {
		return r, message.Transition(move.Reason, move.Facts)
	}
	r.Rollout = &deployments.Progress{Phase: r.Rollout.Phase}
	how := message.Transition(move.Reason, move.Facts)
	if r.Rollout.Phase != deployments.PhaseFrozen && u.Rollout != nil {
		how = "all its nodes at once"
		if most := u.Rollout.MaxUnavailable; most.N > 0 {
			how = fmt.Sprintf("at most %s of its nodes at a time", most)
		}
		if canary := u.Rollout.Canary; canary.N > 0 && r.Rollout.Phase == deployments.PhaseCanary {
			then := "then"
			if u.Rollout.Approval == deployments.Manual {
				then = "then, once it is promoted,"
			}
			as := "canaries"
			if canary == (deployments.Amount{N: 1}) {
				as = "the canary"
			}
			how = fmt.Sprintf("%s of its nodes as %s, %s %s", canary, as, then, how)
		}
	}
	return r, how
}
