package mirror

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// This file builds entries of the history, which record the pins and the orders of a generation.

// historyPin returns the history's form of a pin, without times. node is empty for a pin of the whole unit. If err is
// set, the pin doesn't parse, and only node and err are kept.
func historyPin(node string, pin deployments.Pin, err error) deployments.PastPin {
	pin.By, pin.Reason = deployments.PastWords(pin.By), deployments.PastWords(pin.Reason)
	if err != nil {
		return deployments.PastPin{Node: node, Error: deployments.PastWords(err.Error())}
	}
	return deployments.PastPin{Node: node, Pin: pin}
}

// openPins returns the pins that have not ended.
func openPins(pins []deployments.PastPin) []deployments.PastPin {
	return slices.DeleteFunc(slices.Clone(pins), func(p deployments.PastPin) bool { return !p.Ended.IsZero() })
}

// followPins returns the updated pins of a history entry. A pin has ended if it expired, or if the store no longer
// shows it or shows it changed. New pins are added. shown are the unit's pins in the store, at most one for each node
// and one for all. truncated reports whether there are more than an entry keeps.
func followPins(pins, shown []deployments.PastPin, now time.Time) (next []deployments.PastPin, truncated bool) {
	now = now.UTC().Truncate(time.Millisecond)
	byNode := make(map[string]deployments.PastPin, len(shown))
	for _, p := range shown {
		byNode[p.Node] = p
	}
	next = slices.Clone(pins)
	last := map[string]time.Time{} // when each node's newest pin began
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
		if stands[p.Node] || p.Expired(now) { // it goes on, or has ended: above, or before a mirror saw it
			continue
		}
		p.At = now
		// A pin's At distinguishes it from other pins of its node. An At in an entry may be in the year 9999, the last that
		// JSON can hold.
		if began, ok := last[p.Node]; ok && !now.After(began) && began.Year() < 9999 {
			p.At = began.Add(time.Millisecond)
		}
		next = append(next, p)
	}
	return boundPins(next)
}

// boundPins drops pins beyond MaxPastPins: first the oldest that have ended, then the newest of single nodes, then the
// oldest of the unit. truncated is set if it dropped any. pins is changed in place.
func boundPins(pins []deployments.PastPin) (kept []deployments.PastPin, truncated bool) {
	more := len(pins) - deployments.MaxPastPins
	if more <= 0 {
		return pins, false
	}
	// In one pass each: a token for pins/ may have written tens of thousands for a unit.
	kept = slices.DeleteFunc(pins, func(p deployments.PastPin) bool {
		drop := more > 0 && !p.Ended.IsZero()
		if drop {
			more--
		}
		return drop
	})
	nodes := -more // how many pins of single nodes are kept
	for _, p := range kept {
		if p.Node != "" {
			nodes++
		}
	}
	kept = slices.DeleteFunc(kept, func(p deployments.PastPin) bool {
		if p.Node == "" {
			return false
		}
		nodes--
		return nodes < 0
	})
	return kept[max(0, len(kept)-deployments.MaxPastPins):], true
}

// sameEntry reports whether two versions of a history entry have the same Pins and Truncated.
func sameEntry(a, b deployments.History) bool {
	return a.Truncated == b.Truncated && slices.EqualFunc(a.Pins, b.Pins, func(p, q deployments.PastPin) bool {
		return p.Same(q) && p.At.Equal(q.At) && p.Ended.Equal(q.Ended)
	})
}

// withOrder returns the entry h with the consumed order o added, and its oldest orders beyond MaxPastOrders dropped.
// refused is why o changed nothing; empty: it changed something.
func withOrder(h deployments.History, o order, refused deployments.Reason, now time.Time) deployments.History {
	past := deployments.PastOrder{At: now.UTC().Truncate(time.Millisecond), Order: o.Order, Refused: refused}
	past.By, past.Reason = deployments.PastWords(o.By), deployments.PastWords(o.Reason)
	h.Orders = append(slices.Clone(h.Orders), past)
	if more := len(h.Orders) - deployments.MaxPastOrders; more > 0 {
		h.Orders, h.Truncated = h.Orders[more:], true
	}
	return h
}

// lostEntry returns a history entry for a record whose own entry is missing.
func lostEntry(r deployments.Record, now time.Time) deployments.History {
	return deployments.History{Generation: r.Generation, Release: r.Target, Stable: r.Stable, Commit: r.Commit,
		At: now.UTC().Truncate(time.Millisecond), Claim: r.RequestGeneration(), Retry: r.Retry, Pinned: r.Pinned,
		Note: "the entry of this generation was lost, and made again from the record"}
}

// writeHistory returns the operations that put an entry, and remove the one HistoryKept generations before it.
func writeHistory(id deployments.UnitID, h *deployments.History) []kv.Op {
	var value bytes.Buffer
	e := json.NewEncoder(&value)
	e.SetEscapeHTML(false) // an escape has six bytes, with which pins could outgrow a transaction
	if err := e.Encode(h); err != nil {
		panic(err) // plain data
	}
	ops := []kv.Op{kv.Put(kv.HistoryKey(id, h.Generation), bytes.TrimSpace(value.Bytes()))}
	if old := h.Generation - deployments.HistoryKept; old > 0 {
		ops = append(ops, kv.Delete(kv.HistoryKey(id, old)))
	}
	return ops
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
