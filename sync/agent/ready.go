package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/sync/agent/cache"
)

// noteConvergence closes Idle and Converged, and notes that the node was ready, when the time has come.
func (a *Agent) noteConvergence() {
	idle, serving := true, true
	for _, u := range a.units {
		if u.gone() {
			if !u.state().Unfinished {
				a.drains.forget(u.id) // nobody asks for what it waits for, and nothing of it could serve
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
			a.c.Log.Debug("the note of this start stays", "error", err)
		}
	}
	if len(a.unconverged()) == 0 && closeOnce(a.converged) {
		a.c.Log.Info("first convergence", "after", time.Since(a.started).Round(time.Millisecond), "units", len(a.units))
	}
}

// warnOfUnobserved logs what Config.Observe names and this node doesn't have: its name may be mistyped, and the unit
// that was meant is deployed.
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

// closeOnce closes c, and reports whether it was open.
func closeOnce(c chan struct{}) bool {
	select {
	case <-c:
		return false
	default:
		close(c)
		return true
	}
}

// unknown says, by role, why not all of its records and pins are looked after.
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

// empty says, by role, that the node has no unit at all: mostly the names of its roles, or of the stage, are mistyped.
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
	for _, id := range a.drains.list() {
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

// String is the standing in words.
func (s standing) String() string {
	if s.err == nil {
		return string(s.state)
	}
	return string(s.state) + ": " + oneLine(s.err)
}

// oneLine shortens an error to one line of at most 300 bytes, for a report.
func oneLine(err error) string {
	return clipped(strings.Join(strings.Fields(err.Error()), " "), 300)
}

// clipped cuts a text to limit bytes.
func clipped(s string, limit int) string {
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
