package mirror

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/policy"
)

// Pins and orders stand in the history, in the newest entry of their unit. Pins are compared with what the store shows,
// so that what came and went while no mirror ran, or another did, is found by the next round. Orders are written in
// the transaction that consumes them.

const (
	// auditRoles is how many roles' histories one round reads at most: others wait for the next, so that pins and
	// orders don't wait for them.
	auditRoles = 20
	// auditRetry is the time after which a history that could not be read or written is tried again. Rollouts go on
	// meanwhile.
	auditRetry = 10 * time.Second
)

// pastPin returns a pin of a unit, or of one node of it, as the history keeps it.
func pastPin(node string, pin deployments.Pin, err error) deployments.PastPin {
	pin.By, pin.Reason = pastWords(pin.By), pastWords(pin.Reason)
	if err != nil {
		return deployments.PastPin{Node: node, Error: pastWords(err.Error())}
	}
	return deployments.PastPin{Node: node, Pin: pin}
}

// pastWords cuts what a person, or a stranger, wrote for the history.
func pastWords(s string) string {
	return safetext.Clip(safetext.Printable(strings.TrimSpace(s)), deployments.MaxPastWords)
}

// openPins returns the pins that had not ended.
func openPins(pins []deployments.PastPin) []deployments.PastPin {
	return slices.DeleteFunc(slices.Clone(pins), func(p deployments.PastPin) bool { return !p.Ended.IsZero() })
}

