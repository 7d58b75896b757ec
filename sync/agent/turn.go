package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// turn decides for every unit what its worker should bring about, from what is known now. It returns when time alone could change
// the answer, or what couldn't be written is to be tried again; zero: never.
func (a *Agent) turn(now time.Time) (next time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.unsaved {
		// What is acted upon must be known after a restart. Where the disk refuses, running what is wanted still comes first.
		err := a.known.write(a.c.StateDir)
		switch {
		case err == nil && a.unwritten:
			a.c.Log.Info("the last known state is written again")
		case err != nil && !a.unwritten:
			a.c.Log.Error("a restart without the store would go back to an older state", "error", err)
		}
		a.unsaved, a.unwritten = err != nil, err != nil
		if err != nil {
			next = now.Add(maxRetry)
		}
	}
	for _, r := range a.roles {
		a.decide(r, now)
	}
	for _, u := range a.units {
		if at := u.decision.Recheck; !at.IsZero() && (next.IsZero() || at.Before(next)) {
			next = at
		}
	}
	for _, u := range a.units {
		u.replaced = a.replaced(u)
	}
	for _, r := range a.roles {
		a.aim(r)
	}
	for _, u := range a.units {
		if u.atRest() {
			u.claimed = "" // dest says where it is
		}
	}
	for _, u := range a.units {
		a.readmit(u)
	}
	a.settle()
	a.kickReport()
	return next
}

// decide resolves the units of one role.
func (a *Agent) decide(r *role, now time.Time) {
	if !r.known() {
		return
	}
	for _, id := range r.units(a.c.Stage) {
		a.addUnit(id)
	}
	for id, u := range a.units {
		if id.Role != r.name {
			continue
		}
		u.record, u.pins[0], u.pins[1] = r.facts(id, a.c.Node)
		state := u.state()
		was := u.decision
		u.decided = true
		u.decision = policy.Resolve(policy.Facts{
			Unit: id, Node: a.c.Node, Now: now,
			Record: u.record, UnitPin: u.pins[0], NodePin: u.pins[1],
			Running: state.Running, Quarantined: state.Quarantined, Bounds: a.c.Bounds,
		})
		u.claim = claimOf(r, id, a.c.Node, u.decision.Source, u.record.Value)
		if d := u.decision; d.Action != was.Action || d.Target != was.Target || d.Source != was.Source || text(d.Invalid) != text(was.Invalid) {
			u.log.Info("decided", "action", string(d.Action), "target", d.Target.String(), "why", d.Why)
			if d.Invalid != nil && text(d.Invalid) != text(was.Invalid) {
				u.log.Error("a record or pin can't be used, and changes nothing", "error", d.Invalid)
			}
		}
	}
}

// claimOf names what asks for a release: while it stays the same, a release that failed here isn't tried again.
func claimOf(r *role, id deployments.UnitID, node string, from policy.Source, record deployments.Record) string {
	key := ""
	switch from {
	case policy.FromNodePin:
		key = "pins/" + id.String() + "/" + node
	case policy.FromUnitPin:
		key = "pins/" + id.String()
	default:
		return fmt.Sprintf("generation %d, retry %d", record.Generation, record.Retry)
	}
	e, _ := r.pins.find(key)
	return "pin " + deployments.Trim(string(e.Value))
}

// aim gives each worker of a role its goal.
func (a *Agent) aim(r *role) {
	after := map[string][]string{}
	for id, u := range a.units {
		if id.Role == r.name && u.decided && u.record.Err == nil {
			after[id.Unit] = u.record.Value.After
		}
	}
	circles := cycles(after)
	for id, u := range a.units {
		if id.Role != r.name || !u.decided {
			continue
		}
		u.cycle = circles[id.Unit]
		u.blocked, u.stuck = a.blockedBy(r, u)
		var g goal
		switch d := u.decision; d.Action {
		case policy.ActRun, policy.ActStage:
			g = goal{run: d.Target, stage: d.Stage, commit: u.record.Value.Commit, claim: u.claim}
			if d.Source != policy.FromTarget {
				g.commit = ""
			}
			if u.blocked != "" {
				g.run, g.stage = deployments.Pointer{}, d.Target
			}
		}
		// A rollout may turn back until it has ended; a pin is for a while.
		from := u.decision.Source
		g.settle = a.c.Trust != nil && (from == policy.FromStable || from == policy.FromTarget && u.record.Value.Rollout == nil)
		g.heal = u.record.Value.Drift == deployments.DriftHeal
		u.aim(g)
	}
}

