package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// silencedStore drops reports while silent is set.
type silencedStore struct {
	kv.Store
	silent *atomic.Bool
}

func (s silencedStore) Presence(ctx context.Context, node string) (kv.Presence, error) {
	p, err := s.Store.Presence(ctx, node)
	return silencedPresence{p, s.silent}, err
}

type silencedPresence struct {
	kv.Presence
	silent *atomic.Bool
}

func (p silencedPresence) Join(ctx context.Context, key string, value []byte) (uint64, <-chan struct{}, error) {
	if p.silent.Load() {
		return 0, nil, errors.New("the store takes no report")
	}
	return p.Presence.Join(ctx, key, value)
}

func (p silencedPresence) Put(ctx context.Context, key string, value []byte) error {
	if p.silent.Load() {
		return errors.New("the store takes no report")
	}
	return p.Presence.Put(ctx, key, value)
}

// If a budget counts a node, the store holds a report that it is in mid-switch before the switch begins: if the
// node died in its first step, nobody would know otherwise that it is out of service. Until then it stays in
// service on what it runs, and a switch that is cancelled meanwhile never begins.
func TestASwitchIsSaidBeforeItBegins(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	silent := new(atomic.Bool)
	status := w.path("kv", kv.StatusKey("prod", "web", node))
	looks := func(m *deployments.Manifest) {
		look := fmt.Sprintf("cat %s* >%s", status, w.path("seen"))
		m.Commands.Pre = []deployments.Command{{Run: look, Timeout: time.Minute}}
	}
	one, two, three := w.publish("app", "1"), w.publish("app", "2", looks), w.publish("app", "3", looks)
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(func(c *Config) { c.Store, c.Listen = silencedStore{w.store, silent}, "127.0.0.1:0" })
	a.awaitReady()

	rolls := func(generation int64, to deployments.Pointer) deployments.Record {
		return deployments.Record{Target: to, Stable: one, Generation: generation,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, Since: time.Now()}}
	}
	waits := func(generation int64) {
		t.Helper()
		silent.Store(true)
		w.desire(app, rolls(generation, two))
		a.awaitState(app, deployments.StateSwitching)
		if !a.announces(app.Role) {
			t.Error("the report that it waits for may be held back")
		}
		steadily(t, "while nobody can be told", func() (bool, string) {
			_, err := os.Stat(w.path("seen"))
			ready, body := a.get("/ready")
			return w.live("app") == "1" && errors.Is(err, os.ErrNotExist) && ready == 200, fmt.Sprint(w.live("app"), err, body)
		})
	}

	waits(2)
	back := rolls(2, two)
	back.Rollout.Phase, back.Rollout.Cutoff, back.Rollout.Failed = deployments.PhaseRollingBack, 0, two.Digest
	w.desire(app, back)
	a.awaitState(app, deployments.StateConverged)
	silent.Store(false)
	steadily(t, "what was taken back", func() (bool, string) { return w.live("app") == "1", w.live("app") })

	waits(3)
	silent.Store(false)
	a.awaitRunning(app, two)
	r, err := os.ReadFile(w.path("seen"))
	if err != nil {
		t.Fatal(err)
	}
	said, err := deployments.ParseReport(r)
	if u := said.Units["app"]; err != nil || u.State != deployments.StateSwitching || u.Want != two || u.Running != one {
		t.Errorf("when its first command ran, the store held %s: %v", r, err)
	}

	if a.announces(app.Role) {
		t.Error("a switch that has begun still lets reports go unbounded")
	}

	silent.Store(true) // without a budget nobody counts
	w.desire(app, deployments.Record{Target: three, Generation: 4})
	a.awaitRunning(app, three)
}

// A node whose way back fails, and which is unhealthy, takes a fix under a rollout all the same.
func TestAFixReplacesAWayBackThatDoesNotHold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Timeout: time.Second, Checks: []deployments.Check{
			{Exec: "! test -e " + w.path("sick"), Interval: 50 * time.Millisecond, Timeout: time.Second},
		}}
	})
	two := w.publish("app", "2", post("touch "+w.path("sick")+"; exit 1"))
	three := w.publish("app", "3")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	rolls := func(generation int64, to deployments.Pointer) {
		w.desire(app, deployments.Record{Target: to, Stable: one, Generation: generation,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, Since: time.Now()}})
	}
	rolls(2, two)
	u := a.awaitState(app, deployments.StateUnhealthy)
	if u.Failed != two.Digest || u.Running != one || !strings.Contains(u.Error, "failed in post") ||
		!strings.Contains(u.Error, "exec") {
		t.Errorf("the rollout isn't told what failed: %+v", u)
	}
	if n := len(u.Errors); n == 0 || !strings.HasPrefix(u.Errors[n-1].Text, "the deployment failed: post: ") {
		t.Errorf("the log's errors aren't told: %+v", u.Errors)
	}
	a.stop()
	a = w.start()
	if again := a.awaitState(app, deployments.StateUnhealthy); u.Since.IsZero() || !again.Since.Equal(u.Since) {
		t.Errorf("it is unhealthy since %s, and since %s after a restart of the agent", u.Since, again.Since)
	}
	w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 3,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRollingBack, Since: time.Now(), Failed: two.Digest}})
	u = a.awaitUnit(app, "to be told to go back", func(u deployments.UnitReport) bool { return u.Generation == 3 })
	if u.State != deployments.StateUnhealthy || !u.RollingBack || u.Want != one || !u.Failed.IsZero() {
		t.Errorf("the rollback isn't told that it is out of service: %+v", u)
	}
	rolls(4, three)
	a.awaitRunning(app, three)
	if u := a.unit(app); !u.Failed.IsZero() || u.RollingBack {
		t.Errorf("it still counts as failed: %+v", u)
	}
}

