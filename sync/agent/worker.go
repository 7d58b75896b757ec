package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/deploy"
)

// work is a unit's worker: it does what the goal asks for, one job after another, until ctx ends.
func (a *Agent) work(ctx context.Context, u *unit) {
	if !a.open(ctx, u) {
		return
	}
	watch := &healthWatch{a: a, u: u}
	defer watch.stop()
	for ctx.Err() == nil {
		watch.start(ctx)
		j, jobCtx, again := a.begin(ctx, u, time.Now())
		if j.kind == jobNone {
			var timer <-chan time.Time
			if !again.IsZero() {
				timer = time.After(max(time.Until(again), 0))
			}
			select {
			case <-ctx.Done():
			case <-u.wake.C():
			case <-timer:
			}
			continue
		}
		began := time.Now()
		before := u.deploy.State()
		err := a.do(jobCtx, u, j, watch)
		a.end(jobCtx, u, j, before, err, time.Since(began))
		j.cancel(nil)
	}
}

// open opens the unit's state, as often as it takes.
func (a *Agent) open(ctx context.Context, u *unit) bool {
	retry := newBackoff()
	for {
		d, err := deploy.Open(deploy.Config{
			ID: u.id, Node: a.Node, Dir: a.dir.UnitDir(u.id), Objects: a.c.Objects, Bounds: a.c.Bounds, Trust: a.c.Trust,
			Floors: a.floors, HashAlways: a.c.HashAlways, Secrets: a.c.Secrets,
			Older:    func(p deployments.Pointer) bool { return a.mayBeOlder(u, p) },
			Drain:    func(ctx context.Context, on bool) error { return a.drain(ctx, u, on) },
			Claim:    func(dest string) error { return a.claim(u, dest) },
			Progress: func(s deployments.State, p artifact.Progress) { a.progress(u, s, p) },
			Log:      u.log,
		})
		a.mu.Lock()
		u.deploy, u.trouble = d, err
		for _, other := range a.units {
			other.nudge() // see Agent.opening
		}
		a.mu.Unlock()
		if err == nil {
			s := d.State()
			a.observe(u)
			a.mu.Lock()
			u.recover = s.Unfinished || s.Drained
			if a.c.VerifyEvery > 0 {
				u.verifyAt = time.Now().Add(rand.N(a.c.VerifyEvery)) // not the whole fleet at once
			}
			a.mu.Unlock()
			a.kick()
			return true
		}
		if retry.Tries() == 0 {
			u.log.Error("the unit's state can't be opened: trying again", "error", err)
		}
		a.kickReport()
		if retry.Wait(ctx) != nil {
			return false
		}
	}
}

// end notes what came of a job.
func (a *Agent) end(ctx context.Context, u *unit, j job, before deploy.State, err error, took time.Duration) {
	now, after := time.Now(), u.deploy.State()
	var failed *deploy.Failed
	errors.As(err, &failed)
	changed := before.Running != after.Running || before.Staged != after.Staged ||
		len(before.Quarantined) != len(after.Quarantined)
	if j.kind == jobDeploy || j.kind == jobRecover || j.kind == jobHeal {
		a.observe(u)
	}

	a.mu.Lock()
	calledOff := ctx.Err() != nil
	was := u.trouble
	u.busy, u.phase, u.progress = job{}, "", artifact.Progress{}
	switch {
	case failed != nil: // the unit's state says the rest
		u.trouble = nil
	case errors.Is(err, deploy.ErrQuarantined):
	case errors.Is(err, deploy.ErrRefused) && !j.release.IsZero():
		u.refuse(j.release, err)
		u.trouble = nil
		u.log.Error("the release is refused", "release", j.release.String(), "error", err)
	case err != nil && calledOff: // no trouble
	case errors.As(err, new(*deploy.FutureError)):
	case err != nil:
		u.trouble = err
		u.retryAt = now.Add(u.retry.Next())
	default:
		u.trouble = nil
		u.retry.Reset()
	}
	trouble := u.trouble
	if before.Running != after.Running || !after.Confirmed || after.Unfinished {
		u.done = deployments.Pointer{}
	}
	if j.kind == jobDeploy || j.kind == jobRecover {
		a.displace(u)
	}
	switch j.kind {
	case jobRecover:
		u.recover = false // later on state tells whether there is more to recover
	case jobForget:
		u.forget = u.forget && (err != nil || !j.release.IsZero())
	case jobDeploy:
		if err == nil {
			u.reached(j.release)
			u.drift, u.unhealable, u.foreign = nil, nil, ""
		}
	case jobSettle:
		if settled := new(deploy.FutureError); errors.As(err, &settled) {
			u.future, u.settleAt, u.trouble = settled, now.Add(settleAgain), nil
		} else if err == nil {
			u.future = nil
		} else {
			break
		}
		u.settled = j.release
	case jobVerify:
		u.verifyAt = now.Add(verifyDelay(a.c.VerifyEvery))
		if calledOff {
			u.verifyAt = now.Add(min(time.Minute, a.c.VerifyEvery))
		}
	}
	u.stamp(now)
	a.mu.Unlock()

	switch {
	case trouble != nil && was == nil:
		u.log.Warn("trouble: trying again by itself", "job", string(j.kind), "release", j.release.String(), "error", trouble)
	case trouble == nil && was != nil && err == nil:
		u.log.Info("the trouble is over", "job", string(j.kind))
	}
	if r := after.Running; err == nil && !r.IsZero() && after.Confirmed && (before.Running != r || !before.Confirmed) {
		u.log.Info(
			"the release is live and healthy",
			"release",
			r.String(),
			"version",
			after.Version,
			"took",
			took.Round(time.Millisecond),
		)
	}
	a.metrics.ended(u.id, j.kind, err, calledOff, took)
	a.kick()
	if changed {
		debug.FreeOSMemory() // what a deployment needed an idle agent doesn't
	}
}

// mayBeOlder says whether a pin names p, and pins may name what is older here.
func (a *Agent) mayBeOlder(u *unit, p deployments.Pointer) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	from := u.decision.Source
	return a.c.AllowOlderPins && (from == policy.FromNodePin || from == policy.FromUnitPin) && u.decision.Target == p
}

// progress takes what package deploy says of a deployment under way.
func (a *Agent) progress(u *unit, s deployments.State, p artifact.Progress) {
	u.fetched.Store(p.Done)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case u.busy.kind != jobDeploy && u.busy.kind != jobRecover:
		return // staging in the background changes nothing of what the unit is
	case s == deployments.StateFetching && u.trouble != nil && p.Done == 0:
		return // the next try has brought nothing yet
	case s != deployments.StateFetching && s != deployments.StateSwitching:
		return
	}
	u.phase, u.progress = s, p
	u.stamp(time.Now())
	a.kickReport()
}
