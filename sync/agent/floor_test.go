package agent

import (
	"context"
	"testing"
	"time"

	"kedge/deployments"
)

func signed(c *Config) {
	c.Trust = func(context.Context, deployments.Pointer, []byte) error { return nil }
}

func made(at time.Time) func(*deployments.Manifest) {
	return func(m *deployments.Manifest) { m.Created = at.UTC().Truncate(time.Second) }
}

// awaitFloor waits until a release has raised the version floor.
func (a *running) awaitFloor(id deployments.UnitID, p deployments.Pointer) {
	a.t.Helper()
	await(a.t, "the floor to be raised", func() (bool, string) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.units[id].floorRelease == p, "not yet"
	})
}

// If the agent was killed before it raised the version floor, it raises the floor before any other deployment.
func TestRaisesTheFloorBeforeItGoesOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	old, two := w.publish("app", "1", made(time.Now().Add(-2*time.Hour))), w.publish("app", "2", made(time.Now().Add(-time.Hour)))
	w.desire(app, deployments.Record{Target: two, Generation: 1})
	a := w.start() // without signers: no floor is raised, as by an agent that was killed before it could
	a.awaitRunning(app, two)
	a.stop()
	w.desire(app, deployments.Record{Target: old, Generation: 2})
	a = w.start(signed)
	u := a.awaitState(app, deployments.StateInvalid)
	if u.Reason != deployments.ReasonOlderThanFloor || u.Facts["of"] == "" || u.Running != two || w.live("app") != "2" {
		t.Errorf("%s is live, the report is %+v", w.live("app"), u)
	}
}

// A release from the future is reported as such, and doesn't lock out its successors.
func TestReleaseFromTheFuture(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.desire(app, deployments.Record{Target: w.publish("app", "far", made(time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC))), Generation: 1})
	a := w.start(signed)
	a.awaitUnit(app, "said to be from the future", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateConverged && u.Reason == deployments.ReasonCreatedAhead
	})
	next := w.publish("app", "next", made(time.Now().Add(2*time.Second)))
	w.desire(app, deployments.Record{Target: next, Generation: 2})
	if u := a.awaitRunning(app, next); u.Error != "" {
		t.Errorf("what follows it has an error: %+v", u)
	}
}

// A pin deploys no unit without a record: the known unit reports an error, and nothing runs.
func TestPinWithoutARecord(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	w.delete("desired/prod/web/app")
	a.awaitState(app, deployments.StateWaiting)
	w.put("pins/prod/web/app", two.String())
	u := a.awaitState(app, deployments.StateInvalid)
	if u.Reason != deployments.ReasonNoRecord || u.Running != one || w.live("app") != "1" {
		t.Errorf("%s is live, the report is %+v", w.live("app"), u)
	}
	w.desire(app, deployments.Record{Target: one, Generation: 2})
	a.awaitRunning(app, two)
}

// A unit's files count while its state is being opened: a pin that is seen then isn't one of a unit that nobody knows.
func TestUnitThatOpensIsKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.desire(app, deployments.Record{Target: w.publish("app", "1"), Generation: 1})
	a := w.start()
	a.awaitState(app, deployments.StateConverged)
	a.stop()
	again, err := New(w.config())
	if err != nil {
		t.Fatal(err)
	}
	defer again.dir.Close()
	again.mu.Lock()
	defer again.mu.Unlock()
	unopened, other := &unit{id: app}, app.RoleID().Unit("other")
	if again.units[app] = unopened; !again.kept(app) {
		t.Error("while its worker opens it, the unit is not kept")
	}
	if again.units[other] = unopened; again.kept(other) {
		t.Error("a unit without files is kept")
	}
}
