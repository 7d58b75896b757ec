package agent

import (
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

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
