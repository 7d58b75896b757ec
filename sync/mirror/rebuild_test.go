package mirror

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv/kvtest"
	"kedge/policy"
	"kedge/sync/git/gittest"
)

func TestRebuild(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 27, 3, 0, 0, 0, time.UTC)
	on := func(release string, generation int64, failed ...string) policy.Node {
		r := deployments.UnitReport{State: deployments.StateConverged, Running: pointer(release), Generation: generation}
		for _, f := range failed {
			r.Quarantined = append(r.Quarantined, pointer(f).Digest)
		}
		return policy.Node{Report: r}
	}
	held := on("1", 2)
	held.Report.Reason, held.Report.Facts = deployments.ReasonOldGeneration, deployments.Facts{"acted_on": "9", "generation": "2"}
	nothing := policy.Node{Report: deployments.UnitReport{Generation: 40}}
	for _, c := range []struct {
		name           string
		known          int64
		nodes          []policy.Node
		lost           bool
		target, stable string
		generation     int64
		phase          deployments.Phase
	}{
		{"nobody runs anything", 0, []policy.Node{nothing}, false, "", "", 0, ""},
		{"all is known", 5, []policy.Node{on("2", 5), on("2", 4)}, false, "", "", 0, ""},
		{"a node that lies", 5, []policy.Node{on("2", 5), on("2", 5), on("9", 90)}, false, "", "", 0, ""},
		{"all run what Git says", 0, []policy.Node{on("2", 7), on("2", 8), nothing}, true, "2", "2", 40, ""},
		{"it failed", 0, []policy.Node{on("1", 7, "2"), on("1", 7)}, true, "2", "1", 7, deployments.PhaseRollingBack},
		{"it was never tried", 0, []policy.Node{on("1", 7), on("1", 7)}, true, "1", "1", 7, ""},
		{"it was on its way", 0, []policy.Node{on("1", 7), on("2", 7), on("2", 7)}, true, "1", "1", 7, ""},
		{"an older snapshot, which nodes hold back", 2, []policy.Node{held, held}, true, "1", "1", 9, ""},
		{"what else they run failed", 0, []policy.Node{on("1", 7, "1"), on("2", 7)}, true, "2", "2", 7, ""},
	} {
		if got := isLost(c.nodes, c.known); got != c.lost {
			t.Errorf("%s: lost %v", c.name, got)
		}
		if !c.lost {
			continue
		}
		r := rebuild(deployments.Unit{Release: pointer("2")}, "c", c.nodes, c.known, now)
		phase := deployments.Phase("")
		if r.Rollout != nil {
			phase = r.Rollout.Phase
		}
		if r.Target != pointer(c.target) || r.Stable != pointer(c.stable) || r.Generation != c.generation || phase != c.phase {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
}

// Whoever removes all that kedge keeps in Consul moves no node, and what had failed stays out.
func TestConsulEmptiedUnderAFleet(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	o := gittest.New(t)
	m := start(t, Config{Store: consul.Open(""), Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	h := newHerd(t, m, 4)
	h.until(deployments.Digest{}, 4, func(r deployments.Record) bool { return r.Rollout == nil && len(h.runs) == 4 })
	empty := func(generation int64, fails deployments.Digest, ok func(deployments.Record) bool) {
		t.Helper()
		consul.CLI("", "", "kv", "delete", "-recurse", "kedge/")
		m.await("a record that goes on", func() error {
			e, err := m.store.Get(t.Context(), "desired/prod/web/app")
			if err != nil {
				return err
			}
			if r, err := deployments.ParseRecord(e.Value); err != nil || r.Generation <= generation {
				return fmt.Errorf("generation %d, %v", r.Generation, err)
			}
			return nil
		})
		if _, moved := h.until(fails, 0, ok); len(moved) != 0 {
			t.Errorf("%v moved", moved)
		}
	}
	empty(1, deployments.Digest{}, func(r deployments.Record) bool { return r.Rollout == nil && r.Target == pointer("app/1") })

	bad := pointer("app/2").Digest
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	m.runs("prod/web/app", "app/2")
	out := func(r deployments.Record) bool {
		return r.Rollout != nil && r.Rollout.Phase == deployments.PhaseRolledBack && r.Rollout.Failed == bad
	}
	r, _ := h.until(bad, 0, out)
	h.turn(bad) // each reports that it knows
	empty(r.Generation, bad, out)
	if r := m.record("prod/web/app", out); r.Stable != pointer("app/1") {
		t.Error(errors.New("it forgot what was stable"), r)
	}
}
