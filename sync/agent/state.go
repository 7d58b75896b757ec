package agent

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/deploy"
	"kedge/sync/fleet/message"
)

// unwanted reports whether no key asks for the unit.
func (u *unit) unwanted() bool {
	return u.decided && !u.record.Present && !u.pins[0].Present && !u.pins[1].Present
}

// orphaned reports whether Git names the unit no longer, though its record stays, and no pin asks for it.
func (u *unit) orphaned() bool {
	return u.decided && u.record.Err == nil && u.record.Value.Orphaned && !u.pins[0].Present && !u.pins[1].Present
}

// yields reports whether the unit gives its place up to another: nothing asks for it, or Git asks for the other alone.
func (u *unit) yields(other *unit) bool {
	return u.unwanted() || u.orphaned() && other.decided && !other.unwanted() && !other.orphaned()
}

// gone reports whether the unit is only remembered: another has its place; or no key asks for it, and nothing of it
// runs, or nothing good ever did.
func (u *unit) gone() bool {
	s := u.state()
	return u.replaced || u.unwanted() && (s.Running.IsZero() || s.LastGood.IsZero() && !s.Unfinished)
}

// atRest reports whether the unit has converged, and nothing else of it is to be ready.
func (u *unit) atRest() bool {
	return u.busy.kind == jobNone && !u.goal.run.IsZero() && u.done == u.goal.run && u.goal.stage.IsZero()
}

// changing reports whether something of the unit's dest is under way, or half done.
func (u *unit) changing() bool {
	k := u.busy.kind
	return k == jobDeploy || k == jobRecover || k == jobHeal || u.state().Unfinished
}

// standing is where a unit stands: its state, why that is so as a code, and what is wrong.
type standing struct {
	state  deployments.State
	reason deployments.Reason
	facts  deployments.Facts
	err    error
}

// at returns the standing of a state in which err is wrong, if anything is.
func at(state deployments.State, err error) standing {
	s := standing{state: state, err: err}
	if err != nil {
		s.reason, s.facts = reasonOf(err), factsOf(err)
	}
	return s
}

// factsOf returns what an error is about.
func factsOf(err error) deployments.Facts {
	facts := deployments.Facts{"error": oneLine(err)}
	if older := new(deploy.OlderError); errors.As(err, &older) {
		return facts.With("created", older.Created.Format(time.RFC3339)).
			With("floor", older.Floor.Format(time.RFC3339)).
			With("of", older.Of)
	}
	if foreign := new(foreignError); errors.As(err, &foreign) {
		return facts.With("dest", foreign.dest).With("found", foreign.found)
	}
	if future := new(deploy.FutureError); errors.As(err, &future) {
		return facts.With("created", future.Created.Format(time.RFC3339)).With("settled", future.Settled.Format(time.RFC3339))
	}
	return facts
}

// reasonOf returns the code of an error that has one.
func reasonOf(err error) deployments.Reason {
	switch {
	case errors.As(err, new(*takenError)):
		return deployments.ReasonDestInUse
	case errors.As(err, new(*foreignError)):
		return deployments.ReasonForeignDeployment
	case errors.As(err, new(*deploy.OlderError)):
		return deployments.ReasonOlderThanFloor
	case errors.As(err, new(*deploy.FutureError)):
		return deployments.ReasonCreatedAhead
	case errors.Is(err, policy.ErrUntrusted):
		return deployments.ReasonUnsigned
	case errors.Is(err, artifact.ErrDigest):
		return deployments.ReasonDigestMismatch
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return deployments.ReasonDiskFull
	case errors.Is(err, deploy.ErrSecretUnavailable):
		return deployments.ReasonSecretUnavailable
	case errors.Is(err, object.ErrUnavailable): // what isn't there, or may not be read, is no passing trouble
		return deployments.ReasonStorageUnavailable
	}
	return ""
}

