package mirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// watchLag is how long a write may take to show in a watch, before what the watch shows is taken for the truth.
const watchLag = 5 * time.Second

// written is what this mirror wrote to the store since it holds the lease, or found there and took over.
type written struct {
	records map[deployments.UnitID]writtenRecord
	orders  map[deployments.UnitID]uint64 // versions of the orders that were consumed
	state   deployments.MirrorState       // at mirror/state
	stateAt time.Time
}

// writtenRecord is what this mirror wrote last at a unit's key.
type writtenRecord struct {
	record deployments.Record
	value  []byte // nil: it removed the key
	// base is the version that the write replaced (0: none). version is that of the write, 0 until the store has shown it.
	base, version uint64
	at            time.Time
	// vouched is set if a commit named the unit: it goes into the snapshot, which is signed. A record whose unit Git never
	// named was only marked as orphaned.
	vouched bool
}

// confirm marks the writes that the store shows.
func (w *written) confirm(cells map[deployments.UnitID]cell) {
	for id, own := range w.records {
		c := cells[id]
		switch {
		case own.value == nil && !c.present:
			delete(w.records, id)
		case own.value != nil && bytes.Equal(c.value, own.value):
			own.version = c.version
			w.records[id] = own
		}
	}
}

// adopt takes records that another mirror wrote for this one's own: who changes them by hand is put right, and they
// go into the snapshot.
func (w *written) adopt(units []deployments.UnitID, cells map[deployments.UnitID]cell) {
	for _, id := range units {
		c := cells[id]
		w.records[id] = writtenRecord{record: c.record, value: c.value, base: c.version, version: c.version, vouched: true}
	}
}

// unconfirmed reports whether the store has yet to show a write.
func (w *written) unconfirmed() bool {
	for _, own := range w.records {
		if own.version == 0 {
			return true
		}
	}
	return false
}

// lostState reports whether mirror/state isn't what this mirror wrote there: somebody removed or changed it by
// hand. While the write may have yet to show, at is when that can be told.
func (w *written) lostState(state observedState, now time.Time) (lost bool, at time.Time) {
	if !state.current || w.stateAt.IsZero() || bytes.Equal(state.value, encodeStatus(w.state)) {
		return false, at
	}
	at = w.stateAt.Add(watchLag)
	return !now.Before(at), at
}

// write commits the changes, and the state where it differs from what was written, or where lost says that it isn't
// there. What takes several transactions is announced in the first and confirmed in the last, so that a mirror that
// takes over in between knows which commit it finds half written.
func (l *leader) write(
	ctx context.Context,
	changes []change,
	status deployments.MirrorState,
	lost bool,
	now time.Time,
) error {
	all := changes
	if lost || !status.Equal(l.written.state) {
		all = append(slices.Clone(changes), writeStatus(status))
	}
	todo := batches(all)
	if len(todo) > 1 && status.Head != l.written.state.Head {
		announced := l.written.state
		announced.Holder, announced.Applying, announced.Rules = status.Holder, status.Head, status.Rules
		todo = batches(append([]change{writeStatus(announced)}, all...))
	}
	for _, batch := range todo {
		var ops []kv.Op
		for _, w := range batch {
			ops = append(ops, w.ops...)
		}
		if err := l.c.Store.Commit(ctx, l.lease, ops...); err != nil {
			if !errors.Is(err, kv.ErrConflict) && !errors.Is(err, kv.ErrLeaseLost) {
				for _, w := range batch {
					// It may have been written all the same: take what the store shows.
					delete(l.written.records, w.unit)
					if w.status == nil {
						l.history.forget(w.unit)
					}
				}
			}
			return fmt.Errorf("write %d keys: %w", len(ops), err)
		}
		l.metrics.wrote(len(ops))
		for _, w := range batch {
			l.noteWritten(w, now)
		}
	}
	return nil
}

// noteWritten keeps a change that the store has taken.
func (l *leader) noteWritten(w change, now time.Time) {
	if w.status != nil {
		l.written.state, l.written.stateAt = *w.status, now
		l.metrics.applied(*w.status)
		return
	}
	if w.order.version != 0 {
		l.written.orders[w.unit] = w.order.version
		l.c.Log.Info(
			"order taken",
			"unit",
			w.unit,
			"order",
			w.order.Verb,
			"by",
			w.order.By,
			"why",
			w.order.Reason,
			"outcome",
			w.reason,
		)
	}
	if w.kind == "none" {
		l.history.wrote(w)
		return
	}
	l.written.records[w.unit] = writtenRecord{record: w.after, value: w.value, base: w.base, at: now,
		vouched: !w.after.Orphaned || l.written.records[w.unit].vouched}
	if w.value == nil {
		l.history.forget(w.unit)
	}
	l.history.wrote(w)
	l.c.Log.Info("record written", "unit", w.unit, "kind", w.kind, "target", w.after.Target,
		"generation", w.after.Generation, "commit", w.after.Commit, "reason", w.reason)
}

// reportFailure says in mirror/state why what the commit asks for can't be written, where the store takes at least
// that.
func (l *leader) reportFailure(ctx context.Context, err error, now time.Time) {
	for _, passes := range []error{kv.ErrConflict, kv.ErrLeaseLost, kv.ErrUnavailable} {
		if errors.Is(err, passes) {
			return
		}
	}
	l.tell(ctx, "the commit can't be written: "+err.Error(), now)
}

// tell writes an error to mirror/state.
func (l *leader) tell(ctx context.Context, words string, now time.Time) {
	status := l.written.state
	status.Holder, status.Error = l.c.Name, clip(words, maxError)
	if ctx.Err() != nil || !worthWriting(l.written.state, status, l.written.stateAt, now) {
		return
	}
	w := writeStatus(status)
	if err := l.c.Store.Commit(ctx, l.lease, w.ops...); err == nil {
		l.noteWritten(w, now)
	}
}

// batches packs the writes, each whole and in order, into as few transactions as fit.
func batches(writes []change) [][]change {
	var all [][]change
	sum, size := 0, 0
	for _, w := range writes {
		cost, bytes := 0, 0
		for _, op := range w.ops {
			cost, bytes = cost+op.Cost(), bytes+len(op.Key)+len(op.Value)
		}
		if len(all) == 0 || sum+cost > kv.MaxOps || size+bytes > maxBatch {
			all, sum, size = append(all, nil), 0, 0
		}
		last := len(all) - 1
		all[last], sum, size = append(all[last], w), sum+cost, size+bytes
	}
	return all
}

// maxBatch bounds a transaction's keys and values, in bytes: Consul takes 512 KiB of JSON, in which values grow by
// a third.
const maxBatch = 300 << 10
