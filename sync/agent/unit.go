package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
	"kedge/sync/fleet/message"
)

// unit is one unit on this node. All fields but the first six are guarded by Agent.mu.
type unit struct {
	id   deployments.UnitID
	log  *slog.Logger
	wake wait.Signal // asks the worker to look at its goal
	// cancel ends the worker.
	cancel context.CancelFunc
	// observes is set if this node only observes the unit.
	observes bool

	// fetched are the bytes of the fetch under way, as it tells of them.
	fetched atomic.Int64

	deploy *deploy.Unit // nil until its state could be opened

	desired
	observed
	reported
}

// desired is what the loop decided about a unit. The loop alone writes it.
type desired struct {
	decided  bool
	record   policy.Value[deployments.Record]
	pins     [2]policy.Value[deployments.Pin] // for the unit, for this node
	floor    int64                            // the highest generation that was acted on
	held     int64                            // the generation of a record that is there, and isn't acted on; 0: none
	decision policy.Decision
	key      string // the failure key: names what asks for the decision's target
	cycle    string // the circle of units that it lies on
	blocked  dependency
	retired  bool // its worker ends, and what is left of it goes
	replaced bool // another unit, which is wanted, has its dest
	contends bool // one that isn't wanted any more is changing it
	goal     goal
}

// observed is the worker's present job, and what its jobs found.
type observed struct {
	busy     job
	phase    deployments.State // of a deployment under way: StateFetching or StateSwitching
	announce *announcement     // of the deployment under way; nil: none was made
	progress artifact.Progress
	done     deployments.Pointer             // converged to in this process
	settled  deployments.Pointer             // noted as settled on in this process
	toSettle deployments.Pointer             // to be noted once it runs, before anything else is deployed
	settleAt time.Time                       // when what claims a time ahead of the clock is noted again
	future   *deploy.FutureError             // what settled claims
	ran      []deployments.Digest            // what converged in this process, the newest last: see dependencyOf
	recover  bool                            // whether something has to be recovered first
	forget   bool                            // everything that failed may be tried again
	trouble  error                           // why the last job failed; nil again when it succeeds
	refused  map[deployments.Pointer]refusal // releases that can't succeed on this node: what to run, and what to have ready
	retry    *wait.Backoff
	retryAt  time.Time   // no job that can fail is begun before
	verifyAt time.Time   // zero: never
	dest     string      // of what runs
	claimed  string      // dest of what was let in last
	mark     deploy.Mark // what the last deployment left at dest
	foreign  string      // what something else has deployed there; empty: nothing
	drift    []string
	// unhealable is the drift that healing left.
	unhealable []string
	compared   *deployments.Compared // of a node that observes
	looked     lookedAt
	again      *wait.Backoff       // until dest is looked at again there
	health     deploy.Health       // of watched, as its checks say
	watched    deployments.Pointer // the release that was watched last
}

// reported is the state in which the unit is, and since when.
type reported struct {
	state deployments.State
	since time.Time
}

// settleAgain is how long after a release was settled on that claims to be made ahead of the clock, which may have been
// behind, it is settled on again.
const settleAgain = 10 * time.Minute

// maxRan bounds observed.ran.
const maxRan = 16

// reached notes a release that the unit has converged to.
func (o *observed) reached(p deployments.Pointer) {
	o.done = p
	if !slices.Contains(o.ran, p.Digest) {
		o.ran = append(o.ran, p.Digest)
		o.ran = o.ran[max(0, len(o.ran)-maxRan):]
	}
}

// refusal is an error that trying again doesn't mend.
type refusal struct {
	err  error
	dest string // which another unit has; empty: that isn't why
}

// addUnit begins to look after a unit, where the agent doesn't yet. a.mu is held.
func (a *Agent) addUnit(id deployments.UnitID) {
	if a.units[id] != nil || a.ctx == nil || a.ctx.Err() != nil {
		return
	}
	u := &unit{
		id:       id,
		log:      a.c.Log.With("unit", id.String()),
		wake:     wait.NewSignal(),
		observes: deployments.MatchesUnit(a.c.Observe, id),
		observed: observed{retry: newBackoff(), again: wait.NewBackoff(observeAgain, observeAgainMost)},
	}
	u.stamp(time.Now())
	a.units[id] = u
	var ctx context.Context
	ctx, u.cancel = context.WithCancel(a.ctx)
	a.workers.Go(func() {
		defer u.cancel()
		a.work(ctx, u)
		a.leave(u)
	})
}

func (u *unit) nudge() {
	u.wake.Set()
}

// state returns the unit's state on disk; zero until it could be read.
func (u *unit) state() deploy.State {
	if u.deploy == nil {
		return deploy.State{}
	}
	return u.deploy.State()
}

// retire lets units go that nobody desires, and that nothing is kept of: their workers end, and then their directories
// go. a.mu is held.
func (a *Agent) retire() {
	for _, u := range a.units {
		if u.decided && !u.record.Present && u.deploy != nil && u.busy.kind == jobNone && u.state().Empty() && !u.retired {
			u.retired = true
			u.cancel()
		}
	}
}

// leave removes the files of a unit that was retired, after its worker has ended.
func (a *Agent) leave(u *unit) {
	a.mu.Lock()
	retired := u.retired
	a.mu.Unlock()
	if !retired {
		return
	}
	if err := os.RemoveAll(a.dir.UnitDir(u.id)); err != nil {
		u.log.Warn("the directory of a unit that is gone can't be removed", "error", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.units, u.id)
	delete(a.onDisk, u.id)
	a.metrics.forget(u.id)
	a.cache.Recount(u.id.Role, time.Now())
	a.kick()
}

// kept reports whether something of a unit is kept on this node's disk. a.mu is held.
func (a *Agent) kept(id deployments.UnitID) bool {
	if u := a.units[id]; u != nil {
		return !u.state().Empty()
	}
	return a.onDisk[id]
}

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
	return u.busy.switches() || u.busy.kind == jobHeal || u.state().Unfinished
}

// standing is where a unit stands: its state, why that is so as a code, and what is wrong.
type standing struct {
	state  deployments.State
	reason deployments.Reason
	facts  deployments.Facts
	err    error
}

// at returns the standing of a state, with err as what is wrong; nil: nothing.
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
	case u.busy.switches() && u.phase != "" && !s.Unfinished:
		return at(u.phase, u.trouble)
	case s.Unfinished && s.Health.Unhealthy: // the way back doesn't hold yet
		return standing{deployments.StateUnhealthy, s.Health.Reason, s.Health.Facts,
			fmt.Errorf("what it went back to is unhealthy: %s: %s", s.Health.Facts["check"], s.Health.Facts["error"])}
	case s.Unfinished:
		return at(deployments.StateSwitching, u.trouble) // also while it is fetched what supersedes it: it is out of service
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

// unhealthy reports whether the checks of the running release fail.
func (u *unit) unhealthy() bool { return u.health.Unhealthy && u.watched == u.state().Running }

// sick returns the failure of the live release's checks; nil if it is healthy.
func (u *unit) sick() error {
	if !u.unhealthy() {
		return nil
	}
	return fmt.Errorf("unhealthy: %s: %s", u.health.Facts["check"], u.health.Facts["error"])
}

// final reports whether the unit stays as it is until somebody does something. What a run before this one left
// unfinished, or drained, has to be known and taken up first: else a node that is out of service with nothing good to
// run would be in service between its start and its drain.
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
