package main

import (
	"os"
	"strings"
	"testing"

	"kedge/deployments"
)

// Consul is put back to what it was two releases ago, and another mirror leads since: its older record moves no node,
// each says that it is held, and Git's release counts again as soon as a mirror has written.
func TestOlderSnapshotIsRestored(t *testing.T) {
	t.Parallel()
	s := newService(t, "web-1", "web-2", "web-3")
	s.token("operator", deployments.RuleVars{}) // what was made after the snapshot is gone
	const rollout = "canary: 1, bake: 100ms, max_unavailable: 1"
	s.first(rollout)
	snapshot := s.consul.Snapshot()
	one, two, three := s.version("1", ":"), s.version("2", ":"), s.version("3", ":")
	s.deploy(one, rollout)
	s.stable(one)
	s.processes["mirror-1"].kill()
	s.startMirror("mirror-2")
	s.deploy(two, rollout)
	s.stable(two)
	was := s.record("its record", func(deployments.Record) string { return "" })
	s.keeps(1)
	if err := os.Truncate(s.log, 0); err != nil {
		t.Fatal(err)
	}

	s.consul.Restore(snapshot)
	for _, node := range s.nodes {
		s.reported(node, "app", func(u deployments.UnitReport) string {
			if u.Reason != deployments.ReasonOldGeneration || u.Running != two || u.Generation != was.Generation {
				return "it doesn't say that the record is an older one"
			}
			return ""
		})
	}
	if text, _, _ := s.kedge("status"); !strings.Contains(text, "it waits for a mirror") {
		t.Errorf("status doesn't say that nodes are held:\n%s", text)
	}
	s.record("Git's release", func(r deployments.Record) string {
		if r.Target != two || r.Generation <= was.Generation {
			return "it is not of it"
		}
		return ""
	})
	s.stable(two)
	if lines := strings.Join(s.lines(), "\n"); lines != "" {
		t.Errorf("nodes switched:\n%s", lines)
	}

	s.deploy(three, rollout)
	s.stable(three)
	s.keeps(1)
}
