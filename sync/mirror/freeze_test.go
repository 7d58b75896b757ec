package mirror

import (
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
)

// A round evaluates each freeze window once, however many units there are: with a window without gaps, an evaluation
// takes milliseconds. To parse a cron line takes memory, so the allocations tell how often that happens.
func TestRoundEvaluatesEachFreezeWindowOnce(t *testing.T) {
	var freeze []deployments.Freeze
	for range 20 { // closed ones, so that they don't change what is written
		freeze = append(freeze, deployments.Freeze{Kind: deployments.FreezeDeny, Cron: "0 0 29 2 *", Duration: time.Hour})
	}
	round := func(units int, freeze []deployments.Freeze) float64 {
		all := tree()
		for i := range units {
			u := unit(t, fmt.Sprintf("prod/web/app%d", i), "1")
			u.Rollout = &deployments.Rollout{MaxUnavailable: deployments.Amount{N: 1}}
			all.Units = append(all.Units, u)
		}
		all.Settings.Freeze = freeze
		in := inputs{commit: commitOf(all), now: time.Unix(1e9, 0), cells: map[deployments.UnitID]cell{},
			own: map[deployments.UnitID]writtenRecord{}}
		return testing.AllocsPerRun(1, func() { reconcile(in) })
	}
	one, many := round(1, freeze)-round(1, nil), round(40, freeze)-round(40, nil)
	if one < float64(len(freeze)) || many > 2*one {
		t.Errorf("the windows take %v allocations for one unit, and %v for 40", one, many)
	}
}
