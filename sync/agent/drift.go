package agent

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/sync/deploy"
)

const (
	// verifyRate bounds what a check of a live tree reads, in bytes a second.
	verifyRate = 16 << 20
	// linkSettle is waited after a change beside dest, so that a rename that replaces it isn't seen half done.
	linkSettle = 50 * time.Millisecond
	maxDrift   = 5
)

// driftWatcher is told by the kernel of changes beside the dests of all units, where a link is removed or led
// elsewhere.
type driftWatcher struct {
	log *slog.Logger

	mu      sync.Mutex
	watcher *fsnotify.Watcher // nil: not yet, or not to be had
	opened  chan struct{}     // closed once it is clear whether there is one
	changed map[string]func() // by dest
}

func newDriftWatcher(log *slog.Logger) *driftWatcher {
	return &driftWatcher{log: log, opened: make(chan struct{}), changed: map[string]func(){}}
}

// open makes the watcher when it is first needed: the kernel gives a user 128 of them, for all that they run.
func (w *driftWatcher) open() {
	select {
	case <-w.opened:
		return
	default:
	}
	var err error
	if w.watcher, err = fsnotify.NewWatcher(); err != nil {
		w.log.Warn("changes of dest will be seen by the periodic check only", "error", err)
	}
	close(w.opened)
}

// watch calls changed after an event at dest itself, or after kedge run deployed to it.
func (w *driftWatcher) watch(dest string, changed func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed[dest], w.changed[deploy.LockFile(dest)] = changed, changed
	if w.open(); w.watcher == nil {
		return
	}
	if err := w.watcher.Add(filepath.Dir(dest)); err != nil {
		w.log.Warn("changes of dest will be seen by the periodic check only", "dest", dest, "error", err)
	}
}

func (w *driftWatcher) forget(dest string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.changed, dest)
	delete(w.changed, deploy.LockFile(dest))
	for other := range w.changed {
		if filepath.Dir(other) == filepath.Dir(dest) {
			return
		}
	}
	if w.watcher != nil {
		_ = w.watcher.Remove(filepath.Dir(dest)) // its directory may be gone
	}
}

func (w *driftWatcher) run(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-w.opened:
	}
	if w.watcher == nil {
		return
	}
	defer w.watcher.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-w.watcher.Events:
			w.mu.Lock()
			changed := w.changed[e.Name]
			w.mu.Unlock()
			if changed != nil {
				time.AfterFunc(linkSettle, changed)
			}
		case err := <-w.watcher.Errors:
			w.log.Warn("watching dests", "error", err)
			w.mu.Lock()
			for _, changed := range w.changed { // some may have been missed
				time.AfterFunc(linkSettle, changed)
			}
			w.mu.Unlock()
		}
	}
}

// observe records where dest should lead after a job, and watches it.
func (a *Agent) observe(u *unit) {
	mark := u.deploy.Mark()
	a.mu.Lock()
	was, dest := u.dest, mark.Dest
	u.dest, u.mark = dest, mark
	a.mu.Unlock()
	if was != "" && was != dest {
		a.drift.forget(was)
	}
	if dest != "" {
		a.drift.watch(dest, func() { a.checkLink(u) })
	}
}

// checkLink checks that dest is still as the last deployment left it.
func (a *Agent) checkLink(u *unit) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.changing() || !u.astray() {
		return
	}
	u.drift = []string{u.dest}
	u.nudge()
	a.kickReport()
}

// astray reports whether dest is no longer as the last deployment left it, and notes what something else has deployed
// there.
func (u *unit) astray() bool {
	found, changed := u.mark.Changed()
	switch {
	case found != "" && found != u.foreign:
		u.log.Warn("something else has deployed to dest", "dest", u.dest, "found", found, "expected", u.mark.Live,
			"healing", u.goal.heal)
	case changed && found == "" && len(u.drift) == 0:
		u.log.Warn("dest is gone", "dest", u.dest, "expected", u.mark.Live, "healing", u.goal.heal)
	}
	u.foreign = found
	return changed
}

// foreignError says that something else has deployed to a unit's dest.
type foreignError struct{ dest, found string }

