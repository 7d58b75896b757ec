package agent

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/sync/deploy"
)

// What another tool deploys to the dest of an agent's unit is reported at once, without a check of the whole tree,
// and undone if drift is healed.
func TestForeignDeployments(t *testing.T) {
	t.Parallel()
	run := func(strategy deployments.Strategy) func(t *testing.T, w *world) {
		return func(t *testing.T, w *world) {
			other := w.publish("app", "9", func(m *deployments.Manifest) { m.Strategy = strategy })
			var log strings.Builder
			one := deploy.OneShot{
				URL: other.String(), Node: node, Objects: object.New(object.Config{}),
				Log: slog.New(slog.NewTextHandler(&log, nil)),
			}
			if err := deploy.Once(t.Context(), one); err != nil {
				t.Error(err)
			}
			if !strings.Contains(log.String(), "kedge pin "+app.String()) {
				t.Errorf("it isn't said that an agent deploys there:\n%s", log.String())
			}
		}
	}
	for name, c := range map[string]struct {
		strategy deployments.Strategy
		foreign  func(t *testing.T, w *world)
	}{
		"kedge run":                  {deployments.StrategyRelease, run(deployments.StrategyRelease)},
		"kedge run by rsync":         {deployments.StrategyRsync, run(deployments.StrategyRsync)},
		"a link of another tool":     {deployments.StrategyRelease, link},
		"a tree moved there":         {deployments.StrategyRsync, move},
		"a tree moved over the link": {deployments.StrategyRelease, move},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.publish("app", "1", func(m *deployments.Manifest) { m.Strategy = c.strategy })
			dest := w.path("srv", "app")
			w.desire(app, deployments.Record{Target: p})
			a := w.start(func(c *Config) { c.VerifyEvery = time.Hour }) // the kernel tells
			a.awaitRunning(app, p)
			c.foreign(t, w)
			u := a.awaitUnit(app, "told", func(u deployments.UnitReport) bool {
				return u.Reason == deployments.ReasonForeignDeployment
			})
			if u.Facts["dest"] != dest || u.Facts["found"] == "" || u.State != deployments.StateConverged ||
				!slices.Contains(u.Drift, dest) || u.Error == "" {
				t.Errorf("the report: %+v", u)
			}
			w.desire(app, deployments.Record{Target: p, Drift: deployments.DriftHeal})
			a.awaitUnit(app, "healed", func(u deployments.UnitReport) bool {
				return u.Reason == "" && len(u.Drift) == 0 && w.live("app") == "1"
			})
			steadily(t, "healed once", func() (bool, string) {
				u := a.unit(app)
				return u.Reason == "" && w.live("app") == "1", fmt.Sprintf("%+v", u)
			})
		})
	}
}

// link links dest to another tool's tree.
func link(t *testing.T, w *world) {
	write(t, w.path("other", "VERSION"), "9")
	dest := w.path("srv", "app")
	if err := os.Symlink(w.path("other"), dest+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dest+".new", dest); err != nil {
		t.Fatal(err)
	}
}

// move puts another tree in place of dest.
func move(t *testing.T, w *world) {
	write(t, w.path("other", "VERSION"), "9")
	dest := w.path("srv", "app")
	if err := os.Rename(dest, filepath.Join(w.dir, "before")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(w.path("other"), dest); err != nil {
		t.Fatal(err)
	}
}

// A unit that moves away from a dest, which another unit took over meanwhile, leaves the watch of
// that dest to the other unit.
func TestForeignDeploymentWhereAnotherUnitWas(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	shared := func(m *deployments.Manifest) { m.Dest = w.path("srv", "shared") }
	one, two := w.publish("app", "1", shared), w.publish("app2", "2", shared)
	heir := unitID("app2")
	w.desire(app, deployments.Record{Target: one, Generation: 1})
	a := w.start(func(c *Config) { c.VerifyEvery = time.Hour }) // the kernel tells
	a.awaitUnit(app, "live", func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged })
	w.desire(heir, deployments.Record{Target: two, Generation: 1})
	w.delete("desired/prod/web/app")
	a.awaitUnit(heir, "live", func(u deployments.UnitReport) bool { return u.State == deployments.StateConverged })
	steadily(t, "the old name doesn't count", func() (bool, string) {
		return !strings.Contains(w.log.String(), "something else"), w.log.String()
	})
	moved := w.publish("app", "3")
	w.desire(app, deployments.Record{Target: moved, Generation: 2})
	a.awaitRunning(app, moved)

	if err := os.Remove(w.path("srv", "shared")); err != nil {
		t.Fatal(err)
	}
	a.awaitUnit(heir, "told", func(u deployments.UnitReport) bool { return len(u.Drift) > 0 })
	if u := a.unit(app); len(u.Drift) > 0 {
		t.Errorf("the unit that moved away: %+v", u)
	}
}
