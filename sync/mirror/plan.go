package mirror

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// Change is one write that a commit leads to.
type Change struct {
	Unit deployments.UnitID `json:"unit"`
	// Kind is "create", "update", "remove", or "keep": removed from Git, and the record stays, as pruning is off.
	Kind   string              `json:"kind"`
	Before *deployments.Record `json:"before,omitempty"`
	After  *deployments.Record `json:"after,omitempty"`
	// How says in words how a new target goes to its nodes.
	How string `json:"how,omitempty"`
}

// Plan says which records a tree would change at a time, given those that are there, sorted by unit; pure. A unit
// with a rollout is shown as its rollout begins, before any node is admitted.
func Plan(tree *deployments.Tree, commit string, now map[deployments.UnitID]deployments.Record, at time.Time) []Change {
	var changes []Change
	units := map[deployments.UnitID]bool{}
	for _, u := range tree.Units {
		units[u.ID] = true
		before, present := now[u.ID]
		after, how := follow(u, commit, before), ""
		if after.Generation > before.Generation {
			after, how = first(tree, u, commit, before, at)
		}
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

// first returns the record with which a new target begins, and says how it goes out.
func first(
	tree *deployments.Tree,
	u deployments.Unit,
	commit string,
	before deployments.Record,
	at time.Time,
) (deployments.Record, string) {
	// What the fleet says isn't known here; one node that has said nothing is enough for a rollout to begin, and none
	// to end.
	move := policy.Next(
		policy.Situation{Now: at, Unit: u, Commit: commit, Record: before, Nodes: []policy.Node{{Name: "any"}},
			Freeze: policy.Frozen(tree.Settings.Freeze, u.ID, at)},
	)
	r := move.Record
	r.Nodes, r.Joined = 0, 0
	if r.Rollout == nil {
		return r, reasonOf("", move)
	}
	r.Rollout = &deployments.Progress{Phase: r.Rollout.Phase}
	how := reasonOf("", move)
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
			how = fmt.Sprintf("%s of its nodes as canaries, %s %s", canary, then, how)
		}
	}
	return r, how
}

// ours reports whether a mirror wrote a record: a person's bare pointer is not a mirror's to remove.
func ours(r deployments.Record) bool { return r.Generation > 0 && r.Commit != "" }

// follow returns the record that a unit's file asks for, from the one that is there (zero: none). Where the file
// names another release than the record, it begins a new generation, open to every node; else only what the agents
// read of the file changes.
func follow(u deployments.Unit, commit string, r deployments.Record) deployments.Record {
	if r.Generation == 0 || goal(r, u.Release) != u.Release {
		r = deployments.Record{
			Target:     u.Release,
			Stable:     lastGood(r),
			Generation: r.Generation + 1,
			Commit:     commit,
		}
	}
	r.After, r.Drift, r.Adopt, r.Orphaned = u.After, u.Drift, u.Adopt, false
	return r
}

// goal is the release that a record is about. One that was rolled back has another Target, but is still about the
// release that Git names: want is that where the record says that it was tried.
func goal(r deployments.Record, want deployments.Pointer) deployments.Pointer {
	if r.Rollout != nil && !r.Rollout.Failed.IsZero() && r.Rollout.Failed == want.Digest {
		return want
	}
	return r.Target
}

// lastGood is what nodes run that are not admitted to the next target.
func lastGood(r deployments.Record) deployments.Pointer {
	if r.Rollout == nil {
		return r.Target
	}
	return r.Stable
}

func short(hash string) string { return hash[:min(12, len(hash))] }

// few names the first of many.
func few(names []string) string {
	const shown = 5
	if len(names) > shown {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
	}
	return strings.Join(names, ", ")
}

// roles lists the roles of a tree, sorted.
func roles(tree *deployments.Tree) []deployments.RoleID {
	seen := map[deployments.RoleID]bool{}
	for _, u := range tree.Units {
		seen[u.ID.RoleID()] = true
	}
	return slices.SortedFunc(maps.Keys(seen), deployments.RoleID.Compare)
}
