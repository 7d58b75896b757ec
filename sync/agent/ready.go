package agent

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/sync/agent/cache"
)

// noteConvergence closes the channels of Idle and Converged, and sets a.ready, each once its
// condition holds. It also ends the drain of units that are gone, unless a deployment of theirs is
// unfinished. a.mu is held.
func (a *Agent) noteConvergence() {
	idle, serving := true, true
	for _, u := range a.units {
		if u.gone() {
			if !u.state().Unfinished {
				a.drainTracker.End(u.id) // it has nothing to serve, or another unit has its dest
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
	if idle && !closed(a.idle) {
		a.c.Log.Info("every unit has converged, or can't go on by itself",
			"after", time.Since(a.started).Round(time.Millisecond), "units", len(a.units))
		a.warnOfUnobserved()
		if err := a.dir.Started(); err != nil {
			a.c.Log.Debug("could not remove the record of this start", "error", err)
		}
		close(a.idle) // last, as whoever waits for a.idle expects the record of this start to be gone
	}
	if len(a.unconverged()) == 0 && closeOnce(a.converged) {
		a.c.Log.Info("every unit runs what it should, for the first time since the agent started",
			"after", time.Since(a.started).Round(time.Millisecond), "units", len(a.units))
	}
}

// unready returns why /ready is 503, by ROLE/UNIT, by role, or under "agent"; empty: /ready is 200. a.mu is held.
func (a *Agent) unready() map[string]string {
	why := map[string]string{}
	for id, u := range a.units {
		if err := u.healthError(); err != nil && !u.gone() {
			why[id.Role+"/"+id.Unit] = oneLine(err)
		}
	}
	for _, id := range a.drainTracker.Units() {
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
		s := u.condition().words()
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

// unconverged returns why /converged is 503, by ROLE/UNIT or by role; empty: /converged is 200. a.mu is held.
func (a *Agent) unconverged() map[string]string {
	why := a.unknown()
	maps.Copy(why, a.empty())
	for id, u := range a.units {
		if u.decided && !u.gone() && !u.asDesired() {
			why[id.Role+"/"+id.Unit] = u.condition().words()
		}
	}
	return why
}

// unknown returns, by role, why some of the role's records and pins aren't known, or why some of its units are left
// out.
func (a *Agent) unknown() map[string]string {
	why := map[string]string{}
	for _, r := range a.cache.Roles() {
		if !r.Known() {
			why[r.Name] = oneLine(r.Unknown())
		} else if r.LeftOut > 0 {
			why[r.Name] = fmt.Sprintf("units left out: %d, as a node takes at most %d of one role", r.LeftOut,
				deployments.MaxRoleUnits)
		}
	}
	return why
}

// empty returns a message for each role if the node has no unit at all. Mostly the name of a role
// or the stage is then mistyped. empty returns nil if the node has a unit or needs none
// (Config.AllowEmpty), or while a role isn't known.
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
