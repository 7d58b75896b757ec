package agent

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/deploy"
)

// An interrupted deployment that hangs gives way to the release before it, as it would have without the restart.
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

// A node that may use neither the stable release nor the target tries each once, not for ever.
func TestTwoReleasesRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1", post("true")), w.publish("app", "2", post("true"))
	w.desire(app, deployments.Record{
		Target: two, Stable: one, Generation: 2, Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: time.Now()},
	})
	a := w.start(func(c *Config) { c.Bounds.NoCommands = true })
	a.awaitState(app, deployments.StateInvalid)
	await(t, "both to be refused", func() (bool, string) {
		n := w.log.Count("the release is refused")
		return n >= 2, fmt.Sprint(n)
	})
	steadily(t, "refused once each", func() (bool, string) {
		n := w.log.Count("the release is refused")
		return n == 2, fmt.Sprint(n)
	})
}

// A unit whose dest was taken gets it once nothing names the other unit, in whichever order the keys are written.
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

// A unit that was to move, and no longer is, has no claim to the other dest.
func TestPlaceThatNobodyWantsAnyMore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("app", "1")
	elsewhere := func(m *deployments.Manifest) { m.Dest = w.path("srv", "other") }
	two, other := w.publish("app", "2", elsewhere), w.publish("other", "1")
	w.desire(app, deployments.Record{Target: one, Stable: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	w.desire(app, deployments.Record{
		Target: two, Stable: one, Generation: 2, Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: time.Now()},
	})
	a.awaitUnit(app, "staged", func(u deployments.UnitReport) bool { return u.Staged == two.Digest })
	w.put(kv.DesiredKey(unitID("other")), other.String())
	a.awaitState(unitID("other"), deployments.StateInvalid)
	w.desire(app, deployments.Record{Target: one, Stable: one, Generation: 3})
	a.awaitRunning(unitID("other"), other)
	if u := a.unit(app); u.Running != one || u.State != deployments.StateConverged {
		t.Errorf("the unit that stayed: %+v", u)
	}
}

// The success of a pin doesn't affect what failed under Git's commit: the pin's end doesn't bring the node back
// there.
func TestQuarantineOutlivesAPin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good, pinned := w.publish("app", "1"), w.publish("app", "0")
	bad := w.publish("app", "2", post("echo x >> "+w.path("tries")+"; false"))
	w.desire(app, deployments.Record{Target: good, Generation: 1})
	a := w.start()
	a.awaitRunning(app, good)
	w.desire(app, deployments.Record{Target: bad, Generation: 2})
	a.awaitState(app, deployments.StateQuarantined)
	w.put(kv.PinKey(app), pinned.String())
	a.awaitRunning(app, pinned)
	w.delete(kv.PinKey(app))
	a.awaitState(app, deployments.StateQuarantined)
	steadily(t, "one try", func() (bool, string) {
		tries, _ := os.ReadFile(w.path("tries"))
		return string(tries) == "x\n" && w.live("app") == "0", string(tries) + w.live("app")
	})
}

// The failure keys of an earlier version move into the journals.
func TestOldFailureKeysMove(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good := w.publish("app", "1")
	bad := w.publish("app", "2", post("echo x >> "+w.path("tries")+"; false"))
	w.desire(app, deployments.Record{Target: good, Generation: 1})
	a := w.start()
	a.awaitRunning(app, good)
	w.desire(app, deployments.Record{Target: bad, Generation: 2})
	a.awaitState(app, deployments.StateQuarantined)
	a.stop()

	journal := w.path("state", "units", app.String(), "journal.json")
	data, err := os.ReadFile(journal)
	if err != nil || !strings.Contains(string(data), `"key": "generation 2, retry 0",`) {
		t.Fatalf("the journal: %s, %v", data, err)
	}
	write(t, journal, strings.Replace(string(data), `"key": "generation 2, retry 0",`, "", 1))
	old := w.path("state", "failures.json")
	write(t, old, fmt.Sprintf(`{"format":1,"units":{"prod/web/app":{"%s":{"claim":"generation 1, retry 0","error":"x"}}}}`, bad.Digest))
	w.start()
	await(t, "another try, as another generation asks", func() (bool, string) {
		tries, _ := os.ReadFile(w.path("tries"))
		return string(tries) == "x\nx\n", string(tries)
	})
	if _, err := os.Stat(old); !os.IsNotExist(err) {
		t.Errorf("the old file: %v", err)
	}
}

