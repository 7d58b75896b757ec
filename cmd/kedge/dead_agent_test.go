package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

// An agent that was killed, and that nobody starts again, on a node whose Consul agent lives: it is seen to be gone,
// and the next release is neither stopped nor taken back for it.
func TestDeadAgentOnALivingNode(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and S3, and takes a minute")
	}
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3"}
	w := newWorld(t, nodes...)
	w.startMirror("mirror-1")
	for _, node := range nodes {
		w.startAgent(node)
	}
	release := func(version string) deployments.Pointer {
		p := w.publish("app", version)
		file := fmt.Sprintf("release: %s\nrollout: {max_unavailable: 1, max_failures: 0, deadline: 20s}\n", p)
		w.push("release "+version, map[string]*string{webApp.String(): &file})
		return p
	}
	release("1")
	w.live("app", "1", nodes...)
	for _, node := range nodes {
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged {
				return "it has not converged"
			}
			return ""
		})
	}

	w.processes["web-3"].kill()
	w.eventually("the dead agent is seen to be gone", func() error {
		e, err := w.store.Get(t.Context(), kv.StatusKey("prod", "web", "web-3"))
		if err == nil && e.Session != "" {
			err = errors.New("its entry is held still")
		}
		return err
	})
	out, errs, _ := w.kedge("status", "--json")
	var f fleet.Fleet
	if err := json.Unmarshal([]byte(out), &f); err != nil || len(f.Units) != 1 || f.Units[0].Gone != 1 || f.Units[0].Live != 2 {
		t.Errorf("status: %v, %s%s", err, out, errs)
	}

	two := release("2")
	w.live("app", "2", "web-1", "web-2")
	w.eventually("the rollout ends without it", func() error {
		e, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
		if err != nil {
			return err
		}
		r, err := deployments.ParseRecord(e.Value)
		if err == nil && (r.Rollout != nil || r.Stable != two) {
			err = fmt.Errorf("the record is %s", e.Value)
		}
		return err
	})
	w.startAgent("web-3")
	w.live("app", "2", "web-3")
}
