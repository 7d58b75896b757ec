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
// link: a bad one stops at its canary, which goes back to what was there; a good one bakes on one node, and then goes
// by the budget. It makes no difference that the agents come after the push.
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
	unit := func(p deployments.Pointer) map[string]*string {
		text := "release: " + p.String() + "\nrollout:\n  canary: 1\n  bake: 2s\n  max_unavailable: 1\n"
		return map[string]*string{webApp.String(): &text}
	}
	w.push("a bad first release", unit(bad))
	w.eventually("its record", func() error {
		_, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
		return err
	})
	for _, node := range nodes {
		w.startAgent(node)
	}
	w.eventually("the end of its rollout", func() error {
		if text, _, _ := w.kedge("status"); !strings.Contains(text, "paused") {
			return errors.New(text)
		}
		return nil
	})
	if text, err := os.ReadFile(began); err != nil || strings.Count(string(text), "\n") != 1 {
		t.Errorf("it began on %q, %v, want one node", text, err)
	}
	w.live("app", "before", nodes...)
	for _, node := range nodes {
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if !u.Serves || !u.Running.IsZero() {
				return fmt.Sprintf("serves: %v", u.Serves)
			}
			return ""
		})
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
	commit := w.push("a good one", unit(good))
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
