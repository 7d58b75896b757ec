package agent

import (
	"context"
	"time"

	"kedge/deployments"
	"kedge/sync/deploy"
)

// healthWatch runs the monitor of what a unit runs, between two deployments. The unit's worker alone calls its methods.
type healthWatch struct {
	a *Agent
	u *unit

	of   deployments.Pointer // what is watched, or has nothing to watch; zero: nothing yet
	end  context.CancelFunc  // nil: no monitor runs
	done chan struct{}
}

// start begins the checks of the running release, unless they run already. A release that didn't run before begins
// healthy.
func (w *healthWatch) start(ctx context.Context) {
	s := w.u.deploy.State()
	if s.Unfinished || !s.Proven || s.Running.IsZero() || w.of == s.Running {
		return
	}
	w.stop()
	monitor, err := w.u.deploy.Monitor()
	if err != nil {
		w.u.log.Error("the checks of what runs can't go on", "release", s.Running.String(), "error", err)
	}
	w.of = s.Running
	w.a.mu.Lock()
	if w.u.watched != s.Running {
		w.u.watched, w.u.health = s.Running, deploy.Health{}
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

// stop ends the checks, before a deployment changes the running release.
func (w *healthWatch) stop() {
	w.of = deployments.Pointer{}
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
		u.log.Error("the live release is unhealthy", "check", h.Facts["check"], "error", h.Facts["error"])
	case was && !h.Unhealthy:
		u.log.Info("the live release is healthy again", "after", time.Since(u.health.Since).Round(time.Second))
	}
	u.health = h
	u.stamp(time.Now())
	a.kick()
}