// followPins returns what the pins of a history entry become: what the store shows no longer, or shows otherwise, has
// ended, and what it shows anew is added. shown are the pins that it shows of the unit, at most one a node. truncated
// reports whether there were more than an entry keeps.
func followPins(pins, shown []deployments.PastPin, now time.Time) (next []deployments.PastPin, truncated bool) {
	now = now.UTC().Truncate(time.Millisecond)
	byNode := make(map[string]deployments.PastPin, len(shown))
	for _, p := range shown {
		byNode[p.Node] = p
	}
	next = slices.Clone(pins)
	last := map[string]time.Time{} // when the newest pin of a node began
	stands := map[string]bool{}
	for i := range next {
		p := &next[i]
		last[p.Node] = p.At
		seen, there := byNode[p.Node]
		switch {
		case !p.Ended.IsZero():
		case p.Expired(now):
			p.Ended = p.Until
		case !there || !p.Same(seen):
			p.Ended = latest(now, p.At)
		default:
			stands[p.Node] = true
		}
	}
	for _, p := range shown {
		if stands[p.Node] || p.Expired(now) { // one that had expired before it was seen never stood
			continue
		}
		p.At = now
		if began, ok := last[p.Node]; ok && !now.After(began) { // a pin is told from others of its node by its time
			p.At = began.Add(time.Millisecond)
		}
		next = append(next, p)
	}
	return boundPins(next)
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// boundPins leaves out what is more than an entry keeps: the oldest that have ended, then the newest of single nodes.
func boundPins(pins []deployments.PastPin) (kept []deployments.PastPin, truncated bool) {
	for len(pins) > deployments.MaxPastPins {
		i := slices.IndexFunc(pins, func(p deployments.PastPin) bool { return !p.Ended.IsZero() })
		for j := len(pins) - 1; i < 0; j-- {
			if pins[j].Node != "" || j == 0 {
				i = j
			}
		}
		pins, truncated = slices.Delete(pins, i, i+1), true
	}
	return pins, truncated
}

// sameEntry reports whether two versions of a history entry have the same pins.
func sameEntry(a, b deployments.History) bool {
	return a.Truncated == b.Truncated && slices.EqualFunc(a.Pins, b.Pins, func(p, q deployments.PastPin) bool {
		return p.Same(q) && p.At.Equal(q.At) && p.Ended.Equal(q.Ended)
	})
}

// withOrder adds an order that is consumed to a history entry.
func withOrder(h deployments.History, o order, refused deployments.Reason, now time.Time) deployments.History {
	past := deployments.PastOrder{At: now.UTC().Truncate(time.Millisecond), Order: o.Order, Refused: refused}
	past.By, past.Reason = pastWords(o.By), pastWords(o.Reason)
	h.Orders = append(slices.Clone(h.Orders), past)
	if more := len(h.Orders) - deployments.MaxPastOrders; more > 0 {
		h.Orders, h.Truncated = h.Orders[more:], true
	}
	return h
}

// carryPins gives the entry of a new generation the pins that stood in the one before, and what became of them. Where
// the one before was not read, audit does so: when a pin began isn't known here.
func (in inputs) carryPins(id deployments.UnitID, h *deployments.History) {
	if !in.pastRead[id.RoleID()] {
		return
	}
	h.Pins = openPins(in.pastPins[id])
	if in.shownPins != nil {
		h.Pins, h.Truncated = followPins(h.Pins, in.shownPins[id], in.now)
	}
}

// noteOrder returns the history entry that has the order which a change consumes: that of its new generation, else the
// newest.
func (in inputs) noteOrder(w change, step policy.Move) *deployments.History {
	entry := w.history
	if newest, known := in.history[w.unit]; entry == nil && known {
		newest.Pins = in.pastPins[w.unit]
		entry = &newest
	}
	if entry == nil {
		lost := lostEntry(w.after, in.now)
		in.carryPins(w.unit, &lost)
		entry = &lost
	}
	var refused deployments.Reason
	if step.Refused {
		refused = step.Reason
	}
	noted := withOrder(*entry, w.order, refused, in.now)
	return &noted
}

// audit writes into the newest entries of the history which pins came and ended. again is when to look even if
// nothing changes; 0: never. Trouble with the history never holds up a rollout: only a lost lease is an error.
func (l *leader) audit(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	if !seen.pins.synced || seen.pins.err != nil {
		return 0, nil
	}
	if wait := l.auditAfter.Sub(now); wait > 0 {
		return wait, nil
	}
	again, err = l.auditPins(ctx, seen, now)
	switch {
	case err == nil, ctx.Err() != nil:
		return again, nil
	case errors.Is(err, kv.ErrLeaseLost):
		return 0, err
	}
	l.auditTrouble.Do(func() {
		l.c.Log.Warn("pins can't be noted in the history, it is tried again", "store", l.c.Store, "error", err)
	})
	l.auditAfter = now.Add(auditRetry)
	return auditRetry, nil
}

func (l *leader) auditPins(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	cells := seen.desired.cells
	unread := 0
	for id := range cells {
		role := id.RoleID()
		if l.history.read[role] {
			continue
		}
		if unread++; unread > auditRoles {
			again = time.Millisecond
			break
		}
		if err := l.readRole(ctx, role); err != nil {
			return 0, err
		}
	}

	units := map[deployments.UnitID]bool{}
	for id := range l.history.pins {
		units[id] = true
	}
	for id := range seen.pins.shown {
		units[id] = true
	}
	var todo []change
	for id := range units {
		entry, known := l.history.newest[id]
		if c := cells[id]; !known && l.history.read[id.RoleID()] && c.err == nil && ours(c.record) {
			entry, known = lostEntry(c.record, now), true
		}
		if !known {
			continue // nothing runs by a pin of a unit that has no record
		}
		stored, truncated := entry, false
		entry.Pins, truncated = followPins(l.history.pins[id], seen.pins.shown[id], now)
		entry.Truncated = entry.Truncated || truncated
		for _, p := range entry.Pins {
			if p.Ended.IsZero() && !p.Until.IsZero() {
				again = sooner(again, max(time.Millisecond, p.Until.Sub(now)))
			}
		}
		if !sameEntry(stored, entry) {
			todo = append(todo, change{unit: id, history: &entry, ops: writeHistory(id, &entry)})
		}
	}
	slices.SortFunc(todo, func(a, b change) int { return a.unit.Compare(b.unit) })
	for _, batch := range batches(todo) {
		var ops []kv.Op
		for _, w := range batch {
			ops = append(ops, w.ops...)
		}
		if err := l.c.Store.Commit(ctx, l.lease, ops...); err != nil {
			return 0, fmt.Errorf("write %d entries of the history: %w", len(batch), err)
		}
		l.metrics.wrote(len(ops))
		for _, w := range batch {
			l.history.add(w.unit, *w.history)
			l.c.Log.Info("pins noted in the history", "unit", w.unit, "generation", w.history.Generation,
				"pins", len(openPins(w.history.Pins)))
		}
	}
	return again, nil
}

// lostEntry returns the history entry of a record whose own is not there any more.
func lostEntry(r deployments.Record, now time.Time) deployments.History {
	return deployments.History{Generation: r.Generation, Release: r.Target, Stable: r.Stable, Commit: r.Commit,
		At: now.UTC().Truncate(time.Millisecond), Claim: policy.ClaimOf(r), Retry: r.Retry, Pinned: r.Pinned,
		Note: "the entry of this generation was lost, and made again from the record"}
}
