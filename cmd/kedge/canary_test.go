package main

import (
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// Who pushes a fix while a canary bakes, as it is bad, expects the fix there first. A bare pointer that somebody writes
// over the record meanwhile is put back before any node follows it.
func TestFixGoesToTheCanaryFirst(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	const bakes, goes = "canary: 1, bake: 1h, max_unavailable: 1", "canary: 1, bake: 200ms, max_unavailable: 1"
	zero := s.first(bakes)
	one, two := s.version("1", ":"), s.version("2", ":")
	s.deploy(one, bakes)
	canary := s.begun("1")
	s.record("the bake", func(r deployments.Record) string {
		if r.Rollout == nil || r.Rollout.Reason != deployments.ReasonBaking {
			return "it doesn't bake"
		}
		return ""
	})

	byHand := s.version("by-hand", ":")
	if err := s.store.Commit(t.Context(), nil, kv.Put(kv.DesiredKey(webApp), []byte(byHand.String()))); err != nil {
		t.Fatal(err)
	}
	s.record("the record, put back", func(r deployments.Record) string {
		if r.Target != one || r.Stable != zero || r.Rollout == nil {
			return "it is not"
		}
		return ""
	})

	s.deploy(two, goes)
	if node := s.begun("2"); node != canary {
		t.Errorf("the fix goes to %s first, the canary is %s", node, canary)
	}
	s.stable(two)
	s.keeps(1)
	if lines := strings.Join(s.lines(), "\n"); strings.Contains(lines, "by-hand") || strings.Count(lines, "begin") != 4 {
		t.Errorf("the commands ran as\n%s", lines)
	}
}
