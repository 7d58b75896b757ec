package agent

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

// A node that observes says how dest stands to what it should run, follows what it should run, and touches nothing.
// Once it doesn't any more it adopts what is the release's already, and deploys the rest.
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

	a := w.start(func(c *Config) { c.Observe = true })
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
