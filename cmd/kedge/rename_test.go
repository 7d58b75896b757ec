package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/sync/agent/statedir"
	"kedge/sync/fleet"
)

// A unit's file is renamed together with a new release of the same dest, and the commit is reverted: what Git names
// runs, on nodes that were there and on one that boots meanwhile, whether or not records are pruned; and status,
// explain and wait say the truth.
func TestRenamedUnitAndItsRevert(t *testing.T) {
	t.Parallel()
	for name, settings := range map[string]string{"prune": "prune: true\n", "no prune": "prune: false\n"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, "web-1", "web-2")
			w.startMirror("mirror")
			w.startAgent("web-1")
			unit := func(p deployments.Pointer) *string { s := "release: " + p.String() + "\n"; return &s }
			two := w.publish("app", "2")
			three := w.publish("frontend", "3", func(o *artifact.PublishOptions) { o.Manifest.Dest = "{{ must_env `SRV` }}/app" })
			w.push("release 2", map[string]*string{"kedge": &settings, "prod/web/app": unit(two)})
			w.live("app", "2", "web-1")
			if _, out, code := w.kedge("wait", "prod/web/app", "--timeout", "30s"); code != 0 {
				t.Fatalf("kedge wait: %d: %s", code, out)
			}

			commit := w.push("rename", map[string]*string{"prod/web/app": nil, "prod/web/frontend": unit(three)})
			w.live("app", "3", "web-1")
			w.runsAlone(commit, "frontend", "app", three, "web-1")
			w.startAgent("web-2")
			w.live("app", "3", "web-2")
			w.ready("web-2")
			w.runsAlone(commit, "frontend", "app", three, "web-1", "web-2")

			w.gitDo(w.work, "revert", "--no-edit", "HEAD")
			commit = w.push("as it was", nil)
			w.live("app", "2", "web-1", "web-2")
			w.runsAlone(commit, "app", "frontend", two, "web-1", "web-2")
		})
	}
}

// ready waits until a node's agent answers /ready with 200.
func (w *world) ready(node string) {
	w.t.Helper()
	socket := statedir.SocketPath(filepath.Join(w.dir, node, "state"))
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	w.eventually(node+" is ready", func() error {
		resp, err := client.Get("http://agent/ready")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, text)
		}
		return nil
	})
}

// runsAlone waits for a commit and checks what people are told then: that nodes run p as the unit that Git names,
// and that the other, where its record stays, is orphaned and stands for nothing on any node.
func (w *world) runsAlone(commit, named, other string, p deployments.Pointer, nodes ...string) {
	w.t.Helper()
	if _, out, code := w.kedge("wait", "--commit", commit, "--timeout", "60s"); code != 0 {
		w.t.Fatalf("kedge wait --commit: %d: %s", code, out)
	}
	out, text, code := w.kedge("status", "--json")
	var f fleet.Fleet
	if err := json.Unmarshal([]byte(out), &f); err != nil || code != 0 {
		w.t.Fatalf("kedge status: %v, %d: %s%s", err, code, out, text)
	}
	for _, u := range f.Units {
		switch u.ID.Unit {
		case named:
			if u.Record.Orphaned || u.Live != len(nodes) || u.Converged != len(nodes) || u.Record.Target != p {
				w.t.Errorf("%s: %+v, %d of %d converged", named, u.Record, u.Converged, u.Live)
			}
			for _, n := range u.Nodes {
				if n.Report.Running != p {
					w.t.Errorf("%s of %s runs %s", named, n.Name, n.Report.Running)
				}
			}
		case other:
			if u.Record == nil || !u.Record.Orphaned || u.Live != 0 {
				w.t.Errorf("%s: %+v, %d live nodes", other, u.Record, u.Live)
			}
			if text, _, _ := w.kedge("status"); !strings.Contains(text, "orphaned") || !strings.Contains(text, "no longer in Git") {
				w.t.Errorf("status does not say what %s is:\n%s", other, text)
			}
		}
	}
	for _, node := range nodes {
		if text, _, _ := w.kedge("explain", node+"/"+named); !strings.Contains(text, "as it should") {
			w.t.Errorf("explain:\n%s", text)
		}
	}
}
