package policy

import (
	"testing"
	"time"

	"github.com/robfig/cron/v3"

	"kedge/deployments"
)

// countedSchedule counts the starts that are computed.
type countedSchedule struct {
	cron.Schedule
	starts *int
}

func (s countedSchedule) Next(t time.Time) time.Time {
	*s.starts++
	return s.Schedule.Next(t)
}

// A window without gaps costs little: the mirror evaluates all windows in each round.
func TestWindowWithoutGapsIsFollowedOnlySoFar(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		cron     string
		duration time.Duration
		enough   time.Duration
		most     int
		least    time.Duration // from noon to the end that is found
		goesOn   bool
	}{
		{"0 0 * * *", 24 * time.Hour, enoughTime, 401, 365 * 24 * time.Hour, true},
		{"0 0 * * *", 24 * time.Hour, enoughForPages, 401, 365 * 24 * time.Hour, true},
		{"0 0 * * *", 240 * time.Hour, enoughTime, 401, 365 * 24 * time.Hour, true},
		{"0 0 1 * *", 31 * 24 * time.Hour, enoughTime, 401, 365 * 24 * time.Hour, true},
		{"0 * * * *", time.Hour, enoughTime, 401, enoughTime, true},
		{"*/15 * * * *", 64 * time.Hour, enoughTime, 401, enoughTime, true},
		{"* * * * *", time.Hour, enoughTime, 3300, enoughTime, true},
		{"* * * * *", 8760 * time.Hour, enoughTime, 3300, enoughTime, true},
		{"* * * * *", time.Minute, enoughForPages, 11900, enoughForPages, true},
		// These have gaps, and their ends are found.
		{"0 * * * MON-FRI", time.Hour, enoughTime, 100, 84 * time.Hour, false},
		{"* * * * TUE,WED", time.Minute, enoughTime, 2600, 36 * time.Hour, false},
		{"* * * * MON-FRI", time.Minute, enoughForPages, 5400, 84 * time.Hour, false},
		{"0 0 * 1,2,3,4,5,11,12 *", 24 * time.Hour, enoughTime, 200, 180 * 24 * time.Hour, false},
	} {
		w := deployments.Freeze{Kind: deployments.FreezeDeny, Cron: c.cron, Duration: c.duration}
		schedule, err := scheduleOf(w)
		if err != nil {
			t.Fatal(err)
		}
		starts := 0
		ends, _, goesOn := span(countedSchedule{schedule, &starts}, w, noon, c.enough)
		if starts > c.most || ends.Before(noon.Add(c.least)) || goesOn != c.goesOn {
			t.Errorf("%q for %v: %d starts computed, want at most %d; it ends at %v, want %v from noon, or later; "+
				"it goes on: %v, want %v", c.cron, c.duration, starts, c.most, ends, c.least, goesOn, c.goesOn)
		}
	}
}

// What Freezes say of many units is what FreezeAt says of each.
func TestFreezesOfManyUnits(t *testing.T) {
	t.Parallel()
	type freeze = deployments.Freeze
	windows := []freeze{
		{Name: "weekend", Kind: deployments.FreezeDeny, Cron: "0 16 * * FRI", Duration: 64 * time.Hour},
		{Name: "db", Kind: deployments.FreezeDeny, Cron: "0 9 * * *", Duration: 5 * time.Hour, Units: []string{"*/db/*"}},
		{Name: "hours", Kind: deployments.FreezeAllow, Cron: "0 13 * * *", Duration: 8 * time.Hour,
			Units: []string{"prod/*/*"}},
		{Name: "typo", Kind: deployments.FreezeDeny, Cron: "0 0", Units: []string{"*/*/odd"}},
	}
	freezes := FreezesAt(windows, noon)
	for text, by := range map[string]string{
		"prod/web/app": "hours, which is not open", "prod/db/app": "db", "staging/web/app": "", "staging/web/odd": "typo",
	} {
		id, err := deployments.ParseUnitID(text)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := freezes.Of(id), FreezeAt(windows, id, noon); got != want || got.By != by {
			t.Errorf("%s: %+v, want %+v by %q", text, got, want, by)
		}
	}
}
