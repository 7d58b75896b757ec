package web

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet"
)

// windowRow is one freeze window of kedge.yaml, with its openings in the next week.
type windowRow struct {
	Name, Reason string
	// Allow is set if rollouts may start only while the window is open. Otherwise they may start only while it is closed.
	Allow bool
	// HoldsRunning is set if rollouts under way have to wait as well.
	HoldsRunning bool
	Units        string
	// Open is set while the window is open. From and To are the current opening, whose From is zero, or the next one. Both
	// are zero if there is none in the next week. To is zero, too, if no end is known.
	Open     bool
	From, To time.Time
	// Later lists the next openings after that in words, at most laterOpenings.
	Later string
	// Path draws the openings, beginning with the current hour. Zone is the time zone of the window.
	Path string
	Zone string
}

const (
	maxWindows    = 40  // bounds the freeze windows that are listed
	maxOpenings   = 100 // bounds the openings that are drawn of each window
	laterOpenings = 3   // how many later openings of each window are listed in words
	// weekWidth is the width of the drawing of a week: six units an hour.
	weekWidth = 7 * 24 * 6
)

// windowsOf lists the first maxWindows freeze windows: open ones first, then by their next opening. more is how many
// others there are.
func (s *snapshot) windowsOf() (rows []windowRow, more int) {
	windows, more := s.Freezes()
	more += max(0, len(windows)-maxWindows)
	for _, w := range windows[:min(len(windows), maxWindows)] {
		rows = append(rows, windowOf(w, s.At))
	}
	slices.SortStableFunc(rows, func(a, b windowRow) int {
		switch {
		case a.Open && b.Open:
			if a.To.IsZero() != b.To.IsZero() {
				return b.To.Compare(a.To) // a window without a known end comes last
			}
			return a.To.Compare(b.To) // the window that closes soonest comes first
		case a.Open:
			return -1
		case b.Open:
			return 1
		case a.From.IsZero() != b.From.IsZero():
			return b.From.Compare(a.From) // a window that doesn't open comes last
		}
		return a.From.Compare(b.From)
	})
	return rows, more
}

func windowOf(w deployments.Freeze, now time.Time) windowRow {
	r := windowRow{
		Name: fleet.Clean(cmp.Or(w.Name, w.Cron), 80), Reason: fleet.Clean(w.Reason, maxText),
		Allow: w.Kind == deployments.FreezeAllow, HoldsRunning: w.Running == "wait", Units: "all", Zone: w.Zone.String(),
	}
	if len(w.Units) > 0 {
		r.Units = fleet.Clean(strings.Join(w.Units[:min(len(w.Units), 12)], ", "), maxText)
		if n := len(w.Units) - 12; n > 0 {
			r.Units += fmt.Sprintf(" and %d more", n)
		}
	}
	begin := now.Truncate(time.Hour)
	x := func(t time.Time) int { return min(max(0, int(t.Sub(begin)/(10*time.Minute))), weekWidth) }
	var path strings.Builder
	var later []string
	for i, o := range policy.Openings(w, now, begin.Add(fleet.FreezeAhead), maxOpenings) {
		from, to := x(o.From), weekWidth
		if !o.To.IsZero() {
			to = x(o.To)
		}
		fmt.Fprintf(&path, "M%d 0h%dv1H%dZ", from, max(1, to-from), from)
		switch {
		case i == 0:
			r.Open, r.From, r.To = o.From.IsZero(), o.From.UTC(), o.To.UTC()
		case len(later) < laterOpenings:
			later = append(later, spanIn(o, w.Zone))
		}
	}
	r.Path, r.Later = path.String(), strings.Join(later, "; ")
	return r
}

// spanIn formats an opening by its window's time zone.
func spanIn(o policy.Opening, zone *time.Location) string {
	from, to := o.From.In(zone), o.To.In(zone)
	if o.To.IsZero() {
		return "from " + from.Format("Mon 15:04")
	}
	end := to.Format("Mon 15:04")
	if from.YearDay() == to.YearDay() && from.Year() == to.Year() {
		end = to.Format("15:04")
	}
	return from.Format("Mon 15:04") + "–" + end
}

// say describes a window's drawing in words.
func (r windowRow) say() string {
	if r.Path == "" {
		return "Not open within 7 days"
	}
	return fmt.Sprintf("Open %s within 7 days", plural2(strings.Count(r.Path, "M"), "time"))
}
