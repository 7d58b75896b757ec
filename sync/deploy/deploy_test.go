package deploy

import (
	"cmp"
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/renameio/v2"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
)

func TestDeployUpdateAndNothingToDo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("1", nil), w.publish("2", nil)
	var d drains
	var states []deployments.State
	change := func(c *Config) {
		c.Drain = d.drain
		c.Progress = func(s deployments.State, _ meter.Progress) { states = append(states, s) }
	}
	u := w.open(change)

	w.deploy(u, one)
	w.wantVersion("1")
	w.wantHooks("pre 1", "post 1", "success 1")
	if got := slices.Compact(states); !slices.Equal(got, []deployments.State{deployments.StateFetching, deployments.StateSwitching}) {
		t.Errorf("progress: %q", got)
	}
	if s := u.State(); s.Running != one || s.LastGood != one || !s.Confirmed || s.Version != "1" || s.Drained || s.Unfinished {
		t.Errorf("state: %+v", s)
	}
	if got := d.take(); !slices.Equal(got, []bool{true, false}) {
		t.Errorf("drain: %v", got)
	}

	w.deploy(u, one)
	w.wantHooks()
	w.deploy(u, two)
	w.wantVersion("2")
	w.wantHooks("pre 2", "post 2", "success 2")

	u = w.reopen(change)
	if s := u.State(); s.Running != two || s.LastGood != two || s.Unfinished {
		t.Errorf("after a restart: %+v", s)
	}
	w.deploy(u, two)
	w.wantHooks()

	// Somebody takes the link away: the same state leads to the same place.
	if err := os.Remove(w.dest()); err != nil {
		t.Fatal(err)
	}
	w.deploy(u, two)
	w.wantVersion("2")
}

func TestCommandsAreTold(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	tell := func(m *deployments.Manifest) {
		m.Commands = deployments.Commands{Post: []deployments.Command{{
			Run: `echo "$KEDGE_STEP $KEDGE_UNIT $KEDGE_VERSION $KEDGE_COMMIT $(cat $KEDGE_RELEASE/a) $(cat $KEDGE_PREVIOUS/a)" >> ` + w.path("hooks"),
		}}}
	}
	u := w.open(nil)
	w.deploy(u, w.publish("1", tell))
	w.deploy(u, w.publish("2", tell))
	got := w.hooks()
	if want := "post app 2 c0ffee 2 1"; len(got) != 2 || got[1] != want {
		t.Errorf("got %q, want the second to be %q", got, want)
	}
}

func TestFailureGoesBack(t *testing.T) {
	t.Parallel()
	fail := deployments.Command{Run: "echo the reason; exit 7"}
	for step, breakIt := range map[string]func(*deployments.Manifest){
		"pre":  func(m *deployments.Manifest) { m.Commands.Pre = append(m.Commands.Pre, fail) },
		"post": func(m *deployments.Manifest) { m.Commands.Post = append(m.Commands.Post, fail) },
		"health": func(m *deployments.Manifest) {
			m.Health = deployments.Health{Timeout: 500 * time.Millisecond, Checks: []deployments.Check{{Exec: fail.Run, Interval: 20 * time.Millisecond}}}
		},
	} {
		for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
			t.Run(step+" "+string(strategy), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				set := func(m *deployments.Manifest) { m.Strategy = strategy }
				good := w.publish("1", set)
				bad := w.publish("2", func(m *deployments.Manifest) {
					set(m)
					breakIt(m)
					m.Commands.Failure = []deployments.Command{{Run: `cat > ` + w.path("stdin") + `; echo "failure $KEDGE_ERROR" >> ` + w.path("hooks")}}
				})
				var d drains
				u := w.open(func(c *Config) { c.Drain = d.drain })
				w.deploy(u, good)
				w.hooks()
				d.take()

				err := u.Deploy(t.Context(), Request{Release: bad})
				var failed *Failed
				if !errors.As(err, &failed) || failed.Release != bad || failed.Back != good || failed.Step != step || !strings.Contains(err.Error(), "the reason") {
					t.Fatalf("got %v", err)
				}
				reason := map[string]deployments.Reason{"health": deployments.ReasonUnhealthy}
				if want := cmp.Or(reason[step], deployments.ReasonQuarantined); failed.Reason != want || failed.Facts["step"] != step ||
					(failed.Facts["check"] != "") != (step == "health") || !strings.Contains(failed.Facts["error"], "the reason") {
					t.Errorf("reason %s %v, want %s", failed.Reason, failed.Facts, want)
				}
				w.wantVersion("1")
				hooks := w.hooks()
				want := map[string][]string{"pre": {"pre 2", "post 1"}, "post": {"pre 2", "post 2", "post 1"}, "health": {"pre 2", "post 2", "post 1"}}[step]
				if n := len(want); len(hooks) != n+1 || !slices.Equal(hooks[:n], want) || !strings.Contains(hooks[n], "the reason") {
					t.Errorf("hooks: %q, want %q and failure with the reason", hooks, want)
				}
				log, err := os.ReadFile(w.path("stdin"))
				if err != nil || !strings.Contains(string(log), "deployment failed") || !strings.Contains(string(log), "the reason") {
					t.Errorf("failure's stdin: %v\n%s", err, log)
				}
				if got := d.take(); !slices.Equal(got, []bool{true, false}) {
					t.Errorf("drain: %v", got)
				}

				u = w.reopen(nil)
				if s := u.State(); s.Running != good || s.LastGood != good || !s.Confirmed || s.Drained || !slices.Contains(s.Quarantined, bad.Digest) {
					t.Errorf("state: %+v", s)
				}
				if err := u.Deploy(t.Context(), Request{Release: bad}); !errors.Is(err, ErrQuarantined) {
					t.Errorf("again: %v", err)
				}
				w.wantHooks()
				w.deploy(u, good) // what runs already; no reason to try the bad one again
				if err := u.Deploy(t.Context(), Request{Release: bad}); !errors.Is(err, ErrQuarantined) {
					t.Errorf("again: %v", err)
				}
				if err := u.Retry(bad.Digest); err != nil {
					t.Fatal(err)
				}
				if err := u.Deploy(t.Context(), Request{Release: bad, Key: "generation 7"}); !errors.As(err, &failed) {
					t.Errorf("after retry: %v", err)
				}
				w.deploy(u, w.publish("3", set))
				w.wantVersion("3")
				if s := u.State(); !slices.Equal(s.Quarantined, []deployments.Digest{bad.Digest}) || s.Failures[0].Key != "generation 7" {
					t.Errorf("another release was confirmed, and of the one that failed is left: %+v", s.Failures)
				}
			})
		}
	}
}

func TestFirstReleaseFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("1", func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} })
	var d drains
	u := w.open(func(c *Config) { c.Drain = d.drain })
	var failed *Failed
	if err := u.Deploy(t.Context(), Request{Release: p}); !errors.As(err, &failed) || !failed.Back.IsZero() {
		t.Fatalf("got %v", err)
	}
	w.wantVersion("1") // whole, though out of service
	if s := u.State(); !s.Drained || s.Confirmed || !s.LastGood.IsZero() {
		t.Errorf("state: %+v", s)
	}
	w.deploy(u, w.publish("2", nil))
	if s := u.State(); s.Drained {
		t.Errorf("state: %+v", s)
	}
	if got := d.take(); !slices.Equal(got, []bool{true, true, false}) {
		t.Errorf("drain: %v", got)
	}
}

func TestTransientTroubleIsNoFault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("1", nil), w.publish("2", nil)
	var d drains
	u := w.open(func(c *Config) { c.Drain = d.drain })
	w.deploy(u, one)
	w.hooks()
	archive := w.path("objects", "2.tar")
	if err := os.Rename(archive, archive+".away"); err != nil {
		t.Fatal(err)
	}
	var failed *Failed
	if err := u.Deploy(t.Context(), Request{Release: two}); err == nil || errors.As(err, &failed) {
		t.Errorf("storage is away: %v", err)
	}
	if err := os.Rename(archive+".away", archive); err != nil {
		t.Fatal(err)
	}
	d.take()
	d.err = errors.New("consul is away")
	if err := u.Deploy(t.Context(), Request{Release: two}); !errors.Is(err, d.err) || errors.As(err, &failed) {
		t.Errorf("drain doesn't work: %v", err)
	}
	w.wantHooks()
	w.wantVersion("1")
	if s := u.State(); s.Running != one || len(s.Quarantined) > 0 {
		t.Errorf("state: %+v", s)
	}
	d.err = nil
	w.deploy(u, two)
	w.wantVersion("2")
	if s := u.State(); s.Drained || s.Unfinished {
		t.Errorf("state: %+v", s)
	}
}

// until waits for a hook's mark.
func until(t *testing.T, ok func() bool) {
	t.Helper()
	for begin := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > 20*time.Second {
			t.Error("waited in vain")
			return
		}
	}
}

