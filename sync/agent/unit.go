package agent

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"kedge/artifact/meter"
	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// unit is one unit on this node. Agent.mu guards deploy and all fields after it.
type unit struct {
	id     deployments.UnitID
	log    *slog.Logger
	errors *recentErrors // the newest error lines of log
	wake   wait.Signal   // makes the worker look at its goal
	// cancel ends the worker.
	cancel context.CancelFunc
	// observes is set if this node only observes the unit.
	observes bool

	// fetched is the number of bytes of the fetch under way.
	fetched atomic.Int64

	deploy *deploy.Unit // nil until the unit's state was opened

	desired
	observed
	reported
}

// desired is what the loop decided about a unit. Only the loop writes it.
type desired struct {
	decided        bool
	record         policy.Value[deployments.Record]
	pins           [2]policy.Value[deployments.Pin] // the unit's pin, this node's pin
	actedOn        int64                            // the highest generation that was acted on
	heldGeneration int64                            // of a record that isn't acted on: see cache.Role.Generation
	decision       policy.Decision
	key            string // the failure key: identifies the request for the target
	cycle          string // the cycle of units that the unit is on, in words: see cycles; empty: none
	blocked        dependency
	retired        bool // its worker ends, and its files are removed
	replaced       bool // what Agent.replaced returned last
	contends       bool // a unit that will yield its dest to this one still deploys to it
	goal           goal
}

// observed is the worker's present job, and what its jobs found.
type observed struct {
	busy         job
	phase        deployments.State // StateFetching or StateSwitching during a deployment; else empty
	announce     *announcement     // of the switch of the job under way; nil: none was made
	progress     meter.Progress
	done         deployments.Pointer             // the release that the unit converged to in this process
	floorRelease deployments.Pointer             // the release that last raised the version floor in this process
	nextFloor    deployments.Pointer             // release to raise the floor to once it runs, before other deployments
	raiseFloorAt time.Time                       // when to raise the floor again to a release ahead of the clock
	future       *deploy.FutureError             // set if floorRelease is ahead of the clock
	ran          []deployments.Digest            // releases the unit converged to in this process: see dependencyOf
	mustRecover  bool                            // an earlier run's deployment or drain has to be recovered first
	mustForget   bool                            // all releases that failed may be retried
	lastErr      error                           // of the job, or opening, that failed and is being retried; else nil
	refused      map[deployments.Pointer]refusal // releases that can't succeed on this node
	retry        *wait.Backoff
	retryAt      time.Time   // no job begins before that time
	verifyAt     time.Time   // when the live tree is checked, or dest compared, again; zero: never
	dest         string      // dest of the running release
	claimed      string      // dest that was claimed last; empty once the unit is at rest
	mark         deploy.Mark // what the last deployment left at dest
	foreign      string      // what another tool deployed to dest; empty: nothing
	drift        []string    // paths that differ from the running release, as a report names them
	// unhealable is the drift that healing could not repair.
	unhealable []string
	comparison *deployments.Compared // on a node that observes
	inspected  inspectedDest
	again      *wait.Backoff       // the pauses before dest is compared again, on a node that observes
	health     deploy.Health       // health of watched
	watched    deployments.Pointer // the release whose health was watched last
}

// goal is what a unit's worker should reach. With the zero goal the worker finishes what was begun, and watches what
// runs.
type goal struct {
	run    deployments.Pointer // the release to deploy; zero: whatever runs stays
	stage  deployments.Pointer // the release to have ready on disk as well
	commit string              // the commit that asked for run; empty: unknown, or run isn't the record's target
	key    string              // the failure key of run
	heal   bool                // repair drift
	adopt  bool                // take over the tree at dest if it equals the first release
	// observe is the release to compare with what is at dest, without changing anything of the unit. If it is set, all
	// other fields are zero.
	observe      deployments.Pointer
	leave        bool // restore what was at dest before the first release
	forgetBefore bool // discard what was kept from before the first release: leave can't be asked for any more
	raiseFloor   bool // once run is live, nothing older may follow: see observed.nextFloor
}

