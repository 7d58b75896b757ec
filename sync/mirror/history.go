package mirror

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// pastGenerations is what the history says of units, of the roles for which it was read.
type pastGenerations struct {
	newest map[deployments.UnitID]deployments.History
	stable map[deployments.UnitID][]deployments.Digest // what was stable, and has not failed since
	read   map[deployments.RoleID]bool
}

func newPastGenerations() pastGenerations {
	return pastGenerations{newest: map[deployments.UnitID]deployments.History{},
		stable: map[deployments.UnitID][]deployments.Digest{}, read: map[deployments.RoleID]bool{}}
}

// forget makes a unit's role be read again when it is needed.
func (p pastGenerations) forget(id deployments.UnitID) {
	delete(p.newest, id)
	delete(p.stable, id)
	delete(p.read, id.RoleID())
}

// add takes up the next generation of a unit.
func (p pastGenerations) add(id deployments.UnitID, h deployments.History) {
	if h.Generation > p.newest[id].Generation && h.Generation < policy.AbsurdGeneration {
		p.newest[id] = h
	}
	stable := p.stable[id]
	if !h.Stable.IsZero() && !slices.Contains(stable, h.Stable.Digest) {
		stable = append(stable, h.Stable.Digest)
	}
	p.stable[id] = slices.DeleteFunc(stable, func(d deployments.Digest) bool { return d == h.Failed })
}

// needsHistory reports whether what becomes of a unit hangs on its history: its record isn't there to go on from,
// or its target is about to change, and may have been stable before.
func needsHistory(u deployments.Unit, c cell, pinned bool, s standing) bool {
	if s == unknown {
		return true
	}
	return u.Rollout != nil && u.Rollout.FastBack && (c.record.Target != u.Release || pinned || c.record.Pinned != nil)
}

// readHistory reads the history of the roles for which it is needed, once.
func (l *leader) readHistory(ctx context.Context, commit *git.Commit, cells map[deployments.UnitID]cell,
	pins map[deployments.UnitID]policy.Value[deployments.Pin], now time.Time) error {
	for _, u := range commit.Tree.Units {
		role := u.ID.RoleID()
		own, known := l.written.records[u.ID]
		c := cells[u.ID]
		if l.history.read[role] || !needsHistory(u, c, pins[u.ID].Present, stand(c, own, known, now)) {
			continue
		}
		entries, err := l.c.Store.List(ctx, kv.RolePrefix(kv.HistoryPrefix, role.Stage, role.Role))
		if err != nil {
			return fmt.Errorf("history of %s: %w", role, err)
		}
		l.history.read[role] = true
		for _, e := range entries { // sorted by generation
			name := strings.TrimPrefix(e.Key, kv.HistoryPrefix)
			id, err := deployments.ParseUnitID(name[:max(0, strings.LastIndex(name, "/"))])
			if err != nil {
				continue
			}
			if h, err := deployments.ParseHistory(e.Value); err == nil {
				l.history.add(id, h)
			}
		}
	}
	return nil
}

// record returns the entry that notes a new generation.
func (in inputs) record(w change) *deployments.History {
	return &deployments.History{
		Generation: w.after.Generation,
		Release:    w.after.Target,
		Stable:     w.after.Stable,
		Commit:     in.commit.Hash,
		Author:     in.commit.Author,
		Subject:    in.commit.Subject,
		Committed:  in.commit.When,
		At:         in.now.UTC().Truncate(time.Millisecond),
		Failed:     in.failedBy(w),
		Claim:      policy.ClaimOf(w.after),
		Retry:      w.after.Retry,
		Pinned:     w.after.Pinned,
		Note:       in.accepted(w.note),
	}
}

// writeHistory returns the operations that put an entry, and remove the one that is too old.
func writeHistory(id deployments.UnitID, h *deployments.History) []kv.Op {
	value, err := json.Marshal(h)
	if err != nil {
		panic(err) // plain data
	}
	ops := []kv.Op{kv.Put(historyKey(id, h.Generation), value)}
	if old := h.Generation - deployments.HistoryKept; old > 0 {
		ops = append(ops, kv.Delete(historyKey(id, old)))
	}
	return ops
}

// accepted adds to a note of the history that an operator accepted the commit.
func (in inputs) accepted(note string) string {
	if !in.overruled {
		return note
	}
	return strings.TrimPrefix(note+"; an operator accepted the commit, whatever its history (--accept)", "; ")
}

// failedBy returns the release that a new generation knows to have failed; zero: none.
func (in inputs) failedBy(w change) deployments.Digest {
	if w.after.Rollout != nil && !w.after.Rollout.Failed.IsZero() {
		return w.after.Rollout.Failed
	}
	was := w.before.Target.Digest
	if was == w.after.Target.Digest ||
		!slices.ContainsFunc(
			in.nodes(w.unit),
			func(n policy.Node) bool { return slices.Contains(n.Report.Quarantined, was) },
		) {
		return deployments.Digest{}
	}
	return was
}

// historyKey sorts as the generations do.
func historyKey(id deployments.UnitID, generation int64) string {
	return fmt.Sprintf("%s%010d", kv.HistoryPrefixOf(id), generation)
}

// noteOf says in the history what led to a generation, beside the commit.
func (in inputs) noteOf(w change, did string) string {
	who := func(by, reason string) (words string) {
		if by != "" {
			words += " by " + clip(by, 100)
		}
		if reason != "" {
			words += ": " + clip(reason, 200)
		}
		return words
	}
	switch pin := in.pins[w.unit].Value; {
	case w.note != "":
		return w.note
	case w.after.Pinned != nil && w.after.Target != w.before.Target:
		return "pinned" + who(pin.By, pin.Reason)
	case w.before.Pinned != nil && w.after.Pinned == nil:
		return "the pin ended"
	case w.after.Target != w.before.Target:
		return ""
	case w.order.version != 0:
		return did + who(w.order.By, w.order.Reason)
	}
	return did
}