func TestStopBeforeTheSwitch(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	slow := deployments.Command{Run: "touch " + w.path("slow") + "; exec sleep 1000"}
	one := w.publish("1", nil)
	for name, change := range map[string]func(*deployments.Manifest){
		"drain": func(m *deployments.Manifest) { m.Drain = time.Hour },
		"pre":   func(m *deployments.Manifest) { m.Commands.Pre = []deployments.Command{slow} },
	} {
		var d drains
		u := w.reopen(func(c *Config) { c.Drain = d.drain })
		w.deploy(u, one)
		w.hooks()
		d.take()
		p := w.publish(name, change)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			until(t, func() bool { return exists(w.path("slow")) || name == "drain" && u.State().Drained })
			cancel()
		}()
		err := u.Deploy(ctx, Request{Release: p})
		if failed := new(Failed); !errors.Is(err, context.Canceled) || errors.As(err, &failed) {
			t.Errorf("%s: %v", name, err)
		}
		w.wantVersion("1")
		if name == "pre" {
			w.wantHooks("post 1") // pre may have stopped what runs
		} else {
			w.wantHooks()
		}
		if s := u.State(); s.Running != one || !s.Confirmed || s.Drained || s.Unfinished || len(s.Quarantined) > 0 {
			t.Errorf("%s: state: %+v", name, s)
		}
		if got := d.take(); len(got) == 0 || got[len(got)-1] {
			t.Errorf("%s: drain: %v", name, got)
		}
		os.Remove(w.path("slow"))
	}
}

func TestStopAfterTheSwitch(t *testing.T) {
	t.Parallel()
	// Healthy only once somebody says so.
	setup := func(t *testing.T) (w *world, u *Unit, two deployments.Pointer) {
		w = newWorld(t)
		u = w.open(nil)
		w.deploy(u, w.publish("1", nil))
		two = w.publish("2", func(m *deployments.Manifest) {
			m.Health = deployments.Health{Timeout: time.Minute, Checks: []deployments.Check{{Exec: "test -e " + w.path("ok"), Interval: 10 * time.Millisecond}}}
		})
		w.hooks()
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			until(t, func() bool { return u.State().Running == two })
			cancel()
		}()
		if err := u.Deploy(ctx, Request{Release: two}); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		if s := u.State(); !s.Unfinished || s.Running != two || s.Confirmed {
			t.Errorf("state: %+v", s)
		}
		w.wantVersion("2")
		return w, u, two
	}
	ok := func(t *testing.T, w *world) {
		if err := os.WriteFile(w.path("ok"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Run("recover finishes it", func(t *testing.T) {
		t.Parallel()
		w, _, two := setup(t)
		ok(t, w)
		u := w.reopen(nil)
		if s := u.State(); s.Running != two || !s.Confirmed || s.Unfinished || s.Drained {
			t.Errorf("state: %+v", s)
		}
		if got := w.hooks(); got[len(got)-1] != "success 2" {
			t.Errorf("hooks: %q", got)
		}
	})
	t.Run("deploy finishes it", func(t *testing.T) {
		t.Parallel()
		w, u, two := setup(t)
		ok(t, w)
		w.deploy(u, two)
		if s := u.State(); s.Running != two || !s.Confirmed || s.Unfinished || s.Drained {
			t.Errorf("state: %+v", s)
		}
	})
	t.Run("another release supersedes it", func(t *testing.T) {
		t.Parallel()
		w, u, two := setup(t)
		w.hooks()
		bad := w.publish("3", func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} })
		var failed *Failed
		if err := u.Deploy(t.Context(), Request{Release: bad}); !errors.As(err, &failed) || failed.Back == two {
			t.Fatalf("got %v", err) // it goes back to what is good, not to what was never proved
		}
		w.wantVersion("1")
		w.wantHooks("pre 3", "post 1", "failure 3")
		ok(t, w)
		w.deploy(u, two)
		w.wantVersion("2")
	})
}

