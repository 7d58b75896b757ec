package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"kedge/artifact/meter"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// addUnit adds a unit and starts its worker, unless the unit has one or Run isn't running. a.mu is held.
func (a *Agent) addUnit(id deployments.UnitID) {
	if a.units[id] != nil || a.ctx == nil || a.ctx.Err() != nil {
		return
	}
	recent := new(recentErrors)
	u := &unit{
		id:       id,
		log:      slog.New(remembering{a.c.Log.With("unit", id.String()).Handler(), recent}),
		errors:   recent,
		wake:     wait.NewSignal(),
		observes: deployments.MatchesUnit(a.c.Observe, id),
		observed: observed{retry: newBackoff(), again: wait.NewBackoff(observeAgain, maxObserveAgain)},
	}
	u.stamp(time.Now())
	a.units[id] = u
	var ctx context.Context
	ctx, u.cancel = context.WithCancel(a.ctx)
	a.workers.Go(func() {
		defer u.cancel()
		a.work(ctx, u)
		a.removeRetired(u)
	})
}

// removeRetired removes a unit and its files after its worker has ended, if the unit is retired.
func (a *Agent) removeRetired(u *unit) {
	a.mu.Lock()
	retired := u.retired
	a.mu.Unlock()
	if !retired {
		return
	}
	if err := os.RemoveAll(a.dir.UnitDir(u.id)); err != nil {
		u.log.Warn("could not remove the directory of a unit that is gone: the next start of the agent tries again",
			"error", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.units, u.id)
	delete(a.onDisk, u.id)
	a.metrics.drop(u.id)
	a.cache.RefilterPins(u.id.Role, time.Now())
	a.changed.Set()
}

// work is a unit's worker: it does the jobs that the goal needs, one after another, until ctx ends.
func (a *Agent) work(ctx context.Context, u *unit) {
	if !a.open(ctx, u) {
		return
	}
	watch := &healthWatch{a: a, u: u}
	defer watch.keep() // runs after stop, and saves what the checks found last
	defer watch.stop()
	for ctx.Err() == nil {
		watch.start(ctx)
		watch.keep()
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
		a.traceJob(u, j, began, err)
		a.end(jobCtx, u, j, before, err, time.Since(began))
		j.cancel(nil)
	}
}

// open opens the unit's state, and retries until that succeeds. It returns false if ctx ends first.
func (a *Agent) open(ctx context.Context, u *unit) bool {
	retry := newBackoff()
	for {
		d, err := deploy.Open(deploy.Config{
			ID: u.id, Node: a.Node, Dir: a.dir.UnitDir(u.id), Socket: a.dir.Path(statedir.SocketFile),
			Objects: a.c.Objects, Bounds: a.c.Bounds, Trust: a.c.Trust,
			Floors: a.floors, HashAlways: a.c.HashAlways, Secrets: a.c.Secrets,
			Older: func(p deployments.Pointer) bool {
				a.mu.Lock()
				defer a.mu.Unlock()
				return a.mayBeOlder(u, p)
			},
			Drain:    func(ctx context.Context, on bool) error { return a.drain(ctx, u, on) },
			Claim:    func(dest string) error { return a.claim(u, dest) },
			Progress: func(s deployments.State, p meter.Progress) { a.progress(u, s, p) },
			Stepped:  func(step string, began time.Time, err error) { a.traceStep(u, step, began, err) },
			Log:      u.log,
		})
		a.mu.Lock()
		u.deploy, u.lastErr = d, err
		if err == nil {
			s := d.State()
			u.mustRecover = s.Unfinished || s.Drained
			if s.Proven && !s.Unfinished {
				u.watched, u.health = s.Running, s.Health
			}
		}
		for _, other := range a.units {
			other.wake.Set() // see Agent.opening
		}
		a.mu.Unlock()
		if err == nil {
			a.watchDest(u)
			a.mu.Lock()
			if a.c.VerifyEvery > 0 {
				u.verifyAt = time.Now().Add(rand.N(a.c.VerifyEvery)) // spreads the fleet
			}
			a.mu.Unlock()
			a.changed.Set()
			return true
		}
		if retry.Tries() == 0 {
			u.log.Error("could not open the unit's state: trying again", "error", err)
		}
		a.reportDue.Set()
		if retry.Wait(ctx) != nil {
			return false
		}
	}
}

// drain sets or ends the drain of a unit; package deploy calls it around a switch.
func (a *Agent) drain(ctx context.Context, u *unit, on bool) error {
	if slices.Contains(a.drainTracker.Units(), u.id) != on {
		says := "the unit is drained: /ready answers 503 until that ends"
		if !on {
			says = "the unit is no longer drained"
		}
		u.log.Info(says)
	}
	err := a.drainTracker.Set(ctx, u.id, on)
	a.changed.Set()
	return err
}

// end records the result of a job.
func (a *Agent) end(ctx context.Context, u *unit, j job, before deploy.State, err error, took time.Duration) {
	now, after := time.Now(), u.deploy.State()
	var failed *deploy.Failed
	errors.As(err, &failed)
	changed := before.Running != after.Running || before.Staged != after.Staged ||
		len(before.Quarantined) != len(after.Quarantined)
	if j.switches() || j.kind == jobHeal {
		a.watchDest(u)
	}

	a.mu.Lock()
	calledOff := ctx.Err() != nil
	was := u.lastErr
	u.busy, u.phase, u.progress, u.announce = job{}, "", meter.Progress{}, nil
	switch {
	case failed != nil: // the unit's state has the details
		u.lastErr = nil
	case errors.Is(err, deploy.ErrQuarantined):
	case errors.Is(err, deploy.ErrRefused) && !j.release.IsZero():
		u.refuse(j.release, err)
		u.lastErr = nil
		u.log.Error("the release is refused: the unit stays on what it runs", "release", j.release.String(), "error", err)
	case err != nil && calledOff: // not an error
	case errors.As(err, new(*deploy.FutureError)):
	case err != nil:
		u.lastErr = err
		u.retryAt = now.Add(u.retry.Next())
	default:
		u.lastErr = nil
		u.retry.Reset()
	}
	lastErr := u.lastErr
	if before.Running != after.Running || !after.Confirmed || after.Unfinished {
		u.done = deployments.Pointer{}
	}
	if j.kind == jobDeploy || j.kind == jobRecover {
		a.displace(u)
	}
	switch j.kind {
	case jobRecover:
		u.mustRecover = false // from now on the state says whether there is more to recover
	case jobEndQuarantine:
		u.mustForget = u.mustForget && (err != nil || !j.release.IsZero())
	case jobDeploy:
		if err == nil {
			u.reached(j.release)
			u.drift, u.unhealable, u.foreign = nil, nil, ""
		}
	case jobRaiseFloor:
		if future := new(deploy.FutureError); errors.As(err, &future) {
			u.future, u.raiseFloorAt, u.lastErr = future, now.Add(floorRetry), nil
		} else if err == nil {
			u.future = nil
		} else {
			break
		}
		u.floorRelease = j.release
	case jobVerify:
		u.verifyAt = now.Add(verifyDelay(a.c.VerifyEvery))
		if calledOff {
			u.verifyAt = now.Add(min(time.Minute, a.c.VerifyEvery))
		}
	}
	u.stamp(now)
	a.mu.Unlock()

	switch {
	case lastErr != nil && was == nil:
		u.log.Warn("the job failed: trying again", "job", string(j.kind), "release", j.release.String(), "error", lastErr)
	case lastErr == nil && was != nil && err == nil:
		u.log.Info("a job succeeded after one that had failed", "job", string(j.kind), "earlier", was)
	}
	if r := after.Running; err == nil && !r.IsZero() && after.Confirmed && (before.Running != r || !before.Confirmed) {
		u.log.Info("the release is live and healthy", "release", r.String(), "version", after.Version,
			"took", took.Round(time.Millisecond))
	}
	a.metrics.ended(u.id, string(j.kind), j.kind == jobDeploy, err, calledOff, took)
	a.changed.Set()
	if changed {
		a.freeMemory()
	}
}

// freeDelay is the time without a job that changes something, after which memory is freed. Freeing it at once could
// delay the switch that follows a fetch.
const freeDelay = time.Second

// freeMemory schedules Config.FreeMemory in freeDelay from now, instead of any call scheduled before.
func (a *Agent) freeMemory() {
	if a.c.FreeMemory == nil {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.freeing != nil {
		a.freeing.Stop()
	}
	a.freeing = time.AfterFunc(freeDelay, a.c.FreeMemory)
}

// mayBeOlder reports whether p may be older than the version floor. With AllowOlderPins it may if a
// valid pin of the unit, for all nodes or this one, names p and hasn't expired. The decision's
// source doesn't tell whether a pin names p, because a pin that the mirror rolls out reaches nodes
// as the record's target. a.mu is held.
func (a *Agent) mayBeOlder(u *unit, p deployments.Pointer) bool {
	return a.c.AllowOlderPins && slices.ContainsFunc(u.pins[:], func(v policy.Value[deployments.Pin]) bool {
		return v.Present && v.Err == nil && v.Value.Release == p && !v.Value.Expired(time.Now())
	})
}

// progress records what package deploy reports: the bytes fetched and, for a job that switches, its phase.
func (a *Agent) progress(u *unit, s deployments.State, p meter.Progress) {
	u.fetched.Store(p.Done)
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !u.busy.switches():
		return // staging in the background doesn't change the unit's state
	case s == deployments.StateFetching && u.lastErr != nil && p.Done == 0:
		return // the retry has fetched nothing yet
	case s != deployments.StateFetching && s != deployments.StateSwitching:
		return
	case s == deployments.StateFetching && u.announce != nil: // the switch reads what is on disk
		return
	}
	u.phase, u.progress = s, p
	u.stamp(time.Now())
	a.reportDue.Set()
}

// choose returns the next job for the goal. If there is none, again is when to choose again, which is after now; zero:
// only when the worker is woken. verifies tells whether live trees are checked in the background.
func (u *unit) choose(now time.Time, verifies bool) (_ job, again time.Time) {
	if wait := u.retryAt; now.Before(wait) {
		return job{}, wait
	}
	if u.observes {
		return u.observeOnly(now)
	}
	s, g := u.state(), u.goal
	run := g.run
	if u.refused[run].err != nil {
		run = deployments.Pointer{}
	}
	failed := !run.IsZero() && u.quarantined(run)
	raises := s.Confirmed && !s.Unfinished && s.Running == u.nextFloor && !u.nextFloor.IsZero()
	if raises && u.floorRelease == u.nextFloor { // only a release ahead of the clock raises the floor again
		if raises = u.future != nil && !now.Before(u.raiseFloorAt); u.future != nil && !raises {
			again = u.raiseFloorAt
		}
	}
	deploys := !run.IsZero() && !failed && (u.done != run || s.Unfinished)
	// An interrupted deployment is finished before another release is deployed, as storage may be away. It isn't if the
	// other release is the last good one, because that is on disk.
	back := deploys && run == s.LastGood && s.Unfinished && run != s.RecoversTo
	switch {
	case g.leave && s.Leavable && !s.Leaving:
		return job{kind: jobLeave}, again
	case u.mustRecover && !back || s.Unfinished && !deploys:
		return job{kind: jobRecover}, again
	case raises: // before any other deployment, which may be of an older release
		return job{kind: jobRaiseFloor, release: u.nextFloor}, again
	case u.mustForget:
		return job{kind: jobEndQuarantine}, again
	case deploys:
		return job{
			kind: jobDeploy, release: run, commit: g.commit, key: g.key, adopt: g.adopt, mayLeave: !g.forgetBefore,
		}, again
	case failed:
		// A request other than the one that the release failed under allows another try.
		if f, _ := u.failure(run); !policy.SameRequest(f.Key, g.key) {
			return job{kind: jobEndQuarantine, release: run, key: g.key}, again
		}
	}
	if u.gone() {
		return job{}, again
	}
	unproven := s.Confirmed && !s.Proven && !s.Running.IsZero()
	if unproven && u.lastErr == nil {
		return job{kind: jobProve, release: s.Running}, again
	}
	if s.Leavable && g.forgetBefore && s.Confirmed && !s.Unfinished {
		return job{kind: jobForgetBefore}, again
	}
	if u.toHeal() {
		return job{kind: jobHeal}, again
	}
	if u.mustInspectDest() {
		return job{kind: jobInspectDest, release: g.stage}, again
	}
	if p := g.stage; !p.IsZero() && s.Staged.Digest != p.Digest && s.Running.Digest != p.Digest && !u.quarantined(p) &&
		u.refused[p].err == nil {
		return job{kind: jobStage, release: p}, again
	}
	switch {
	case unproven: // once more, after all other jobs
		return job{kind: jobProve, release: s.Running}, again
	case !verifies || s.Running.IsZero():
		return job{}, again
	case now.Before(u.verifyAt):
		if !again.IsZero() && again.Before(u.verifyAt) {
			return job{}, again
		}
		return job{}, u.verifyAt
	default:
		return job{kind: jobVerify}, again
	}
}

// begin chooses the next job, records that it is under way, and returns it with its context. If there is no job, the
// context is nil, and the time is when to choose again; zero: only when the worker is woken.
func (a *Agent) begin(ctx context.Context, u *unit, now time.Time) (job, context.Context, time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	j, again := u.choose(now, a.c.VerifyEvery > 0)
	if (j.kind == jobDeploy || j.kind == jobStage || j.kind == jobInspectDest) && a.opening() {
		return job{}, nil, time.Time{}
	}
	if j.kind == jobNone {
		return j, nil, again
	}
	ctx, cancel := context.WithCancelCause(ctx)
	j.cancel = cancel
	j.span, j.root = a.traced(u, j)
	u.busy, u.phase, u.progress, u.announce = j, "", meter.Progress{}, nil
	u.stamp(now)
	return j, ctx, time.Time{}
}

// opening reports whether some unit's state has yet to be opened. Until then it isn't known where the unit's tree is,
// and another unit could take its dest. A unit whose opening failed holds up no other. a.mu is held.
func (a *Agent) opening() bool {
	for _, u := range a.units {
		if u.deploy == nil && u.lastErr == nil {
			return true
		}
	}
	return false
}

// do runs a job, according to its kind.
func (a *Agent) do(ctx context.Context, u *unit, j job, watch *healthWatch) error {
	switch j.kind {
	case jobRecover:
		watch.stop()
		return u.deploy.Recover(ctx)
	case jobEndQuarantine:
		return a.forget(u, j)
	case jobDeploy:
		q := deploy.Request{Release: j.release, Commit: j.commit, Key: j.key, Adopt: j.adopt, MayLeave: j.mayLeave}
		began := time.Now()
		err := a.fetch(ctx, u, j.release, a.fetchSlot)
		a.traceStep(u, "fetch", began, err)
		if err != nil {
			return u.deploy.StageFailed(ctx, q, err)
		}
		if u.deploy.State().Running.IsZero() {
			if err := a.inspectDest(ctx, u, j.release); err != nil {
				return err
			}
		}
		began = time.Now()
		err = a.announce(ctx, u, j.release)
		a.traceStep(u, "announce", began, err)
		if err != nil {
			return err
		}
		watch.stop()
		return u.deploy.Deploy(ctx, q)
	case jobLeave:
		if err := a.announce(ctx, u, deployments.Pointer{}); err != nil {
			return err
		}
		watch.stop()
		return u.deploy.Leave(ctx)
	case jobForgetBefore:
		return u.deploy.ForgetBefore()
	case jobStage:
		return a.fetch(ctx, u, j.release, a.prefetchSlot)
	case jobProve:
		return u.deploy.Prove(ctx)
	case jobRaiseFloor:
		return u.deploy.RaiseFloor()
	case jobHeal:
		return a.heal(ctx, u)
	case jobObserve:
		return a.compare(ctx, u, j.release)
	case jobInspectDest:
		return a.inspectDest(ctx, u, j.release)
	case jobVerify:
		return a.verify(ctx, u)
	}
	return fmt.Errorf("no such job: %q", j.kind)
}

// floorRetry is the pause between two tries to raise the version floor to a release whose time is ahead of the node's
// clock. The clock may have been behind, and may have been corrected since.
const floorRetry = 10 * time.Minute

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
