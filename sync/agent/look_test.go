package agent

import (
	"math"
	"os"
	"testing"
	"time"

	"kedge/deployments"
)

// A node that joins after a release was rolled out, and where something else serves, keeps that until the mirror
// has room for it. A node that just booted doesn't: it serves nobody yet.
func TestNodeWhereSomethingElseServesWaitsForItsTurn(t *testing.T) {
	t.Parallel()
	for name, up := range map[string]time.Duration{"up for long": time.Hour, "just booted": time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.publishTree("app", "1", nil)
			write(t, w.path("srv", "app", "VERSION"), "before")
			r := deployments.Record{Target: p, Stable: p, Generation: 1, Commit: "c1", Paced: true, Joined: 1}
			w.desire(app, r)
			a := w.start(func(c *Config) { c.uptime = func() time.Duration { return up } })
			if up > bootWithin {
				a.awaitUnit(app, "waiting", func(u deployments.UnitReport) bool {
					return u.OtherServes && u.State == deployments.StateWaiting && u.Want.IsZero() &&
						u.Staged == p.Digest
				})
				if got, err := os.ReadFile(w.path("srv", "app", "VERSION")); err != nil || string(got) != "before" {
					t.Errorf("%q serves before its turn: %v", got, err)
				}
				<-a.Idle() // it can't go on by itself
				r.Joined = math.MaxUint64
				w.desire(app, r)
			}
			if u := a.awaitState(app, deployments.StateConverged); u.OtherServes || u.Running != p {
				t.Errorf("%+v", u)
			}
		})
	}
}
