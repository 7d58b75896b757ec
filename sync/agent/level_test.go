package agent

import (
	"fmt"
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

// A node that may use neither the stable release nor the target asks for each once, not for ever.
func TestTwoReleasesRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1", post("true")), w.publish("app", "2", post("true"))
	w.desire(app, deployments.Record{
		Target: two, Stable: one, Generation: 2, Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: time.Now()},
	})
	a := w.start(func(c *Config) { c.Bounds.NoCommands = true })
	a.awaitState(app, deployments.StateInvalid)
	await(t, "both to be refused", func() (bool, string) { n := w.log.count("the release is refused"); return n >= 2, fmt.Sprint(n) })
	steadily(t, "refused once each", func() (bool, string) { n := w.log.count("the release is refused"); return n == 2, fmt.Sprint(n) })
}

// A unit whose place was taken gets it once the other is named no more: in whichever order the keys are written.
func TestPlaceThatBecomesFree(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	two := w.publish("base", "2", func(m *deployments.Manifest) { m.Dest = w.path("srv", "app") })
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	w.put(kv.DesiredKey(unitID("base")), two.String())
	a.awaitState(unitID("base"), deployments.StateInvalid)
	w.delete(kv.DesiredKey(app))
	a.awaitState(unitID("base"), deployments.StateConverged)
	if v := w.live("app"); v != "2" {
		t.Errorf("dest holds %q", v)
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
