package deploy

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"kedge/deployments"
)

// check is a health check that passes while the file w.path("healthy") is there.
func (w *world) check(m *deployments.Manifest) {
	m.Health = deployments.Health{Timeout: 2 * time.Second, Checks: []deployments.Check{{
		Exec: `test "$KEDGE_STEP" = health && test -e ` + w.path("healthy"), Interval: 5 * time.Millisecond,
	}}}
}

func (w *world) healthy(yes bool) {
	w.t.Helper()
	err := os.WriteFile(w.path("healthy"), nil, 0o644)
	if !yes {
		err = os.Remove(w.path("healthy"))
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// rebooted is the unit after a restart of the machine, before anything of it is recovered.
func (w *world) rebooted() *Unit {
	u := w.open(nil)
	u.boot += " another"
	return u
}

// What a post command started is gone after a reboot: without it a good release would fail its checks.
func TestPostRunsAgainAfterAReboot(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		open  func(*world) *Unit
		hooks []string
	}{
		"restart of the agent":   {func(w *world) *Unit { return w.open(nil) }, []string{"success 1"}},
		"restart of the machine": {(*world).rebooted, []string{"post 1", "success 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := w.publish("1", func(m *deployments.Manifest) { w.check(m); m.Health.Timeout = time.Minute })
			u := w.open(nil)
			ctx, cancel := context.WithCancel(t.Context())
			u.at = func(point string) {
				if point == "before health" {
					cancel()
				}
			}
			if err := u.Deploy(ctx, Request{Release: p}); !errors.Is(err, context.Canceled) {
				t.Fatalf("deploying was to be cut off in health: %v", err)
			}
			w.wantHooks("pre 1", "post 1")
			w.healthy(true)
			u = test.open(w)
			if err := u.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantHooks(test.hooks...)
			if s := u.State(); s.Running != p || !s.Confirmed || !s.Proven || s.Unfinished {
				t.Errorf("the state is %+v", s)
			}
		})
	}
}

// The way back is cut off by a reboot as well.
func TestPostOfTheOldReleaseRunsAgainAfterAReboot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one := w.publish("1", func(m *deployments.Manifest) { w.check(m); m.Health.Timeout = time.Minute })
	w.healthy(true)
	u := w.open(nil)
	w.deploy(u, one)
	w.hooks()
	two := w.publish("2", func(m *deployments.Manifest) {
		m.Commands.Post = []deployments.Command{w.hook("post"), {Run: "exit 1"}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	u.at = func(point string) {
		if point == "before back health" {
			w.healthy(false)
			cancel()
		}
	}
	if err := u.Deploy(ctx, Request{Release: two}); !errors.Is(err, context.Canceled) {
		t.Fatalf("going back was to be cut off in health: %v", err)
	}
	w.wantHooks("pre 2", "post 2", "post 1")
	w.healthy(true)
	u = w.rebooted()
	var failed *Failed
	if err := u.Recover(t.Context()); !errors.As(err, &failed) || failed.Back != one {
		t.Fatalf("recover: %v", err)
	}
	w.wantHooks("post 1", "failure 2")
	w.wantVersion("1")
}

// While the machine shuts down services end and can't be started: a command that fails by that says nothing of its
// release.
func TestNoReleaseFailsInAShutdown(t *testing.T) {
	t.Parallel()
	for name, list := range map[string]func(*deployments.Commands) *[]deployments.Command{
		"pre":  func(c *deployments.Commands) *[]deployments.Command { return &c.Pre },
		"post": func(c *deployments.Commands) *[]deployments.Command { return &c.Post },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			w.deploy(u, w.publish("1", nil))
			p := w.publish("2", func(m *deployments.Manifest) {
				*list(&m.Commands) = []deployments.Command{{Run: "test -e " + w.path("healthy")}}
			})
			u.ending = func() bool { return true }
			var failed *Failed
			if err := u.Deploy(t.Context(), Request{Release: p}); err == nil || errors.As(err, &failed) {
				t.Fatalf("deploying in a shutdown: %v", err)
			}
			if s := u.State(); len(s.Quarantined) > 0 || !s.Unfinished {
				t.Errorf("the state is %+v", s)
			}
			w.healthy(true)
			u = w.rebooted()
			if err := u.Recover(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.deploy(u, p)
			w.wantVersion("2")
		})
	}
}

// What ran before a reboot is the release to run, but serves only once its checks say so again.
func TestProve(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.healthy(true)
	p := w.publish("1", w.check)
	u := w.open(nil)
	w.deploy(u, p)
	if !u.State().Proven {
		t.Error("a release that has just passed its checks isn't proven")
	}
	if u = w.reopen(nil); !u.State().Proven {
		t.Error("a restart of the agent alone takes the proof away")
	}
	w.hooks()
	w.healthy(false)
	u = w.rebooted()
	if s := u.State(); s.Proven || !s.Confirmed {
		t.Errorf("after a reboot the state is %+v", s)
	}
	w.deploy(u, p) // nothing to do: the release is the one
	if err := u.Prove(t.Context()); err == nil {
		t.Error("it is proven while its check fails")
	}
	if s := u.State(); s.Proven || !s.Confirmed || len(s.Quarantined) > 0 || s.Running != p {
		t.Errorf("after a check that failed the state is %+v", s)
	}
	w.healthy(true)
	if err := u.Prove(t.Context()); err != nil || !u.State().Proven {
		t.Errorf("it isn't proven while its check passes: %v", err)
	}
	w.wantHooks()
}
