package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	defaultEvery    = 10 * time.Second
	defaultFailures = 3
)

// Health is the result of a release's checks. The zero Health is healthy.
type Health struct {
	Unhealthy bool
	Reason    deployments.Reason // ReasonUnhealthy while Unhealthy
	// Facts are check and error. A Health read from the journal also has step, and lacks check if another thing failed,
	// such as a command.
	Facts deployments.Facts
	Since time.Time // when Unhealthy changed last

	failed int       // failed rounds in a row
	passed time.Time // while Unhealthy, when rounds began to pass; zero: the last round failed
}

// round is the result of one round of checks: at most one failure, the first in the manifest's order.
type round struct {
	check string // the check that failed; empty: all passed
	err   error
}

// next returns the health after one more round at now. It becomes unhealthy after as many failed rounds in a row as
// failures says. It is healthy again once rounds have passed without a failure for the time stable.
func (h Health) next(r round, failures int, stable time.Duration, now time.Time) Health {
	if r.check != "" {
		h.failed, h.passed = h.failed+1, time.Time{}
		if h.failed < failures && !h.Unhealthy {
			return h
		}
		if !h.Unhealthy {
			h.Since = now
		}
		h.Unhealthy, h.Reason = true, deployments.ReasonUnhealthy
		h.Facts = deployments.Facts{"check": r.check, "error": short(r.err)}
		return h
	}
	h.failed = 0
	if !h.Unhealthy {
		return h
	}
	if h.passed.IsZero() {
		h.passed = now
	}
	if now.Sub(h.passed) < stable {
		return h
	}
	return Health{Since: now}
}

// Monitor tries the checks of the live release while that release runs. The caller must end Run before the next
// deployment begins, and make a new Monitor after it.
type Monitor struct {
	checks   []watch
	every    time.Duration
	failures int
	stable   time.Duration
	// identities are what the probes of checks returned when they passed last: see probe.
	identities []string
}

// Monitor returns a monitor of the running release. It returns nil if no confirmed release runs, if a deployment is
// under way, or if no check of the manifest goes on after a deployment.
func (u *Unit) Monitor() (*Monitor, error) {
	r, err := u.liveRelease()
	if err != nil || r == nil || !u.j.Confirmed {
		return nil, err
	}
	d := &deployment{Release: r.Pointer}
	d.enter(stepHealth)
	h := r.Manifest.Health
	m := &Monitor{every: cmp.Or(h.Every, defaultEvery), failures: cmp.Or(h.Failures, defaultFailures), stable: h.StableFor}
	for _, c := range h.Checks {
		if c.During == deployments.DuringDeploy {
			continue
		}
		try := newProbe(c, u.env(d, r, nil))
		if c.Exec != "" {
			try = u.exec(c, u.env(d, r, nil), r)
		}
		m.checks = append(m.checks, watch{
			name:    u.secrets.text(nameOf(c)),
			timeout: cmp.Or(c.Timeout, defaultTryTimeout),
			try:     u.masked(try),
		})
	}
	if len(m.checks) == 0 {
		return nil, nil
	}
	m.identities = make([]string, len(m.checks))
	return m, nil
}

// KeepHealth stores in the journal whether the running release is healthy, as a Monitor found, so
// that State has it after a restart, too. It does nothing if the journal has it already, if no
// confirmed release runs, or if a deployment is under way.
func (u *Unit) KeepHealth(h Health) error {
	if u.j.Deployment != nil || !u.j.Confirmed || h.Unhealthy == (u.j.HealthFailure != nil) {
		return nil
	}
	var now *healthFailure
	if h.Unhealthy {
		now = &healthFailure{Step: stepHealth, Check: h.Facts["check"], Error: h.Facts["error"], Since: h.Since}
	}
	return u.save(func(j *journal) { j.HealthFailure = now })
}

// Run tries all checks in parallel, a round every health.every, until ctx ends. It calls changed when the release
// becomes unhealthy, when another check fails than before, and when it is healthy again. h is an earlier Run's health,
// or State's. The first round is at a random time within health.every, so that a fleet's checks are spread.
func (m *Monitor) Run(ctx context.Context, h Health, changed func(Health)) {
	if wait.For(ctx, rand.N(m.every)) != nil {
		return
	}
	tick := time.NewTicker(m.every)
	defer tick.Stop()
	for {
		r := m.round(ctx)
		if ctx.Err() != nil {
			return // an interrupted round has no result
		}
		was := h
		h = h.next(r, m.failures, m.stable, time.Now())
		if h.Unhealthy != was.Unhealthy || h.Facts["check"] != was.Facts["check"] {
			changed(h)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// round tries each check once. A check that passes with another identity than before counts as failed: the service was
// restarted, and may be restarted again and again.
func (m *Monitor) round(ctx context.Context) round {
	errs := make([]error, len(m.checks))
	var tries sync.WaitGroup
	for i, c := range m.checks {
		tries.Go(func() {
			once, done := context.WithTimeoutCause(ctx, c.timeout, fmt.Errorf("no answer within %s", c.timeout))
			defer done()
			identity, err := c.try(once)
			was := m.identities[i]
			if err == nil {
				m.identities[i] = identity
				if was != "" && was != identity {
					err = errors.New("the service was restarted since the last check")
				}
			}
			errs[i] = err
		})
	}
	tries.Wait()
	for i, err := range errs {
		if err != nil {
			return round{m.checks[i].name, err}
		}
	}
	return round{}
}
