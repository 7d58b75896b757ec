package agent

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"

	"kedge/deployments"
)

// An agent that restarts before it has converged reports its first start; one that had converged, or whose machine
// was rebooted, its latest. The file may contain anything.
func TestStartedIsWhenItBeganToConverge(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	missing := one
	missing.URL += ".missing"
	w.desire(app, deployments.Record{Target: missing, Generation: 1})
	starts := func() (*running, time.Time) {
		t.Helper()
		a := w.start()
		return a, a.Report()["web"].Started
	}
	retrying := func(u deployments.UnitReport) bool { return u.State == deployments.StateRetrying }
	a, first := starts()
	a.awaitUnit(app, "in trouble", retrying)
	a.stop()
	a, again := starts()
	if !again.Equal(first) {
		t.Errorf("it began at %v, and says %v after it was started again", first, again)
	}
	a.stop()

	file := w.path("state", "starting.json")
	for _, text := range []string{"", "{", `{"boot":"another","since":"2020-01-01T00:00:00Z"}`, `{"since":"2990-01-01T00:00:00Z"}`} {
		write(t, file, text)
		began := time.Now().Truncate(time.Millisecond)
		a, again := starts()
		if again.Before(began) || again.After(time.Now()) {
			t.Errorf("%q: it says that it began at %v", text, again)
		}
		a.stop()
	}

	a, first = starts()
	w.desire(app, deployments.Record{Target: one, Generation: 2})
	a.awaitRunning(app, one)
	<-a.Idle()
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the start is still noted after the node has converged: %v", err)
	}
	a.stop()
	a, again = starts()
	if !again.After(first) {
		t.Errorf("it had converged, and says %v again", again)
	}
	a.awaitRunning(app, one)
}
