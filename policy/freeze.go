package policy

import (
	"fmt"
	"time"

	"github.com/robfig/cron/v3"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// FreezeState says whether a unit's rollouts may start.
type FreezeState struct {
	Frozen bool
	// By is the name of the window that decides, Reason that window's reason. Of several open deny windows, the one that
	// ends last decides; an end that isn't known counts as the last. If the unit is frozen because no allow window is
	// open, By is the name of the first one that has a reason, or else of the first, and says that it is not open.
	By, Reason string
	// ChangesAt is when Frozen may change, or when to look again. WindowEnds is when the deciding window closes or, if
	// allow windows freeze the unit because none is open, when the next one opens. Each of the two is zero if its time
	// isn't within five years, or isn't known. WindowEnds isn't known of a window without a gap as far as FreezeAt looks.
	ChangesAt, WindowEnds time.Time
	// Wait is set if rollouts under way have to wait as well, as one of the windows that freeze the
	// unit says so.
	Wait bool
	// Never is set if allow windows freeze the unit and none will open.
	Never bool
}

// Facts returns the facts of the reason why the unit is frozen: the deciding window's name and reason, and WindowEnds,
// or that no window opens.
func (v FreezeState) Facts() deployments.Facts {
	f := deployments.Facts{"window": clipped(v.By)}
	if !v.WindowEnds.IsZero() {
		f["until"] = v.WindowEnds.UTC().Format(time.RFC3339)
	}
	if v.Never {
		f["opens"] = "never"
	}
	if v.Reason != "" {
		f["reason"] = clipped(v.Reason)
	}
	return f
}

// FreezeAt returns whether a unit's rollouts may start at a time, and which freeze window decides. An open deny window
// freezes the unit, even if an allow window is open. A unit that allow windows cover is frozen while all of them are
// closed. Windows open by the wall clock of their zone. They stay open for their duration in elapsed time, so that a
// change of the clocks makes none longer or shorter. A window for the unit whose cron line doesn't parse freezes it,
// too: better late than at the wrong time. deployments.Load refuses such a window. FreezesAt is cheaper for many units.
func FreezeAt(windows []deployments.Freeze, id deployments.UnitID, now time.Time) FreezeState {
	var own []deployments.Freeze
	for _, w := range windows {
		if isFor(w, id) {
			own = append(own, w)
		}
	}
	return FreezesAt(own, now).Of(id)
}

// Freezes are freeze windows as they are at one time: see FreezesAt. The zero Freezes has no windows.
type Freezes struct{ windows []evaluated }

// evaluated is a freeze window with the result of span, or with the error of its cron line.
type evaluated struct {
	deployments.Freeze
	ends, opens time.Time
	goesOn      bool
	err         error
}

// FreezesAt evaluates each window once, at a time, so that Freezes.Of can answer for many units without doing so again.
func FreezesAt(windows []deployments.Freeze, now time.Time) Freezes {
	all := make([]evaluated, len(windows))
	for i, w := range windows {
		all[i].Freeze = w
		schedule, err := scheduleOf(w)
		if err != nil {
			all[i].err = err
			continue
		}
		all[i].ends, all[i].opens, all[i].goesOn = span(schedule, w, now, enoughTime)
	}
	return Freezes{all}
}

// Of returns what FreezeAt returns for the unit, the windows and the time of f.
func (f Freezes) Of(id deployments.UnitID) FreezeState {
	var v FreezeState
	allows, allowed := 0, false
	var allow deployments.Freeze // the one to name if none is open
	var allowedFrom time.Time
	waits := false
	for _, w := range f.windows {
		if !isFor(w.Freeze, id) {
			continue
		}
		if w.err != nil {
			return FreezeState{Frozen: true, By: nameOf(w.Freeze), Reason: w.err.Error(), Wait: true}
		}
		next := w.opens
		if !w.ends.IsZero() {
			next = w.ends
		}
		switch {
		case w.Kind == deployments.FreezeDeny && !w.ends.IsZero():
			end := knownEnd(w.ends, w.goesOn)
			if !v.Frozen || !v.WindowEnds.IsZero() && (end.IsZero() || end.After(v.WindowEnds)) {
				v.Frozen, v.By, v.Reason, v.WindowEnds = true, nameOf(w.Freeze), w.Reason, end
			}
			v.Wait = v.Wait || w.Running == "wait"
		case w.Kind == deployments.FreezeAllow:
			if allows++; allows == 1 || allow.Reason == "" && w.Reason != "" {
				allow = w.Freeze
			}
			allowed = allowed || !w.ends.IsZero()
			allowedFrom = earlier(allowedFrom, w.opens)
			waits = waits || w.Running == "wait"
		}
		v.ChangesAt = earlier(v.ChangesAt, next)
	}
	if allows > 0 && !allowed {
		if !v.Frozen {
			v.Frozen, v.By, v.Reason, v.WindowEnds = true, nameOf(allow)+", which is not open", allow.Reason, allowedFrom
			v.Never = allowedFrom.IsZero()
		}
		v.Wait = v.Wait || waits // an allow window must not soften a deny window's wait
	}
	return v
}

// knownEnd returns the end of an opening that span found; zero: the opening goes on, and its end isn't known.
func knownEnd(ends time.Time, goesOn bool) time.Time {
	if goesOn {
		return time.Time{}
	}
	return ends
}

// isFor reports whether a window is for a unit.
func isFor(w deployments.Freeze, id deployments.UnitID) bool {
	return len(w.Units) == 0 || deployments.MatchesUnit(w.Units, id)
}

// Opening is one period in which a window is open. A zero From means that the window was open already at the time from
// which Openings looks. A zero To means that the window has no gap as far as Openings looks, which is more than a week.
type Opening struct{ From, To time.Time }

// Openings returns the periods in which a window is open after from, in order, with overlapping
// ones joined. It leaves out periods that begin at end or later, and returns at most limit of them.
// An invalid window has none.
func Openings(w deployments.Freeze, from, end time.Time, limit int) (all []Opening) {
	schedule, err := scheduleOf(w)
	if err != nil {
		return nil
	}
	closes, opens, goesOn := span(schedule, w, from, enoughForPages)
	if !closes.IsZero() {
		all = append(all, Opening{To: knownEnd(closes, goesOn)})
	}
	for !opens.IsZero() && opens.Before(end) && len(all) < limit {
		at := opens
		closes, opens, goesOn = span(schedule, w, at, enoughForPages)
		all = append(all, Opening{at, knownEnd(closes, goesOn)})
	}
	return all
}

// maxChanges bounds how many changes NextFreeze examines.
const maxChanges = 100

// NextFreeze returns the first time in [now, end) at which a unit is frozen, and the state at that
// time. It returns now for a unit that is already frozen. The time is zero if NextFreeze finds none
// among the next maxChanges changes.
func NextFreeze(windows []deployments.Freeze, id deployments.UnitID, now, end time.Time) (time.Time, FreezeState) {
	at := now
	for range maxChanges {
		v := FreezeAt(windows, id, at)
		if v.Frozen {
			return at, v
		}
		if v.ChangesAt.IsZero() || !v.ChangesAt.Before(end) {
			break
		}
		at = v.ChangesAt
	}
	return time.Time{}, FreezeState{}
}

// earlier returns the earlier of two times. The zero time means never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// later returns the later of two times. The zero time means none.
func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// scheduleOf parses a window's cron line. The schedule treats wall-clock time as UTC. In a zone with summer time, cron
// would skip a start within the hour that the clocks skip, and the freeze would not happen.
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

// These bound how far span follows an opening that goes on and on, as of deny: "0 0 * * *" with duration: 24h. What
// comes later is computed when FreezeAt is called again at ChangesAt.
const (
	// enoughStarts is how many starts span computes in any case: a year of daily ones. That takes a millisecond.
	enoughStarts = 400
	// enoughTime is how far FreezesAt follows an opening whose starts lie more closely: a weekend, minute by minute.
	enoughTime = 48 * time.Hour
	// enoughForPages is as enoughTime, for Openings: pages draw a week.
	enoughForPages = 8 * 24 * time.Hour
	// maxStarts is more than the starts, one each minute, of enoughForPages.
	maxStarts = 12000
)

// span returns when the window's current opening ends, with overlapping openings joined, and when the next one begins.
// ends is zero if the window is closed, opens if no later opening was found. span gives up after enoughStarts starts,
// if the opening goes on for longer than enough by then. goesOn is then set, and the opening lasts until ends at least.
func span(
	s cron.Schedule,
	w deployments.Freeze,
	now time.Time,
	enough time.Duration,
) (ends, opens time.Time, goesOn bool) {
	zone := w.Zone
	if zone == nil {
		zone = time.UTC
	}
	const change = 3 * time.Hour // no change of the clocks is longer
	wall := now.Add(-w.Duration).In(zone)
	wall = time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), 0, 0, time.UTC).Add(-change)
	for n := range maxStarts {
		if n >= enoughStarts && ends.After(now.Add(enough)) {
			break
		}
		if wall = s.Next(wall); wall.IsZero() {
			return ends, time.Time{}, false
		}
		start := instant(wall, zone)
		end := start.Add(w.Duration)
		switch {
		case !end.After(now): // it is over
		case ends.IsZero() && start.After(now), !ends.IsZero() && start.After(ends):
			return ends, start, false
		case end.After(ends):
			ends = end
		}
	}
	return ends, time.Time{}, true
}

// instant returns the time at which the clocks of a zone show a wall time, which is given as if it were UTC. If the
// clocks show it twice, instant returns the first of both times. If they skip it, the result lies as long after the
// change as the wall time does.
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

// maxQuoted bounds text from nodes and settings in a fact, in bytes: nodes refuse a record that is too large.
const maxQuoted = 300

func clipped(s string) string { return safetext.Cut(s, maxQuoted) }
