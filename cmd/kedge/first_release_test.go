package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
)

// The first release that kedge makes of a unit comes to nodes where something else serves, a tree or the target of a
// link: a bad one stops at its canary, which goes back to what was there; one that fails later is left by the canary,
// which ran it well, for what was there; a good one bakes on one node, and then goes by the budget. It makes no
// difference that the agents come after the push.
func TestFirstReleaseWhereSomethingElseServes(t *testing.T) {
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3"}
	w := newWorld(t, nodes...)
	w.startMirror("mirror")
	for i, node := range nodes { // as Capistrano or stretcher have left it
		dest := filepath.Join(w.srv(node), "app")
		tree := dest
		if i > 0 {
			tree = filepath.Join(w.srv(node), "capistrano", "20261101")
		}
		writeTree(t, tree, "before")
		if i > 0 {
			if err := os.Symlink("capistrano/20261101", dest); err != nil {
				t.Fatal(err)
			}
		}
	}
	began := filepath.Join(w.dir, "began")
	bad := w.publish("app", "bad", func(o *artifact.PublishOptions) {
		o.Manifest.Commands.Post = []deployments.Command{{Run: "echo $KEDGE_NODE >> " + began + "; exit 1"}}
	})
	unit := func(p deployments.Pointer, bake string) map[string]*string {
		text := "release: " + p.String() + "\nrollout:\n  canary: 1\n  bake: " + bake + "\n  max_unavailable: 1\n"
		return map[string]*string{webApp.String(): &text}
	}
	w.push("a bad first release", unit(bad, "2s"))
	w.eventually("its record", func() error {
		_, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
		return err
	})
	for _, node := range nodes {
		w.startAgent(node)
	}
	rolledBack := func(p deployments.Pointer) {
		t.Helper()
		w.eventually("the end of its rollout", func() error {
			e, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
			if err != nil {
				return err
			}
			r, err := deployments.ParseRecord(e.Value)
			if err != nil || r.Target != p || r.Rollout == nil || r.Rollout.Phase != deployments.PhaseRolledBack {
				return errors.Join(err, errors.New(string(e.Value)))
			}
			return nil
		})
	}
	rolledBack(bad)
	if text, err := os.ReadFile(began); err != nil || strings.Count(string(text), "\n") != 1 {
		t.Errorf("it began on %q, %v, want one node", text, err)
	}
	serve := func() {
		t.Helper()
		w.live("app", "before", nodes...)
		for _, node := range nodes {
			w.reported(node, "app", func(u deployments.UnitReport) string {
				if !u.OtherServes || !u.Running.IsZero() {
					return fmt.Sprintf("other serves: %v", u.OtherServes)
				}
				return ""
			})
		}
	}
	serve()

	served := filepath.Join(w.dir, "served")
	late := w.publish("app", "late", func(o *artifact.PublishOptions) {
		run := "mkdir " + served + " && echo $KEDGE_NODE > " + served + "/by"
		o.Manifest.Commands.Post = []deployments.Command{{Run: run}}
	})
	w.push("one that fails on the second node", unit(late, "1s"))
	rolledBack(late)
	canary, err := os.ReadFile(filepath.Join(served, "by"))
	if err != nil {
		t.Fatal(err)
	}
	serve()
	w.reported(strings.TrimSpace(string(canary)), "app", func(u deployments.UnitReport) string {
		if u.Reason != deployments.ReasonRestored || u.Leavable || len(u.Quarantined) > 1 {
			return fmt.Sprintf("reason %q, leavable %v, quarantined %v", u.Reason, u.Leavable, u.Quarantined)
		}
		return ""
	})
	if text, _, code := w.kedge("status"); code != 0 || !strings.Contains(text, "rolled-back") ||
		!strings.Contains(text, "something else on 3") {
		t.Errorf("status: %d: %s", code, text)
	}

	live := func() (n int) {
		for _, node := range nodes {
			if version, err := readTree(filepath.Join(w.srv(node), "app")); err != nil {
				t.Fatal(err)
			} else if version == "good" {
				n++
			}
		}
		return n
	}
	var first time.Time
	good := w.publish("app", "good")
	commit := w.push("a good one", unit(good, "2s"))
	w.eventually("the release on all nodes", func() error {
		n := live()
		switch {
		case n == 1 && first.IsZero():
			first = time.Now()
		case n > 1 && first.IsZero(), n > 1 && time.Since(first) < time.Second:
			t.Errorf("%d nodes run it before it has baked", n)
		}
		if n < len(nodes) {
			return fmt.Errorf("%d nodes run it", n)
		}
		return nil
	})
	if _, text, code := w.kedge("wait", "--commit", commit, "--timeout", "60s"); code != 0 {
		t.Errorf("kedge wait: %d: %s", code, text)
	}
	for _, node := range nodes {
		if kept, err := filepath.Glob(filepath.Join(w.srv(node), "app.releases", "adopted-*")); err != nil || len(kept) != 1 {
			t.Errorf("%s: what was there before: %q, %v", node, kept, err)
		}
	}
}
