package agent

import (
	"os"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// What was cut off and hangs makes room for the release before it, as it would have without the restart.
func TestSupersedesWhatARestartFoundHanging(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("app", "2", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Timeout: time.Hour, Checks: []deployments.Check{{Exec: "touch " + w.path("asked") + "; false"}}}
	})
	asked := func() (bool, string) { _, err := os.Stat(w.path("asked")); return err == nil, "not yet" }
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	for _, known := range []bool{true, false} { // whether the restart finds out before it goes on with what was cut off
		w.put(kv.DesiredKey(app), two.String())
		await(t, "the check", asked)
		a.stop()
		back := func() { w.put(kv.DesiredKey(app), one.String()) }
		if known {
			back()
		}
		if err := os.Remove(w.path("asked")); err != nil {
			t.Fatal(err)
		}
		a = w.start()
		if !known {
			await(t, "the check", asked)
			back()
		}
		a.awaitRunning(app, one)
		os.Remove(w.path("asked"))
	}
}

// A release that is no longer in quarantine leaves nothing behind, that would count when it fails again.
func TestFailuresEndWithTheirQuarantine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	bad, good := w.publish("app", "1", post("false")), w.publish("app", "2")
	w.desire(app, deployments.Record{Target: bad, Generation: 1})
	a := w.start()
	a.awaitState(app, deployments.StateQuarantined)
	w.desire(app, deployments.Record{Target: good, Generation: 2})
	a.awaitRunning(app, good)
	await(t, "the list of failures", func() (bool, string) {
		data, err := os.ReadFile(w.path("state", failuresFile))
		return err == nil && !strings.Contains(string(data), bad.Digest.String()), string(data)
	})
}

// A unit of which nothing ever ran doesn't keep the node out of service once nothing names it any more.
func TestForgottenUnitIsNotDrained(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.put(kv.DesiredKey(app), w.publish("app", "1", func(m *deployments.Manifest) {
		m.Commands.Pre = []deployments.Command{{Run: "false"}}
	}).String())
	a := w.start(withMetrics)
	a.awaitState(app, deployments.StateQuarantined)
	if code, body := a.get("/ready"); code != 503 {
		t.Errorf("/ready says %d %s", code, body)
	}
	w.delete(kv.DesiredKey(app))
	a.awaitReady()
	a.stop()
	a = w.start(withMetrics)
	a.awaitReady()
}
