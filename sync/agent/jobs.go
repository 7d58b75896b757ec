package agent

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
)

// fetch puts release p on disk, unless p runs or is staged. If p has to be fetched from storage, fetch first waits for
// a random time below Config.StartDelay, and then until its token fits into turn, which is fetchSlot or prefetchSlot.
func (a *Agent) fetch(ctx context.Context, u *unit, p deployments.Pointer, turn chan struct{}) error {
	s := u.deploy.State()
	if p.Digest == s.Running.Digest || p.Digest == s.Staged.Digest {
		return nil
	}
	if p.Digest == s.LastGood.Digest { // it is on disk
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
	fetched := make(chan struct{})
	defer close(fetched)
	u.fetched.Store(0)
	go u.holdTurn(turn, fetched)
	return u.deploy.Stage(ctx, p)
}

const (
	// A fetch of less than slowFetch bytes in slowAfter gives up its turn: it costs the node little, and other units need
	// not wait for it.
	slowAfter = 3 * time.Second
	slowFetch = 1 << 20
)

// holdTurn takes the unit's token out of turn once fetched is closed, or the fetch turns out to be slow: see slowFetch.
func (u *unit) holdTurn(turn, fetched <-chan struct{}) {
	defer func() { <-turn }()
	look := time.NewTicker(slowAfter)
	defer look.Stop()
	before := u.fetched.Load()
	for {
		select {
		case <-fetched:
			return
		case <-look.C:
		}
		now := u.fetched.Load()
		if now-before < slowFetch {
			u.log.Info("the fetch is slow: other units don't wait for it", "bytes", now)
			return
		}
		before = now
	}
}

// announce waits until the store holds a report that the unit is about to switch to release (zero: to leave). It waits
// only if the unit serves and a rollout's budget counts it. Without that report, the mirror would not notice if the
// node died in the first steps of the switch, and would admit another node in its place. While the store is away, the
// unit stays in service.
func (a *Agent) announce(ctx context.Context, u *unit, release deployments.Pointer) error {
	a.mu.Lock()
	serves := !u.state().Running.IsZero() || u.inspected.found == policy.FoundOther
	pinned := u.decision.Source == policy.FromNodePin || u.decision.Source == policy.FromUnitPin
	// A half-done deployment is out of service already, and its report says so.
	if u.record.Value.Rollout == nil || pinned || !serves || u.state().Unfinished {
		a.mu.Unlock()
		return nil
	}
	made := make(chan struct{})
	u.announce = &announcement{release, made}
	u.phase = deployments.StateSwitching
	u.stamp(time.Now())
	a.mu.Unlock()
	a.reportDue.Set()
	select {
	case <-made:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// forget ends the quarantine of j.release, or of all releases if that is zero. A release that failed without a failure
// key stays in quarantine instead, and gets the key of j.
func (a *Agent) forget(u *unit, j job) error {
	digest := j.release.Digest
	if !digest.IsZero() {
		if f, _ := u.failure(j.release); f.Key == "" {
			return u.deploy.SetKey(digest, j.key)
		}
		u.log.Info("trying a release again that failed here", "release", j.release.String(), "asked_by", j.key)
	}
	return u.deploy.Retry(digest)
}

const (
	// verifyRate bounds how fast a check reads a live tree, in bytes a second; strategy rsync ignores it.
	verifyRate = 16 << 20
	maxDrift   = 5 // paths in a report
)

// watchDest records the mark by which a later change of dest is noticed. The worker calls it at the
// start, and after each job that may have changed dest. It watches the unit's dest, if the unit has
// one, and no longer watches the previous dest if that was another.
func (a *Agent) watchDest(u *unit) {
	mark := u.deploy.Mark()
	a.mu.Lock()
	was, dest := u.dest, mark.Dest
	u.dest, u.mark = dest, mark
	a.mu.Unlock()
	if was != "" && was != dest {
		a.destWatcher.Forget(was, u.id)
	}
	if dest != "" {
		a.destWatcher.Watch(dest, u.id, func() { a.checkLink(u) })
	}
}

// checkLink records drift if dest is no longer as the last deployment left it, unless the unit
// itself, or another one that takes dest over, is changing it.
func (a *Agent) checkLink(u *unit) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.changing() || a.replaced(u) || a.contested(u) || !u.noteDestChange() {
		return
	}
	u.drift = []string{u.dest}
	u.wake.Set()
	a.reportDue.Set()
}

// noteDestChange reports whether dest is no longer as the last deployment left it, and records what
// another tool deployed there, if anything.
func (u *unit) noteDestChange() bool {
	found, changed := u.mark.Changed()
	switch {
	case found != "" && found != u.foreign:
		u.log.Warn("something else has deployed to dest", "dest", u.dest, "found", found, "expected", u.mark.LeadsTo,
			"healing", u.goal.heal)
	case changed && found == "" && len(u.drift) == 0:
		u.log.Warn("dest is gone, or leads nowhere", "dest", u.dest, "expected", u.mark.LeadsTo, "healing", u.goal.heal)
	}
	u.foreign = found
	return changed
}

// verify compares dest and the live tree with the release, and records the drift. It returns no error.
func (a *Agent) verify(ctx context.Context, u *unit) error {
	ds, err := u.deploy.Verify(ctx, verifyRate)
	if err != nil {
		if ctx.Err() == nil {
			u.log.Warn("could not verify the live release: the next check tries again", "error", err)
		}
		return nil // the next check retries, and the unit is none the worse
	}
	paths := driftPaths(ds)
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.noteDestChange() {
		paths = append([]string{u.dest}, paths[:min(len(paths), maxDrift-1)]...)
	}
	if len(ds) > 0 && !slices.Equal(paths, u.drift) {
		u.log.Warn("the live release differs from its index", "paths", len(ds), "first", ds[0].Path,
			"what", ds[0].What, "healing", u.goal.heal)
	}
	u.drift = paths
	return nil
}

// heal repairs drift. What only the release's commands could restore stays in the report.
func (a *Agent) heal(ctx context.Context, u *unit) error {
	left, err := u.deploy.Heal(ctx)
	if err != nil {
		return err
	}
	paths := driftPaths(left)
	a.mu.Lock()
	u.drift, u.unhealable, u.foreign = paths, paths, ""
	a.mu.Unlock()
	if len(left) > 0 {
		u.log.Warn("drift is healed in part: what only the release's commands make comes back with the next deployment",
			"paths", len(left), "first", left[0].Path, "what", left[0].What)
		return nil
	}
	u.log.Info("drift is healed")
	return nil
}

// driftPaths returns the paths of the first maxDrift differences, for a report.
func driftPaths(ds []artifact.Difference) []string {
	var paths []string
	for _, d := range ds[:min(len(ds), maxDrift)] {
		paths = append(paths, safetext.Cut(d.Path, 200))
	}
	return paths
}

// toHeal reports whether there is drift to heal: the goal asks for it, and the drift isn't just
// what the last healing left.
func (u *unit) toHeal() bool {
	return u.goal.heal && len(u.drift) > 0 && !slices.Equal(u.drift, u.unhealable)
}

// verifyDelay returns the time to the next check, spread so that the fleet doesn't check at once.
func verifyDelay(every time.Duration) time.Duration { return wait.Jitter(every, 0.5) }

// While dest differs, a node that observes compares again after observeAgain, and then less and
// less often, up to maxObserveAgain. Both are averages: see wait.Backoff.
const (
	observeAgain    = time.Second
	maxObserveAgain = 5 * time.Minute
)

// observeOnly is choose for a unit that is only observed.
func (u *unit) observeOnly(now time.Time) (_ job, again time.Time) {
	p := u.goal.observe
	switch {
	case p.IsZero() || u.refused[p].err != nil:
		return job{}, time.Time{}
	case u.comparison != nil && u.comparison.Release == p.Digest && (u.verifyAt.IsZero() || now.Before(u.verifyAt)):
		return job{}, u.verifyAt
	}
	return job{kind: jobObserve, release: p}, time.Time{}
}

// compare runs a jobObserve: it compares the tree at dest with a release, and sets when to do so again.
func (a *Agent) compare(ctx context.Context, u *unit, p deployments.Pointer) error {
	select {
	case a.fetchSlot <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-a.fetchSlot }()
	found, err := u.deploy.Observe(ctx, p, verifyRate)
	if err != nil {
		return err
	}
	u.log.Info("compared dest with the release, and changed nothing",
		"release", p.String(), "dest", found.Dest, "missing", found.Missing,
		"differs", found.Differs, "paths", found.Paths)
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.comparison == nil || u.comparison.Release != found.Release {
		u.again.Reset()
	}
	u.comparison = found
	switch {
	case found.Differs > 0: // another tool may be about to change that
		u.verifyAt = time.Now().Add(u.again.Next())
	case a.c.VerifyEvery > 0:
		u.verifyAt = time.Now().Add(verifyDelay(a.c.VerifyEvery))
	default:
		u.verifyAt = time.Time{}
	}
	return nil
}

// inspectDest runs a jobInspectDest: it finds out whether something lies at dest before the unit's first release.
func (a *Agent) inspectDest(ctx context.Context, u *unit, p deployments.Pointer) error {
	occupied, err := u.deploy.DestOccupied(ctx, p)
	if err != nil {
		return err
	}
	found := policy.FoundNothing
	if occupied {
		found = policy.FoundOther
	}
	u.log.Debug("looked at what is at dest", "release", p.String(), "found", string(found))
	a.mu.Lock()
	defer a.mu.Unlock()
	u.inspected = inspectedDest{p.Digest, found}
	a.reportDue.Set()
	return nil
}

// healthWatch runs the health monitor of a unit's release between two deployments. Only the unit's worker calls its
// methods.
type healthWatch struct {
	a *Agent
	u *unit

	watched deployments.Pointer // the release that start took up; its checks run, if it has any; zero: none yet
	kept    deploy.Health       // what keep tried to write last
	end     context.CancelFunc  // nil: no monitor runs
	done    chan struct{}
}

// start begins the checks of the running release, unless they run already. It does nothing while
// the release isn't proven or a deployment is unfinished. The checks begin with the health in the
// journal if another release was watched last. If the same release was watched last, they begin
// with the health found then, even if a deployment has been tried and has gone back to that release
// since. An unhealthy release doesn't become healthy by the health gate of such a deployment.
func (w *healthWatch) start(ctx context.Context) {
	s := w.u.deploy.State()
	if s.Unfinished || !s.Proven || s.Running.IsZero() || w.watched == s.Running {
		return
	}
	w.stop()
	monitor, err := w.u.deploy.Monitor()
	if err != nil {
		w.u.log.Error("could not read the health checks of the running release: it counts as healthy until the next "+
			"deployment, or start of the agent", "release", s.Running.String(), "error", err)
	}
	w.watched = s.Running
	w.a.mu.Lock()
	if w.u.watched != s.Running {
		w.u.watched, w.u.health = s.Running, s.Health
	}
	if monitor == nil {
		w.u.health = deploy.Health{}
	}
	health := w.u.health
	w.a.mu.Unlock()
	if monitor == nil {
		return
	}
	ctx, w.end = context.WithCancel(ctx)
	w.done = make(chan struct{})
	go func() {
		defer close(w.done)
		monitor.Run(ctx, health, func(h deploy.Health) { w.a.noteHealth(w.u, h) })
	}()
}

// keep stores in the journal what the checks found. Without it, a restarted agent would take an
// unhealthy release for a healthy one until its own checks had failed often enough. After an error
// it tries again only when the result changes.
func (w *healthWatch) keep() {
	w.a.mu.Lock()
	h, known := w.u.health, w.u.watched == w.u.deploy.State().Running
	w.a.mu.Unlock()
	if !known || h.Unhealthy == w.kept.Unhealthy && h.Since.Equal(w.kept.Since) {
		return
	}
	w.kept = h
	if err := w.u.deploy.KeepHealth(h); err != nil {
		w.u.log.Warn("could not save the health of the running release: a restart of the agent would begin with an older "+
			"result",
			"error", err)
	}
}

// stop ends the checks, if they run, and returns once they have ended. It is called before a
// deployment changes the running release.
func (w *healthWatch) stop() {
	w.watched, w.kept = deployments.Pointer{}, deploy.Health{} // a deployment may clear the health in the journal
	if w.end != nil {
		w.end()
		<-w.done
		w.end = nil
	}
}

// noteHealth records the result of a unit's checks.
func (a *Agent) noteHealth(u *unit, h deploy.Health) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch was := u.health.Unhealthy; {
	case h.Unhealthy && !was:
		u.log.Error("the live release is unhealthy: /ready answers 503, and the release stays live",
			"check", h.Facts["check"], "error", h.Facts["error"])
	case was && !h.Unhealthy:
		u.log.Info("the live release is healthy again", "after", time.Since(u.health.Since).Round(time.Second))
	}
	u.health = h
	u.stamp(time.Now())
	a.changed.Set()
	u.wake.Set() // see healthWatch.keep
}