// A unit without a good release doesn't keep the node out of service once nothing names the unit.
func TestForgottenUnitIsNotDrained(t *testing.T) {
	t.Parallel()
	for name, list := range map[string]func(*deployments.Commands) *[]deployments.Command{
		"before the switch": func(c *deployments.Commands) *[]deployments.Command { return &c.Pre },
		"after it":          func(c *deployments.Commands) *[]deployments.Command { return &c.Post },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.put(kv.DesiredKey(app), w.publish("app", "1", func(m *deployments.Manifest) {
				*list(&m.Commands) = []deployments.Command{{Run: "false"}}
			}).String())
			a := w.start(withMetrics, allowEmpty)
			a.awaitState(app, deployments.StateQuarantined)
			if code, body := a.get("/ready"); code != 503 {
				t.Errorf("/ready says %d %s", code, body)
			}
			w.delete(kv.DesiredKey(app))
			a.awaitReady()
			a.stop()
			a = w.start(withMetrics, allowEmpty)
			a.awaitReady()
		})
	}
}

// A node's start is complete when the remaining units can't continue by themselves: systemd's READY must not wait
// for a person.
func TestConvergedDoesNotWaitForAPerson(t *testing.T) {
	t.Parallel()
	base := unitID("base")
	for name, prepare := range map[string]func(w *world){
		"no record": func(*world) {},
		"failed":    func(w *world) { w.put(kv.DesiredKey(base), w.publish("base", "1", post("false")).String()) },
		"held":      func(w *world) { w.put(kv.PinKey(base), "hold") },
		"refused": func(w *world) {
			w.put(kv.DesiredKey(base), w.publish("base", "1", func(m *deployments.Manifest) { m.Dest = w.path("elsewhere") }).String())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			prepare(w)
			w.desire(app, deployments.Record{Target: w.publish("app", "1"), After: []string{"base"}})
			a := w.start(func(c *Config) { c.Bounds.Dests = []string{w.path("srv")} })
			select {
			case <-a.Idle():
			case <-time.After(patience):
				t.Fatal("it waits")
			}
			u := a.unit(app)
			if u.State != deployments.StateWaiting || !u.Running.IsZero() || !strings.Contains(u.Message, "base") {
				t.Errorf("what comes after it: %+v", u)
			}
		})
	}
}

// A rollout may turn back until it has ended; from then on no older release is taken, except by a pin if pins may.
func TestOlderReleases(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	at := func(day int) func(*deployments.Manifest) {
		return func(m *deployments.Manifest) { m.Created = time.Date(2026, 11, day, 0, 0, 0, 0, time.UTC) }
	}
	one, two := w.publish("app", "1", at(1)), w.publish("app", "2", at(2))
	r := deployments.Record{Target: one, Generation: 1}
	w.desire(app, r)
	a := w.start(func(c *Config) {
		c.Trust = func(context.Context, deployments.Pointer, []byte) error { return nil }
		c.AllowOlderPins = true
	})
	a.awaitRunning(app, one)
	r = deployments.Record{Target: two, Stable: one, Generation: 2, Rollout: &deployments.Progress{
		Phase: deployments.PhaseRolling, Since: time.Now(), Cutoff: math.MaxUint64,
	}}
	w.desire(app, r)
	a.awaitRunning(app, two)
	r.Rollout.Phase, r.Rollout.Cutoff = deployments.PhaseRolledBack, 0
	w.desire(app, r)
	a.awaitRunning(app, one)

	w.desire(app, deployments.Record{Target: two, Stable: two, Generation: 3})
	a.awaitRunning(app, two)
	a.awaitFloor(app, two)
	w.desire(app, deployments.Record{Target: one, Stable: one, Generation: 4})
	a.awaitState(app, deployments.StateInvalid)
	w.put(kv.PinKey(app), one.String())
	a.awaitRunning(app, one)
}

// A pin that the mirror rolls out reaches nodes as the record's target, or as stable once another follows it. It may
// name an older release, too, but only while it is there.
func TestOlderReleasesByAPacedPin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	now := time.Now()
	one, two := w.publish("app", "1", made(now.Add(-2*time.Hour))), w.publish("app", "2", made(now.Add(-time.Hour)))
	w.desire(app, deployments.Record{Target: two, Stable: two, Generation: 1, Paced: true})
	a := w.start(signed, func(c *Config) { c.AllowOlderPins = true })
	a.awaitRunning(app, two)
	a.awaitFloor(app, two)
	pinned := deployments.Record{Target: one, Stable: two, Generation: 2, Paced: true,
		Pinned: &deployments.Pinned{Target: two, Stable: two, Claim: 1},
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: now, Cutoff: math.MaxUint64,
			SkipsGates: true}}
	w.desire(app, pinned) // without the pin
	a.awaitState(app, deployments.StateInvalid)
	w.put(kv.PinKey(app), "{release: "+one.String()+", until: "+now.Add(-time.Minute).Format(time.RFC3339)+"}")
	await(t, "the pin to be seen", func() (bool, string) {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.units[app].pins[0].Present, "not yet"
	})
	if u := a.unit(app); u.State != deployments.StateInvalid || w.live("app") != "2" {
		t.Errorf("by a pin that has expired, %s is live: %+v", w.live("app"), u)
	}
	w.put(kv.PinKey(app), one.String())
	a.awaitRunning(app, one)
}

