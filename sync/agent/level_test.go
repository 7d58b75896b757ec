package agent

import (
	"os"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

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
