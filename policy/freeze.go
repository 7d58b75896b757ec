package policy

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/robfig/cron/v3"

	"kedge/deployments"
)

// Verdict is whether a unit's rollouts may start.
type Verdict struct {
	Frozen bool
	// By names the window that says so, Reason is its own.
	By, Reason string
	// Until is when the verdict may change; zero: never, as far as a year ahead shows. Ends is when the window that
	// says so is over, or, where none is open that allows it, when the next one opens.
	Until, Ends time.Time
	// Wait is set where a rollout under way waits as well.
	Wait bool
	// Never is set where no window opens that would allow it.
	Never bool
}

// Facts returns the window as the facts of a reason.
func (v Verdict) Facts() deployments.Facts {
	f := deployments.Facts{"window": clipped(v.By)}
	if !v.Ends.IsZero() {
		f["until"] = v.Ends.UTC().Format(time.RFC3339)
	}
	if v.Never {
		f["opens"] = "never"
	}
	if v.Reason != "" {
		f["reason"] = clipped(v.Reason)
	}
	return f
}

// Frozen reports whether a unit's rollouts may start at a time. Any deny window that is open freezes, whatever else
// allows; a unit that allow windows name is frozen outside of them all. Windows open by the wall clock of their
// zone and stay open for their duration as it passes, so that one over a change of the clocks is neither longer nor
// shorter. A window whose cron line doesn't parse, which Load refuses, freezes: better late than at the wrong time.
func Frozen(windows []deployments.Freeze, id deployments.UnitID, now time.Time) Verdict {
	var v Verdict
	allows, allowed := 0, false
	var reason, by string
	var allowedFrom time.Time
	waits := false
	for _, w := range windows {
		if !covers(w.Units, id) {
			continue
		}
		schedule, err := scheduleOf(w)
		if err != nil {
			return Verdict{Frozen: true, By: nameOf(w), Reason: err.Error(), Wait: true}
		}
		ends, opens := span(schedule, w, now)
		next := opens
		if !ends.IsZero() {
			next = ends
		}
		switch {
		case w.Kind == deployments.FreezeDeny && !ends.IsZero():
			if !v.Frozen {
				v.Frozen, v.By, v.Reason, v.Ends = true, nameOf(w), w.Reason, ends
			}
			v.Wait = v.Wait || w.Running == "wait"
		case w.Kind == deployments.FreezeAllow:
			allows++
			allowed = allowed || !ends.IsZero()
			allowedFrom = earlier(allowedFrom, opens)
			by, reason = cmp.Or(by, nameOf(w)), cmp.Or(reason, w.Reason)
			waits = waits || w.Running == "wait"
		}
		v.Until = earlier(v.Until, next)
	}
	if allows > 0 && !allowed {
		if !v.Frozen {
			v.Frozen, v.By, v.Reason, v.Ends = true, by+", which is not open", reason, allowedFrom
			v.Never = allowedFrom.IsZero()
		}
		v.Wait = v.Wait || waits // a window that denies as well makes it no laxer
	}
	return v
}

// Opening is a time in which a window is open. From is zero if it was open already.
type Opening struct{ From, To time.Time }

// Openings returns when a window is open from a time on, in order; openings that overlap are one. It stops before what
// begins at end or later, and after most of them. A window that can't be read has none.
func Openings(w deployments.Freeze, from, end time.Time, most int) (all []Opening) {
	schedule, err := scheduleOf(w)
	if err != nil {
		return nil
	}
	closes, opens := span(schedule, w, from)
	if !closes.IsZero() {
		all = append(all, Opening{To: closes})
	}
	for !opens.IsZero() && opens.Before(end) && len(all) < most {
		at := opens
		closes, opens = span(schedule, w, at)
		all = append(all, Opening{at, closes})
	}
	return all
}

// mostChanges bounds how many openings and ends of windows NextFreeze looks at.
const mostChanges = 100

// NextFreeze returns the first time from now on, and before end, at which a unit is frozen, and what says so. That is
// now for a unit that is frozen already; zero: none is seen.
func NextFreeze(windows []deployments.Freeze, id deployments.UnitID, now, end time.Time) (time.Time, Verdict) {
	at := now
	for range mostChanges {
		v := Frozen(windows, id, at)
		if v.Frozen {
			return at, v
		}
		if v.Until.IsZero() || !v.Until.Before(end) {
			break
		}
		at = v.Until
	}
	return time.Time{}, Verdict{}
}

// earlier is the first of two times, where zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// later is the later of two times; the zero time is none.
func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// scheduleOf reads the cron line. It counts wall clock time as if it were UTC: cron itself would skip a start that
// falls into the hour that spring takes away, and a freeze would not happen.
func scheduleOf(w deployments.Freeze) (cron.Schedule, error) {
	s, err := cron.ParseStandard(w.Cron)
	if err != nil {
		return nil, fmt.Errorf("cron line %q: %w", w.Cron, err)
	}
	if spec, ok := s.(*cron.SpecSchedule); ok {
		spec.Location = time.UTC
	}
	return s, nil
}

// maxStarts bounds how many starts of a window are looked at. What lies beyond is looked at when Until comes.
const maxStarts = 10000

// span says when the window that is open now ends (zero: none is), overlapping ones taken together, and when the
// next one opens.
func span(s cron.Schedule, w deployments.Freeze, now time.Time) (ends, opens time.Time) {
	zone := w.Zone
	if zone == nil {
		zone = time.UTC
	}
	const change = 3 * time.Hour // no clock is put forward or back by as much
	wall := now.Add(-w.Duration).In(zone)
	wall = time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), 0, 0, time.UTC).Add(-change)
	for range maxStarts {
		if wall = s.Next(wall); wall.IsZero() {
			break
		}
		start := instant(wall, zone)
		end := start.Add(w.Duration)
		switch {
		case !end.After(now): // is over
		case ends.IsZero() && start.After(now), !ends.IsZero() && start.After(ends):
			return ends, start
		case end.After(ends):
			ends = end
		}
	}
	return ends, time.Time{}
}

// instant is when the clocks of a zone show a wall time, given as if it were UTC: the first time where they show it
// twice, and as much after the change as it lies in the gap where they don't show it.
func instant(wall time.Time, zone *time.Location) time.Time {
	shows := func(t time.Time) bool { return t.Hour() == wall.Hour() && t.Minute() == wall.Minute() }
	at := time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), 0, 0, zone)
	_, before := at.Add(-3 * time.Hour).Zone()
	if early := wall.Add(-time.Duration(before) * time.Second).In(zone); shows(early) || !shows(at) {
		return early
	}
	return at
}

func nameOf(w deployments.Freeze) string {
	if w.Name != "" {
		return w.Name
	}
	return string(w.Kind) + " " + w.Cron
}

// covers reports whether one of the patterns matches a unit; none: all do.
func covers(patterns []string, id deployments.UnitID) bool {
	for _, p := range patterns {
		parts := strings.Split(p, "/")
		if len(parts) == 3 && fits(parts[0], id.Stage) && fits(parts[1], id.Role) && fits(parts[2], id.Unit) {
			return true
		}
	}
	return len(patterns) == 0
}

func fits(pattern, name string) bool { return pattern == "*" || pattern == name }
