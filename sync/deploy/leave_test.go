package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/deployments"
)

var leaveStrategies = []deployments.Strategy{
	deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv,
}

// movesAway has a release of strategy mv keep what was at dest before kedge, as its pre commands have to.
func (w *world) movesAway(strategy deployments.Strategy) func(*deployments.Manifest) {
	return func(m *deployments.Manifest) {
		if m.Strategy = strategy; strategy == deployments.StrategyMv {
			run := "if test -e DEST.old; then rm -rf DEST; else mv DEST DEST.old; fi"
			m.Commands.Pre = []deployments.Command{{Run: strings.ReplaceAll(run, "DEST", w.dest())}}
		}
	}
}

// wantLeft wants what was there before kedge to serve, and nothing to be left of what was kept of it.
func (w *world) wantLeft(u *Unit) {
	w.t.Helper()
	w.wantForeign()
	s := u.State()
	if !s.Running.IsZero() || !s.LastGood.IsZero() || s.Restored.IsZero() || s.Leavable || s.Leaving || s.Drained ||
		s.Unfinished || len(s.Quarantined) > 0 {
		w.t.Errorf("state: %+v", s)
	}
	w.wantNothingKept(u)
}

func (w *world) wantNothingKept(u *Unit) {
	w.t.Helper()
	if left, _ := os.ReadDir(u.beforeDir()); len(left) > 0 {
		w.t.Errorf("nobody needs %v any more", left)
	}
}

// From a first release that runs well, and from one that replaced it, a unit goes back to what was there before: out of
// service meanwhile, and with the failure commands of what it leaves. Then another first release can come, which goes
// back by itself if it fails; once one stays, what was kept is given up.
func TestLeave(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			var d drains
			var inService []string // the hooks that had run by then
			drain := func(ctx context.Context, on bool) error {
				if !on {
					inService = w.hooks()
				}
				return d.drain(ctx, on)
			}
			u := w.open(func(c *Config) { c.Drain = drain })
			first := func(p deployments.Pointer) {
				t.Helper()
				if err := u.Deploy(t.Context(), Request{Release: p, MayLeave: true}); err != nil {
					t.Fatal(err)
				}
			}
			one, two := w.publish("1", w.movesAway(strategy)), w.publish("2", w.movesAway(strategy))
			first(one)
			first(two)
			w.wantVersion("2")
			u = w.reopen(func(c *Config) { c.Drain = drain })
			if s := u.State(); !s.Leavable || !s.Restored.IsZero() {
				t.Errorf("state: %+v", s)
			}
			d.take()
			w.hooks()
			if err := u.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantLeft(u)
			w.wantHooks()
			if want := []string{"failure 2"}; !slices.Equal(inService, want) {
				t.Errorf("before it was in service it ran %q, want %q", inService, want)
			}
			if got := d.take(); !slices.Equal(got, []bool{true, false}) {
				t.Errorf("drain: %v", got)
			}
			w.wantFailed(u, w.publish("3", func(m *deployments.Manifest) {
				w.movesAway(strategy)(m)
				fails(m)
			}), deployments.Pointer{})
			if !slices.Contains(inService, "failure 3") {
				t.Errorf("before it was in service it ran %q", inService)
			}
			w.wantForeign()
			first(two)
			if s := u.State(); !s.Leavable || !s.Restored.IsZero() {
				t.Errorf("state: %+v", s)
			}
			if err := u.ForgetBefore(); err != nil {
				t.Fatal(err)
			}
			w.wantNothingKept(u)
			if err := u.Leave(t.Context()); err != nil || u.State().Leavable {
				t.Errorf("there is nothing to go back to: %v, %+v", err, u.State())
			}
			w.wantVersion("2")
		})
	}
}

// A deployment that hangs in its checks is left for what was there before, without an end of it.
func TestLeaveWhatHangs(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			u := w.open(nil)
			p := w.publish("1", func(m *deployments.Manifest) {
				w.movesAway(strategy)(m)
				check := deployments.Check{Exec: "touch " + w.path("asked") + "; false"}
				m.Health = deployments.Health{Timeout: time.Hour, Checks: []deployments.Check{check}}
			})
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() { ended <- u.Deploy(ctx, Request{Release: p, MayLeave: true}) }()
			until(t, func() bool { return exists(w.path("asked")) })
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) || !u.State().Leavable {
				t.Fatalf("%v, %+v", err, u.State())
			}
			if err := u.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantLeft(u)
		})
	}
}

