package deploy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	defaultHealthTimeout = 60 * time.Second
	defaultInterval      = time.Second
	defaultTryTimeout    = 5 * time.Second
)

// probe tries one check once. identity names the running instance that passed, for example by the invocation ID of a
// systemd service. It is empty if the check can't tell instances apart. If it changes while a release is watched, the
// service counts as restarted.
type probe func(ctx context.Context) (identity string, err error)

// healthy waits until the checks of r pass and go on passing for stable_for, while r is live all the time. It returns
// an error if they don't pass in time. other is the release for KEDGE_PREVIOUS; nil: there is none.
func (u *Unit) healthy(ctx context.Context, d *deployment, r, other *artifact.Release) error {
	h := r.Manifest.Health
	env := u.env(d, r, other)
	if slices.ContainsFunc(h.Checks, func(c deployments.Check) bool { return c.Exec != "" }) {
		var err error
		if env, err = u.withSecrets(ctx, env, r, duringDeployment); err != nil {
			return err
		}
	}
	live := func() error {
		if !u.switcher(r).IsLive(r) {
			return fmt.Errorf("%s no longer resolves to release %s", r.Manifest.Dest, r.Pointer.Digest.Short())
		}
		return nil
	}
	var watched []watch
	for _, c := range h.Checks {
		try := u.masked(newProbe(c, env))
		watched = append(watched, watch{
			name:     u.secrets.text(nameOf(c)),
			interval: probeInterval(cmp.Or(c.Interval, defaultInterval), h.StableFor),
			timeout:  cmp.Or(c.Timeout, defaultTryTimeout),
			try: func(ctx context.Context) (string, error) {
				identity, err := try(ctx)
				return identity, errors.Join(err, live())
			},
		})
	}
	if len(watched) > 0 {
		u.log.Info("waiting for health", "checks", len(watched), "timeout", cmp.Or(h.Timeout, defaultHealthTimeout),
			"stable_for", h.StableFor)
	}
	if err := awaitHealthy(ctx, watched, cmp.Or(h.Timeout, defaultHealthTimeout), h.StableFor); err != nil {
		return err
	}
	return live()
}

// probeInterval returns the time between two tries of a check. If stable is 0, that is interval.
// Otherwise it is the shorter one of interval and stable; a stable below 1 s counts as 1 s.
func probeInterval(interval, stable time.Duration) time.Duration {
	if stable == 0 {
		return interval
	}
	return min(interval, max(stable, defaultInterval))
}

// watch is a check with its times.
type watch struct {
	name              string
	interval, timeout time.Duration
	try               probe
}

// awaitHealthy tries all checks in parallel, each at its own interval. It returns nil once the
// release is healthy (at once without checks), and an error once it has failed or ctx ends: see
// healthGate.
func awaitHealthy(ctx context.Context, watched []watch, timeout, stable time.Duration) error {
	if len(watched) == 0 {
		return ctx.Err()
	}
	v := newHealthGate(watched, timeout, stable, time.Now())
	type outcome struct {
		check    int
		identity string
		err      error
		at       time.Time
	}
	outcomes := make(chan outcome)
	trying, stop := context.WithCancel(ctx)
	var tries sync.WaitGroup
	defer tries.Wait()
	defer stop()
	for i, w := range watched {
		tries.Go(func() {
			for {
				once, done := context.WithTimeoutCause(trying, w.timeout, fmt.Errorf("no answer within %s", w.timeout))
				identity, err := w.try(once)
				done()
				if wait.Send(trying, outcomes, outcome{i, identity, err, time.Now()}) != nil ||
					wait.For(trying, w.interval) != nil {
					return
				}
			}
		})
	}
	late := time.NewTimer(timeout)
	defer late.Stop()
	for {
		select {
		case o := <-outcomes:
			v.record(o.check, o.identity, o.err, o.at)
		case <-late.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if done, err := v.result(time.Now()); done {
			return err
		}
	}
}

// healthGate decides from the checks' results whether a release is healthy. All checks must pass by the timeout, and
// then go on passing for stable, and each of them once more after that. If a check fails again, or passes with another
// identity, the wait restarts; after the timeout that is a failure. healthGate has no clock of its own. Its times are
// monotonic, so that a jump of the wall clock changes nothing.
type healthGate struct {
	begin   time.Time
	timeout time.Duration
	stable  time.Duration
	since   time.Time // when all checks began to pass; zero: not all pass
	checks  []checkState
}

type checkState struct {
	name     string
	tried    bool
	at       time.Time // time of the last try
	identity string
	err      error
}

func newHealthGate(watched []watch, timeout, stable time.Duration, now time.Time) *healthGate {
	v := &healthGate{begin: now, timeout: timeout, stable: stable}
	for _, w := range watched {
		v.checks = append(v.checks, checkState{name: w.name})
	}
	return v
}

// record records the result of one try of a check.
func (v *healthGate) record(check int, identity string, err error, now time.Time) {
	c := &v.checks[check]
	if c.tried && c.err == nil && err == nil && c.identity != identity {
		v.since = time.Time{} // it passes, but with another identity than before
	}
	c.tried, c.at, c.identity, c.err = true, now, identity, err
	if v.failing() != nil {
		v.since = time.Time{}
	} else if v.since.IsZero() {
		v.since = now
	}
}

// result reports whether the gate has decided. The error is nil if the release is healthy, and says why if it wasn't
// healthy in time. While done is false, the error is nil.
func (v *healthGate) result(now time.Time) (done bool, _ error) {
	err := v.failing()
	switch {
	case err == nil && v.wasStable():
		return true, nil
	case err == nil && v.since.Sub(v.begin) > v.timeout:
		return true, fmt.Errorf("not healthy within %s: the checks pass, but not for long enough yet, as after a restart "+
			"of the service", v.timeout)
	case err != nil && now.Sub(v.begin) >= v.timeout:
		return true, fmt.Errorf("not healthy within %s: %w", v.timeout, err)
	}
	return false, nil
}

// wasStable reports whether all checks have passed for the time stable, and each once more after it.
func (v *healthGate) wasStable() bool {
	return v.stable == 0 || !slices.ContainsFunc(v.checks, func(c checkState) bool { return c.at.Sub(v.since) < v.stable })
}

// failing returns the errors of the checks that don't pass or weren't tried yet; nil: all pass.
func (v *healthGate) failing() error {
	var errs []error
	for _, c := range v.checks {
		switch {
		case !c.tried:
			errs = append(errs, &checkError{c.name, errors.New("no answer yet")})
		case c.err != nil:
			errs = append(errs, &checkError{c.name, c.err})
		}
	}
	return errors.Join(errs...)
}

// checkError says which check failed, and why.
type checkError struct {
	check string
	err   error
}

func (e *checkError) Error() string { return e.check + ": " + e.err.Error() }
func (e *checkError) Unwrap() error { return e.err }

func nameOf(c deployments.Check) string {
	switch {
	case c.HTTP != nil:
		return "http " + c.HTTP.URL
	case c.TCP != "":
		return "tcp " + c.TCP
	case c.Exec != "":
		return "exec"
	case c.Systemd != "":
		return "systemd " + c.Systemd
	default:
		return "consul " + c.Consul
	}
}
