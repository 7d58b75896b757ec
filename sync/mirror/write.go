package mirror

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet/message"
	"kedge/sync/trace"
)

// writer writes the changes that reconcile returns, and the mirror's state.
type writer struct {
	written
	name    string                                // Config.Name
	commit  func(context.Context, ...kv.Op) error // under the lease
	history *historyKeeper
	metrics *metrics
	trace   *trace.Sender
	log     *slog.Logger
}

// confirm records which writes the store now shows, with their versions. It drops what is kept of
// keys that this mirror removed, once the store shows that they are gone.
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

// adopt makes this mirror responsible for records that are as the commit asks: from now on it undoes changes to them
// that are made by hand, and includes them in the snapshot. Another mirror wrote them, or this one while the commit was
// unvouched.
func (w *written) adopt(units []deployments.UnitID, cells map[deployments.UnitID]cell) {
	for _, id := range units {
		c := cells[id]
		w.records[id] = writtenRecord{record: c.record, value: c.value, base: c.version, version: c.version,
			at: w.records[id].at, vouched: true}
	}
}

// unconfirmed reports whether the store has yet to show this mirror's write or removal of a record.
func (w *written) unconfirmed() bool {
	for _, own := range w.records {
		if own.version == 0 {
			return true
		}
	}
	return false
}

// lostState reports whether somebody removed or changed what this mirror wrote to mirror/state. It is false while the
// view is out of date, or if this mirror has yet to write there. If the watch may still be late to show the write,
// lostState can't tell yet; at is when it can.
func (w *written) lostState(state observedState, now time.Time) (lost bool, at time.Time) {
	if !state.current || w.stateAt.IsZero() || bytes.Equal(state.value, encodeStatus(w.state)) {
		return false, at
	}
	at = w.stateAt.Add(watchLag)
	return !now.Before(at), at
}

// write commits the changes, and the state if it changed or is lost. If a new commit needs several transactions, the
// first announces it and the last confirms it. So a mirror that takes over knows which commit is half written.
func (w *writer) write(
	ctx context.Context,
	changes []change,
	status deployments.MirrorState,
	lost bool,
	now time.Time,
) error {
	all := changes
	if lost || !status.Equal(w.state) {
		all = append(slices.Clone(changes), writeStatus(status))
	}
	todo := batches(all)
	if len(todo) > 1 && status.Head != w.state.Head {
		announced := w.state
		announced.Holder, announced.Applying, announced.Rules = status.Holder, status.Head, status.Rules
		todo = batches(append([]change{writeStatus(announced)}, all...))
	}
	for _, batch := range todo {
		var ops []kv.Op
		for _, c := range batch {
			ops = append(ops, c.ops...)
		}
		if err := w.commit(ctx, ops...); err != nil {
			if !errors.Is(err, kv.ErrConflict) && !errors.Is(err, kv.ErrLeaseLost) {
				for _, c := range batch {
					// The write may have happened all the same: rely on what the store shows.
					delete(w.records, c.unit)
					if c.status == nil {
						w.history.forget(c.unit)
					}
				}
			}
			return fmt.Errorf("writing keys (%d, the first is %s): %w", len(ops), ops[0].Key, err)
		}
		for _, c := range batch {
			w.noteWritten(c, now)
		}
	}
	return nil
}

// noteWritten records a change that the store has taken.
func (w *writer) noteWritten(c change, now time.Time) {
	if c.status != nil {
		w.state, w.stateAt = *c.status, now
		w.metrics.setState(*c.status)
		return
	}
	if c.order.version != 0 {
		w.orders[c.unit] = c.order.version
		w.log.Info("read an operator's order", "unit", c.unit, "order", c.order.Verb, "by", c.order.By,
			"reason", c.order.Reason, "outcome", c.reason)
	}
	if c.kind == "none" {
		w.history.addWritten(c)
		return
	}
	w.traceWritten(c, now)
	w.records[c.unit] = writtenRecord{record: c.after, value: c.value, base: c.base, at: now,
		vouched: c.vouched}
	if c.value == nil {
		w.history.forget(c.unit)
	}
	w.history.addWritten(c)
	phase, reason := deployments.Phase(""), c.reason
	if p := c.after.Rollout; p != nil {
		phase, reason = p.Phase, cmp.Or(reason, p.Message)
	}
	w.log.Info("record written", "unit", c.unit, "kind", c.kind, "target", c.after.Target,
		"generation", c.after.Generation, "commit", c.after.Commit, "phase", phase, "reason", reason)
}

