package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// A node that observes reports how dest compares to what it should run, follows that, and changes nothing. When it
// stops observing, it adopts what equals the release, and deploys the rest.
func TestObserveThenAdopt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	other := deployments.UnitID{Stage: "prod", Role: "web", Unit: "other"}
	mark := func(unit string) func(*deployments.Manifest) {
		return func(m *deployments.Manifest) {
			post("echo " + unit + " >> " + w.path("hooks"))(m)
			m.Health.Checks = nil
		}
	}
	one := w.publishTree("app", "1", nil, mark("app"))
	two := w.publishTree("app", "2", nil, mark("app"))
	others := w.publishTree("other", "1", nil, mark("other"))
	for _, unit := range []string{"app", "other"} { // as something else has left it
		write(t, w.path("srv", unit, "VERSION"), "1")
	}
	write(t, w.path("srv", "other", "extra"), "x")
	w.desire(app, deployments.Record{Target: two, Generation: 1, Commit: "c1", Adopt: true})
	w.desire(other, deployments.Record{Target: others, Generation: 1, Commit: "c1", Adopt: true})

	a := w.start(func(c *Config) { c.Observe = []string{"*/*/*"} })
	observed := func(differs int) func(deployments.UnitReport) bool {
		return func(u deployments.UnitReport) bool {
			return u.State == deployments.StateHeld && u.Reason == deployments.ReasonObserving && u.Compared != nil && u.Compared.Differs == differs
		}
	}
	a.awaitUnit(app, "observed to differ", observed(1))
	a.awaitUnit(other, "observed to differ", observed(1))
	w.desire(app, deployments.Record{Target: one, Generation: 2, Commit: "c2", Adopt: true})
	a.awaitUnit(app, "observed to be the same", observed(0))
	if err := os.Remove(w.path("srv", "other", "extra")); err != nil { // somebody else changes dest
		t.Fatal(err)
	}
	a.awaitUnit(other, "observed to be the same", observed(0))
	write(t, w.path("srv", "other", "extra"), "x")
	w.put(kv.PinKey(app), "s3://nowhere@sha256:zz")
	<-a.Idle()
	if r := a.Report()["web"]; r.Ready {
		t.Error("it is ready, though nothing of kedge's serves")
	}
	a.stop()
	entries, err := os.ReadDir(w.path("srv"))
	if err != nil || len(entries) != 2 {
		t.Errorf("beside the dests lie %v, %v", entries, err)
	}
	if _, err := os.Stat(w.path("hooks")); err == nil {
		t.Error("commands ran")
	}
	w.delete(kv.PinKey(app))

	a = w.start()
	if u := a.awaitState(app, deployments.StateConverged); u.Compared == nil || !u.Compared.Adopted || u.Running != one {
		t.Errorf("%+v", u)
	}
	if u := a.awaitState(other, deployments.StateConverged); u.Compared == nil || u.Compared.Adopted || u.Compared.Differs != 1 {
		t.Errorf("%+v", u)
	}
	if data, err := os.ReadFile(w.path("hooks")); err != nil || string(data) != "other\n" {
		t.Errorf("commands that ran: %q, %v", data, err)
	}
	if _, err := os.Stat(filepath.Join(w.path("srv", "other"), "extra")); err == nil {
		t.Error("what is not the release's is still there")
	}
}

// A node that observes one unit changes nothing of it, and deploys the others. A unit that comes after the observed
// one waits until what another tool deploys there is its release.
func TestObserveOneUnit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base, tool := app.RoleID().Unit("base"), app.RoleID().Unit("tool")
	releases := map[deployments.UnitID]deployments.Pointer{}
	for _, id := range []deployments.UnitID{base, app, tool} {
		releases[id] = w.publishTree(id.Unit, "1", nil, func(m *deployments.Manifest) {
			post("echo " + id.Unit + " >> " + w.path("hooks"))(m)
			m.Health.Checks = nil
		})
		r := deployments.Record{Target: releases[id], Generation: 1, Commit: "c1"}
		if id == app {
			r.After = []string{base.Unit}
		}
		w.desire(id, r)
	}
	write(t, w.path("srv", "base", "VERSION"), "0")

	a := w.start(func(c *Config) { c.Observe = []string{"*/web/base"} })
	a.awaitUnit(base, "observed to differ", func(u deployments.UnitReport) bool {
		return u.Reason == deployments.ReasonObserving && u.Compared != nil && u.Compared.Differs == 1
	})
	a.awaitState(tool, deployments.StateConverged)
	a.awaitUnit(app, "waiting for base", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateWaiting && strings.Contains(u.Message, "base, which is only observed here")
	})
	write(t, w.path("srv", "base", "VERSION"), "1") // somebody else deploys it
	a.awaitState(app, deployments.StateConverged)
	if r := a.Report()["web"]; r.Ready {
		t.Error("the node is ready, though nothing of base is known to serve")
	}
	a.stop()
	if data, err := os.ReadFile(w.path("hooks")); err != nil || string(data) != "tool\napp\n" {
		t.Errorf("commands that ran: %q, %v", data, err)
	}
}