// TestStopOnTheWayBack leaves a failed release live for a moment; nothing that comes then may end on it.
func TestStopOnTheWayBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	slow := "; test ! -e " + w.path("block") + " || { touch " + w.path("slow") + "; exec sleep 1000; }"
	good := w.publish("1", func(m *deployments.Manifest) { m.Commands.Post[0].Run += slow })
	bad := w.publish("2", func(m *deployments.Manifest) {
		m.Commands.Post = []deployments.Command{{Run: "touch " + w.path("block") + "; false"}}
	})
	next := w.publish("3", func(m *deployments.Manifest) { m.Commands.Pre[0].Run += slow })
	u := w.open(nil)
	w.deploy(u, good)
	stopped := func(p deployments.Pointer) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			until(t, func() bool { return exists(w.path("slow")) })
			os.Remove(w.path("block"))
			cancel()
		}()
		if err := u.Deploy(ctx, Request{Release: p}); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
		os.Remove(w.path("slow"))
	}
	stopped(bad)
	if s := u.State(); !s.Unfinished || !slices.Contains(s.Quarantined, bad.Digest) {
		t.Errorf("state: %+v", s)
	}
	if err := os.WriteFile(w.path("block"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stopped(next)
	w.wantVersion("1")
	if s := u.State(); s.Running != good || s.LastGood != good || !s.Confirmed || s.Unfinished || s.Drained {
		t.Errorf("state: %+v", s)
	}
	w.deploy(u, next)
	w.wantVersion("3")
}

func TestBounds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	objects := "file://" + w.path("objects")
	p := w.publish("1", func(m *deployments.Manifest) { m.Commands.Pre[0].User = "nobody"; m.Commands.Pre[0].Run = "true" })
	health := w.publish("2", func(m *deployments.Manifest) {
		m.Commands = deployments.Commands{}
		m.Health.Checks = []deployments.Check{{Exec: "true"}}
	})
	elsewhere := w.publish("3", func(m *deployments.Manifest) { m.Src = "file:///elsewhere/app.tar" })
	for _, test := range []struct {
		release deployments.Pointer
		bounds  policy.Bounds
		want    string // in the error; empty: allowed
	}{
		{p, policy.Bounds{Sources: []string{objects + "x", objects[:len(objects)-1]}}, "is not from"},
		{elsewhere, policy.Bounds{Sources: []string{objects}}, "file:///elsewhere/app.tar is not from"},
		{p, policy.Bounds{Dests: []string{w.path("sr"), w.path("srv", "app", "x")}}, "is outside of"},
		{p, policy.Bounds{NoCommands: true}, "none are allowed"},
		{p, policy.Bounds{Users: []string{"daemon"}}, "user nobody is not among those allowed: daemon"},
		{p, policy.Bounds{Users: []string{"nobody"}}, "agent's own user"},
		{health, policy.Bounds{NoCommands: true}, "none are allowed"},
		{health, policy.Bounds{Sources: []string{objects + "/"}, Dests: []string{w.path("srv")}}, ""},
	} {
		w := &world{t, w.root}
		u := w.open(func(c *Config) { c.Bounds = test.bounds; c.Dir = t.TempDir() })
		err := u.Deploy(t.Context(), Request{Release: test.release})
		if test.want == "" {
			if err != nil {
				t.Errorf("%+v: %v", test.bounds, err)
			}
			continue
		}
		if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %q", test.bounds, err, test.want)
		}
		if exists(w.dest()) || exists(w.dest()+".releases") {
			t.Errorf("%+v: something was staged", test.bounds)
		}
		w.wantHooks()
	}
}

func TestTrust(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("1", nil)
	unsigned := errors.New("no signature")
	u := w.open(func(c *Config) {
		c.Trust = func(_ context.Context, got deployments.Pointer, raw []byte) error {
			if want, err := os.ReadFile(w.path("objects", "1.yaml")); err != nil || got != p || string(raw) != string(want) {
				t.Errorf("asked about %s: %q", got, raw)
			}
			return unsigned
		}
	})
	for _, try := range []func() error{
		func() error { return u.Deploy(t.Context(), Request{Release: p}) },
		func() error { return u.Stage(t.Context(), p) },
	} {
		if err := try(); !errors.Is(err, unsigned) {
			t.Errorf("got %v", err)
		}
	}
	if exists(w.dest()) || exists(w.dest()+".releases") {
		t.Error("something was staged")
	}
	wrong := p
	wrong.Digest[0]++
	switch err := w.open(nil).Deploy(t.Context(), Request{Release: wrong}); {
	case !errors.Is(err, deployments.ErrDigest):
		t.Errorf("a wrong digest: %v", err)
	case strings.Contains(err.Error(), p.Digest.String()[:12]): // who may pin could guess files that root alone can read
		t.Errorf("a wrong digest: the right one is told: %v", err)
	}
}

