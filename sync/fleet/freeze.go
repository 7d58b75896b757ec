package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// FreezeAhead is how far ahead freeze windows are announced.
const FreezeAhead = 7 * 24 * time.Hour

// Freezes returns the freeze windows in the mirror's state, and how many more there are that it can't return.
func (f *Fleet) Freezes() ([]deployments.Freeze, int) {
	if f.Mirror == nil {
		return nil, 0
	}
	return f.Mirror.Freezes()
}

// FreezeOf returns a text that says until when a unit's rollouts are frozen, or when the next freeze begins. It is
// empty if there is none within FreezeAhead. It is empty, too, if the unit's rollout is in phase frozen, as its reason
// says the same.
func (f *Fleet) FreezeOf(id deployments.UnitID) string {
	if u, err := f.Unit(id); err == nil && u.Record != nil && u.Record.Rollout != nil &&
		u.Record.Rollout.Phase == deployments.PhaseFrozen {
		return "" // its rollout says so
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
	return join(says+" until "+timeAhead(v.WindowEnds, f.At)+": "+message.OneLine(v.By), message.OneLine(v.Reason))
}

// statusAhead is how soon a freeze must begin to be announced above the table of all units.
const statusAhead = 24 * time.Hour

// maxFreezeNotes bounds the lines about freezes above the table of all units.
const maxFreezeNotes = 3

// freezeNotes returns notes on deny windows that are open or soon will be (statusAhead), and on closed allow windows,
// whenever they open.
func (f *Fleet) freezeNotes() (all []Note) {
	type line struct {
		at   time.Time // when it freezes; zero: now
		says string
	}
	var lines []line
	windows, _ := f.Freezes()
	for _, w := range windows {
		next := policy.Openings(w, f.At, f.At.AddDate(100, 0, 0), 1)
		if len(next) == 0 {
			continue // a window that never opens is none: its cron line doesn't parse
		}
		o, says := next[0], cmp.Or(message.OneLine(w.Name), string(w.Kind)+" "+message.OneLine(w.Cron))+": "
		switch soon := o.From.Before(f.At.Add(statusAhead)); {
		case w.Kind == deployments.FreezeDeny && o.From.IsZero():
			says += "no rollout starts until " + timeAhead(o.To, f.At)
		case w.Kind == deployments.FreezeDeny && soon:
			says += "no rollout starts from " + timeAhead(o.From, f.At)
		case w.Kind == deployments.FreezeAllow && !o.From.IsZero():
			says += "is closed until " + timeAhead(o.From, f.At)
		default:
			continue
		}
		if len(w.Units) > 0 {
			says += ", for " + firstFew(slices.Clone(w.Units))
		}
		if w.Kind == deployments.FreezeAllow {
			o.From = time.Time{} // it is closed now
		}
		lines = append(lines, line{o.From, says})
	}
	slices.SortStableFunc(lines, func(a, b line) int { return a.at.Compare(b.at) })
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

func timeAhead(t, now time.Time) string {
	return t.UTC().Format("Mon 2006-01-02 15:04 UTC") + " (in " + brief(t.Sub(now)) + ")"
}
