package fleet

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// PinNotes returns what an operator should know before pinning or unpinning a unit or, if node
// isn't empty, that node. pin is the new pin, nil to unpin. The result is nil if there is nothing
// to know, or if the fleet can't be read.
func PinNotes(
	ctx context.Context, store kv.Store, id deployments.UnitID, node string, pin *deployments.Pin,
) (notes []string) {
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil {
		return nil // writing the pin will return the error
	}
	switch unread := f.CheckComplete(); {
	case unread != nil && len(f.Units) == 0:
		return []string{f.IncompleteText()}
	case unread != nil:
		notes = append(notes, f.IncompleteText())
	case len(f.Units) == 0:
		return []string{NoUnit(ctx, store, id).Error()}
	}
	u := &f.Units[0]
	was, pinned := u.Pins[node]
	if node == "" && u.Pin != nil {
		was, pinned = *u.Pin, true
	}
	if pinned {
		notes = append(notes, "pinned before: "+strings.TrimSpace(pinTarget(u, was)+" "+pinDetails(was, f.At)))
	}
	if node == "" && u.Record != nil && !f.MirrorRunning {
		const waits = "no mirror runs, and nodes wait until one admits them, within max_unavailable: start one"
		switch {
		case pin != nil && policy.Paced(*u.Record, *pin):
			notes = append(notes, fmt.Sprintf("%s, or let all nodes follow at once: kedge pin %s %s --at-once",
				waits, id, pin.Release))
		case pin == nil && u.Pinned(f.At) && policy.Paced(*u.Record, *u.Pin):
			notes = append(notes, waits)
		}
	}
	if node == "" {
		for _, other := range slices.Sorted(maps.Keys(u.Pins)) {
			if !u.Pins[other].Expired(f.At) {
				notes = append(
					notes,
					fmt.Sprintf("%s has a pin of its own, which takes precedence: %s", message.Clean(other),
						pinTarget(u, u.Pins[other])),
				)
			}
		}
		return notes
	}
	if u.Pinned(f.At) {
		notes = append(notes, "the unit itself is pinned: "+
			strings.TrimSpace(pinTarget(u, *u.Pin)+" "+pinDetails(*u.Pin, f.At)))
	}
	if !pinned && !slices.ContainsFunc(u.Nodes, func(n Node) bool { return n.Name == node }) {
		_, _, err := f.find(id, node)
		notes = append(notes, err.Error())
	}
	return notes
}

// AfterUnpinNote returns what a unit, or one of its nodes, will run now that its pin is removed; empty: unknown.
func AfterUnpinNote(ctx context.Context, store kv.Store, id deployments.UnitID, node string) string {
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil || len(f.Units) == 0 || len(f.incomplete) > 0 {
		return ""
	}
	u := &f.Units[0]
	switch {
	case node != "" && u.Pinned(f.At):
		return "the unit's pin counts now: " + strings.TrimSpace(pinTarget(u, *u.Pin)+" "+pinDetails(*u.Pin, f.At))
	case u.Error != "":
		return message.OneLine(u.Error)
	case u.Record == nil:
		return "there is no record: nodes keep what they run"
	}
	says := "the record counts now: " + u.Release(u.GitTarget())
	switch p := u.Record.Rollout; {
	case u.Record.Pinned != nil && u.Record.Pinned.Failed == u.Record.Pinned.Target.Digest &&
		!u.Record.Pinned.Stable.IsZero():
		return says + ", which was rolled back: nodes go to " + u.Release(u.Record.Pinned.Stable) + ", within max_unavailable"
	case u.Record.Pinned != nil:
		return says + ": nodes go there within max_unavailable"
	case p == nil || u.Record.Stable.IsZero():
	case p.Phase == deployments.PhaseRollingBack:
		return says + ", which is being rolled back: nodes go to " + u.Release(u.Record.Stable) + ", within max_unavailable"
	case p.Phase == deployments.PhaseRolledBack:
		return says + ", which was rolled back: nodes run " + u.Release(u.Record.Stable)
	default:
		return says + " on the nodes that its rollout has admitted, and " + u.Release(u.Record.Stable) + " on the others"
	}
	for _, n := range u.Nodes {
		if slices.Contains(n.Report.Quarantined, u.Record.Target.Digest) && (node == "" || node == n.Name) {
			return says + ", which failed on " + message.Clean(n.Name) + " before"
		}
	}
	return says
}

// RunsAlreadyNote returns a text that says that every live node of a unit runs a release already.
// It is empty if some live node doesn't, if no node is live, or if that is unknown, as for nodes
// that aren't listed.
func RunsAlreadyNote(ctx context.Context, store kv.Store, id deployments.UnitID, release deployments.Pointer) string {
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil || len(f.Units) == 0 || len(f.incomplete) > 0 || f.Units[0].Live == 0 {
		return ""
	}
	u := &f.Units[0]
	if !u.allRun(release) {
		return ""
	}
	says := fmt.Sprintf("all %d live nodes run it already", u.Live)
	if u.Live == 1 {
		says = "the one live node runs it already"
	}
	if failed, stable := rolledBackFrom(u.Record); !failed.IsZero() && stable.Digest == release.Digest {
		says += ", as " + u.Release(failed) + " was rolled back before: the pin keeps them on it, whatever Git names next"
	}
	return says
}

// allRun reports whether all live nodes of u are known to run a release. It returns false if a live node isn't listed.
func (u *Unit) allRun(release deployments.Pointer) bool {
	same := 0
	for _, n := range u.Nodes {
		if !n.Gone && n.Report.Running.Digest == release.Digest {
			same++
		}
	}
	return same >= u.Live
}

// rolledBackFrom returns the release of Git that was rolled back, and the one that it was rolled
// back to; zero: none was. If the record's target is a pin's, these are from before the pin.
func rolledBackFrom(r *deployments.Record) (failed, stable deployments.Pointer) {
	switch {
	case r == nil:
	case r.Pinned != nil:
		if r.Pinned.Failed == r.Pinned.Target.Digest {
			return r.Pinned.Target, r.Pinned.Stable
		}
	case r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack:
		return r.Target, r.Stable
	}
	return failed, stable
}

// PinnedNote returns a text that says that a unit is pinned, and how to unpin it. It is empty if no pin is in force, or
// if that can't be read.
func PinnedNote(ctx context.Context, store kv.Store, id deployments.UnitID) string {
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil || len(f.Units) == 0 || !f.Units[0].Pinned(f.At) {
		return ""
	}
	return fmt.Sprintf("the unit is pinned (%s), whatever Git names, until the pin ends: kedge unpin %s",
		pinTarget(&f.Units[0], *f.Units[0].Pin), id)
}
