package policy

import (
	"testing"
	"time"

	"kedge/deployments"
)

func TestRebuild(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 27, 3, 0, 0, 0, time.UTC)
	on := func(version string, generation int64, failed ...string) Node {
		r := deployments.UnitReport{State: deployments.StateConverged, Running: release(version), Generation: generation}
		for _, f := range failed {
			r.Quarantined = append(r.Quarantined, release(f).Digest)
		}
		return Node{Report: r}
	}
	held := on("1", 2)
	held.Report.Reason, held.Report.Facts = deployments.ReasonOldGeneration, deployments.Facts{"acted_on": "9", "generation": "2"}
	nothing := Node{Report: deployments.UnitReport{Generation: 40}}
	for _, c := range []struct {
		name           string
		known          int64
		nodes          []Node
		lost           bool
		target, stable string
		generation     int64
		phase          deployments.Phase
	}{
		{"nobody runs anything", 0, []Node{nothing}, false, "", "", 0, ""},
		{"all is known", 5, []Node{on("2", 5), on("2", 4)}, false, "", "", 0, ""},
		{"a node that lies", 5, []Node{on("2", 5), on("2", 5), on("9", 90)}, false, "", "", 0, ""},
		{"all run what Git says", 0, []Node{on("2", 7), on("2", 8), nothing}, true, "2", "2", 40, ""},
		{"it failed", 0, []Node{on("1", 7, "2"), on("1", 7)}, true, "2", "1", 7, deployments.PhaseRollingBack},
		{"it was never tried", 0, []Node{on("1", 7), on("1", 7)}, true, "1", "1", 7, ""},
		{"it was on its way", 0, []Node{on("1", 7), on("2", 7), on("2", 7)}, true, "1", "1", 7, ""},
		{"an older snapshot, which nodes hold back", 2, []Node{held, held}, true, "1", "1", 9, ""},
		{"what else they run failed", 0, []Node{on("1", 7, "1"), on("2", 7)}, true, "2", "2", 7, ""},
	} {
		if got := IsLost(c.nodes, c.known); got != c.lost {
			t.Errorf("%s: lost %v", c.name, got)
		}
		if !c.lost {
			continue
		}
		r := Rebuild(deployments.Unit{Release: release("2")}, "c", c.nodes, c.known, now)
		phase := deployments.Phase("")
		if r.Rollout != nil {
			phase = r.Rollout.Phase
		}
		if r.Target != release(c.target) || r.Stable != release(c.stable) || r.Generation != c.generation || phase != c.phase {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
}
