package agent

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

// reboot makes a unit's journal one of an earlier boot of the machine.
func (w *world) reboot(id deployments.UnitID) {
	w.t.Helper()
	path := w.path("state", "units", id.Stage, id.Role, id.Unit, "journal.json")
	journal, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	old := regexp.MustCompile(`"proven": "[^"]+"`).ReplaceAll(journal, []byte(`"proven": "an earlier boot"`))
	if string(old) == string(journal) {
		w.t.Fatalf("the journal has no boot in it: %s", journal)
	}
	if err := os.WriteFile(path, old, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// After a reboot the agent has converged at once if the release is the right one, as services wait for that; /ready
// waits until they are healthy.
func TestReadyWaitsForHealthAfterAReboot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	up := w.path("up")
	write(t, up, "")
	p := w.publish("app", "1", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Timeout: 2 * time.Second, Checks: []deployments.Check{{Exec: "test -e " + up, Interval: 5 * time.Millisecond}}}
	})
	w.desire(app, deployments.Record{Target: p, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, p)
	a.awaitReady()
	a.stop()

	w.reboot(app)
	if err := os.Remove(up); err != nil {
		t.Fatal(err)
	}
	a = w.start(withMetrics)
	a.awaitRunning(app, p)
	<-a.Idle()
	u := a.awaitUnit(app, "in trouble", func(u deployments.UnitReport) bool { return u.Error != "" })
	if u.State != deployments.StateConverged || !strings.Contains(u.Error, "not healthy") || len(u.Quarantined) > 0 {
		t.Errorf("it reports %+v", u)
	}
	if code, body := a.get("/ready"); code != 503 || !strings.Contains(body, "since the machine started") {
		t.Errorf("/ready says %d %s", code, body)
	}
	two := w.publish("app", "2")
	w.desire(app, deployments.Record{Target: two, Generation: 2})
	a.awaitRunning(app, two)
	a.awaitReady()
	w.desire(app, deployments.Record{Target: p, Generation: 3})
	a.awaitUnit(app, "failed", func(u deployments.UnitReport) bool { return u.State == deployments.StateQuarantined })
	a.stop()

	w.reboot(app)
	write(t, up, "")
	a = w.start(withMetrics)
	a.awaitReady()
}
