package policy

import (
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

func zone(t *testing.T, name string) *time.Location {
	t.Helper()
	z, err := time.LoadLocation(name)
	if err != nil {
		t.Fatal(err)
	}
	return z
}

func TestFrozen(t *testing.T) {
	t.Parallel()
	berlin, newYork := zone(t, "Europe/Berlin"), zone(t, "America/New_York")
	type freeze = deployments.Freeze
	const deny, allow = deployments.FreezeDeny, deployments.FreezeAllow
	weekend := freeze{Name: "weekend", Kind: deny, Cron: "0 16 * * FRI", Zone: berlin, Duration: 64 * time.Hour, Reason: "nobody is there"}
	hours := freeze{Name: "office hours", Kind: allow, Cron: "0 9 * * MON-FRI", Zone: newYork, Duration: 8 * time.Hour, Units: []string{"prod/*/*"}}
	night := freeze{Name: "night", Kind: deny, Cron: "30 2 * * *", Zone: berlin, Duration: time.Hour}
	nyNight := freeze{Name: "night", Kind: deny, Cron: "30 2 * * *", Zone: newYork, Duration: time.Hour}
	nyEarly := freeze{Name: "early", Kind: deny, Cron: "30 1 * * *", Zone: newYork, Duration: time.Hour}
	always := freeze{Name: "always", Kind: deny, Cron: "* * * * *", Zone: berlin, Duration: time.Hour}
	for _, c := range []struct {
		name    string
		windows []freeze
		unit    string
		now     string
		by      string // "": not frozen
		until   string // "": never
	}{
		{"no windows", nil, "prod/web/app", "2026-11-24T12:00:00Z", "", ""},
		{"before the weekend", []freeze{weekend}, "prod/web/app", "2026-11-27T14:59:59Z", "", "2026-11-27T15:00:00Z"},
		{"as the weekend begins", []freeze{weekend}, "prod/web/app", "2026-11-27T15:00:00Z", "weekend", "2026-11-30T07:00:00Z"},
		{"as the weekend ends", []freeze{weekend}, "prod/web/app", "2026-11-30T07:00:00Z", "", "2026-12-04T15:00:00Z"},
		{"clocks put back within it: 64 hours all the same", []freeze{weekend}, "prod/web/app", "2026-10-25T12:00:00Z", "weekend", "2026-10-26T06:00:00Z"},
		{"clocks put forward within it", []freeze{weekend}, "prod/web/app", "2026-03-29T12:00:00Z", "weekend", "2026-03-30T07:00:00Z"},
		{"a start in the hour that spring takes, Berlin", []freeze{night}, "prod/web/app", "2026-03-29T01:45:00Z", "night", "2026-03-29T02:30:00Z"},
		{"a start in the hour that autumn gives twice, Berlin", []freeze{night}, "prod/web/app", "2026-10-25T00:45:00Z", "night", "2026-10-25T01:30:00Z"},
		{"which counts once", []freeze{night}, "prod/web/app", "2026-10-25T01:45:00Z", "", "2026-10-26T01:30:00Z"},
		{"a start in the hour that spring takes, New York", []freeze{nyNight}, "prod/web/app", "2026-03-08T07:45:00Z", "night", "2026-03-08T08:30:00Z"},
		{"a start in the hour that autumn gives twice, New York", []freeze{nyEarly}, "prod/web/app", "2026-11-01T05:45:00Z", "early", "2026-11-01T06:30:00Z"},
		{"summer in New York", []freeze{hours}, "prod/web/app", "2026-10-30T13:00:00Z", "", "2026-10-30T21:00:00Z"},
		{"winter in New York", []freeze{hours}, "prod/web/app", "2026-11-02T13:00:00Z", "office hours, which is not open", "2026-11-02T14:00:00Z"},
		{"outside of the office", []freeze{hours}, "prod/web/app", "2026-11-24T22:00:00Z", "office hours, which is not open", "2026-11-25T14:00:00Z"},
		{"a unit that it does not name", []freeze{hours}, "staging/web/app", "2026-11-24T22:00:00Z", "", ""},
		{"deny wins", []freeze{hours, weekend}, "prod/web/app", "2026-11-27T16:00:00Z", "weekend", "2026-11-27T22:00:00Z"},
		{"and is named, also where nothing allows", []freeze{hours, weekend}, "prod/web/app", "2026-11-28T12:00:00Z", "weekend", "2026-11-30T07:00:00Z"},
		{"one allow of two is enough", []freeze{hours, {Name: "second shift", Kind: allow, Cron: "0 17 * * *", Zone: newYork, Duration: 5 * time.Hour}},
			"prod/web/app", "2026-11-24T23:00:00Z", "", "2026-11-25T03:00:00Z"},
		{"whichever it is", []freeze{{Name: "second shift", Kind: allow, Cron: "0 17 * * *", Zone: newYork, Duration: 5 * time.Hour}, hours},
			"prod/web/app", "2026-11-24T23:00:00Z", "", "2026-11-25T03:00:00Z"},
		{"the one without an end is named", []freeze{weekend, always}, "prod/web/app", "2026-11-28T12:00:00Z",
			"always", "2026-11-30T07:00:00Z"},
		{"wherever it is listed", []freeze{always, weekend}, "prod/web/app", "2026-11-28T12:00:00Z",
			"always", "2026-11-30T07:00:00Z"},
		{"one that begins as another ends goes on", []freeze{{Name: "noon", Kind: deny, Cron: "0 12,13 * * *", Duration: time.Hour}}, "prod/web/app", "2026-11-24T12:30:00Z", "noon", "2026-11-24T14:00:00Z"},
		{"by unit", []freeze{{Name: "db", Kind: deny, Cron: "0 0 * * *", Duration: 24 * time.Hour, Units: []string{"*/*/db"}}}, "prod/web/app", "2026-11-24T22:00:00Z", "", ""},
		{"without a name, by what it is", []freeze{{Kind: deny, Cron: "0 12 * * *", Duration: time.Hour}}, "prod/web/app", "2026-11-24T12:30:00Z", "deny 0 12 * * *", "2026-11-24T13:00:00Z"},
		{"by role", []freeze{{Name: "db", Kind: deny, Cron: "0 0 * * *", Duration: 24 * time.Hour, Units: []string{"*/db/*"}}}, "prod/web/app", "2026-11-24T22:00:00Z", "", ""},
		{"a line that doesn't parse", []freeze{{Name: "typo", Kind: deny, Cron: "0 0"}}, "prod/web/app", "2026-11-24T22:00:00Z", "typo", ""},
		{"windows that overlap for ever", []freeze{always}, "prod/web/app", "2026-11-24T22:00:00Z",
			"always", "2026-11-26T22:01:00Z"},
	} {
		t.Run(c.name, func(t *testing.T) {
			id, err := deployments.ParseUnitID(c.unit)
			if err != nil {
				t.Fatal(err)
			}
			now, err := time.Parse(time.RFC3339, c.now)
			if err != nil {
				t.Fatal(err)
			}
			v := FreezeAt(c.windows, id, now)
			until := ""
			if !v.ChangesAt.IsZero() {
				until = v.ChangesAt.UTC().Format(time.RFC3339)
			}
			if v.Frozen != (c.by != "") || v.By != c.by || until != c.until {
				t.Errorf("%+v until %s, want frozen by %q until %s", v, until, c.by, c.until)
			}
		})
	}
}

// If no allow window is open, the name and the reason are of one window: the first with a reason,
// or else the first.
func TestFrozenForOneWindowsReason(t *testing.T) {
	t.Parallel()
	shut := func(name, reason string) deployments.Freeze {
		return deployments.Freeze{Name: name, Kind: deployments.FreezeAllow, Cron: "0 18 * * *", Duration: time.Hour,
			Reason: reason}
	}
	for _, c := range []struct {
		windows    []deployments.Freeze
		by, reason string
	}{
		{[]deployments.Freeze{shut("a", ""), shut("b", "")}, "a, which is not open", ""},
		{[]deployments.Freeze{shut("a", ""), shut("b", "night"), shut("c", "day")}, "b, which is not open", "night"},
		{[]deployments.Freeze{shut("a", "day"), shut("b", "")}, "a, which is not open", "day"},
	} {
		if v := FreezeAt(c.windows, app, noon); v.By != c.by || v.Reason != c.reason {
			t.Errorf("by %q, reason %q; want %q, %q", v.By, v.Reason, c.by, c.reason)
		}
	}
}

// Whether a rollout under way waits as well: one window that is against it and says so is enough.
func TestFrozenWhileARolloutIsUnderWay(t *testing.T) {
	t.Parallel()
	type freeze = deployments.Freeze
	const deny, allow = deployments.FreezeDeny, deployments.FreezeAllow
	open := func(kind deployments.FreezeKind, running string) freeze {
		return freeze{Name: "open", Kind: kind, Cron: "0 12 * * *", Duration: time.Hour, Running: running}
	}
	shut := func(kind deployments.FreezeKind, running string) freeze {
		return freeze{Name: "shut", Kind: kind, Cron: "0 18 * * *", Duration: time.Hour, Running: running}
	}
	for _, c := range []struct {
		name         string
		windows      []freeze
		frozen, wait bool
	}{
		{"it finishes, where nothing is said", []freeze{open(deny, "")}, true, false},
		{"or where that is said", []freeze{open(deny, "finish")}, true, false},
		{"it waits", []freeze{open(deny, "wait")}, true, true},
		{"not for what is not open", []freeze{shut(deny, "wait")}, false, false},
		{"for the first of two", []freeze{open(deny, "wait"), open(deny, "finish")}, true, true},
		{"for the second of two", []freeze{open(deny, "finish"), open(deny, "wait")}, true, true},
		{"where it is not allowed", []freeze{shut(allow, "wait")}, true, true},
		{"where it is not allowed, but may finish", []freeze{shut(allow, "finish")}, true, false},
		{"where one of those that don't allow it says so", []freeze{shut(allow, "wait"), shut(allow, "finish")}, true, true},
		{"not where it is allowed", []freeze{open(allow, "wait")}, false, false},
		{"not where another window allows it", []freeze{shut(allow, "wait"), open(allow, "finish")}, false, false},
		{"where it is not allowed, and denied more laxly besides", []freeze{open(deny, "finish"), shut(allow, "wait")}, true, true},
		{"where it is denied, and allowed", []freeze{open(allow, "finish"), open(deny, "wait")}, true, true},
		{"for a line that doesn't parse", []freeze{{Kind: deny, Cron: "0 0"}}, true, true},
	} {
		if v := FreezeAt(c.windows, app, noon); v.Frozen != c.frozen || v.Wait != c.wait {
			t.Errorf("%s: frozen %v, wait %v; want %v, %v", c.name, v.Frozen, v.Wait, c.frozen, c.wait)
		}
	}
}

// What a person is told is when the window that is named is over, not when some other opens or closes meanwhile.
func TestVerdictSaysWhenItsWindowEnds(t *testing.T) {
	t.Parallel()
	type freeze = deployments.Freeze
	weekend := freeze{Name: "weekend", Kind: deployments.FreezeDeny, Cron: "0 15 * * FRI", Duration: 64 * time.Hour}
	night := freeze{Name: "night", Kind: deployments.FreezeDeny, Cron: "0 22 * * *", Duration: 8 * time.Hour}
	hours := freeze{Name: "office hours", Kind: deployments.FreezeAllow, Cron: "0 9 * * MON-FRI", Duration: 8 * time.Hour}
	always := freeze{Name: "always", Kind: deployments.FreezeDeny, Cron: "0 0 * * *", Duration: 24 * time.Hour}
	forever := freeze{Name: "forever", Kind: deployments.FreezeDeny, Cron: "0 * * * *", Duration: time.Hour}
	same := freeze{Name: "same", Kind: deployments.FreezeDeny, Cron: "0 21 * * *", Duration: 9 * time.Hour}
	late := freeze{Name: "late", Kind: deployments.FreezeAllow, Cron: "0 18 * * *", Duration: time.Hour}
	for _, c := range []struct {
		windows []freeze
		now     time.Time
		want    string
	}{
		{[]freeze{night, weekend, hours}, time.Date(2026, 11, 27, 16, 0, 0, 0, time.UTC), "frozen by weekend until 2026-11-30 07:00Z"},
		{[]freeze{night, weekend, hours}, time.Date(2026, 11, 28, 23, 0, 0, 0, time.UTC),
			"frozen by weekend until 2026-11-30 07:00Z"},
		{[]freeze{weekend, night, hours}, time.Date(2026, 11, 28, 23, 0, 0, 0, time.UTC),
			"frozen by weekend until 2026-11-30 07:00Z"},
		{[]freeze{weekend, night, hours}, time.Date(2026, 11, 30, 5, 0, 0, 0, time.UTC),
			"frozen by weekend until 2026-11-30 07:00Z"},
		{[]freeze{weekend, night, hours}, time.Date(2026, 11, 29, 23, 0, 0, 0, time.UTC),
			"frozen by weekend until 2026-11-30 07:00Z"},
		{[]freeze{night, weekend, always, forever, hours}, time.Date(2026, 11, 28, 23, 0, 0, 0, time.UTC),
			"frozen by always"},
		{[]freeze{forever, always, night}, time.Date(2026, 11, 28, 23, 0, 0, 0, time.UTC), "frozen by forever"},
		{[]freeze{night, same}, time.Date(2026, 11, 24, 23, 0, 0, 0, time.UTC), "frozen by night until 2026-11-25 06:00Z"},
		{[]freeze{hours, late, night}, time.Date(2026, 11, 24, 17, 30, 0, 0, time.UTC), "frozen by office hours, which is not open until 2026-11-24 18:00Z"},
	} {
		if got := frozenBy(FreezeAt(c.windows, app, c.now)); got != c.want {
			t.Errorf("at %v: %s, want %s", c.now, got, c.want)
		}
	}
}

// The end of a window without gaps isn't known, and the reason doesn't change from day to day: each change of it would
// rewrite the record of each frozen unit.
func TestFrozenByAWindowWithoutGaps(t *testing.T) {
	t.Parallel()
	for _, w := range []deployments.Freeze{
		{Name: "always", Kind: deployments.FreezeDeny, Cron: "0 0 * * *", Duration: 24 * time.Hour},
		{Name: "always", Kind: deployments.FreezeDeny, Cron: "* * * * *", Duration: time.Hour},
	} {
		for days := range 3 {
			now := noon.AddDate(0, 0, days)
			v := FreezeAt([]deployments.Freeze{w}, app, now)
			if got := frozenBy(v); got != "frozen by always" || !v.WindowEnds.IsZero() || !v.ChangesAt.After(now) {
				t.Errorf("%s, on day %d: %s; it ends at %v, and changes at %v", w.Cron, days, got, v.WindowEnds, v.ChangesAt)
			}
		}
	}
}

func TestVerdictInWords(t *testing.T) {
	t.Parallel()
	for want, v := range map[string]FreezeState{
		"frozen by 30 February, which is not open, and never opens": FreezeAt([]deployments.Freeze{
			{Name: "30 February", Kind: deployments.FreezeAllow, Cron: "0 9 30 2 *", Duration: time.Hour}}, app, noon),
		"frozen by xmas until 2026-11-24 12:00Z (nobody is there)": {Frozen: true, By: "xmas", WindowEnds: noon,
			Reason: "nobody is there"},
	} {
		if got := frozenBy(v); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A page that shows what is to come shows each time that a window is open once, whatever the clocks do.
func TestOpenings(t *testing.T) {
	t.Parallel()
	berlin := zone(t, "Europe/Berlin")
	type freeze = deployments.Freeze
	const deny = deployments.FreezeDeny
	for _, c := range []struct {
		name   string
		window freeze
		from   string
		most   int
		want   string
	}{
		{"a weekend to come", freeze{Kind: deny, Cron: "0 16 * * FRI", Zone: berlin, Duration: 64 * time.Hour},
			"2026-11-24T12:00:00Z", 9,
			"27T15-30T07"},
		{"that is open, and the next", freeze{Kind: deny, Cron: "0 16 * * FRI", Zone: berlin, Duration: 64 * time.Hour},
			"2026-11-27T16:00:00Z", 9, "now-30T07 04T15-07T07"},
		{"as it opens", freeze{Kind: deny, Cron: "0 16 * * FRI", Duration: time.Hour}, "2026-11-27T16:00:00Z", 1,
			"now-27T17"},
		{"as it closes", freeze{Kind: deny, Cron: "0 16 * * FRI", Duration: time.Hour}, "2026-11-27T17:00:00Z", 9,
			"04T16-04T17"},
		{"no more than asked for", freeze{Kind: deny, Cron: "0 * * * *", Duration: time.Minute}, "2026-11-24T12:30:00Z", 3,
			"24T13-24T13 24T14-24T14 24T15-24T15"},
		{"two that touch are one", freeze{Kind: deny, Cron: "0 12,13 * * FRI", Duration: time.Hour},
			"2026-11-24T12:00:00Z", 9, "27T12-27T14"},
		{"clocks put back", freeze{Kind: deny, Cron: "30 2 * * SUN", Zone: berlin, Duration: time.Hour},
			"2026-10-24T00:00:00Z", 1, "25T00-25T01"},
		{"it overlaps for ever: as far as is looked", freeze{Kind: deny, Cron: "0 * * * *", Duration: 2 * time.Hour},
			"2026-11-24T12:00:00Z", 1, "now-?"},
		{"it begins to overlap for ever", freeze{Kind: deny, Cron: "* * 27-31 * *", Duration: time.Hour},
			"2026-11-24T12:00:00Z", 9, "27T00-01T00"},
		{"it begins to, for longer than is looked", freeze{Kind: deny, Cron: "* * 1-20 * *", Duration: time.Hour},
			"2026-11-24T12:00:00Z", 9, "01T00-?"},
		{"none within the week", freeze{Kind: deny, Cron: "0 0 24 12 *", Duration: 72 * time.Hour},
			"2026-11-24T12:00:00Z", 9, ""},
		{"a line that doesn't parse", freeze{Kind: deny, Cron: "0 0"}, "2026-11-24T12:00:00Z", 9, ""},
	} {
		from, err := time.Parse(time.RFC3339, c.from)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, o := range Openings(c.window, from, from.AddDate(0, 0, 10), c.most) {
			begins := "now"
			if !o.From.IsZero() {
				begins = o.From.UTC().Format("02T15")
			}
			ends := "?"
			if !o.To.IsZero() {
				ends = o.To.UTC().Format("02T15")
			}
			got = append(got, begins+"-"+ends)
		}
		if text := strings.Join(got, " "); text != c.want {
			t.Errorf("%s: %q, want %q", c.name, text, c.want)
		}
	}
}

func TestNextFreeze(t *testing.T) {
	t.Parallel()
	type freeze = deployments.Freeze
	weekend := freeze{Name: "weekend", Kind: deployments.FreezeDeny, Cron: "0 16 * * FRI", Duration: 64 * time.Hour}
	hours := freeze{Name: "hours", Kind: deployments.FreezeAllow, Cron: "0 9 * * *", Duration: 8 * time.Hour}
	shift := freeze{Name: "shift", Kind: deployments.FreezeAllow, Cron: "0 16 * * *", Duration: 8 * time.Hour}
	db := freeze{Name: "db", Kind: deployments.FreezeDeny, Cron: "0 14 * * *", Duration: time.Hour,
		Units: []string{"*/db/*"}}
	tuesday := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name    string
		windows []freeze
		days    int
		at, by  string
	}{
		{"none", nil, 7, "", ""},
		{"a window to come", []freeze{weekend}, 7, "27T16", "weekend"},
		{"too far off", []freeze{weekend}, 3, "", ""},
		{"the end of what allows it", []freeze{weekend, hours}, 7, "24T17", "hours, which is not open"},
		{"another allows it still", []freeze{weekend, hours, shift}, 7, "25T00", "hours, which is not open"},
		{"one that is not for it", []freeze{db, weekend}, 7, "27T16", "weekend"},
		{"now", []freeze{shift}, 7, "24T12", "shift, which is not open"},
	} {
		at, v := NextFreeze(c.windows, app, tuesday, tuesday.AddDate(0, 0, c.days))
		text := ""
		if !at.IsZero() {
			text = at.UTC().Format("02T15")
		}
		if text != c.at || v.By != c.by {
			t.Errorf("%s: %q by %q, want %q by %q", c.name, text, v.By, c.at, c.by)
		}
	}
}