// job is what a worker does at present.
type job struct {
	kind     jobKind
	release  deployments.Pointer
	commit   string
	key      string
	adopt    bool
	mayLeave bool // what was at dest is kept, as goal.leave may follow
	cancel   context.CancelCauseFunc
	span     trace.Context // zero: not traced
	root     trace.SpanID  // the root span of span's trace
}

type jobKind string

// switches reports whether the job may take the unit out of service.
func (j job) switches() bool {
	return j.kind == jobDeploy || j.kind == jobRecover || j.kind == jobLeave
}

const (
	jobNone          jobKind = ""
	jobRecover       jobKind = "recover" // finish or undo an unfinished deployment
	jobEndQuarantine jobKind = "forget"  // end the quarantine of one release, or of all
	jobDeploy        jobKind = "deploy"
	jobStage         jobKind = "stage"
	jobHeal          jobKind = "heal"
	jobVerify        jobKind = "verify"
	jobProve         jobKind = "prove" // await the health of the running release, after a reboot
	jobObserve       jobKind = "observe"
	jobInspectDest   jobKind = "inspect-dest"  // find out whether something lies at dest before the first release
	jobLeave         jobKind = "leave"         // restore what was there before the first release
	jobForgetBefore  jobKind = "forget-before" // discard what was kept from before the first release
	jobRaiseFloor    jobKind = "raise-floor"   // raise the version floor: nothing older may follow
)

// announcement is a switch that begins once the store holds a report that announces it.
type announcement struct {
	release deployments.Pointer
	made    chan struct{} // closed once the store holds the report
}

// begins reports whether the announced switch may begin. It is true for a nil x, which announces nothing.
func (x *announcement) begins() bool {
	if x == nil {
		return true
	}
	select {
	case <-x.made:
		return true
	default:
		return false
	}
}

// inspectedDest is what was found at a release's dest while its unit ran nothing.
type inspectedDest struct {
	release deployments.Digest
	found   policy.Found
}

// dependency is a unit that another one waits for; zero: none.
type dependency struct {
	unit  string
	why   string
	stuck bool // this node alone can't end the wait
}

// refusal is an error that a retry doesn't cure.
type refusal struct {
	err  error
	dest string // the dest that another unit has; empty: there is another cause
}

// destInUseError means that another unit has the dest, or one in or around it.
type destInUseError struct {
	dest string
	unit deployments.UnitID
	why  string
}

func (e *destInUseError) Error() string { return e.why }

// foreignError means that another tool has deployed to a unit's dest.
type foreignError struct{ dest, found string }

func (e *foreignError) Error() string {
	return fmt.Sprintf("something else has deployed to %s: %s", e.dest, e.found)
}

// state returns the unit's state on disk; zero until it was opened.
func (u *unit) state() deploy.State {
	if u.deploy == nil {
		return deploy.State{}
	}
	return u.deploy.State()
}

// mustInspectDest reports whether the unit has to look at what is at dest before it stages its first release. If
// another tool's release serves there, it must not be replaced on all nodes at once.
func (u *unit) mustInspectDest() bool {
	p := u.goal.stage
	return !p.IsZero() && u.goal.run.IsZero() && u.atDest(p) == policy.FoundUnknown && u.refused[p].err == nil
}

