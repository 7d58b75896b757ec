package mirror

import (
	"bytes"
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
	// pins are those of the newest entry, with what stood in earlier ones and is missing there: the mirror of a version
	// that knows nothing of them may have written it. Units without any are left out.
	pins map[deployments.UnitID][]deployments.PastPin
	read map[deployments.RoleID]bool
}

func newPastGenerations() pastGenerations {
	return pastGenerations{newest: map[deployments.UnitID]deployments.History{},
		stable: map[deployments.UnitID][]deployments.Digest{}, pins: map[deployments.UnitID][]deployments.PastPin{},
		read: map[deployments.RoleID]bool{}}
}

// forget makes a unit's role be read again when it is needed.
func (p pastGenerations) forget(id deployments.UnitID) {
	delete(p.newest, id)
	delete(p.stable, id)
	delete(p.pins, id)
	delete(p.read, id.RoleID())
}

// add takes up the next generation of a unit, or what the newest one has become.
func (p pastGenerations) add(id deployments.UnitID, h deployments.History) {
	if newest := p.newest[id].Generation; h.Generation >= newest && h.Generation < policy.AbsurdGeneration {
		pins := h.Pins
		if h.Generation > newest {
			missing := slices.DeleteFunc(openPins(p.pins[id]), func(open deployments.PastPin) bool {
				return slices.ContainsFunc(h.Pins, func(q deployments.PastPin) bool {
					return q.Node == open.Node && q.At.Equal(open.At)
				})
			})
			pins = slices.Concat(missing, h.Pins)
		}
		p.newest[id] = h
		if p.pins[id] = pins; len(pins) == 0 {
			delete(p.pins, id)
		}
	}
	stable := p.stable[id]
	if !h.Stable.IsZero() && !slices.Contains(stable, h.Stable.Digest) {
		stable = append(stable, h.Stable.Digest)
	}
	p.stable[id] = slices.DeleteFunc(stable, func(d deployments.Digest) bool { return d == h.Failed })
}

// wrote takes up the entry that a change has put, where the rest of its role's was read.
func (p pastGenerations) wrote(w change) {
	if w.history != nil && p.read[w.unit.RoleID()] {
		p.add(w.unit, *w.history)
	}
}

// needsHistory reports whether what becomes of a unit hangs on its history: its record isn't there to go on from,
// its target is about to change, and may have been stable before, or an order is to be noted there.
func needsHistory(u deployments.Unit, c cell, pinned, ordered bool, s standing) bool {
	if s == unknown || ordered {
		return true
	}
	return u.Rollout != nil && u.Rollout.FastBack && (c.record.Target != u.Release || pinned || c.record.Pinned != nil)
}

// readHistory reads the history of the roles for which it is needed, once.
func (l *leader) readHistory(ctx context.Context, commit *git.Commit, cells map[deployments.UnitID]cell,
	seen observed, now time.Time) error {
	for _, u := range commit.Tree.Units {
		role := u.ID.RoleID()
		own, known := l.written.records[u.ID]
		c := cells[u.ID]
		_, ordered := seen.orders.good[u.ID]
		pinned := seen.pins.units[u.ID].Present
		if l.history.read[role] || !needsHistory(u, c, pinned, ordered, stand(c, own, known, now)) {
			continue
		}
		if err := l.readRole(ctx, role); err != nil {
			return err
		}
	}
	return nil
}

// readRole reads the history of all units of a role.
func (l *leader) readRole(ctx context.Context, role deployments.RoleID) error {
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
	return nil
}

// record returns the entry that notes a new generation.
func (in inputs) record(w change) *deployments.History {
	h := &deployments.History{
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
	in.carryPins(w.unit, h)
	return h
}

// writeHistory returns the operations that put an entry, and remove the one that is too old.
func writeHistory(id deployments.UnitID, h *deployments.History) []kv.Op {
	var value bytes.Buffer
	e := json.NewEncoder(&value)
	e.SetEscapeHTML(false) // six bytes for one would let pins outgrow a transaction
	if err := e.Encode(h); err != nil {
		panic(err) // plain data
	}
	ops := []kv.Op{kv.Put(historyKey(id, h.Generation), bytes.TrimSpace(value.Bytes()))}
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