// A release that replaced the first one, and fails, goes back to that. If the first one isn't healthy any more, it is
// left, too, for what was there before; if that is gone, the first one is tried until it is healthy.
func TestLeaveFromAWayBackThatDoesNotHold(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			u := w.open(nil)
			sick := w.path("sick")
			one := w.publish("1", func(m *deployments.Manifest) {
				w.movesAway(strategy)(m)
				m.Commands.Post = []deployments.Command{{Run: "! test -e " + sick}}
			})
			two := w.publish("2", func(m *deployments.Manifest) {
				w.movesAway(strategy)(m)
				m.Commands.Post = []deployments.Command{{Run: "touch " + sick + "; false"}}
			})
			unserved := func() {
				t.Helper()
				if err := u.Deploy(t.Context(), Request{Release: one, MayLeave: true}); err != nil {
					t.Fatal(err)
				}
				err := u.Deploy(t.Context(), Request{Release: two, MayLeave: true})
				if s := u.State(); err == nil || !s.Health.Unhealthy || s.Running != one || !s.Leavable {
					t.Fatalf("%v, %+v", err, s)
				}
				w.hooks()
			}
			unserved()
			if err := u.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantForeign()
			s := u.State()
			if !s.Running.IsZero() || s.Restored != one.Digest || s.Unfinished || s.Drained || s.Health.Unhealthy ||
				!slices.Equal(s.Quarantined, []deployments.Digest{two.Digest}) {
				t.Errorf("state: %+v", s)
			}
			if hooks := w.hooks(); !slices.Contains(hooks, "failure 1") {
				t.Errorf("what was there before is started by the commands %q", hooks)
			}
			w.wantNothingKept(u)

			if err := errors.Join(os.Remove(sick), u.Retry(two.Digest)); err != nil {
				t.Fatal(err)
			}
			unserved()
			kept, err := filepath.Glob(w.dest() + ".releases/adopted-*")
			if err != nil {
				t.Fatal(err)
			}
			for _, dir := range append(kept, w.dest()+".old", u.beforeDir()) {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			if err := u.Leave(t.Context()); err == nil || !u.State().Health.Unhealthy || u.State().Leavable {
				t.Errorf("%v, %+v", err, u.State())
			}
			w.wantVersion("1")
			if err := errors.Join(os.Remove(sick), u.Recover(t.Context())); err != nil {
				t.Fatal(err)
			}
			if s := u.State(); s.Running != one || !s.Confirmed || s.Drained || s.Unfinished || s.Health.Unhealthy {
				t.Errorf("state: %+v", s)
			}
		})
	}
}

// What was there before, and was removed since, can't be gone back to: the unit stays on what it runs, in service.
func TestLeaveForWhatIsGone(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			u := w.open(nil)
			p := w.publish("1", w.movesAway(strategy))
			if err := u.Deploy(t.Context(), Request{Release: p, MayLeave: true}); err != nil {
				t.Fatal(err)
			}
			kept, err := filepath.Glob(w.dest() + ".releases/adopted-*")
			if err != nil {
				t.Fatal(err)
			}
			for _, dir := range append(kept, w.dest()+".old", u.beforeDir()) {
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
			}
			if err := u.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantVersion("1")
			s := u.State()
			if s.Running != p || !s.Confirmed || s.Drained || s.Unfinished || s.Leavable || !s.Restored.IsZero() {
				t.Errorf("state: %+v", s)
			}
		})
	}
}

// If Leave has changed a part of dest when another deployment supersedes it, and that goes back, dest is whole again.
func TestGoesBackBehindALeaveThatStopped(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies[1:] { // one rename is no part
		for _, stopped := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/stopped %v", strategy, stopped), func(t *testing.T) {
				t.Parallel()
				goesBackBehindALeaveThatStopped(t, strategy, stopped)
			})
		}
	}
}

func goesBackBehindALeaveThatStopped(t *testing.T, strategy deployments.Strategy, stopped bool) {
	w := newWorld(t)
	w.foreign((*world).tree)
	u := w.open(nil)
	one := w.publish("1", w.movesAway(strategy))
	if err := u.Deploy(t.Context(), Request{Release: one, MayLeave: true}); err != nil {
		t.Fatal(err)
	}
	u.at = func(point string) {
		if point == "before back" {
			if err := os.Remove(filepath.Join(w.dest(), "a")); err != nil {
				t.Error(err)
			}
			panic("killed")
		}
	}
	func() {
		defer func() { _ = recover() }()
		_ = u.Leave(t.Context())
	}()
	u = w.open(nil)
	two := w.publish("2", func(m *deployments.Manifest) {
		m.Strategy, m.Commands.Pre = strategy, []deployments.Command{{Run: "false"}}
	})
	if stopped { // as it waits for the drain
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		u.at = func(point string) {
			if point == "before drain" {
				cancel()
			}
		}
		if err := u.Deploy(ctx, Request{Release: two}); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
	} else {
		w.wantFailed(u, two, one)
	}
	w.wantVersion("1")
	if s := u.State(); s.Running != one || s.Drained || s.Unfinished {
		t.Errorf("state: %+v", s)
	}
}

// Wherever the first release, its successor and the way back to what was there before are killed, it ends there.
func TestLeaveKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, strategy := range leaveStrategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.foreign((*world).tree)
			s := story{world: w}
			releases := []deployments.Pointer{w.publish("2", w.movesAway(strategy))}
			if strategy == deployments.StrategyRsync { // which has the most to keep
				releases = slices.Insert(releases, 0, w.publish("1", w.movesAway(strategy)))
			}
			file := s.planned(plan{Root: w.root, Die: true, CutOff: 1000, Leave: true, Releases: releases})
			stop, watched := make(chan struct{}), make(chan struct{})
			go func() {
				defer close(watched)
				if strategy == deployments.StrategyRelease { // the others aren't atomic
					s.watch(stop, new(atomic.Int64))
				}
			}()
			cuts := 0
			for ; ; cuts++ {
				cmd := s.start(file)
				err := cmd.Wait()
				exit := new(exec.ExitError)
				if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
					continue
				}
				if err != nil {
					t.Errorf("%v\n%s", err, cmd.Stderr)
				}
				break
			}
			close(stop)
			<-watched
			w.wantLeft(w.open(nil))
			points, err := os.ReadFile(w.path("points"))
			if err != nil {
				t.Fatal(err)
			}
			for _, point := range []string{
				"leaving", "after drain", "before back", "after back", "after back undrain", "after failure",
			} {
				if !strings.Contains(string(points), "leave "+point+"\n") {
					t.Errorf("it was not killed at %q: %s", point, points)
				}
			}
			if hooks := w.hooks(); !slices.Contains(hooks, "failure 2") {
				t.Errorf("failure commands did not run: %q", hooks)
			}
			t.Logf("survived %d cuts", cuts)
		})
	}
}
