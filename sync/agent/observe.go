package agent

import (
	"context"
	"fmt"
	"time"

	"kedge/deployments"
)

// While dest differs from the release, a node that observes looks again after these times.
const (
	observeAgain     = time.Second
	observeAgainMost = 5 * time.Minute
)

// observeOnly has a unit's release compared with what lies at its dest, in the place of anything else.
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

// observing returns where a unit stands on a node that only observes: to a rollout it is one that is held.
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
