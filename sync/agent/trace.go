package agent

import (
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/trace"
)

// traced returns the context of a job's span and the root span of its trace; zero if the job isn't traced. a.mu is
// held.
func (a *Agent) traced(u *unit, j job) (span trace.Context, root trace.SpanID) {
	if a.c.Trace == nil || j.kind != jobDeploy && j.kind != jobStage && j.kind != jobLeave {
		return span, root
	}
	r := u.record.Value
	var pin deployments.Digest
	if d := u.decision; d.Source == policy.FromNodePin || d.Source == policy.FromUnitPin {
		pin = d.Target.Digest
	} else if r.Pinned != nil {
		pin = r.Target.Digest
	}
	push := trace.Of(u.id, r.Commit, pin)
	return push.New(), push.Span
}

// traceJob sends the span of a job that has ended.
func (a *Agent) traceJob(u *unit, j job, began time.Time, err error) {
	if j.span.IsZero() {
		return
	}
	facts := []trace.Attribute{
		{Key: "kedge.unit", Value: u.id.String()}, {Key: "kedge.node", Value: a.Node()},
		{Key: "kedge.release", Value: j.release.String()},
	}
	if s := u.deploy.State(); s.Running == j.release {
		facts = append(facts, trace.Attribute{Key: "kedge.version", Value: s.Version})
	}
	a.c.Trace.Add(trace.Span{Context: j.span, Parent: j.root, Name: string(j.kind), Start: began, End: time.Now(),
		Attributes: facts, Err: err})
}

// traceStep sends the span of a part of the unit's present job.
func (a *Agent) traceStep(u *unit, step string, began time.Time, err error) {
	if a.c.Trace == nil {
		return
	}
	a.mu.Lock()
	within := u.busy.span
	a.mu.Unlock()
	if within.IsZero() {
		return
	}
	a.c.Trace.Add(trace.Span{Context: within.New(), Parent: within.Span, Name: step, Start: began, End: time.Now(),
		Err: err})
}