func TestDamagedJournal(t *testing.T) {
	t.Parallel()
	for name, data := range map[string]string{
		"zeros": strings.Repeat("\x00", 500), "empty": "", "half": `{"format": 1, "running": "file:///`,
		"newer": `{"format": 2}`, "unknown step": `{"format": 1, "deployment": {"step": "dance"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			one, two := w.publish("1", nil), w.publish("2", nil)
			u := w.open(nil)
			w.deploy(u, one)
			w.deploy(u, two)
			journal := w.path("state", journalFile)
			if err := os.WriteFile(journal, []byte(data), 0o600); err != nil {
				t.Fatal(err)
			}
			u = w.reopen(nil)
			if s := u.State(); s.Running != two || s.Confirmed || s.Unfinished {
				t.Errorf("state: %+v", s)
			}
			if kept, err := os.ReadFile(journal + ".bad"); err != nil || string(kept) != data {
				t.Errorf("the damaged journal was not kept: %v", err)
			}
			w.hooks()
			w.deploy(u, two) // proves it anew
			w.wantHooks("pre 2", "post 2", "success 2")
			w.wantVersion("2")
		})
	}
}

// A kill while a file is written aside leaves that: it goes when the unit is opened, and nothing else does.
func TestWhatAKillLeftOfTheJournal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.deploy(w.open(nil), w.publish("1", nil))
	was, err := os.ReadDir(w.path("state"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renameio.NewPendingFile(w.path("state", journalFile), renameio.WithTempDir(w.path("state"))); err != nil {
		t.Fatal(err)
	}
	w.open(nil)
	if is, err := os.ReadDir(w.path("state")); err != nil || len(is) != len(was) {
		t.Errorf("the state holds %v, %v; it held %v", is, err, was)
	}
}

func TestDestThatIsSwitchedByHandIsNoSuccess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	w.deploy(u, w.publish("1", nil))
	two := w.publish("2", func(m *deployments.Manifest) {
		m.Commands.Post = []deployments.Command{{Run: "ln -sfn $KEDGE_PREVIOUS $KEDGE_DEST"}}
	})
	var failed *Failed
	if err := u.Deploy(t.Context(), Request{Release: two}); !errors.As(err, &failed) || failed.Step != "health" || !strings.Contains(err.Error(), "no longer resolves") {
		t.Errorf("got %v", err)
	}
	w.wantVersion("1")
}

func TestJournalThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("1", nil), w.publish("2", nil)
	u := w.open(nil)
	w.deploy(u, one)
	w.hooks()
	// Nothing can be written where a file is in the directory's place: not by root, either.
	state := w.path("state")
	if err := os.Rename(state, state+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(state, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var failed *Failed
	if err := u.Deploy(t.Context(), Request{Release: two}); err == nil || errors.As(err, &failed) {
		t.Errorf("got %v", err)
	}
	w.wantHooks()
	w.wantVersion("1")
	if err := os.Remove(state); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(state+".away", state); err != nil {
		t.Fatal(err)
	}
	w.deploy(u, two)
	w.wantVersion("2")
}

// Bounds of users hold for a tree's group and for owners that only the archive names.
func TestBoundedUsersOwnTheTree(t *testing.T) {
	t.Parallel()
	b := policy.Bounds{Users: []string{"daemon", "4321"}}
	for owner, allowed := range map[string]bool{
		"": true, "daemon": true, "daemon:daemon": true, "4321:4321": true, ":4321": true, "daemon:root": false, ":0": false, "daemon:1234": false, "root": false,
	} {
		r := &artifact.Release{Manifest: &deployments.Manifest{Src: "file:///a.tar", Dest: "/srv/app", Owner: owner}}
		if err := bounded(b, r); (err == nil) != allowed {
			t.Errorf("owner %q: %v", owner, err)
		}
	}
	owners := ownersOf(b)
	for ids, allowed := range map[[2]int]bool{
		{os.Geteuid(), os.Getegid()}: true, {4321, 4321}: true, {4321, 1234}: false, {1234, 4321}: false, {1 << 32, 1 << 32}: false,
	} {
		if err := owners(ids[0], ids[1]); (err == nil) != allowed {
			t.Errorf("%v: %v", ids, err)
		}
	}
	if ownersOf(policy.Bounds{}) != nil {
		t.Error("nothing is bounded, and owners are")
	}
}

// A manifest or a signature that comes without end ends as an outage of its storage, by its deadline.
func TestManifestsHaveADeadline(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := rw.Write([]byte("#\n")); err != nil {
				return
			}
			rw.(http.Flusher).Flush()
			time.Sleep(time.Millisecond)
		}
	}))
	t.Cleanup(server.Close)
	for what, trust := range map[string]func(context.Context, deployments.Pointer, []byte) error{
		"the manifest": nil,
		"the signature": func(ctx context.Context, _ deployments.Pointer, _ []byte) error {
			<-ctx.Done()
			return ctx.Err()
		},
	} {
		p := deployments.Pointer{URL: server.URL + "/manifest.yaml"}
		if trust != nil {
			p = w.publish("1", nil)
		}
		u := w.open(func(c *Config) { c.Trust = trust })
		u.manifestWithin = 100 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		err := u.Stage(ctx, p)
		cancel()
		if !errors.Is(err, errManifestLate) || !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("%s comes without end: %v", what, err)
		}
	}
}
