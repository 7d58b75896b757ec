package agent

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/statedir"
	"kedge/sync/fleet/message"
)

// Run deploys, reports and waits for changes until ctx ends, and then returns nil. It ends commands
// under way before it removes this node's reports from the store. It ends earlier, with an error,
// only if serving one of its addresses fails.
func (a *Agent) Run(ctx context.Context) error {
	defer a.dir.Close()
	g, ctx := errgroup.WithContext(ctx)
	a.mu.Lock()
	a.ctx = ctx
	a.mu.Unlock()
	a.mu.Lock()
	for id := range a.onDisk {
		a.addUnit(id)
	}
	a.mu.Unlock()
	// Decide by the last known state before the store answers. Otherwise the agent could forget over a restart to raise
	// the version floor.
	a.reconcile(time.Now())
	g.Go(func() error { return a.serve(ctx) })
	g.Go(func() error { return a.serveStatus(ctx) })
	g.Go(func() error { return a.serveSocket(ctx, a.dir.Path(statedir.SocketFile)) })
	g.Go(func() error { a.drainTracker.Run(ctx); return nil })
	g.Go(func() error { a.destWatcher.Run(ctx); return nil })
	g.Go(func() error { a.loop(ctx); return nil })
	g.Go(func() error {
		a.findName(ctx, func(why error) {
			for _, r := range a.cache.Roles() {
				for _, s := range r.Sources() {
					a.takeView(ctx, s, kv.View{Err: why})
				}
			}
		})
		g.Go(func() error { a.report(ctx); return nil })
		for _, r := range a.cache.Roles() {
			for _, s := range r.Sources() {
				g.Go(func() error { a.watch(ctx, s); return nil })
			}
		}
		return nil
	})
	err := g.Wait()
	a.workers.Wait()
	return err
}

// loop calls reconcile after every change, and at the time that the last reconcile returned, until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	for {
		next := a.reconcile(time.Now())
		var timer <-chan time.Time
		if !next.IsZero() {
			// The wall clock may jump, and timers stop while the machine sleeps: so wait for at most a minute.
			timer = time.After(min(max(time.Until(next), 10*time.Millisecond), time.Minute))
		}
		for again := false; !again; {
			select {
			case <-ctx.Done():
				return
			case <-a.pulse:
			case <-a.changed.C():
				again = true
			case <-timer:
				again = true
			}
		}
	}
}

