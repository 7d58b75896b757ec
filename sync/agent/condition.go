package agent

import (
	"cmp"
	"errors"
	"fmt"
	"syscall"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/policy"
	"kedge/sync/deploy"
)

// reported is the state that stamp saw last, and since when the unit has been in it.
type reported struct {
	state deployments.State
	since time.Time
}

// condition is a unit's state, the code of its reason, and the error, if any.
type condition struct {
	state  deployments.State
	reason deployments.Reason
	facts  deployments.Facts
	err    error
	since  time.Time // zero: since the state was first seen
}

// words returns the condition as people read it.
func (s condition) words() string {
	if s.err == nil {
		return string(s.state)
	}
	return string(s.state) + ": " + oneLine(s.err)
}

// conditionOf returns the condition of a state, with an error and its reason and facts. err may be nil.
func conditionOf(state deployments.State, err error) condition {
	s := condition{state: state, err: err}
	if err != nil {
		s.reason, s.facts = reasonOf(err), factsOf(err)
	}
	return s
}

// factsOf returns the facts of an error's reason.
func factsOf(err error) deployments.Facts {
	facts := deployments.Facts{"error": oneLine(err)}
	if older := new(deploy.OlderError); errors.As(err, &older) {
		return facts.With("created", older.Created.Format(time.RFC3339)).
			With("floor", older.Floor.Format(time.RFC3339)).
			With("of", older.Of)
	}
	if taken := new(destInUseError); errors.As(err, &taken) {
		return facts.With("dest", taken.dest).With("unit", taken.unit.String())
	}
	if foreign := new(foreignError); errors.As(err, &foreign) {
		return facts.With("dest", foreign.dest).With("found", foreign.found)
	}
	if future := new(deploy.FutureError); errors.As(err, &future) {
		return facts.With("created", future.Created.Format(time.RFC3339)).With("floor", future.Floor.Format(time.RFC3339))
	}
	return facts
}

// reasonOf returns the code of an error's reason; empty: it has none.
func reasonOf(err error) deployments.Reason {
	switch {
	case errors.As(err, new(*destInUseError)):
		return deployments.ReasonDestInUse
	case errors.As(err, new(*foreignError)):
		return deployments.ReasonForeignDeployment
	case errors.As(err, new(*deploy.OlderError)):
		return deployments.ReasonOlderThanFloor
	case errors.As(err, new(*deploy.FutureError)):
		return deployments.ReasonCreatedAhead
	case errors.Is(err, policy.ErrUntrusted):
		return deployments.ReasonUnsigned
	case errors.Is(err, deployments.ErrDigest):
		return deployments.ReasonDigestMismatch
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return deployments.ReasonDiskFull
	case errors.Is(err, deploy.ErrSecretUnavailable):
		return deployments.ReasonSecretUnavailable
	case errors.Is(err, object.ErrUnavailable): // an object that is missing or denied doesn't count as unavailable
		return deployments.ReasonStorageUnavailable
	}
	return ""
}

// condition returns the unit's condition: the first case that holds decides.
func (u *unit) condition() condition {
	s := u.state()
	target := u.decision.Target
	switch {
	case u.observes && u.decided:
		return u.observingCondition()
	case u.busy.switches() && u.phase != "" && !s.Unfinished:
		return conditionOf(u.phase, u.lastErr)
	case s.Unfinished && s.Health.Unhealthy: // the release that the unit went back to isn't healthy yet
		facts := s.Health.Facts
		err := fmt.Errorf("the release that the unit went back to is unhealthy: %s: %s",
			cmp.Or(facts["check"], facts["step"]),
			facts["error"])
		if f, _ := u.failure(target); u.staysQuarantined(target) {
			err = fmt.Errorf("release %s failed in %s: %s; %w", f.Digest.Short(), f.Step, safetext.Cut(f.Reason, 120), err)
		}
		return condition{deployments.StateUnhealthy, s.Health.Reason, facts, err, s.Health.Since}
	case s.Unfinished && u.staysQuarantined(target):
		return u.failedCondition(deployments.StateSwitching, target)
	case s.Unfinished:
		// This holds even while another release is fetched, because the unit is out of service.
		return conditionOf(deployments.StateSwitching, u.lastErr)
	case !u.decided:
		return conditionOf(deployments.StateWaiting, u.lastErr)
	case u.contends:
		return conditionOf(deployments.StateSwitching, u.lastErr)
	case u.decision.Action == policy.ActHold:
		return conditionOf(deployments.StateHeld, u.decision.Invalid)
	case target.IsZero() && u.decision.Invalid != nil:
		return u.invalidCondition()
	case target.IsZero() && u.refused[u.goal.stage].err != nil:
		return conditionOf(deployments.StateInvalid, u.refused[u.goal.stage].err)
	case target.IsZero() && u.lastErr != nil && (u.goal.leave || !u.goal.stage.IsZero()):
		return conditionOf(deployments.StateRetrying, u.lastErr)
	case u.goal.leave:
		return conditionOf(deployments.StateSwitching, nil)
	case u.decision.Reason == deployments.ReasonRestored && !s.Restored.IsZero() && u.lastErr == nil:
		return condition{state: deployments.StateWaiting, reason: deployments.ReasonRestored}
	case target.IsZero():
		return conditionOf(deployments.StateWaiting, u.lastErr)
	case u.staysQuarantined(target):
		return u.failedCondition(deployments.StateQuarantined, target)
	case u.refused[target].err != nil:
		return conditionOf(deployments.StateInvalid, u.refused[target].err)
	case u.done == target:
		return u.convergedCondition()
	case u.blocked.why != "":
		blocked := conditionOf(deployments.StateWaiting, u.lastErr)
		if u.cycle != "" {
			blocked = conditionOf(deployments.StateInvalid, errors.New(u.blocked.why))
		}
		blocked.reason = deployments.ReasonDependency
		blocked.facts = deployments.Facts{"unit": u.blocked.unit, "error": u.blocked.why}
		return blocked
	case u.lastErr != nil:
		return conditionOf(deployments.StateRetrying, u.lastErr)
	default:
		return conditionOf(deployments.StateFetching, u.decision.Invalid)
	}
}

