package agent

import (
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

// firstRelease returns the record of a first release whose rollout is in a phase.
func firstRelease(p deployments.Pointer, generation int64, phase deployments.Phase, cutoff uint64) deployments.Record {
	r := deployments.Record{Target: p, Generation: generation, Claim: 1, Rollout: &deployments.Progress{
		Phase: phase, Cutoff: cutoff, Serving: true, Since: time.Now(),
	}}
	if phase == deployments.PhaseRollingBack || phase == deployments.PhaseRolledBack {
		r.Rollout.Failed = p.Digest
	}
	return r
}

func (a *running) awaitRestored() {
	a.t.Helper()
	u := a.awaitUnit(app, "back at what was there before", func(u deployments.UnitReport) bool {
		return u.Reason == deployments.ReasonRestored
	})
	if u.State != deployments.StateWaiting || !u.OtherServes || !u.Running.IsZero() || u.Leavable || u.Error != "" {
		a.t.Errorf("the report: %+v", u)
	}
	if v := a.w.live("app"); v != "before" {
		a.t.Errorf("dest holds %q", v)
	}
}

// A node that runs a first release restores what was there before, in its turn, when the rollout is rolled back.
// The next release is a first one again; what was there before is discarded once a release is stable.
func TestLeavesAFirstReleaseThatIsRolledBack(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			write(t, w.path("srv", "app", "VERSION"), "before")
			in := func(m *deployments.Manifest) {
				m.Strategy = strategy
				m.Commands.Failure = []deployments.Command{{Run: "sleep 0.2"}} // for dest to be looked at before the end
			}
			one, two := w.publish("app", "1", in), w.publish("app", "2", in)
			w.desire(app, firstRelease(one, 1, deployments.PhaseRolling, math.MaxUint64))
			a := w.start()
			if u := a.awaitRunning(app, one); !u.Leavable {
				t.Errorf("it keeps nothing of what was there before: %+v", u)
			}
			w.desire(app, firstRelease(one, 2, deployments.PhaseRollingBack, math.MaxUint64))
			a.awaitUnit(app, "waiting for its turn", func(u deployments.UnitReport) bool { return u.Generation == 2 })
			if u := a.awaitRunning(app, one); !u.Leavable {
				t.Errorf("it went before its turn: %+v", u)
			}
			w.desire(app, firstRelease(one, 2, deployments.PhaseRollingBack, 0))
			a.awaitRestored()
			w.desire(app, firstRelease(one, 2, deployments.PhaseRolledBack, 0))
			a.stop()
			a = w.start()
			a.awaitRestored()

			w.desire(app, firstRelease(two, 3, deployments.PhaseRolling, 0))
			a.awaitUnit(app, "ready", func(u deployments.UnitReport) bool {
				return u.Staged == two.Digest && u.OtherServes && u.Running.IsZero()
			})
			w.desire(app, firstRelease(two, 3, deployments.PhaseRolling, math.MaxUint64))
			if u := a.awaitRunning(app, two); !u.Leavable {
				t.Errorf("it keeps nothing of what was there before: %+v", u)
			}
			w.desire(app, deployments.Record{Target: two, Stable: two, Generation: 3, Claim: 3})
			a.awaitUnit(app, "settled", func(u deployments.UnitReport) bool { return !u.Leavable && u.Running == two })
			await(t, "the space of what was there", func() (bool, string) {
				left, _ := os.ReadDir(filepath.Join(a.dir.UnitDir(app), "before"))
				return len(left) == 0, "it is there"
			})
			if log := w.log.String(); strings.Contains(log, "something else has deployed") {
				t.Errorf("its own way back is taken for somebody else's:\n%s", log)
			}
		})
	}
}

// A first release whose checks hang is left at once, also by an agent that learns of the rollback at its start.
func TestLeavesAFirstReleaseThatHangs(t *testing.T) {
	t.Parallel()
	for _, restarted := range []bool{false, true} {
		t.Run(map[bool]string{false: "running", true: "restarted"}[restarted], func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			write(t, w.path("srv", "app", "VERSION"), "before")
			one := w.publish("app", "1", func(m *deployments.Manifest) {
				check := deployments.Check{Exec: "touch " + w.path("asked") + "; false"}
				m.Health = deployments.Health{Timeout: time.Hour, Checks: []deployments.Check{check}}
			})
			w.desire(app, firstRelease(one, 1, deployments.PhaseCanary, math.MaxUint64))
			a := w.start(withMetrics)
			await(t, "the check", func() (bool, string) { _, err := os.Stat(w.path("asked")); return err == nil, "not yet" })
			if restarted {
				a.stop()
			}
			w.desire(app, firstRelease(one, 2, deployments.PhaseRollingBack, 0))
			if restarted {
				a = w.start(withMetrics)
			}
			a.awaitRestored()
			await(t, "the end of the drain", func() (bool, string) { return len(a.drainTracker.Units()) == 0, "drained" })
		})
	}
}

// A unit that is renamed while a node is in mid-switch under the old name is reported as switching under the new
// one, where the budget counts it; after the switch it waits for its turn.
func TestRenamedInMidSwitch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	renamed := unitID("frontend")
	one := w.publish("app", "1")
	two := w.publish("app", "2", post("touch "+w.path("begun")+"; until test -e "+w.path("go")+"; do sleep 0.01; done"))
	three := w.publish("frontend", "3", func(m *deployments.Manifest) { m.Dest = w.path("srv", "app") })
	w.desire(app, deployments.Record{Target: one, Stable: one, Generation: 1})
	a := w.start()
	a.awaitRunning(app, one)
	r := deployments.Record{Target: two, Stable: one, Generation: 2,
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: math.MaxUint64, Since: time.Now()}}
	w.desire(app, r)
	await(t, "the switch", func() (bool, string) { _, err := os.Stat(w.path("begun")); return err == nil, "not yet" })
	r.Orphaned = true
	w.desire(app, r)
	w.desire(renamed, firstRelease(three, 1, deployments.PhaseCanary, 0))
	a.awaitUnit(renamed, "counted", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateSwitching && u.OtherServes && u.Generation == 1
	})
	write(t, w.path("go"), "")
	a.awaitUnit(renamed, "waiting for its turn", func(u deployments.UnitReport) bool {
		return u.State == deployments.StateWaiting && u.OtherServes && u.Staged == three.Digest
	})
	if v := w.live("app"); v != "2" {
		t.Errorf("dest holds %q", v)
	}
}
