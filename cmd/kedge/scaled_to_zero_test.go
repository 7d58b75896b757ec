package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// A release that is pushed while a role has no live node waits: it would else bake on nobody, become stable, and all
// nodes that boot later would take it at once. When nodes come, one of them new, it goes on with its canary.
func TestReleaseForAStageScaledToZero(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	const rollout = "canary: 1, bake: 1s, max_unavailable: 1"
	zero := s.first(rollout)
	for _, node := range s.nodes {
		if err := s.processes[node].stop(); err != nil {
			t.Fatalf("%s: %v", node, err)
		}
		s.eventually(node+" has left", func() error {
			if _, err := s.store.Get(t.Context(), kv.StatusKey("prod", "web", node)); !errors.Is(err, kv.ErrNotFound) {
				return errors.Join(errors.New("its status is there"), err)
			}
			return nil
		})
	}

	one := s.version("1", "sleep 0.3")
	s.deploy(one, rollout)
	waits := func(r deployments.Record) string {
		if r.Target != one || r.Stable != zero || r.Rollout == nil || r.Rollout.Reason != deployments.ReasonNoLiveNodes {
			return "it doesn't wait for nodes"
		}
		return ""
	}
	s.record("the rollout without nodes", waits)
	s.push("another commit", nil) // after which it has been looked at again
	s.record("the rollout without nodes, later", waits)

	if err := os.RemoveAll(filepath.Join(s.dir, "web-3")); err != nil { // as of an instance that boots
		t.Fatal(err)
	}
	for _, node := range s.nodes {
		s.startAgent(node)
	}
	s.stable(one)
	s.keeps(1)
}