// reconcile decides for every unit what its worker should reach, from what is known now. It returns when to decide
// again though nothing changed; zero: never.
func (a *Agent) reconcile(now time.Time) (next time.Time) {
	began := time.Now()
	defer func() { a.metrics.reconcile.Observe(time.Since(began).Seconds()) }()
	a.mu.Lock()
	defer a.mu.Unlock()
	next = a.cache.Review(now)
	if retry := a.cache.Save(now); !retry.IsZero() && (next.IsZero() || retry.Before(next)) {
		next = retry
	}
	for _, r := range a.cache.Roles() {
		a.decide(r, now)
	}
	for _, u := range a.units {
		if at := u.decision.Recheck; !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	for _, u := range a.units {
		u.replaced, u.contends = a.replaced(u), a.contends(u)
	}
	for _, r := range a.cache.Roles() {
		a.setGoals(r)
	}
	for _, u := range a.units {
		if u.atRest() {
			u.claimed = "" // u.dest says where the tree is
		}
	}
	for _, u := range a.units {
		a.endRefusals(u)
	}
	a.retire()
	a.noteConvergence()
	for _, u := range a.units {
		u.stamp(now)
	}
	a.reportDue.Set()
	return next
}

// decide sets the decision of each unit of a role, and adds units that have a record. It does nothing until r is known.
func (a *Agent) decide(r *cache.Role, now time.Time) {
	if !r.Known() {
		return
	}
	for _, id := range r.Units() {
		a.addUnit(id)
	}
	for id, u := range a.units {
		if id.Role != r.Name {
			continue
		}
		u.record = r.Record(id)
		u.pins[0], u.pins[1] = r.UnitPins(id, a.c.Node)
		u.actedOn, u.heldGeneration = r.Generation(id)
		state := u.state()
		was := u.decision
		u.decided = true
		u.decision = policy.Resolve(policy.ResolveInputs{
			Unit: id, Node: a.c.Node, Now: now,
			Joined: a.joined[r.Name], Record: u.record, UnitPin: u.pins[0], NodePin: u.pins[1],
			Running: state.Running, Quarantined: state.Quarantined, Bounds: a.c.Bounds,
			AtDest: u.atDest(u.record.Value.Target, u.record.Value.Stable), Booted: a.booted, Leavable: state.Leavable,
		})
		u.key = failureKey(r, id, a.c.Node, u.decision.Source, u.record.Value)
		if d := u.decision; d.Action != was.Action || d.Target != was.Target || d.Source != was.Source ||
			errorText(d.Invalid) != errorText(was.Invalid) {
			u.log.Info("decided what the unit should run", "action", string(d.Action), "target", d.Target.String(),
				"reason", string(d.Reason), "message", message.Decision(d.Reason, d.Facts))
			if d.Invalid != nil && errorText(d.Invalid) != errorText(was.Invalid) {
				u.log.Error("a record or pin can't be used, and changes nothing", "error", d.Invalid)
			}
		}
	}
}

// failureKey returns the key that identifies the request for a release. A release that failed here isn't retried while
// its key is that of the same request: see policy.SameRequest.
func failureKey(
	r *cache.Role,
	id deployments.UnitID,
	node string,
	from policy.Source,
	record deployments.Record,
) string {
	key := ""
	switch from {
	case policy.FromNodePin:
		key = kv.NodePinKey(id, node)
	case policy.FromUnitPin:
		key = kv.PinKey(id)
	default:
		return policy.FailureKey(record)
	}
	return "pin " + deployments.Trim(r.Pins.Value(key))
}

// setGoals sets the goals of a role's workers, by their units' decisions.
func (a *Agent) setGoals(r *cache.Role) {
	after := map[string][]string{}
	for id, u := range a.units {
		if id.Role == r.Name && u.decided && u.record.Err == nil {
			after[id.Unit] = u.record.Value.After
		}
	}
	cycleOf := cycles(after)
	for id, u := range a.units {
		if id.Role != r.Name || !u.decided {
			continue
		}
		u.cycle = cycleOf[id.Unit]
		u.blocked = a.dependencyOf(u)
		var g goal
		switch d := u.decision; d.Action {
		case policy.ActRun, policy.ActRunAndStage:
			g = goal{run: d.Target, stage: d.Stage, commit: u.record.Value.Commit, key: u.key}
			if d.Source != policy.FromTarget {
				g.commit = ""
			}
			if u.blocked.why != "" {
				g.run, g.stage = deployments.Pointer{}, d.Target
			}
		case policy.ActLeave:
			g.leave = true
		}
		if r := u.record; r.Present && r.Err == nil {
			g.forgetBefore = r.Value.Rollout == nil || !r.Value.Stable.IsZero()
		}
		g.raiseFloor = a.c.Trust != nil && rolledOut(u.decision.Source, u.record.Value)
		g.heal = u.record.Value.Drift == deployments.DriftHeal && !a.contested(u)
		g.adopt = a.c.Adopt || u.record.Value.Adopt
		if u.observes {
			g = goal{observe: u.decision.Target}
		}
		if u.replaced {
			g = goal{}
		}
		u.setGoal(g)
	}
}

// rolledOut reports whether the decided release has been rolled out for good, so that nothing older
// may follow it. source says which release of the record was decided. A rollout may turn back until
// it has ended, and a pin is temporary.
func rolledOut(source policy.Source, r deployments.Record) bool {
	switch source {
	case policy.FromTarget:
		return r.Rollout == nil && r.Pinned == nil
	case policy.FromStable:
		return r.Rollout == nil || !r.Rollout.StablePinned
	}
	return false
}

// setGoal sets the worker's goal, and cancels a job that conflicts with it. What is newly wanted is tried at once.
func (u *unit) setGoal(g goal) {
	if g.raiseFloor && !g.run.IsZero() &&
		(u.floorRelease == u.nextFloor || u.deploy != nil && u.state().Running != u.nextFloor) {
		u.nextFloor = g.run
	}
	if g == u.goal {
		return
	}
	if g.run != u.goal.run || g.key != u.goal.key || g.leave != u.goal.leave {
		u.retry.Reset()
		u.retryAt = time.Time{}
		if u.deploy != nil && u.done == g.run {
			u.lastErr = nil // the error was about what isn't wanted any more
		}
	}
	if g.key != u.goal.key {
		u.refused = nil
	}
	u.goal = g
	if u.busy.kind != jobNone && u.conflicts() {
		u.busy.cancel(errSuperseded)
	}
	u.wake.Set()
}

// conflicts reports whether the job under way has to be cancelled for the goal.
func (u *unit) conflicts() bool {
	switch g := u.goal; u.busy.kind {
	case jobDeploy:
		// If nothing is wanted any more, a switch that has begun isn't cancelled: it would have to be finished
		// anyway.
		begun := u.phase == deployments.StateSwitching && u.announce.begins()
		return g.leave || g.run != u.busy.release && (!g.run.IsZero() || !begun)
	case jobRecover:
		s := u.state()
		return g.leave && !s.Leaving || !g.run.IsZero() && g.run != s.Staged && g.run != s.RecoversTo
	case jobLeave: // it ends soon once it has begun
		return !g.leave && !u.state().Leaving
	case jobStage:
		return u.busy.release != g.run && u.busy.release != g.stage
	case jobObserve:
		return u.busy.release != g.observe
	case jobHeal, jobVerify, jobProve:
		return g.leave || !g.run.IsZero() && g.run != u.done
	}
	return false
}

var errSuperseded = errors.New("superseded by another goal")

// retire ends the workers of units that have no record and nothing on this node (deploy.State.Empty).
// Agent.removeRetired then removes their directories. a.mu is held.
func (a *Agent) retire() {
	for _, u := range a.units {
		if u.decided && !u.record.Present && u.deploy != nil && u.busy.kind == jobNone && u.state().Empty() && !u.retired {
			u.retired = true
			u.cancel()
		}
	}
}

// warnOfUnobserved logs the patterns in Config.Observe, except */*/*, that match no unit of this node. Such a pattern
// may be mistyped, and the unit that it was meant for is deployed. a.mu is held.
func (a *Agent) warnOfUnobserved() {
	for _, p := range a.c.Observe {
		named := slices.ContainsFunc(slices.Collect(maps.Keys(a.units)), func(id deployments.UnitID) bool {
			return deployments.MatchesUnit([]string{p}, id)
		})
		if !named && p != "*/*/*" {
			a.c.Log.Warn("a pattern in observe matches no unit of this node: if it is mistyped, "+
				"the unit that it was meant for is deployed", "observe", p)
		}
	}
}
