package agent

import (
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

func allowEmpty(c *Config) { c.AllowEmpty = true }

// checked gives a release a check that passes while the file at path doesn't exist, and runs as during says.
func checked(path string, during deployments.During) func(*deployments.Manifest) {
	return func(m *deployments.Manifest) {
		m.Health = deployments.Health{
			Every: 20 * time.Millisecond, Failures: 2, StableFor: 50 * time.Millisecond,
			Checks: []deployments.Check{{Exec: "test ! -e " + path, During: during}},
		}
	}
}

func (a *running) awaitCode(path string, want int) string {
	a.t.Helper()
	body := ""
	await(a.t, path, func() (bool, string) {
		code, b := a.get(path)
		body = b
		return code == want, b
	})
	return body
}

// A release whose checks fail while it is live is not converged and not in service, until they pass again.
func TestHealthGoesOnWhileLive(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sick := w.path("sick")
	one := w.publish("app", "1", checked(sick, ""))
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	a.awaitReady()
	if code, body := a.get("/converged"); code != http.StatusOK {
		t.Errorf("/converged: %d %s", code, body)
	}

	write(t, sick, "")
	u := a.awaitState(app, deployments.StateUnhealthy)
	if u.Reason != deployments.ReasonUnhealthy || u.Facts["check"] != "exec" || u.Running != one || u.Error == "" {
		t.Errorf("the report: %+v", u)
	}
	for _, path := range []string{"/ready", "/converged"} {
		if body := a.awaitCode(path, http.StatusServiceUnavailable); !strings.Contains(body, "unhealthy") {
			t.Errorf("%s doesn't say why: %s", path, body)
		}
	}
	await(t, "the report in the store", func() (bool, string) {
		r, _ := w.reported("web")
		return r.Units["app"].State == deployments.StateUnhealthy && !r.Ready, string(r.Units["app"].State)
	})

	// A following deployment replaces the unhealthy release.
	two := w.publish("app", "2")
	w.desire(app, deployments.Record{Target: two, Generation: 2})
	a.awaitRunning(app, two)
	a.awaitReady()
	w.desire(app, deployments.Record{Target: one, Generation: 3})
	a.awaitState(app, deployments.StateSwitching)
	if err := os.Remove(sick); err != nil {
		t.Fatal(err)
	}
	a.awaitRunning(app, one)
	write(t, sick, "")
	a.awaitState(app, deployments.StateUnhealthy)
	if err := os.Remove(sick); err != nil {
		t.Fatal(err)
	}
	a.awaitState(app, deployments.StateConverged)
	a.awaitReady()
}

// A restart of the agent makes no unhealthy release healthy until its checks have failed often enough again, and no
// healthy one unhealthy.
func TestHealthAcrossRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sick := w.path("sick")
	one := w.publish("app", "1", checked(sick, ""), func(m *deployments.Manifest) {
		m.Health.Every = 300 * time.Millisecond
	})
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	write(t, sick, "")
	was := a.awaitState(app, deployments.StateUnhealthy)
	for range 2 {
		a.stop()
		a = w.start(withMetrics)
		await(t, "the restarted agent to say how it is", func() (bool, string) {
			u := a.unit(app)
			code, body := a.get("/ready")
			if u.State == deployments.StateConverged || code == http.StatusOK {
				t.Fatalf("it is %s and /ready says %d %s", u.State, code, body)
			}
			return u.State == deployments.StateUnhealthy && u.Since.Equal(was.Since) && u.Error == was.Error,
				fmt.Sprintf("%+v, before: %+v", u, was)
		})
	}
	if err := os.Remove(sick); err != nil {
		t.Fatal(err)
	}
	a.awaitRunning(app, one)
	a.stop()
	a = w.start(withMetrics)
	await(t, "the restarted agent to say that it is healthy", func() (bool, string) {
		u := a.unit(app)
		if u.State == deployments.StateUnhealthy {
			t.Fatalf("it is unhealthy after a restart: %+v", u)
		}
		return u.State == deployments.StateConverged, fmt.Sprintf("%+v", u)
	})
}

// A deployment that goes back to an unhealthy release ends what the journal says of its checks. If they go on failing,
// a restart knows of it.
func TestHealthAfterADeploymentTakenBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sick := w.path("sick")
	one := w.publish("app", "1", checked(sick, ""), func(m *deployments.Manifest) {
		m.Health.Every = 300 * time.Millisecond
	})
	two := w.publish("app", "2", func(m *deployments.Manifest) {
		m.Commands.Pre = []deployments.Command{{Run: "rm " + sick + "; exit 1"}}
		m.Commands.Failure = []deployments.Command{{Run: "touch " + sick}}
	})
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	write(t, sick, "")
	a.awaitState(app, deployments.StateUnhealthy)
	w.desire(app, deployments.Record{Target: two, Generation: 2})
	a.awaitState(app, deployments.StateQuarantined)
	steadily(t, "after the deployment", func() (bool, string) {
		code, body := a.get("/ready")
		return code != http.StatusOK, body
	})
	a.stop()
	a = w.start(withMetrics)
	await(t, "the restarted agent to say how it is", func() (bool, string) {
		code, body := a.get("/ready")
		if code == http.StatusOK {
			t.Fatalf("/ready says %d %s", code, body)
		}
		return a.unit(app).State == deployments.StateQuarantined, body
	})
}

// A check that only gates the switch takes nothing out of service later.
func TestCheckDuringDeployEndsWithIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	sick := w.path("sick")
	one := w.publish("app", "1", checked(sick, deployments.DuringDeploy))
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(withMetrics)
	a.awaitRunning(app, one)
	a.awaitReady()
	write(t, sick, "")
	steadily(t, "in service", func() (bool, string) { code, body := a.get("/ready"); return code == 200, body })
}

// An agent with a mistyped stage or role has no units: it must not count as a node that serves.
func TestAgentWithoutUnitsIsNotReady(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(withMetrics)
	for _, path := range []string{"/ready", "/converged"} {
		await(t, path+" to say that there is no unit", func() (bool, string) {
			code, body := a.get(path)
			return code == 503 && strings.Contains(body, "allow_empty"), body
		})
	}
	a.stop()
	a = w.start(withMetrics, allowEmpty)
	a.awaitReady()
	a.awaitCode("/converged", http.StatusOK)
}

// A dependency that went back, and serves, is enough for a unit that doesn't need the newer release.
func TestDependencyThatServesIsEnoughForAPin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := unitID("base")
	goodBase, one, two := w.publish("base", "1"), w.publish("app", "1"), w.publish("app", "2")
	w.desire(base, deployments.Record{Target: goodBase, Generation: 1})
	w.desire(app, deployments.Record{Target: one, Generation: 1, After: []string{"base"}})
	a := w.start()
	a.awaitRunning(app, one)
	w.desire(base, deployments.Record{Target: w.publish("base", "2", post("false")), Generation: 2})
	a.awaitState(base, deployments.StateQuarantined)

	w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 2, After: []string{"base"}})
	u := a.awaitState(app, deployments.StateWaiting)
	if u.Reason != deployments.ReasonDependency || u.Facts["unit"] != "base" {
		t.Errorf("the report: %+v", u)
	}
	w.put(kv.PinKey(app), two.String())
	a.awaitRunning(app, two)
}
