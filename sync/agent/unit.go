package agent

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
)

// goal is what the loop wants of a unit's worker. The zero goal: leave it as it is, but finish what was begun.
type goal struct {
	run    deployments.Pointer // have it live; zero: whatever runs stays
	stage  deployments.Pointer // have it ready on disk as well
	commit string              // that asked for run
	claim  string              // what asks for run: the failure key
	heal   bool                // put drift right
	settle bool                // once it runs, nothing older is gone back to
}

// job is what a worker is doing.
type job struct {
	kind    jobKind
	release deployments.Pointer
	commit  string
	claim   string
	cancel  context.CancelCauseFunc
}

type jobKind string

const (
	jobNone    jobKind = ""
	jobRecover jobKind = "recover" // finish what a crash cut off
	jobForget  jobKind = "forget"  // end quarantine
	jobDeploy  jobKind = "deploy"
	jobStage   jobKind = "stage"
	jobHeal    jobKind = "heal"
	jobVerify  jobKind = "verify"
	jobProve   jobKind = "prove"  // await the health of what runs, after a reboot
	jobSettle  jobKind = "settle" // note that nothing older is gone back to
)

// unit is one unit on this node: what is decided about it, and the worker that brings it about. All fields but the constant ones
// are guarded by Agent.mu.
type unit struct {
	id   deployments.UnitID
	log  *slog.Logger
	wake wait.Signal // asks the worker to look at its goal

	deploy *deploy.Unit // nil until its state could be opened

	// What the loop decided.
	decided  bool
	record   policy.Value[deployments.Record]
	pins     [2]policy.Value[deployments.Pin] // for the unit, for this node
	decision policy.Decision
	claim    string
	cycle    string // the circle of units that it lies on
	blocked  string // why it waits for another unit
	stuck    bool   // and whether that other can't move by itself
	replaced bool   // another unit, which is wanted, has its dest
	goal     goal

	// What the worker does and found.
	busy     job
	phase    deployments.State // of a deployment under way: StateFetching or StateSwitching
	progress artifact.Progress
	done     deployments.Pointer             // converged to in this process
	settled  deployments.Pointer             // noted as settled on in this process
	recover  bool                            // whether something has to be recovered first
	forget   bool                            // everything that failed may be tried again
	trouble  error                           // why the last job failed; nil again when it succeeds
	refused  map[deployments.Pointer]refusal // releases that can't succeed on this node: what to run, and what to have ready
	retry    *wait.Backoff
	retryAt  time.Time // no job that can fail is begun before
	verifyAt time.Time // zero: never
	dest     string    // of what runs
	claimed  string    // dest of what was let in last
	live     string    // what dest resolved to after the last deployment
	drift    []string

	// The state that was reported last, and since when.
	shown deployments.State
	since time.Time
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
	u := &unit{id: id, log: a.c.Log.With("unit", id.String()), wake: wait.NewSignal(), retry: newBackoff(), since: time.Now()}
	a.units[id] = u
	a.workers.Go(func() { a.work(a.ctx, u) })
}

// aim sets what the worker should bring about, and calls off what stands in its way.
func (u *unit) aim(g goal) {
	if g == u.goal {
		return
	}
	if g.run != u.goal.run || g.claim != u.goal.claim {
		u.retry.Reset()
		u.retryAt = time.Time{}
		if u.deploy != nil && u.done == g.run {
			u.trouble = nil // it was with what isn't wanted any more
		}
	}
	if g.claim != u.goal.claim {
		u.refused = nil
	}
	u.goal = g
	if u.busy.kind != jobNone && u.inTheWay() {
		u.busy.cancel(errSuperseded)
	}
	u.nudge()
}

// inTheWay reports whether the job under way has to make room for the goal.
func (u *unit) inTheWay() bool {
	switch g := u.goal; u.busy.kind {
	case jobDeploy:
		// Nothing wanted any more isn't worth stopping what has begun to switch: it would have to be finished all the same.
		return g.run != u.busy.release && (!g.run.IsZero() || u.phase != deployments.StateSwitching)
	case jobRecover:
		s := u.state()
		return !g.run.IsZero() && g.run != s.Staged && g.run != s.Ends
	case jobStage:
		return u.busy.release != g.run && u.busy.release != g.stage
	case jobHeal, jobVerify, jobProve:
		return !g.run.IsZero() && g.run != u.done
	}
	return false
}

func (u *unit) nudge() {
	u.wake.Set()
}

// state is what is on disk; zero until it could be read.
func (u *unit) state() deploy.State {
	if u.deploy == nil {
		return deploy.State{}
	}
	return u.deploy.State()
}

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
	return f.Key != "" && f.Key != u.claim
}

// report is what the unit's node says of it. now dates a state that is new.
func (u *unit) report(now time.Time) deployments.UnitReport {
	s := u.state()
	state, err := u.standing()
	if state != u.shown {
		u.shown, u.since = state, now
	}
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

func unitDir(stateDir string, id deployments.UnitID) string {
	return filepath.Join(stateDir, "units", id.Stage, id.Role, id.Unit)
}
