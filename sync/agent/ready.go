package agent

import (
	"strings"
	"time"
)

// noteConvergence closes Converged, and notes that the node was ready, when the time has come.
func (a *Agent) noteConvergence() {
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
