package mirror

import (
	"errors"
	"fmt"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet/message"
	"kedge/sync/trace"
)

// traceWritten sends the spans that a written record completes: that of the push itself, and that of a rollout that
// has ended.
func (w *writer) traceWritten(c change, now time.Time) {
	if w.trace == nil || c.value == nil {
		return
	}
	push := trace.Of(c.unit, c.after.Commit, pinned(c.after))
	facts := []trace.Attribute{
		{Key: "kedge.unit", Value: c.unit.String()}, {Key: "kedge.commit", Value: c.after.Commit},
		{Key: "kedge.release", Value: c.after.Target.String()},
		{Key: "kedge.generation", Value: fmt.Sprint(c.after.Generation)},
	}
	if before := trace.Of(c.unit, c.before.Commit, pinned(c.before)); before != push {
		w.trace.Add(trace.Span{Context: push, Name: "push", Start: now, End: time.Now(), Attributes: facts})
	}
	if !rolling(c.before) || rolling(c.after) {
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

// pinned returns the release of a pin that a record rolls out; zero: none.
func pinned(r deployments.Record) deployments.Digest {
	if r.Pinned == nil {
		return deployments.Digest{}
	}
	return r.Target.Digest
}

// rolling reports whether a rollout is under way.
func rolling(r deployments.Record) bool {
	return r.Rollout != nil && r.Rollout.Phase != deployments.PhaseRolledBack
}