// atDest returns what lies at the dest of one of releases before the unit's first release. It is FoundUnknown if the
// agent has neither looked at the dest of any of them nor restored it. Once a release of the unit runs, the result is
// always FoundNothing.
func (u *unit) atDest(releases ...deployments.Pointer) policy.Found {
	is := func(p deployments.Pointer) bool { return u.inspected.release == p.Digest }
	was := func(p deployments.Pointer) bool { return !p.IsZero() && u.state().Restored == p.Digest }
	switch {
	case !u.state().Running.IsZero():
		return policy.FoundNothing
	case slices.ContainsFunc(releases, was):
		return policy.FoundOther
	case !slices.ContainsFunc(releases, is):
		return policy.FoundUnknown
	}
	return u.inspected.found
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

// orphaned reports whether the unit's record says that Git no longer names the unit, and no pin asks for the unit.
func (u *unit) orphaned() bool {
	return u.decided && u.record.Err == nil && u.record.Value.Orphaned && !u.pins[0].Present && !u.pins[1].Present
}

// yields reports whether u gives up its dest to other. An unwanted unit yields to every other unit. An orphaned unit
// yields only to a unit that is wanted and not orphaned.
func (u *unit) yields(other *unit) bool {
	return u.unwanted() || u.orphaned() && other.decided && !other.unwanted() && !other.orphaned()
}

// gone reports whether the unit no longer counts on this node: another unit has its dest, or no record or pin asks for
// the unit. In the second case the unit still counts while it runs a release, if it has a last good release or an
// unfinished deployment.
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

// healthError returns why the running release's checks fail; nil if it is healthy.
func (u *unit) healthError() error {
	if !u.unhealthy() {
		return nil
	}
	return fmt.Errorf("unhealthy: %s: %s", u.health.Facts["check"], u.health.Facts["error"])
}

// final reports whether the unit stays on what it runs until the mirror or a person acts. It
// returns false until the unit's state was opened. Unless the node only observes the unit, it also
// returns false until what an earlier run left unfinished or drained was recovered. If it returned
// true in that time, a node without a good release would count as in service until it is drained.
func (u *unit) final() bool {
	if u.deploy == nil || u.mustRecover && !u.observes {
		return false
	}
	switch u.condition().state {
	case deployments.StateConverged, deployments.StateHeld, deployments.StateInvalid, deployments.StateQuarantined,
		deployments.StateUnhealthy:
		return true
	case deployments.StateWaiting:
		return u.decided && (u.blocked.stuck || u.decision.Target.IsZero() && !u.mustInspectDest())
	}
	return false
}

// serves reports whether the running release is good and in service, even if another release should run.
func (u *unit) serves() bool {
	s := u.state()
	return !s.Running.IsZero() && s.Confirmed && !s.Drained && !s.Unfinished && !u.unhealthy()
}

// serving reports whether the unit stays as it is (final), and serves a release that passed its
// health checks in this boot.
func (u *unit) serving() bool { return u.final() && u.serves() && u.state().Proven }

// asDesired reports whether the unit is healthy, and runs what it should: the decided release or,
// if a pin holds the unit or the node only observes it, any release that serves.
func (u *unit) asDesired() bool {
	state := u.condition().state
	return state == deployments.StateConverged || state == deployments.StateHeld && u.serves()
}

func (u *unit) quarantined(p deployments.Pointer) bool {
	_, failed := u.failure(p)
	return failed
}

// failure returns the failure of a release on this node, and whether there is one.
func (u *unit) failure(p deployments.Pointer) (deploy.Failure, bool) {
	for _, f := range u.state().Failures {
		if f.Digest == p.Digest {
			return f, true
		}
	}
	return deploy.Failure{}, false
}

// staysQuarantined reports whether a release failed here, and isn't tried again.
func (u *unit) staysQuarantined(p deployments.Pointer) bool { return u.quarantined(p) && !u.toRetry(p) }

// toRetry reports whether a release that failed here is about to be retried, as there is a new request for it. Such a
// release isn't reported as failed: a rollout that was restarted would count the earlier failure as its own.
func (u *unit) toRetry(p deployments.Pointer) bool {
	f, _ := u.failure(p)
	return f.Key != "" && !policy.SameRequest(f.Key, u.key)
}

// oneLine returns an error's text on one line of at most 300 bytes, for a report.
func oneLine(err error) string {
	return safetext.Cut(strings.Join(strings.Fields(err.Error()), " "), 300)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
