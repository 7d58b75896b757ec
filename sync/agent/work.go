package agent

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"strings"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
)

// work is a unit's worker: it does what the goal asks for, one job after another, until ctx ends.
func (a *Agent) work(ctx context.Context, u *unit) {
	if !a.open(ctx, u) {
		return
	}
	for ctx.Err() == nil {
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
		err := a.do(jobCtx, u, j)
		a.end(jobCtx, u, j, before, err, time.Since(began))
		j.cancel(nil)
	}
}

// open opens the unit's state, as often as it takes.
func (a *Agent) open(ctx context.Context, u *unit) bool {
	retry := newBackoff()
	for {
		d, err := deploy.Open(deploy.Config{
			ID: u.id, Node: a.Node, Dir: unitDir(a.c.StateDir, u.id), Objects: a.c.Objects, Bounds: a.c.Bounds, Trust: a.c.Trust,
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

// begin chooses the next job, and notes that it is under way. Without one, it says when to look again; zero: when woken.
func (a *Agent) begin(ctx context.Context, u *unit, now time.Time) (job, context.Context, time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	j, again := u.choose(now, a.c.VerifyEvery > 0)
	if (j.kind == jobDeploy || j.kind == jobStage) && a.opening() {
		return job{}, nil, time.Time{}
	}
	if j.kind == jobNone {
		return j, nil, again
	}
	ctx, cancel := context.WithCancelCause(ctx)
	j.cancel = cancel
	u.busy, u.phase, u.progress = j, "", artifact.Progress{}
	return j, ctx, time.Time{}
}

// opening reports whether some unit's state has yet to be opened. Until then it isn't known where its tree lies, and another could take
// its place. a.mu is held.
func (a *Agent) opening() bool {
	for _, u := range a.units {
		if u.deploy == nil && u.trouble == nil {
			return true
		}
	}
	return false
}

// choose is the job that the goal asks for next.
func (u *unit) choose(now time.Time, verifies bool) (_ job, again time.Time) {
	if wait := u.retryAt; now.Before(wait) {
		return job{}, wait
	}
	s, g := u.state(), u.goal
	run := g.run
	if u.refused[run].err != nil {
		run = deployments.Pointer{}
	}
	failed := !run.IsZero() && u.quarantined(run)
	deploys := !run.IsZero() && !failed && (u.done != run || s.Unfinished)
	// What was cut off is finished first, as storage may be away: but not where the release before it is wanted, which lies on disk.
	back := deploys && run == s.LastGood && s.Unfinished && run != s.Ends
	switch {
	case u.recover && !back || s.Unfinished && !deploys:
		return job{kind: jobRecover}, again
	case u.forget:
		return job{kind: jobForget}, again
	case deploys:
		return job{kind: jobDeploy, release: run, commit: g.commit, claim: g.claim}, again
	case failed:
		// Another claim than the one that it failed under lets it be tried once more.
		if f, _ := u.failure(run); f.Key != g.claim {
			return job{kind: jobForget, release: run, claim: g.claim}, again
		}
	}
	if u.gone() {
		return job{}, again
	}
	unproven := s.Confirmed && !s.Proven && !s.Running.IsZero()
	if unproven && u.trouble == nil {
		return job{kind: jobProve, release: s.Running}, again
	}
	if g.settle && !run.IsZero() && u.done == run && u.settled != run {
		return job{kind: jobSettle, release: run}, again
	}
	if g.heal && len(u.drift) > 0 {
		return job{kind: jobHeal}, again
	}
	if p := g.stage; !p.IsZero() && s.Staged.Digest != p.Digest && s.Running.Digest != p.Digest && !u.quarantined(p) && u.refused[p].err == nil {
		return job{kind: jobStage, release: p}, again
	}
	switch {
	case unproven: // once more, after what else there was to do
		return job{kind: jobProve, release: s.Running}, again
	case !verifies || s.Running.IsZero():
		return job{}, again
	case now.Before(u.verifyAt):
		return job{}, u.verifyAt
	default:
		return job{kind: jobVerify}, again
	}
}

// do does a job.
func (a *Agent) do(ctx context.Context, u *unit, j job) error {
	switch j.kind {
	case jobRecover:
		return u.deploy.Recover(ctx)
	case jobForget:
		return a.forget(u, j)
	case jobDeploy:
		if err := a.fetch(ctx, u, j.release, a.fetching); err != nil {
			return err
		}
		return u.deploy.Deploy(ctx, deploy.Request{Release: j.release, Commit: j.commit, Key: j.claim})
	case jobStage:
		return a.fetch(ctx, u, j.release, a.ahead)
	case jobProve:
		return u.deploy.Prove(ctx)
	case jobSettle:
		return u.deploy.Settle()
	case jobHeal:
		return a.heal(ctx, u)
	case jobVerify:
		return a.verify(ctx, u)
	}
	return fmt.Errorf("no such job: %q", j.kind)
}

// fetch has a release on disk before it is deployed, where that takes a fetch: after the start delay, and in its turn.
func (a *Agent) fetch(ctx context.Context, u *unit, p deployments.Pointer, turn chan struct{}) error {
	s := u.deploy.State()
	if p.Digest == s.Running.Digest || p.Digest == s.Staged.Digest {
		return nil
	}
	if p.Digest == s.LastGood.Digest { // it lies on disk
		return u.deploy.Stage(ctx, p)
	}
	if a.c.StartDelay > 0 {
		if err := wait.For(ctx, rand.N(a.c.StartDelay)); err != nil {
			return err
		}
	}
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-turn }()
	return u.deploy.Stage(ctx, p)
}

// forget ends the quarantine of one release, or of all. One whose failure key isn't known is given the present one instead.
func (a *Agent) forget(u *unit, j job) error {
	digest := j.release.Digest
	if !digest.IsZero() {
		if f, _ := u.failure(j.release); f.Key == "" {
			return u.deploy.SetKey(digest, j.claim)
		}
		u.log.Info("trying a release once more that failed here", "release", j.release.String(), "asked by", j.claim)
	}
	return u.deploy.Retry(digest)
}

// end notes what came of a job.
func (a *Agent) end(ctx context.Context, u *unit, j job, before deploy.State, err error, took time.Duration) {
	now, after := time.Now(), u.deploy.State()
	var failed *deploy.Failed
	errors.As(err, &failed)
	changed := before.Running != after.Running || before.Staged != after.Staged || len(before.Quarantined) != len(after.Quarantined)
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
	switch j.kind {
	case jobRecover:
		u.recover = false // later on state tells whether there is more to recover
	case jobForget:
		u.forget = u.forget && (err != nil || !j.release.IsZero())
	case jobDeploy:
		if err == nil {
			u.done, u.drift = j.release, nil
		}
	case jobSettle:
		if err == nil {
			u.settled = j.release
		}
	case jobHeal:
		if err == nil {
			u.drift = nil
		}
	case jobVerify:
		u.verifyAt = now.Add(verifyDelay(a.c.VerifyEvery))
		if calledOff {
			u.verifyAt = now.Add(min(time.Minute, a.c.VerifyEvery))
		}
	}
	a.mu.Unlock()

	switch {
	case trouble != nil && was == nil:
		u.log.Warn("trouble: trying again by itself", "job", string(j.kind), "release", j.release.String(), "error", trouble)
	case trouble == nil && was != nil && err == nil:
		u.log.Info("the trouble is over", "job", string(j.kind))
	}
	if r := after.Running; err == nil && !r.IsZero() && after.Confirmed && (before.Running != r || !before.Confirmed) {
		u.log.Info("the release is live and healthy", "release", r.String(), "version", after.Version, "took", took.Round(time.Millisecond))
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
	a.kickReport()
}

// refuse notes that a release can't succeed on this node.
func (u *unit) refuse(p deployments.Pointer, err error) {
	why := refusal{err: err}
	if taken := new(takenError); errors.As(err, &taken) {
		why.dest = taken.dest
	}
	if u.refused == nil {
		u.refused = map[deployments.Pointer]refusal{}
	}
	u.refused[p] = why
}

// readmit ends refusals for a place that has become free meanwhile. a.mu is held.
func (a *Agent) readmit(u *unit) {
	for p, why := range u.refused {
		if why.dest != "" && a.free(u, why.dest) == nil {
			u.log.Info("the place that another unit had is free", "release", p.String(), "dest", why.dest)
			delete(u.refused, p)
			u.nudge()
		}
	}
}

// takenError says that another unit has a place.
type takenError struct {
	dest string
	why  string
}

func (e *takenError) Error() string { return e.why }

// claim takes a place for a unit's tree, where no other unit has its own there, in it or around it. A unit that moves has both
// places until it has moved; one that nothing names any more has none, once it has ended what it began, so that it can go on under
// another name.
func (a *Agent) claim(u *unit, dest string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.free(u, dest); err != nil {
		return err
	}
	u.claimed = dest
	return nil
}

// free reports why a unit may not have its tree at dest. a.mu is held.
func (a *Agent) free(u *unit, dest string) error {
	for _, other := range a.units {
		if other == u || other.unwanted() && !other.changing() {
			continue
		}
		for _, taken := range []string{other.dest, other.claimed} {
			if taken != "" && (within(dest, taken) || within(taken, dest)) {
				return &takenError{dest, fmt.Sprintf("dest %s is in the way of %s, which has %s: give each unit a directory of its own", dest, other.id, taken)}
			}
		}
	}
	return nil
}

// replaced reports whether nothing names the unit any more, and what runs in its place is another's.
func (a *Agent) replaced(u *unit) bool {
	if u.dest == "" || !u.unwanted() || u.changing() {
		return false
	}
	for _, other := range a.units {
		if other.dest == u.dest && !other.unwanted() {
			return true
		}
	}
	return false
}

// within reports whether a clean path is dir, or below it or the directory of its releases.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/") || path == dir+".releases" || strings.HasPrefix(path, dir+".releases/")
}