// blockedBy says which unit of its role a unit has to wait for, if any, and whether that one can't move by itself.
func (a *Agent) blockedBy(r *role, u *unit) (why string, stuck bool) {
	want := u.decision.Target
	if want.IsZero() {
		return "", false
	}
	if s := u.state(); s.Running.Digest == want.Digest && s.Confirmed && !s.Unfinished {
		return "", false
	}
	if u.cycle != "" {
		return "its record makes a circle: " + u.cycle, true
	}
	for _, name := range u.record.Value.After {
		id := u.id
		id.Unit = name
		dep := a.units[id]
		switch {
		case dep == nil || !dep.decided || dep.decision.Source == policy.FromNothing && dep.state().Running.IsZero():
			return "waits for " + name + ", which has no record", true
		case dep.decision.Target.IsZero(): // held, or kept as it is
			if dep.state().Running.IsZero() {
				return "waits for " + name + ", of which nothing runs: " + dep.decision.Why, true
			}
		case dep.done != dep.decision.Target:
			state, err := dep.standing()
			if err != nil {
				return "waits for " + name + ", which is " + string(state) + ": " + oneLine(err), dep.final()
			}
			return "waits for " + name, dep.final()
		}
	}
	return "", false
}

// settle closes Converged, and notes that the node was ready, when the time has come.
func (a *Agent) settle() {
	known, final, serving := true, true, true
	for _, r := range a.roles {
		known = known && r.known()
	}
	for _, u := range a.units {
		if u.gone() {
			if !u.state().Unfinished {
				a.drains.forget(u.id) // nobody asks for what it waits for, and nothing of it could serve
			}
			continue
		}
		if !u.decided {
			continue
		}
		final = final && u.final()
		serving = serving && u.serving()
	}
	if !known {
		return
	}
	if serving {
		a.ready = true
	}
	if !final {
		return
	}
	select {
	case <-a.converged:
	default:
		a.c.Log.Info("first convergence", "after", time.Since(a.started).Round(time.Millisecond), "units", len(a.units))
		close(a.converged)
		if err := startedWell(a.c.StateDir); err != nil {
			a.c.Log.Debug("the note of this start stays", "error", err)
		}
	}
}

// unready says why /ready is 503, by unit or role; empty: it is 200. a.mu is held.
func (a *Agent) unready() map[string]string {
	why := map[string]string{}
	for _, id := range a.drains.list() {
		why[id.Role+"/"+id.Unit] = "drained"
	}
	if a.ready {
		return why
	}
	for _, r := range a.roles {
		if !r.known() {
			why[r.name] = r.unknown()
		}
	}
	for id, u := range a.units {
		if !u.decided || u.gone() || u.serving() {
			continue
		}
		state, err := u.standing()
		s := string(state)
		if d := u.state(); d.Confirmed && !d.Proven && u.final() {
			s += ", and not seen healthy since the machine started"
		}
		if err != nil {
			s += ": " + oneLine(err)
		}
		why[id.Role+"/"+id.Unit] = s
	}
	if len(why) == 0 {
		why["agent"] = "starting"
	}
	return why
}

// oneLine makes of an error what fits into a report: one line of at most 300 bytes.
func oneLine(err error) string {
	s := strings.Join(strings.Fields(err.Error()), " ")
	const limit = 300
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

var errSuperseded = errors.New("something else is wanted by now")
