package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

// All agents are cut off from Consul in mid-rollout until they count as gone. That is no end of the rollout: who comes
// back, in any order, comes back to its turn.
func TestAgentsCutOffInMidRollout(t *testing.T) {
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3", "web-4"}
	s := &service{world: newWorldOn(t, kvtest.ConsulOptions{ACL: true, Clients: nodes}), nodes: nodes}
	s.begin()
	wires := map[string]*wire{}
	for _, node := range nodes {
		wires[node] = newWire(t, strings.TrimPrefix(s.client(node).Addr, "http://"))
		s.startAgentWith(node, []string{"CONSUL_HTTP_ADDR=http://" + wires[node].addr})
	}
	const rollout = "canary: 1, bake: 200ms, max_unavailable: 1"
	s.first(rollout)

	one := s.version("1", "sleep 0.7")
	s.deploy(one, rollout)
	canary := s.begun("1")
	for _, w := range wires {
		w.set(wireSilent)
	}
	s.held(false, nodes...)
	r := s.record("the rollout has not ended", func(r deployments.Record) string {
		if r.Target != one || r.Rollout == nil {
			return "it has"
		}
		return ""
	})
	if n := s.tries("1"); n != 1 {
		t.Errorf("%d nodes began before the canary had baked, in phase %s", n, r.Rollout.Phase)
	}
	others := slices.DeleteFunc(slices.Clone(nodes), func(node string) bool { return node == canary })
	for _, node := range others {
		wires[node].set(wireWhole)
	}
	s.held(true, others...)
	wires[canary].set(wireWhole)
	s.stable(one)
	s.live("app", "1", nodes...)
	s.keeps(1)
}

// held waits until nodes count as there, or as gone.
func (w *world) held(there bool, nodes ...string) {
	w.t.Helper()
	for _, node := range nodes {
		w.eventually(fmt.Sprintf("it shows of %s whether it is there: %v", node, there), func() error {
			e, err := w.store.Get(w.t.Context(), kv.StatusKey("prod", "web", node))
			if err == nil && (e.Session != "") != there {
				err = errors.New("not yet")
			}
			return err
		})
	}
}
