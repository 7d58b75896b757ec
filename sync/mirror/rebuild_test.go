package mirror

import (
	"errors"
	"fmt"
	"testing"

	"kedge/deployments"
	"kedge/kv/kvtest"
	"kedge/sync/git/gittest"
)

// Removing all of kedge's keys from Consul moves no node, and what had failed stays out.
func TestConsulEmptiedUnderAFleet(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	o := gittest.New(t)
	m := start(t, Config{Store: consul.Open(""), Repo: o.Bare})
	m.at(o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual}))
	h := newHerd(t, m, 4)
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