// standing returns where the unit stands.
func (u *unit) standing() standing {
	s := u.state()
	target := u.decision.Target
	switch {
	case u.observes && u.decided:
		return u.observing()
	case (u.busy.kind == jobDeploy || u.busy.kind == jobRecover) && u.phase != "" && !s.Unfinished:
		return at(u.phase, u.trouble)
	case s.Unfinished && s.Health.Unhealthy: // the way back doesn't hold yet
		return standing{deployments.StateUnhealthy, s.Health.Reason, s.Health.Facts,
			fmt.Errorf("what it went back to is unhealthy: %s: %s", s.Health.Facts["check"], s.Health.Facts["error"])}
	case s.Unfinished:
		return at(deployments.StateSwitching, u.trouble) // also while it is fetched what supersedes it: it is out of service
	case !u.decided:
		return at(deployments.StateWaiting, u.trouble)
	case u.decision.Action == policy.ActHold:
		return at(deployments.StateHeld, u.decision.Invalid)
	case target.IsZero() && u.decision.Invalid != nil:
		return u.invalid()
	case target.IsZero() && u.refused[u.goal.stage].err != nil:
		return at(deployments.StateInvalid, u.refused[u.goal.stage].err)
	case target.IsZero() && u.trouble != nil && !u.goal.stage.IsZero():
		return at(deployments.StateRetrying, u.trouble)
	case target.IsZero():
		return at(deployments.StateWaiting, u.trouble)
	case u.quarantined(target) && !u.reprieved(target):
		f, _ := u.failure(target)
		failed := f.Err(target)
		return standing{deployments.StateQuarantined, failed.Reason, failed.Facts, failed}
	case u.refused[target].err != nil:
		return at(deployments.StateInvalid, u.refused[target].err)
	case u.done == target:
		return u.converged()
	case u.blocked.why != "":
		facts := deployments.Facts{"unit": u.blocked.unit, "error": u.blocked.why}
		if u.cycle != "" {
			return standing{deployments.StateInvalid, deployments.ReasonDependency, facts, errors.New(u.blocked.why)}
		}
		return standing{deployments.StateWaiting, deployments.ReasonDependency, facts, u.trouble}
	case u.trouble != nil:
		return at(deployments.StateRetrying, u.trouble)
	default:
		return at(deployments.StateFetching, u.decision.Invalid)
	}
}

// converged returns where a unit stands that runs what it should.
func (u *unit) converged() standing {
	switch {
	case u.unhealthy():
		return standing{deployments.StateUnhealthy, u.health.Reason, u.health.Facts, u.sick()}
	case u.trouble != nil: // with what is fetched ahead
		return at(deployments.StateConverged, u.trouble)
	case u.foreign != "":
		return at(deployments.StateConverged, &foreignError{u.dest, u.foreign})
	case u.refused[u.goal.stage].err != nil:
		return at(deployments.StateConverged, u.refused[u.goal.stage].err)
	case u.future != nil && u.settled == u.done:
		return at(deployments.StateConverged, u.future)
	}
	return at(deployments.StateConverged, u.decision.Invalid)
}

// invalid returns where a unit stands whose record or pin can't be used.
func (u *unit) invalid() standing {
	s := at(deployments.StateInvalid, u.decision.Invalid)
	switch {
	case u.pins[0].Err != nil || u.pins[1].Err != nil:
		s.reason = deployments.ReasonInvalidPin
	case u.record.Err != nil:
		s.reason = deployments.ReasonInvalidRecord
	case errors.Is(u.decision.Invalid, policy.ErrNoRecord):
		s.reason = deployments.ReasonNoRecord
	}
	return s
}

// unhealthy reports whether the checks of what runs fail.
func (u *unit) unhealthy() bool { return u.health.Unhealthy && u.watched == u.state().Running }

// sick returns what the checks of the live release say against it; nil if it is healthy.
func (u *unit) sick() error {
	if !u.unhealthy() {
		return nil
	}
	return fmt.Errorf("unhealthy: %s: %s", u.health.Facts["check"], u.health.Facts["error"])
}

