package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// FreezeAhead is how far ahead FreezeOf and the dashboard announce freeze windows.
const FreezeAhead = 7 * 24 * time.Hour

// Freezes returns the freeze windows in the mirror's state, and how many more there are that the state doesn't list.
func (f *Fleet) Freezes() ([]deployments.Freeze, int) {
	if f.Mirror == nil {
		return nil, 0
	}
	return f.Mirror.Freezes()
}

// FreezeOf returns a text that says until when a unit's rollouts are frozen, or when the next freeze begins. It is
// empty if no freeze is in force or begins within FreezeAhead. It is empty, too, if the unit's rollout is in phase
// frozen, as the rollout's reason says the same.
func (f *Fleet) FreezeOf(id deployments.UnitID) string {
	if u, err := f.Unit(id); err == nil && u.Record != nil && u.Record.Rollout != nil &&
		u.Record.Rollout.Phase == deployments.PhaseFrozen {
		return "" // the rollout's reason says so
	}
	windows, _ := f.Freezes()
	from, v := policy.NextFreeze(windows, id, f.At, f.At.Add(FreezeAhead))
	if from.IsZero() {
		return ""
	}
	says := "no rollout starts now"
	if from.After(f.At) {
		says = "no rollout starts from " + timeAhead(from, f.At)
	}
	if v.Never {
		return says + ", and no window opens: " + message.OneLine(v.By)
	}
	return join(says+untilEnd(v.WindowEnds, f.At)+": "+message.OneLine(v.By), message.OneLine(v.Reason))
}

// statusAhead is how far ahead deny windows are announced above the table of all units.
const statusAhead = 24 * time.Hour

// maxFreezeNotes bounds the lines about freezes above the table of all units.
const maxFreezeNotes = 3

// freezeNotes returns notes on at most maxFreezeNotes freeze windows, and how many more there are.
// Windows that freeze rollouts now come first: see freezeRank.
func (f *Fleet) freezeNotes() (all []Note) {
	type line struct {
		rank freezeRank
		at   time.Time // when the window opens; zero: it freezes rollouts now
		says string
	}
	var lines []line
	windows, _ := f.Freezes()
	next := make([]*policy.Opening, len(windows)) // nil: none
	var allowed []string
	for i, w := range windows {
		for _, o := range policy.Openings(w, f.At, f.At.AddDate(100, 0, 0), 1) {
			next[i] = &o
			if w.Kind == deployments.FreezeAllow && o.From.IsZero() {
				allowed = append(allowed, patternsOf(w)...)
			}
		}
	}
	for i, w := range windows {
		o, rank := next[i], rankFreeze(w, next[i], allowed, f.At)
		says := cmp.Or(message.OneLine(w.Name), string(w.Kind)+" "+message.OneLine(w.Cron)) + ": "
		switch rank {
		case denies:
			says += "no rollout starts" + untilEnd(o.To, f.At)
		case willDeny:
			says += "no rollout starts from " + timeAhead(o.From, f.At)
		case allowsNothing, allowsLater:
			says += "is closed until " + timeAhead(o.From, f.At)
		default:
			continue
		}
		if len(w.Units) > 0 {
			says += ", for " + firstFew(slices.Clone(w.Units))
		}
		if rank == allowsLater {
			says += ", while others are open"
		}
		at := o.From
		if rank == allowsNothing {
			at = time.Time{} // it freezes now
		}
		lines = append(lines, line{rank, at, says})
	}
	slices.SortStableFunc(lines, func(a, b line) int { return cmp.Or(cmp.Compare(a.rank, b.rank), a.at.Compare(b.at)) })
	for i, l := range lines {
		if i == maxFreezeNotes {
			says := fmt.Sprintf("and %d more: kedge web lists them", len(lines)-i)
			return append(all, Note{Says: Text{says, Plain}})
		}
		note := Note{Says: Text{message.Clean(l.says), Plain}}
		if i == 0 {
			note.About = Text{"freeze", Dim}
		}
		all = append(all, note)
	}
	return all
}

// freezeRank orders the notes on freeze windows, as there is no room for all.
type freezeRank int

const (
	denies        freezeRank = iota // a deny window that is open
	allowsNothing                   // an allow window that is closed, without others open for all of its units
	willDeny                        // a deny window that opens within statusAhead
	allowsLater                     // an allow window that opens within FreezeAhead, with others open for all of its units
	notShown                        // any other window
)

// rankFreeze returns the rank of a window whose next opening is o; nil: it has none. allowed are the patterns of the
// allow windows that are open.
func rankFreeze(w deployments.Freeze, o *policy.Opening, allowed []string, now time.Time) freezeRank {
	switch {
	case o == nil:
		return notShown // a window that never opens has no effect: its cron line doesn't parse
	case w.Kind == deployments.FreezeDeny && o.From.IsZero():
		return denies
	case w.Kind == deployments.FreezeDeny && o.From.Before(now.Add(statusAhead)):
		return willDeny
	case w.Kind != deployments.FreezeAllow || o.From.IsZero():
		return notShown
	case !covers(allowed, patternsOf(w)):
		return allowsNothing
	case o.From.Before(now.Add(FreezeAhead)):
		return allowsLater
	}
	return notShown
}

// patternsOf returns the patterns of the units that a window is for.
func patternsOf(w deployments.Freeze) []string {
	if len(w.Units) == 0 {
		return []string{"*/*/*"}
	}
	return w.Units
}

// covers reports whether the patterns in all match every unit that those in names match. It returns
// false for a pattern in names that only several patterns of all match together.
func covers(all, names []string) bool {
	split := make([][]string, len(all))
	for i, pattern := range all {
		split[i] = strings.Split(pattern, "/")
	}
	fits := func(p, n string) bool { return p == "*" || p == n }
	for _, name := range names {
		parts := strings.Split(name, "/")
		if !slices.ContainsFunc(split, func(pattern []string) bool { return slices.EqualFunc(pattern, parts, fits) }) {
			return false
		}
	}
	return true
}

// untilEnd says until when a freeze holds; zero: that isn't known.
func untilEnd(t, now time.Time) string {
	if t.IsZero() {
		return ", and no end is known"
	}
	return " until " + timeAhead(t, now)
}

func timeAhead(t, now time.Time) string {
	return t.UTC().Format("Mon 2006-01-02 15:04 UTC") + " (in " + brief(t.Sub(now)) + ")"
}
