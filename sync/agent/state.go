package agent

import (
	"errors"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/deploy"
)

// unwanted reports whether no key asks for the unit.
func (u *unit) unwanted() bool {
	return u.decided && !u.record.Present && !u.pins[0].Present && !u.pins[1].Present
}

// gone reports whether the unit is only remembered: no key asks for it, and nothing of it runs, or nothing good ever did, or another has
// its place.
func (u *unit) gone() bool {
	s := u.state()
	return u.unwanted() && (s.Running.IsZero() || s.LastGood.IsZero() && !s.Unfinished || u.replaced)
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

// standing is where the unit stands, and what is wrong.
func (u *unit) standing() (deployments.State, error) {
	s := u.state()
	target := u.decision.Target
	switch {
	case (u.busy.kind == jobDeploy || u.busy.kind == jobRecover) && u.phase != "":
		return u.phase, u.trouble
	case !u.decided:
		return deployments.StateWaiting, u.trouble
	case u.decision.Action == policy.ActHold:
		return deployments.StateHeld, u.decision.Invalid
	case target.IsZero() && u.decision.Invalid != nil:
		return deployments.StateInvalid, u.decision.Invalid
	case target.IsZero():
		return deployments.StateWaiting, u.trouble
	case u.quarantined(target) && !u.reprieved(target):
		f, _ := u.failure(target)
		return deployments.StateQuarantined, f.Err(target)
	case u.refused[target].err != nil:
		return deployments.StateInvalid, u.refused[target].err
	case u.done == target && !s.Unfinished:
		switch { // trouble with what is fetched ahead
		case u.trouble != nil:
			return deployments.StateConverged, u.trouble
		case u.refused[u.goal.stage].err != nil:
			return deployments.StateConverged, u.refused[u.goal.stage].err
		}
		return deployments.StateConverged, u.decision.Invalid
	case u.cycle != "" && u.blocked != "":
		return deployments.StateInvalid, errors.New(u.blocked)
	case u.blocked != "":
		return deployments.StateWaiting, u.trouble
	case u.trouble != nil:
		return deployments.StateRetrying, u.trouble
	default:
		return deployments.StateFetching, u.decision.Invalid
	}
}

// final reports whether the unit stays as it is until somebody does something.
func (u *unit) final() bool {
	switch state, _ := u.standing(); state {
	case deployments.StateConverged, deployments.StateHeld, deployments.StateInvalid, deployments.StateQuarantined:
		return true
	case deployments.StateWaiting:
		return u.decided && !u.state().Unfinished && (u.stuck || u.decision.Target.IsZero())
	}
	return false
}

// serving reports whether the unit stays as it is, with a release that passed its health checks in this boot.
func (u *unit) serving() bool {
	s := u.state()
	return u.final() && s.Proven && !s.Drained && !s.Running.IsZero()
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

// reprieved reports whether a release that failed here is about to be tried once more, as something else asks for it now. Else a
// rollout that was begun anew would take the failure of before for one of its own.
func (u *unit) reprieved(p deployments.Pointer) bool {
	f, _ := u.failure(p)
	return f.Key != "" && f.Key != u.key
}

// stamp dates the state in which the unit is, where that is another than before.
func (u *unit) stamp(now time.Time) {
	if state, _ := u.standing(); state != u.reported.state {
		u.reported = reported{state, now}
	}
}

// report is what the unit's node says of it.
func (u *unit) report() deployments.UnitReport {
	s := u.state()
	state, err := u.standing()
	r := deployments.UnitReport{
		State: state, Running: s.Running, Version: s.Version, Want: u.decision.Target, Why: u.decision.Why,
		Generation: u.record.Value.Generation, Staged: s.Staged.Digest, Quarantined: s.Quarantined,
		Pinned: u.decision.Source == policy.FromNodePin || u.decision.Source == policy.FromUnitPin,
		Since:  u.since.UTC().Truncate(time.Millisecond), Drift: u.drift,
	}
	if u.blocked != "" && state == deployments.StateWaiting {
		r.Why = u.blocked
	}
	if err != nil {
		r.Error = oneLine(err)
	}
	if state == deployments.StateFetching {
		r.Fetched, r.Total = u.progress.Done, u.progress.Total
	}
	return r
}