// convergedCondition returns the condition of a unit that runs what it should: converged, or unhealthy.
func (u *unit) convergedCondition() condition {
	switch {
	case u.unhealthy():
		return condition{deployments.StateUnhealthy, u.health.Reason, u.health.Facts, u.healthError(), u.health.Since}
	case u.lastErr != nil: // of a later job, such as a fetch in advance
		return conditionOf(deployments.StateConverged, u.lastErr)
	case u.foreign != "":
		return conditionOf(deployments.StateConverged, &foreignError{u.dest, u.foreign})
	case u.refused[u.goal.stage].err != nil:
		return conditionOf(deployments.StateConverged, u.refused[u.goal.stage].err)
	case u.future != nil && u.floorRelease == u.done:
		return conditionOf(deployments.StateConverged, u.future)
	}
	return conditionOf(deployments.StateConverged, u.decision.Invalid)
}

// invalidCondition returns the condition of a unit whose record or pin can't be used.
func (u *unit) invalidCondition() condition {
	s := conditionOf(deployments.StateInvalid, u.decision.Invalid)
	switch {
	case u.pins[0].Err != nil || u.pins[1].Err != nil:
		s.reason = deployments.ReasonInvalidPin
	case errors.Is(u.record.Err, deployments.ErrTooOld):
		s.reason = deployments.ReasonAgentTooOld
	case u.record.Err != nil:
		s.reason = deployments.ReasonInvalidRecord
	case errors.Is(u.decision.Invalid, policy.ErrNoRecord):
		s.reason = deployments.ReasonNoRecord
	}
	return s
}

// observingCondition returns the condition of a unit that the node only observes: a rollout counts it as held.
func (u *unit) observingCondition() condition {
	s := conditionOf(deployments.StateHeld, u.lastErr)
	if refused := u.refused[u.goal.observe].err; refused != nil {
		s = conditionOf(deployments.StateHeld, refused)
	}
	s.reason = deployments.ReasonObserving
	if c := u.comparison; c != nil {
		s.facts = s.facts.With("differs", fmt.Sprint(c.Differs))
	}
	return s
}

// failedCondition returns the condition of a unit whose target failed here.
func (u *unit) failedCondition(state deployments.State, target deployments.Pointer) condition {
	f, _ := u.failure(target)
	err := f.Err(target)
	err.Unfinished = state == deployments.StateSwitching
	return condition{state: state, reason: err.Reason, facts: err.Facts, err: err}
}

// stamp returns the condition, and records since when the unit is in its state. For an unhealthy
// unit, that is Health.Since. For any other unit that goes back after a failure, it is the time of
// the failure, even if the unit should run another release by now. Both times survive a restart of
// the agent, because otherwise each restart would begin another deadline.
func (u *unit) stamp(now time.Time) condition {
	s := u.condition()
	if s.since.IsZero() {
		s.since = u.state().FailedAt
	}
	switch {
	case !s.since.IsZero():
		u.reported = reported{s.state, s.since}
	case s.state != u.reported.state:
		u.reported = reported{s.state, now}
	}
	return s
}