// final reports whether the unit stays as it is until somebody does something.
func (u *unit) final() bool {
	switch u.standing().state {
	case deployments.StateConverged, deployments.StateHeld, deployments.StateInvalid, deployments.StateQuarantined,
		deployments.StateUnhealthy:
		return true
	case deployments.StateWaiting:
		return u.decided && (u.blocked.stuck || u.decision.Target.IsZero() && !u.toLook())
	}
	return false
}

// serves reports whether what runs is good and in service, whatever else is wanted.
func (u *unit) serves() bool {
	s := u.state()
	return !s.Running.IsZero() && s.Confirmed && !s.Drained && !s.Unfinished && !u.unhealthy()
}

// serving reports whether the unit stays as it is, with a release that passed its health checks in this boot.
func (u *unit) serving() bool { return u.final() && u.serves() && u.state().Proven }

// asDesired reports whether the unit runs what it should: the release that is decided, or what a pin holds.
func (u *unit) asDesired() bool {
	state := u.standing().state
	return state == deployments.StateConverged || state == deployments.StateHeld && u.serves()
}

func (u *unit) quarantined(p deployments.Pointer) bool {
	_, failed := u.failure(p)
	return failed
}

// failure is how a release failed on this node.
func (u *unit) failure(p deployments.Pointer) (deploy.Failure, bool) {
	for _, f := range u.state().Failures {
		if f.Digest == p.Digest {
			return f, true
		}
	}
	return deploy.Failure{}, false
}

// reprieved reports whether a release that failed here is about to be tried once more, as something else asks for
// it now. Else a rollout that was begun anew would take the failure of before for one of its own.
func (u *unit) reprieved(p deployments.Pointer) bool {
	f, _ := u.failure(p)
	return f.Key != "" && !policy.SameRequest(f.Key, u.key)
}

// stamp dates the state in which the unit is, where that is another than before.
func (u *unit) stamp(now time.Time) {
	if state := u.standing().state; state != u.reported.state {
		u.reported = reported{state, now}
	}
}

// report is what the unit's node says of it.
func (u *unit) report() deployments.UnitReport {
	s, now := u.state(), u.standing()
	if sick := u.sick(); sick != nil && now.reason == "" {
		now.reason, now.facts, now.err = u.health.Reason, u.health.Facts, sick // held, say
	}
	if held := u.held; held > 0 && now.reason == "" {
		now.reason = deployments.ReasonOldGeneration
		now.facts = deployments.Facts{"generation": fmt.Sprint(held), "acted_on": fmt.Sprint(u.floor)}
		now.err = fmt.Errorf(
			"the record has generation %d, and this node has acted on %d: it waits for a mirror that knows of that",
			held,
			u.floor,
		)
	}
	r := deployments.UnitReport{
		State: now.state, Reason: now.reason, Facts: now.facts, Running: s.Running, Version: clipped(s.Version, 128),
		Want: u.decision.Target, Why: clipped(message.Decision(u.decision.Reason, u.decision.Facts), 300),
		Generation: max(u.record.Value.Generation, u.floor), Staged: s.Staged.Digest, Quarantined: s.Quarantined,
		Pinned: u.decision.Source == policy.FromNodePin || u.decision.Source == policy.FromUnitPin,
		Since:  u.since.UTC().Truncate(time.Millisecond), Drift: u.drift,
	}
	r.Serves = s.Running.IsZero() && u.looked.found == policy.FoundOther
	if r.Compared = s.Compared; u.observes {
		r.Compared = u.compared
	}
	if now.reason == deployments.ReasonDependency {
		r.Why = u.blocked.why
	}
	if now.err != nil {
		r.Error = oneLine(now.err)
	}
	if now.state == deployments.StateFetching {
		r.Fetched, r.Total = u.progress.Done, u.progress.Total
	}
	return r
}
