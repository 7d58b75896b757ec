package deploy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

// What a restart finds is gone through again from the step that was cut off, and no further back.
func TestGoesOnFromTheStepThatWasCutOff(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		point     string
		cut, ends string
		hooks     []string
	}{
		{"before drain", "2", "1", nil},
		{"before pre", "2", "1", []string{"post 1"}},
		{"before switch", "2", "2", []string{"post 2", "success 2"}},
		{"before health", "2", "2", []string{"success 2"}},
		{"before undrain", "2", "2", []string{"success 2"}},
		{"before tidy", "2", "2", nil},
		{"before back", "bad", "1", []string{"post 1", "failure bad"}},
		{"before back health", "bad", "1", []string{"failure bad"}},
		{"before back undrain", "bad", "1", []string{"failure bad"}},
	} {
		for name, again := range map[string]func(u *Unit, ends deployments.Pointer) error{
			"recovered": func(u *Unit, _ deployments.Pointer) error { return u.Recover(t.Context()) },
			"deployed":  func(u *Unit, ends deployments.Pointer) error { return u.Deploy(t.Context(), Request{Release: ends}) },
		} {
			t.Run(c.point+" "+name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				releases := map[string]deployments.Pointer{"1": w.publish("1", nil), "2": w.publish("2", nil), "bad": w.publish("bad", fails)}
				u := w.open(nil)
				w.deploy(u, releases["1"])
				w.cut(u, releases[c.cut], c.point)
				w.hooks()
				u = w.open(nil)
				if err := again(u, releases[c.ends]); err != nil && !errors.As(err, new(*Failed)) {
					t.Fatal(err)
				}
				if s := u.State(); s.Running != releases[c.ends] || !s.Confirmed || s.Unfinished || s.Drained {
					t.Errorf("state: %+v", s)
				}
				if name == "deployed" && c.cut == "2" && c.ends == "1" {
					return // that supersedes it, with all of its own commands
				}
				w.wantHooks(c.hooks...)
			})
		}
	}
}

// A node that was out of service with nothing good to run is so after a restart.
func TestStaysDrainedThroughARestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.wantFailed(w.open(nil), w.publish("1", fails), deployments.Pointer{})
	var d drains
	w.reopen(func(c *Config) { c.Drain = d.drain })
	if got := d.take(); !slices.Equal(got, []bool{true}) {
		t.Errorf("drain: %v", got)
	}
}

// That a node can't be put back into service is no fault of the release.
func TestUndrainThatFailsIsTriedAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	away := errors.New("consul is away")
	u := w.open(nil)
	u.at = func(point string) {
		if point == "before undrain" {
			u.c.Drain = (&drains{err: away}).drain
		}
	}
	p := w.publish("1", nil)
	if err := u.Deploy(t.Context(), Request{Release: p}); !errors.Is(err, away) || errors.As(err, new(*Failed)) {
		t.Fatalf("got %v", err)
	}
	if s := u.State(); s.Running != p || !s.Drained || !s.Unfinished || len(s.Quarantined) > 0 {
		t.Errorf("state: %+v", s)
	}
	u.at, u.c.Drain = func(string) {}, nil
	w.deploy(u, p)
	if s := u.State(); s.Drained || s.Unfinished {
		t.Errorf("state: %+v", s)
	}
}

// The way back is tried until it holds: by its commands, if they fail, and by its checks. Meanwhile the unit is out
// of service and unhealthy, and people are told once that the release failed.
func TestWayBackIsTriedUntilItHolds(t *testing.T) {
	t.Parallel()
	for name, breaks := range map[string]string{
		"commands": "touch %[1]s; false", "checks": "rm %[2]s; false", "both": "touch %[1]s; rm %[2]s; false",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.healthy(true)
			one := w.publish("1", func(m *deployments.Manifest) {
				w.check(m)
				m.Commands.Post = append(m.Commands.Post, deployments.Command{Run: "test ! -e " + w.path("limit")})
			})
			var d drains
			u := w.open(func(c *Config) { c.Drain = d.drain })
			w.deploy(u, one)
			w.hooks()
			d.take()
			two := w.publish("2", func(m *deployments.Manifest) {
				m.Commands.Post = []deployments.Command{{Run: "cd " + w.path() + "; " + fmt.Sprintf(breaks, w.path("limit"), w.path("healthy"))}}
			})
			err := u.Deploy(t.Context(), Request{Release: two})
			if err == nil || errors.As(err, new(*Failed)) {
				t.Fatalf("got %v", err)
			}
			for range maxCutOff + 1 { // the agent's restart in between changes nothing, and is no cut-off
				s := u.State()
				if s.Running != one || s.Confirmed || s.Proven || !s.Drained || !s.Unfinished || s.RecoversTo != one ||
					!s.Health.Unhealthy || s.Health.Reason != deployments.ReasonUnhealthy || s.Health.Facts["error"] == "" {
					t.Errorf("state: %+v", s)
				}
				w.wantVersion("1")
				if got := d.take(); slices.Contains(got, false) {
					t.Errorf("drain: %v", got)
				}
				u = w.open(func(c *Config) { c.Drain = d.drain })
				if err := u.Recover(t.Context()); err == nil || errors.As(err, new(*Failed)) {
					t.Fatalf("got %v", err)
				}
			}
			if err := os.RemoveAll(w.path("limit")); err != nil {
				t.Fatal(err)
			}
			w.healthy(true)
			var failed *Failed
			if err := u.Recover(t.Context()); !errors.As(err, &failed) || failed.Release != two || failed.Back != one {
				t.Fatalf("got %v", err)
			}
			if s := u.State(); s.Running != one || !s.Confirmed || s.Drained || s.Unfinished || s.Health.Unhealthy {
				t.Errorf("state: %+v", s)
			}
			hooks := strings.Join(w.hooks(), ",")
			if n := strings.Count(hooks, "failure 2"); n != 1 || strings.Count(hooks, "post 1") < maxCutOff+3 {
				t.Errorf("hooks: %s", hooks)
			}
		})
	}
}

