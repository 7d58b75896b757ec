package main

import (
	"fmt"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// Each order, given by the consul program itself, as at 3 a.m.; and one that is none.
func TestOrdersByConsulItself(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1", "web-2")
	m := w.startMirror("mirror")
	for _, node := range []string{"web-1", "web-2"} {
		w.startAgent(node)
	}
	push := func(p deployments.Pointer) {
		content := fmt.Sprintf("release: %s\nrollout:\n  canary: 1\n  max_unavailable: 1\n  approval: manual\n", p)
		w.push("app", map[string]*string{webApp.String(): &content})
	}
	order := func(verb string) {
		w.consul.CLI(w.token("operator", deployments.RuleVars{}), "", "kv", "put", "kedge/"+kv.ControlKey(webApp), verb)
	}
	phase := func(target deployments.Pointer, want deployments.Phase) {
		t.Helper()
		w.eventually(fmt.Sprintf("the rollout of %s is %q", target.URL, want), func() error {
			e, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
			if err != nil {
				return err
			}
			r, err := deployments.ParseRecord(e.Value)
			if err != nil {
				return err
			}
			var now deployments.Phase
			if r.Rollout != nil {
				now = r.Rollout.Phase
			}
			if r.Target != target || now != want {
				return fmt.Errorf("it is %s %q", r.Target.URL, now)
			}
			return nil
		})
	}
	taken := func() {
		t.Helper()
		w.eventually("the order is taken away", func() error {
			if e, err := w.store.Get(t.Context(), kv.ControlKey(webApp)); err == nil {
				return fmt.Errorf("it is %s", e.Value)
			}
			return nil
		})
	}
	one, two, three := w.publish("app", "1"), w.publish("app", "2"), w.publish("app", "3")
	push(one)
	w.live("app", "1", "web-1", "web-2")

	push(two)
	phase(two, deployments.PhasePendingApproval)
	order("prmote") // changes nothing, and says where it is wrong
	w.eventually("the mirror says what it can't obey", func() error {
		if !strings.Contains(m.logged(), "want promote, pause, resume, abort or retry") {
			return fmt.Errorf("its log does not")
		}
		return nil
	})
	phase(two, deployments.PhasePendingApproval)
	order("pause")
	phase(two, deployments.PhasePaused)
	order("resume")
	phase(two, deployments.PhasePendingApproval)
	taken()
	order("promote")
	w.live("app", "2", "web-1", "web-2")
	phase(two, "")

	push(three)
	phase(three, deployments.PhasePendingApproval)
	order("abort")
	phase(three, deployments.PhaseRolledBack)
	w.live("app", "2", "web-1", "web-2")
	order("retry")
	phase(three, deployments.PhasePendingApproval)
	order("promote")
	w.live("app", "3", "web-1", "web-2")
	phase(three, "")
	taken()
}
