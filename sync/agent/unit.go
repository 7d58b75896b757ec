package agent

import (
	"context"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/policy"
	"kedge/sync/deploy"
)

// unit is one unit on this node. All fields but the first six are guarded by Agent.mu.
type unit struct {
	id   deployments.UnitID
	log  *slog.Logger
	wake wait.Signal // asks the worker to look at its goal
	// cancel ends the worker.
	cancel context.CancelFunc
	// observes is set if this node only observes.
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
	goal     goal
}

// observed is what the unit's worker does, and what it found.
type observed struct {
	busy     job
	phase    deployments.State // of a deployment under way: StateFetching or StateSwitching
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
		observes: a.c.Observe,
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

// state is what is on disk; zero until it could be read.
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

// leave removes what is left of a unit whose worker has ended as it was retired.
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