// A release is nothing to go back to from itself.
func TestNothingToGoBackTo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.wantFailed(w.open(nil), w.publish("1", fails), deployments.Pointer{})
	if s := w.open(nil).State(); !s.Drained || s.Unfinished {
		t.Errorf("nothing is healthy, and it is in service: %+v", s)
	}
}

func TestRetryNamesOneOrAll(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	good := w.publish("1", nil)
	w.deploy(u, good)
	two, three := w.publish("2", fails), w.publish("3", fails)
	w.wantFailed(u, two, good)
	w.wantFailed(u, three, good)
	for _, step := range []struct {
		retry deployments.Digest
		left  []deployments.Digest
	}{{two.Digest, []deployments.Digest{three.Digest}}, {deployments.Digest{}, nil}} {
		if err := u.Retry(step.retry); err != nil {
			t.Fatal(err)
		}
		if got := w.open(nil).State().Quarantined; !slices.Equal(got, step.left) {
			t.Errorf("in quarantine: %v, want %v", got, step.left)
		}
	}
}

// What comes after a crash of the agent ends the commands that this one left, before any other runs.
func TestEndsLeftovers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		point string
		again func(w *world, u *Unit) error
	}{
		"superseded": {"before post", func(w *world, u *Unit) error { return u.Deploy(t.Context(), Request{Release: w.publish("2", nil)}) }},
		"finished":   {"before post", func(_ *world, u *Unit) error { return u.Recover(t.Context()) }},
		"taken back": {"before pre", func(_ *world, u *Unit) error { return u.Recover(t.Context()) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			w.cut(u, w.publish("1", nil), c.point)
			left := exec.Command("sleep", "60")
			left.Env = append(os.Environ(), "KEDGE_RUN="+u.j.Deployment.Run)
			if err := left.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- left.Wait() }()
			if err := c.again(w, w.open(nil)); err != nil {
				t.Error(err)
			}
			select {
			case <-ended:
			case <-time.After(10 * time.Second):
				left.Process.Kill()
				t.Error("a command of what was cut off still runs")
			}
		})
	}
}

// A deployment that is called off before its switch leaves what ran when it began, proven or not.
func TestCalledOffLeavesWhatRan(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	w.deploy(u, w.publish("1", nil))
	two := w.publish("2", nil)
	w.cut(u, two, "before post")
	u = w.open(nil)
	ctx, cancel := context.WithCancel(t.Context())
	u.at = func(point string) {
		if point == "before pre" {
			cancel()
		}
	}
	if err := u.Deploy(ctx, Request{Release: w.publish("3", nil)}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	w.wantVersion("2")
	if s := u.State(); s.Running != two || s.Unfinished || len(s.Quarantined) > 0 {
		t.Errorf("state: %+v", s)
	}
}

// Failure commands run for what fails before anything is deployed, too: once for each request, and not when it was
// called off.
func TestFailureCommandsOfWhatCannotBeStaged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	p := w.publish("1", func(m *deployments.Manifest) {
		m.Checksum = strings.Repeat("0", 64)
		m.Commands.Failure = []deployments.Command{
			{Run: `echo "failure $KEDGE_ERROR" >> ` + w.path("hooks") + "; cat > " + w.path("stdin")},
			{Run: "echo once >> " + w.path("hooks"), Once: true},
		}
	})
	stage := func(key string) {
		t.Helper()
		err := u.Stage(t.Context(), p)
		if !errors.Is(err, deployments.ErrDigest) {
			t.Fatalf("got %v", err)
		}
		called, cancel := context.WithCancel(t.Context())
		cancel()
		for _, ctx := range []context.Context{called, t.Context()} {
			if told := u.StageFailed(ctx, Request{Release: p, Key: key}, err); !errors.Is(told, deployments.ErrDigest) {
				t.Fatalf("got %v", told)
			}
		}
		u = w.open(nil)
	}
	stage("1")
	stage("1")
	if hooks := w.hooks(); len(hooks) != 2 || !strings.Contains(hooks[0], "wrong digest") {
		t.Errorf("hooks: %q", hooks)
	}
	if log, err := os.ReadFile(w.path("stdin")); err != nil || !strings.Contains(string(log), "could not be staged") {
		t.Errorf("stdin: %q, %v", log, err)
	}
	stage("2")
	if hooks := w.hooks(); len(hooks) != 2 || hooks[1] != "once" {
		t.Errorf("hooks of another request: %q", hooks)
	}
	if s := u.State(); s.Drained || s.Unfinished || len(s.Quarantined) > 0 {
		t.Errorf("state: %+v", s)
	}
}
