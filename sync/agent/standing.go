package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/agent/cache"
	"kedge/sync/deploy"
	"kedge/sync/fleet/message"
)

// standing is a unit's state, the code of its reason, and the error, if any.
type standing struct {
	state  deployments.State
	reason deployments.Reason
	facts  deployments.Facts
	err    error
}

// String returns the standing in words.
func (s standing) String() string {
	if s.err == nil {
		return string(s.state)
	}
	return string(s.state) + ": " + oneLine(s.err)
}

// at returns the standing of a state with an error; nil: none.
func at(state deployments.State, err error) standing {
	s := standing{state: state, err: err}
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
	if foreign := new(foreignError); errors.As(err, &foreign) {
		return facts.With("dest", foreign.dest).With("found", foreign.found)
	}
	if future := new(deploy.FutureError); errors.As(err, &future) {
		return facts.With("created", future.Created.Format(time.RFC3339)).With("settled", future.Settled.Format(time.RFC3339))
	}
	return facts
}

// reasonOf returns the code of an error's reason; empty: it has none.
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
	case errors.Is(err, object.ErrUnavailable): // an object that is missing or denied doesn't count as unavailable
		return deployments.ReasonStorageUnavailable
	}
	return ""
}

// standing returns the unit's standing.
func (u *unit) standing() standing {
	s := u.state()
	target := u.decision.Target
	switch {
	case u.observes && u.decided:
		return u.observing()
	case u.busy.switches() && u.phase != "" && !s.Unfinished:
		return at(u.phase, u.trouble)
	case s.Unfinished && s.Health.Unhealthy: // the release that it went back to isn't healthy yet
		return standing{deployments.StateUnhealthy, s.Health.Reason, s.Health.Facts,
			fmt.Errorf("what it went back to is unhealthy: %s: %s", s.Health.Facts["check"], s.Health.Facts["error"])}
	case s.Unfinished:
		return at(deployments.StateSwitching, u.trouble) // also while its successor is fetched: the unit is out of service
	case !u.decided:
		return at(deployments.StateWaiting, u.trouble)
	case u.contends:
		return at(deployments.StateSwitching, u.trouble)
	case u.decision.Action == policy.ActHold:
		return at(deployments.StateHeld, u.decision.Invalid)
	case target.IsZero() && u.decision.Invalid != nil:
		return u.invalid()
	case target.IsZero() && u.refused[u.goal.stage].err != nil:
		return at(deployments.StateInvalid, u.refused[u.goal.stage].err)
	case target.IsZero() && u.trouble != nil && (u.goal.leave || !u.goal.stage.IsZero()):
		return at(deployments.StateRetrying, u.trouble)
	case u.goal.leave:
		return at(deployments.StateSwitching, nil)
	case u.decision.Reason == deployments.ReasonRestored && !s.Restored.IsZero() && u.trouble == nil:
		return standing{state: deployments.StateWaiting, reason: deployments.ReasonRestored}
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

// converged returns the standing of a unit that runs what it should.
func (u *unit) converged() standing {
	switch {
	case u.unhealthy():
		return standing{deployments.StateUnhealthy, u.health.Reason, u.health.Facts, u.sick()}
	case u.trouble != nil: // an error with what is fetched ahead
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

// invalid returns the standing of a unit whose record or pin can't be used.
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

// observing returns the standing of a unit that the node only observes: a rollout counts it as held.
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

// toLook reports whether the unit waits for a look at dest, as what serves there must not be replaced on all nodes
// at once.
func (u *unit) toLook() bool {
	p := u.goal.stage
	return !p.IsZero() && u.goal.run.IsZero() && u.atDest(p) == policy.FoundUnknown && u.refused[p].err == nil
}

// atDest returns what is at the dest of one of the releases, as far as that is known. It has no meaning once a
// release runs.
func (u *unit) atDest(releases ...deployments.Pointer) policy.Found {
	is := func(p deployments.Pointer) bool { return u.looked.release == p.Digest }
	was := func(p deployments.Pointer) bool { return !p.IsZero() && u.state().Restored == p.Digest }
	switch {
	case !u.state().Running.IsZero():
		return policy.FoundNothing
	case slices.ContainsFunc(releases, was):
		return policy.FoundOther
	case !slices.ContainsFunc(releases, is):
		return policy.FoundUnknown
	}
	return u.looked.found
}

// maxRan bounds observed.ran.
const maxRan = 16

// reached records a release that the unit has converged to.
func (o *observed) reached(p deployments.Pointer) {
	o.done = p
	if !slices.Contains(o.ran, p.Digest) {
		o.ran = append(o.ran, p.Digest)
		o.ran = o.ran[max(0, len(o.ran)-maxRan):]
	}
}

// unwanted reports whether neither a record nor a pin asks for the unit.
func (u *unit) unwanted() bool {
	return u.decided && !u.record.Present && !u.pins[0].Present && !u.pins[1].Present
}

// orphaned reports whether the unit's record stays though Git no longer names it, and no pin asks for it.
func (u *unit) orphaned() bool {
	return u.decided && u.record.Err == nil && u.record.Value.Orphaned && !u.pins[0].Present && !u.pins[1].Present
}

// yields reports whether the unit gives its dest up to another: nothing asks for it, or Git names only the other.
func (u *unit) yields(other *unit) bool {
	return u.unwanted() || u.orphaned() && other.decided && !other.unwanted() && !other.orphaned()
}

// gone reports whether the unit is only remembered: another unit has its dest; or nothing asks for it, and none of
// its releases runs, or none was ever good.
func (u *unit) gone() bool {
	s := u.state()
	return u.replaced || u.unwanted() && (s.Running.IsZero() || s.LastGood.IsZero() && !s.Unfinished)
}

// atRest reports whether the unit has converged, with nothing to stage.
func (u *unit) atRest() bool {
	return u.busy.kind == jobNone && !u.goal.run.IsZero() && u.done == u.goal.run && u.goal.stage.IsZero()
}

// changing reports whether a change of the unit's dest is under way or half done.
func (u *unit) changing() bool {
	return u.busy.switches() || u.busy.kind == jobHeal || u.state().Unfinished
}

// unhealthy reports whether the checks of the running release fail.
func (u *unit) unhealthy() bool { return u.health.Unhealthy && u.watched == u.state().Running }

// sick returns why the running release's checks fail; nil if it is healthy.
func (u *unit) sick() error {
	if !u.unhealthy() {
		return nil
	}
	return fmt.Errorf("unhealthy: %s: %s", u.health.Facts["check"], u.health.Facts["error"])
}

// final reports whether the unit stays as it is until a person acts. A deployment that an earlier run left
// unfinished or drained has to be recovered first: otherwise a node that is out of service, with nothing good to
// run, would be in service between its start and its drain.
func (u *unit) final() bool {
	if u.deploy == nil || u.recover && !u.observes {
		return false
	}
	switch u.standing().state {
	case deployments.StateConverged, deployments.StateHeld, deployments.StateInvalid, deployments.StateQuarantined,
		deployments.StateUnhealthy:
		return true
	case deployments.StateWaiting:
		return u.decided && (u.blocked.stuck || u.decision.Target.IsZero() && !u.toLook())
	}
	return false
}

// serves reports whether the running release is good and in service, whatever should run.
func (u *unit) serves() bool {
	s := u.state()
	return !s.Running.IsZero() && s.Confirmed && !s.Drained && !s.Unfinished && !u.unhealthy()
}

// serving reports whether the unit stays as it is, with a release that passed its health checks in this boot.
func (u *unit) serving() bool { return u.final() && u.serves() && u.state().Proven }

// asDesired reports whether the unit runs what it should: the decided release, or what a pin holds.
func (u *unit) asDesired() bool {
	state := u.standing().state
	return state == deployments.StateConverged || state == deployments.StateHeld && u.serves()
}

func (u *unit) quarantined(p deployments.Pointer) bool {
	_, failed := u.failure(p)
	return failed
}

// failure returns how a release failed on this node.
func (u *unit) failure(p deployments.Pointer) (deploy.Failure, bool) {
	for _, f := range u.state().Failures {
		if f.Digest == p.Digest {
			return f, true
		}
	}
	return deploy.Failure{}, false
}

// reprieved reports whether a release that failed here is about to be retried, as there is a new request for it.
// Otherwise a rollout that was restarted would count the earlier failure as its own.
func (u *unit) reprieved(p deployments.Pointer) bool {
	f, _ := u.failure(p)
	return f.Key != "" && !policy.SameRequest(f.Key, u.key)
}

// stamp sets the time of the state if the state changed.
func (u *unit) stamp(now time.Time) {
	if state := u.standing().state; state != u.reported.state {
		u.reported = reported{state, now}
	}
}

// report returns the unit's part of the node's report.
func (u *unit) report() deployments.UnitReport {
	s, now := u.state(), u.standing()
	if sick := u.sick(); sick != nil && now.reason == "" {
		now.reason, now.facts, now.err = u.health.Reason, u.health.Facts, sick // for example, a held unit
	}
	if held := u.held; held > 0 && now.reason == "" {
		now.reason = deployments.ReasonOldGeneration
		now.facts = deployments.Facts{"generation": fmt.Sprint(held), "acted_on": fmt.Sprint(u.floor)}
		now.err = fmt.Errorf(
			"the record has generation %d, and this node has acted on %d: it waits for a mirror that knows the newer one",
			held,
			u.floor,
		)
	}
	r := deployments.UnitReport{
		State: now.state, Reason: now.reason, Facts: now.facts, Running: s.Running, Version: clipped(s.Version, 128),
		Want: u.decision.Target, Why: clipped(message.Decision(u.decision.Reason, u.decision.Facts), 300),
		Generation: max(u.record.Value.Generation, u.floor), Staged: s.Staged.Digest, Quarantined: s.Quarantined,
		Leavable: s.Leavable, Pinned: u.decision.Source == policy.FromNodePin || u.decision.Source == policy.FromUnitPin,
		Since: u.since.UTC().Truncate(time.Millisecond), Drift: u.drift,
	}
	r.Serves = s.Running.IsZero() &&
		(u.contends || u.looked.found == policy.FoundOther || u.looked.found == policy.FoundUnknown && !s.Restored.IsZero())
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

// noteConvergence closes Idle and Converged, and records that the node was ready, when that is so.
func (a *Agent) noteConvergence() {
	idle, serving := true, true
	for _, u := range a.units {
		if u.gone() {
			if !u.state().Unfinished {
				a.drained.End(u.id) // nobody asks for the unit, and it has nothing to serve
			}
			continue
		}
		if u.decided {
			idle = idle && u.final()
			serving = serving && u.serving()
		}
	}
	if slices.ContainsFunc(a.cache.Roles(), func(r *cache.Role) bool { return !r.Known() }) {
		return
	}
	if serving && len(a.empty()) == 0 {
		a.ready = true
	}
	if idle && closeOnce(a.idle) {
		a.c.Log.Info(
			"every unit has converged, or can't go on by itself",
			"after",
			time.Since(a.started).Round(time.Millisecond),
			"units",
			len(a.units),
		)
		a.warnOfUnobserved()
		if err := a.dir.Started(); err != nil {
			a.c.Log.Debug("could not remove the note of this start", "error", err)
		}
	}
	if len(a.unconverged()) == 0 && closeOnce(a.converged) {
		a.c.Log.Info("first convergence", "after", time.Since(a.started).Round(time.Millisecond), "units", len(a.units))
	}
}

// warnOfUnobserved logs patterns in Config.Observe that match no unit of this node: one may be mistyped, and the
// unit that was meant is deployed.
func (a *Agent) warnOfUnobserved() {
	for _, p := range a.c.Observe {
		named := slices.ContainsFunc(slices.Collect(maps.Keys(a.units)), func(id deployments.UnitID) bool {
			return deployments.MatchesUnit([]string{p}, id)
		})
		if !named && p != "*/*/*" {
			a.c.Log.Warn("observe names no unit that this node has", "observe", p)
		}
	}
}

// unknown returns, by role, why not all of its records and pins are known or followed.
func (a *Agent) unknown() map[string]string {
	why := map[string]string{}
	for _, r := range a.cache.Roles() {
		if !r.Known() {
			why[r.Name] = oneLine(r.Unknown())
		} else if r.LeftOut > 0 {
			why[r.Name] = fmt.Sprintf(
				"%d units are left out, as a node takes %d of one role",
				r.LeftOut,
				deployments.MaxRoleUnits,
			)
		}
	}
	return why
}

// empty returns, by role, that the node has no unit at all: usually the name of a role or the stage is mistyped.
func (a *Agent) empty() map[string]string {
	for _, u := range a.units {
		if !u.gone() {
			return nil
		}
	}
	if a.c.AllowEmpty || len(a.unknown()) > 0 {
		return nil
	}
	why := map[string]string{}
	for _, r := range a.cache.Roles() {
		why[r.Name] = "no unit is desired in " + a.c.Stage + "/" + r.Name + ": correct the stage or role, or set allow_empty"
	}
	return why
}

// unconverged returns why /converged is 503, by unit or role; empty: it is 200. a.mu is held.
func (a *Agent) unconverged() map[string]string {
	why := a.unknown()
	maps.Copy(why, a.empty())
	for id, u := range a.units {
		if u.decided && !u.gone() && !u.asDesired() {
			why[id.Role+"/"+id.Unit] = u.standing().String()
		}
	}
	return why
}

// unready returns why /ready is 503, by unit or role; empty: it is 200. a.mu is held.
func (a *Agent) unready() map[string]string {
	why := map[string]string{}
	for id, u := range a.units {
		if err := u.sick(); err != nil && !u.gone() {
			why[id.Role+"/"+id.Unit] = oneLine(err)
		}
	}
	for _, id := range a.drained.Units() {
		why[id.Role+"/"+id.Unit] = "drained"
	}
	if a.ready {
		return why
	}
	maps.Copy(why, a.unknown())
	maps.Copy(why, a.empty())
	for id, u := range a.units {
		if !u.decided || u.gone() || u.serving() {
			continue
		}
		s := u.standing().String()
		if d := u.state(); d.Confirmed && !d.Proven && u.final() {
			s += ", and not seen healthy since the machine started"
		}
		why[id.Role+"/"+id.Unit] = s
	}
	if len(why) == 0 {
		why["agent"] = "starting"
	}
	return why
}