// traceWritten sends the trace spans that writing c completes. These are the push's span if c's record is the first of
// its commit or pin, and the rollout's span if c ends the rollout.
func (w *writer) traceWritten(c change, now time.Time) {
	if w.trace == nil || c.value == nil {
		return
	}
	push := trace.Of(c.unit, c.after.Commit, pinOf(c.after))
	facts := []trace.Attribute{
		{Key: "kedge.unit", Value: c.unit.String()}, {Key: "kedge.commit", Value: c.after.Commit},
		{Key: "kedge.release", Value: c.after.Target.String()},
		{Key: "kedge.generation", Value: fmt.Sprint(c.after.Generation)},
	}
	if before := trace.Of(c.unit, c.before.Commit, pinOf(c.before)); before != push {
		w.trace.Add(trace.Span{Context: push, Name: "push", Start: now, End: time.Now(), Attributes: facts})
	}
	if !inRollout(c.before) || inRollout(c.after) {
		return
	}
	s := trace.Span{Context: push.New(), Parent: push.Span, Name: "rollout", Start: now, End: time.Now(),
		Attributes: facts}
	if began := w.history.newest[c.unit].At; !began.IsZero() && began.Before(now) {
		s.Start = began
	}
	if c.after.Rollout != nil {
		s.Err = errors.New(message.Rollout(c.after.Rollout))
	}
	w.trace.Add(s)
}

// pinOf returns the release of the pin that a record rolls out; zero: none.
func pinOf(r deployments.Record) deployments.Digest {
	if r.Pinned == nil {
		return deployments.Digest{}
	}
	return r.Target.Digest
}

// inRollout reports whether a rollout is under way.
func inRollout(r deployments.Record) bool {
	return r.Rollout != nil && r.Rollout.Phase != deployments.PhaseRolledBack
}

// reportFailure writes to mirror/state why the commit's changes can't be written, if the store takes that write. It
// ignores errors that pass: a conflict, a lost lease, a store that is unavailable.
func (w *writer) reportFailure(ctx context.Context, err error, now time.Time) {
	for _, passes := range []error{kv.ErrConflict, kv.ErrLeaseLost, kv.ErrUnavailable} {
		if errors.Is(err, passes) {
			return
		}
	}
	w.writeError(ctx, "the commit can't be written: "+err.Error(), now)
}

// writeError tries to write an error to mirror/state, unless that isn't worth writing: see worthWriting.
func (w *writer) writeError(ctx context.Context, words string, now time.Time) {
	status := w.state
	status.Holder, status.Error = w.name, clip(words, maxError)
	if ctx.Err() != nil || !worthWriting(w.state, status, w.stateAt, now) {
		return
	}
	c := writeStatus(status)
	if err := w.commit(ctx, c.ops...); err == nil {
		w.noteWritten(c, now)
	}
}

// worthWriting reports whether next differs enough from was, the state that was written at the time
// at. next doesn't if only digits in the error differ (ports, counts, times) and sameErrorPause has
// not passed. worthWriting is pure.
func worthWriting(was, next deployments.MirrorState, at, now time.Time) bool {
	if withoutDigits(was.Error) == withoutDigits(next.Error) && now.Sub(at) < sameErrorPause {
		was.Error = next.Error
	}
	return !was.Equal(next)
}

const sameErrorPause = 5 * time.Minute

func withoutDigits(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, s)
}

// writeStatus returns the change that puts s at mirror/state.
func writeStatus(s deployments.MirrorState) change {
	return change{status: &s, ops: []kv.Op{kv.Put(kv.MirrorKey, encodeStatus(s))}}
}

func encodeStatus(s deployments.MirrorState) []byte {
	value, err := json.Marshal(s)
	if err != nil {
		panic(err) // plain data
	}
	return value
}