// A node that goes back has done so since its release failed, however often its agent restarts: a rollback waits for it
// for one deadline.
func TestAWayBackBeganOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1", func(m *deployments.Manifest) {
		m.Health = deployments.Health{Timeout: time.Hour, Checks: []deployments.Check{
			{Exec: "! test -e " + w.path("sick"), Interval: 50 * time.Millisecond, Timeout: time.Second},
		}}
	})
	two := w.publish("app", "2", post("touch "+w.path("sick")+"; exit 1"))
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 2,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, Since: time.Now()}})
	goesBack := func(u deployments.UnitReport) bool {
		return u.State == deployments.StateSwitching && u.RollingBack
	}
	before := a.awaitUnit(app, "goes back", func(u deployments.UnitReport) bool {
		return goesBack(u) && u.Failed == two.Digest
	})
	if before.Since.IsZero() {
		t.Error("it goes back since no time")
	}
	pin := kv.NodePinKey(app, node)
	for _, then := range []struct {
		what   string
		target deployments.Pointer
		do     func()
	}{
		{"at first", two, func() {}},
		{"after a restart", two, func() {}},
		{"in the rollback", one, func() {
			w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 3, Rollout: &deployments.Progress{
				Phase: deployments.PhaseRollingBack, Cutoff: 1<<64 - 1, Failed: two.Digest, Since: time.Now()}})
		}},
		{"under a pin", one, func() { w.put(pin, one.String()) }},
		{"after the pin", two, func() {
			w.desire(app, deployments.Record{Target: two, Stable: one, Generation: 4,
				Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, Since: time.Now()}})
			w.delete(pin)
		}},
	} {
		then.do()
		for _, when := range []string{"", ", after a restart of the agent"} {
			again := a.awaitUnit(app, "goes back "+then.what+when, func(u deployments.UnitReport) bool {
				return goesBack(u) && u.Want == then.target
			})
			if !again.Since.Equal(before.Since) {
				t.Errorf("it goes back since %s, and %s%s since %s", before.Since, then.what, when, again.Since)
			}
			a.stop()
			a = w.start()
		}
	}
	// Only then is it well again: back under generation 4, the agent would try the release once more that generation 2
	// was for.
	w.desire(app, deployments.Record{Target: one, Generation: 5})
	a.awaitUnit(app, "the last record", func(u deployments.UnitReport) bool { return u.Generation == 5 })
	if err := os.Remove(w.path("sick")); err != nil {
		t.Fatal(err)
	}
	a.awaitUnit(app, "is back", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateConverged && u.Running == one && !u.RollingBack
	})
}

// A record admits a node by the number of its first report, once the store holds that report: a mirror that has yet
// to see it counts another node, which joined later.
func TestARecordSpeaksToWhoHasReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	silent := new(atomic.Bool)
	silent.Store(true)
	one, two, three := w.publish("app", "1"), w.publish("app", "2"), w.publish("app", "3")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(func(c *Config) { c.Store = silencedStore{w.store, silent} })
	a.awaitRunning(app, one)
	rolls := func(generation int64, stable, to deployments.Pointer, joined uint64) {
		w.desire(app, deployments.Record{Target: to, Stable: stable, Generation: generation, Joined: joined,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: 1<<64 - 1, Since: time.Now()}})
	}
	stays := func(generation int64, on deployments.Pointer) {
		t.Helper()
		u := a.awaitUnit(app, "knows the record", func(u deployments.UnitReport) bool { return u.Generation == generation })
		if u.Want != on {
			t.Errorf("it goes to %s by generation %d", u.Want, generation)
		}
	}

	rolls(2, one, two, 1<<64-1)
	stays(2, one)
	silent.Store(false)
	a.awaitRunning(app, two)

	joined := a.Report()[app.Role].Joined
	rolls(3, two, three, joined-1)
	stays(3, two)
	rolls(4, two, three, joined)
	a.awaitRunning(app, three)
}