func (e *foreignError) Error() string {
	return fmt.Sprintf("something else has deployed to %s: %s", e.dest, e.found)
}

// verify compares dest, and the live tree, with the release.
func (a *Agent) verify(ctx context.Context, u *unit) error {
	ds, err := u.deploy.Verify(ctx, verifyRate)
	if err != nil {
		if ctx.Err() == nil {
			u.log.Warn("the live release can't be checked", "error", err)
		}
		return nil // it is looked at again in its time, and nothing of the unit is worse for it
	}
	paths := driftPaths(ds)
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.astray() {
		paths = append([]string{u.dest}, paths[:min(len(paths), maxDrift-1)]...)
	}
	if len(ds) > 0 && !slices.Equal(paths, u.drift) {
		u.log.Warn(
			"the live release differs from its index",
			"paths",
			len(ds),
			"first",
			ds[0].Path,
			"what",
			ds[0].What,
			"healing",
			u.goal.heal,
		)
	}
	u.drift = paths
	return nil
}

// heal puts drift right. What only the release's commands could make again stays in the report.
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
		u.log.Warn("drift is healed but for what the release's commands had made: deploy it again to have it made anew",
			"paths", len(left), "first", left[0].Path, "what", left[0].What)
		return nil
	}
	u.log.Info("drift is healed")
	return nil
}

// driftPaths returns the paths that a report names of differences.
func driftPaths(ds []artifact.Difference) []string {
	var paths []string
	for _, d := range ds[:min(len(ds), maxDrift)] {
		paths = append(paths, clipped(d.Path, 200))
	}
	return paths
}

// toHeal reports whether there is drift that can be healed.
func (u *unit) toHeal() bool {
	return u.goal.heal && len(u.drift) > 0 && !slices.Equal(u.drift, u.unhealable)
}

// verifyDelay is the time from one check to the next, so spread that a fleet doesn't check at once.
func verifyDelay(every time.Duration) time.Duration { return wait.Jitter(every, 0.5) }

// While dest differs from the release, a node that observes looks again after these times.
const (
	observeAgain     = time.Second
	observeAgainMost = 5 * time.Minute
)

// observeOnly compares a unit's release with its dest, and does nothing else.
func (u *unit) observeOnly(now time.Time) (_ job, again time.Time) {
	p := u.goal.observe
	switch {
	case p.IsZero() || u.refused[p].err != nil:
		return job{}, time.Time{}
	case u.compared != nil && u.compared.Release == p.Digest && (u.verifyAt.IsZero() || now.Before(u.verifyAt)):
		return job{}, u.verifyAt
	}
	return job{kind: jobObserve, release: p}, time.Time{}
}

// compare does jobObserve.
func (a *Agent) compare(ctx context.Context, u *unit, p deployments.Pointer) error {
	select {
	case a.fetching <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-a.fetching }()
	found, err := u.deploy.Observe(ctx, p, verifyRate)
	if err != nil {
		return err
	}
	u.log.Info("observed, and touched nothing", "release", p.String(), "dest", found.Dest, "missing", found.Missing,
		"differs", found.Differs, "paths", found.Paths)
	a.mu.Lock()
	defer a.mu.Unlock()
	if u.compared == nil || u.compared.Release != found.Release {
		u.again.Reset()
	}
	u.compared = found
	switch {
	case found.Differs > 0: // what deploys here besides may be about to change that
		u.verifyAt = time.Now().Add(u.again.Next())
	case a.c.VerifyEvery > 0:
		u.verifyAt = time.Now().Add(verifyDelay(a.c.VerifyEvery))
	default:
		u.verifyAt = time.Time{}
	}
	return nil
}

// observing returns the standing of a unit that the node only observes: a rollout sees it as held.
func (u *unit) observing() standing {
	s := at(deployments.StateHeld, u.trouble)
	if refused := u.refused[u.goal.observe].err; refused != nil {
		s = at(deployments.StateHeld, refused)
	}
	s.reason = deployments.ReasonObserving
	if c := u.compared; c != nil {
		s.facts = s.facts.With("differs", fmt.Sprint(c.Differs))
	}
	return s
}
