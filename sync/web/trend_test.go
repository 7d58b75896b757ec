package web

import (
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// Units that were removed leave their places to new ones, also while there are more units than have
// a trend.
func TestTrendsOfRemovedUnitsMakeRoom(t *testing.T) {
	t.Parallel()
	unitNamed := func(i int) *unit {
		return &unit{Unit: &fleet.Unit{ID: app.RoleID().Unit(fmt.Sprintf("app-%d", i))}}
	}
	var units []*unit
	for i := range maxTrends + 10 {
		units = append(units, unitNamed(i))
	}
	all := &trends{units: map[deployments.UnitID][]sample{}}
	all.record(units, time.Now())

	units = append(units[1:], unitNamed(maxTrends+10))
	all.record(units, time.Now())
	if got := len(all.of(app.RoleID().Unit("app-0"))); got > 0 {
		t.Errorf("a removed unit has %d samples", got)
	}
	if got := len(all.of(units[maxTrends-1].ID)); got != 1 || len(all.units) != maxTrends {
		t.Errorf("the next unit has %d samples, want 1; %d units have some, want %d", got, len(all.units), maxTrends)
	}
}