// A pin is temporary: its release doesn't raise the version floor, neither once its rollout has ended, nor as the
// stable release of the rollout that follows the pin. Git's older release may follow it.
func TestPinnedReleasesRaiseNoFloor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	now := time.Now()
	one, two := w.publish("app", "1", made(now.Add(-2*time.Hour))), w.publish("app", "2", made(now.Add(-time.Hour)))
	w.desire(app, deployments.Record{Target: two, Stable: two, Generation: 2, Paced: true,
		Pinned: &deployments.Pinned{Target: one, Stable: one, Claim: 1}})
	w.put(kv.PinKey(app), two.String())
	a := w.start(signed)
	a.awaitRunning(app, two)
	a.awaitState(app, deployments.StateConverged)
	w.delete(kv.PinKey(app))
	back := deployments.Record{Target: one, Stable: two, Generation: 3, Paced: true, Claim: 1,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Since: now, SkipsGates: true,
			StablePinned: true}}
	w.desire(app, back)
	a.awaitUnit(app, "awaiting its turn", func(u deployments.UnitReport) bool { return u.Generation == 3 })
	back.Rollout.Cutoff = math.MaxUint64
	w.desire(app, back)
	a.awaitRunning(app, one)
}

// A hold lets a switch that has begun finish, in success or failure.
func TestHoldInMidSwitch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.put(kv.DesiredKey(app), w.publish("app", "1").String())
	a := w.start(withMetrics)
	a.awaitState(app, deployments.StateConverged)
	two := w.publish("app", "2", post("touch "+w.path("in-post")+"; while ! test -e "+w.path("go")+"; do sleep 0.02; done"))
	w.desire(app, deployments.Record{Target: two, Commit: strings.Repeat("c", 40)})
	await(t, "post", func() (bool, string) { _, err := os.Stat(w.path("in-post")); return err == nil, "not yet" })
	w.put(kv.PinKey(app), "hold")
	a.awaitUnit(app, "held, as far as decided", func(u deployments.UnitReport) bool { return u.Pinned })
	if err := os.Remove(w.path("in-post")); err != nil {
		t.Fatal(err)
	}
	write(t, w.path("go"), "")
	u := a.awaitState(app, deployments.StateHeld)
	if u.Running != two || w.live("app") != "2" {
		t.Errorf("it holds %+v", u)
	}
	if _, err := os.Stat(w.path("in-post")); err == nil {
		t.Error("the command was begun anew")
	}
	a.awaitReady()
}

// A node that is out of service with nothing good to run stays so after a restart of the agent.
func TestStaysDrainedThroughARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.put(kv.DesiredKey(app), w.publish("app", "1", post("false")).String())
	var maintenance atomic.Bool
	for range 2 {
		a := w.start(withMetrics, func(c *Config) {
			c.Maintenance = func(_ context.Context, on bool, _ string) error { maintenance.Store(on); return nil }
		})
		a.awaitState(app, deployments.StateQuarantined)
		<-a.Idle()
		steadily(t, "out of service", func() (bool, string) {
			code, body := a.get("/ready")
			return code == 503 && maintenance.Load(), body
		})
		a.stop()
	}
}

// A quarantined unit may have drained the node before the agent's restart: it isn't final, which would end
// maintenance mode, before its state is read and it is drained again.
func TestUnitIsNotFinalBeforeItsDrainIsTakenUp(t *testing.T) {
	t.Parallel()
	p := deployments.Pointer{URL: "file:///r", Digest: deployments.Digest{1}}
	u := &unit{id: app}
	u.decided, u.decision = true, policy.Decision{Target: p}
	u.refused = map[deployments.Pointer]refusal{p: {err: errors.New("refused")}}
	if u.final() {
		t.Error("a unit is final before its state was read")
	}
	d, err := deploy.Open(deploy.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	u.deploy, u.mustRecover = d, true
	if u.final() {
		t.Error("a unit is final before it recovered")
	}
	if u.mustRecover = false; !u.final() {
		t.Error("a unit whose release is refused is not final")
	}
}

// After a start, no unit takes a dest until it is known where each unit's tree is.
func TestNoPlaceIsTakenBeforeAllAreKnown(t *testing.T) {
	t.Parallel()
	d, err := deploy.Open(deploy.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	u := &unit{id: app, deploy: d}
	u.goal.run = deployments.Pointer{URL: "file:///r", Digest: deployments.Digest{1}}
	other := &unit{id: unitID("base")}
	a := &Agent{units: map[deployments.UnitID]*unit{u.id: u, other.id: other}}
	if j, _, _ := a.begin(t.Context(), u, time.Now()); j.kind != jobNone {
		t.Errorf("while another is being opened, it begins to %s", j.kind)
	}
	other.lastErr = os.ErrPermission // one that can't be opened holds up nobody
	if j, _, _ := a.begin(t.Context(), u, time.Now()); j.kind != jobDeploy {
		t.Errorf("it begins to %q", j.kind)
	}
}
