package agent

import (
	"strings"
	"testing"

	"kedge/deployments"
)

// TestLinesNameTheirUnitOnce checks the agent's lines about a unit, and those of the deployment that it starts.
func TestLinesNameTheirUnitOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	a.stop()
	deploying, live := false, false
	for line := range strings.Lines(w.log.String()) {
		deploying = deploying || strings.Contains(line, "msg=deploying ") && strings.Contains(line, " unit="+app.String())
		live = live || strings.Contains(line, `msg="the release is live and healthy"`) && strings.Contains(line, one.String())
		if strings.Count(line, " unit=") > 1 {
			t.Errorf("the unit is named more than once: %s", line)
		}
	}
	if !deploying || !live {
		t.Errorf("no line says that the unit was deployed, or that it came to its end:\n%s", w.log)
	}
}
