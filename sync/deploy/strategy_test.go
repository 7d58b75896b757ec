package deploy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kedge/artifact"
	"kedge/deployments"
)

func TestStageAheadNeedsNoStorageLater(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv} {
		w := newWorld(t)
		u := w.open(nil)
		p := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
		if err := u.Stage(t.Context(), p); err != nil {
			t.Fatal(err)
		}
		w.wantVersion("")
		w.wantHooks()
		if s := u.State(); s.Staged != p || !s.Running.IsZero() {
			t.Errorf("state: %+v", s)
		}
		if err := os.RemoveAll(w.path("objects")); err != nil {
			t.Fatal(err)
		}
		w.deploy(w.reopen(nil), p)
		w.wantVersion("1")
	}
}

func TestStrategies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	as := func(s deployments.Strategy, change func(*deployments.Manifest)) func(*deployments.Manifest) {
		return func(m *deployments.Manifest) {
			m.Strategy = s
			if change != nil {
				change(m)
			}
		}
	}
	u := w.open(nil)

	// rsync takes away what isn't excluded.
	w.deploy(u, w.publish("1", as(deployments.StrategyRsync, nil)))
	w.wantVersion("1")
	for _, name := range []string{"app.pid", "rubbish"} {
		if err := os.WriteFile(filepath.Join(w.dest(), name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.deploy(u, w.publish("2", as(deployments.StrategyRsync, func(m *deployments.Manifest) { m.Excludes = []string{"*.pid"} })))
	w.wantVersion("2")
	if !exists(filepath.Join(w.dest(), "app.pid")) || exists(filepath.Join(w.dest(), "rubbish")) {
		t.Error("excludes don't hold")
	}

	// release takes over a directory, and a failed one gives it back.
	bad := as(deployments.StrategyRelease, func(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} })
	var failed *Failed
	if err := u.Deploy(t.Context(), Request{Release: w.publish("3", bad)}); !errors.As(err, &failed) {
		t.Fatalf("got %v", err)
	}
	w.wantVersion("2")
	if info, err := os.Lstat(w.dest()); err != nil || !info.IsDir() {
		t.Errorf("dest is %v, %v; want a directory", info, err)
	}
	four := w.publish("4", nil)
	w.deploy(u, four)
	w.wantVersion("4")

	// mv needs a dest that is gone, and leaves what it finds when it is not.
	err := u.Deploy(t.Context(), Request{Release: w.publish("5", as(deployments.StrategyMv, func(m *deployments.Manifest) {
		m.Commands.Pre = []deployments.Command{{Run: "rm " + w.dest() + " && cp -a $KEDGE_PREVIOUS " + w.dest()}}
	}))})
	if !errors.As(err, &failed) || !strings.Contains(err.Error(), "needs a pre command") {
		t.Fatalf("got %v", err)
	}
	w.wantVersion("4")
	w.deploy(u, four)
	w.deploy(u, w.publish("6", as(deployments.StrategyMv, func(m *deployments.Manifest) {
		m.Commands.Pre = []deployments.Command{{Run: "rm -rf " + w.dest()}}
	})))
	w.wantVersion("6")
	if err := u.Deploy(t.Context(), Request{Release: w.publish("7", as(deployments.StrategyMv, func(m *deployments.Manifest) {
		m.Commands.Pre = []deployments.Command{{Run: "rm -rf " + w.dest()}}
		m.Commands.Post = []deployments.Command{{Run: "false"}}
	}))}); !errors.As(err, &failed) {
		t.Fatalf("got %v", err)
	}
	w.wantVersion("6")
	entries, err := os.ReadDir(w.path("srv"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") && e.Name() != lockName(w.dest()) {
			t.Errorf("%s was left behind", e.Name())
		}
	}

	// Commands only.
	w.hooks()
	eight := w.publish("8", func(m *deployments.Manifest) { m.Src, m.Checksum, m.Dest, m.Strategy = "", "", "", "" })
	w.deploy(u, eight)
	w.wantHooks("pre 8", "post 8", "success 8")
	if s := u.State(); s.Running != eight {
		t.Errorf("state: %+v", s)
	}
	w.deploy(u, eight)
	w.wantHooks()
}

func TestOldReleasesGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	for _, v := range []string{"1", "2", "3", "4", "5"} {
		w.deploy(u, w.publish(v, func(m *deployments.Manifest) {
			if v < "3" {
				m.Strategy = deployments.StrategyRsync
			}
		}))
	}
	for dir, most := range map[string]int{manifestsDir: 1, treesDir: 0} {
		if entries, err := os.ReadDir(w.path("state", dir)); err != nil && !errors.Is(err, fs.ErrNotExist) || len(entries) > most {
			t.Errorf("%s holds %v, %v", dir, entries, err)
		}
	}
}

func TestHealsWhatIsGone(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv} {
		w := newWorld(t)
		u := w.open(nil)
		w.deploy(u, w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy }))
		if err := os.RemoveAll(w.dest()); err != nil {
			t.Fatal(err)
		}
		if _, err := u.Heal(t.Context()); err != nil {
			t.Errorf("%s: %v", strategy, err)
		}
		w.wantVersion("1")
	}
}

func TestVerifyAndHeal(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			w.deploy(u, w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy }))
			w.hooks()
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
				t.Errorf("just deployed: %v, %v", ds, err)
			}
			dest := w.dest()
			for _, err := range []error{
				os.WriteFile(filepath.Join(dest, "a"), []byte("x"), 0o644), os.Remove(filepath.Join(dest, "dir", "b")),
				os.WriteFile(filepath.Join(dest, "new"), nil, 0o644), os.Chmod(filepath.Join(dest, "z"), 0o700),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			ds, err := u.Verify(t.Context(), 0)
			slices.SortFunc(ds, func(a, b artifact.Difference) int { return strings.Compare(a.Path, b.Path) })
			want := []artifact.Difference{{Path: "a", What: "content"}, {Path: "dir/b", What: "missing"}, {Path: "new", What: "extra"}, {Path: "z", What: "mode"}}
			if err != nil || !slices.Equal(ds, want) {
				t.Errorf("got %v, %v; want %v", ds, err, want)
			}
			if _, err := u.Heal(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantVersion("1")
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
				t.Errorf("healed: %v, %v", ds, err)
			}
			if err := errors.Join(os.RemoveAll(dest), os.RemoveAll(dest+".releases")); err != nil {
				t.Fatal(err)
			}
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) == 0 || ds[0].What != "missing" {
				t.Errorf("all of it is gone: %v, %v", ds, err)
			}
			if _, err := u.Heal(t.Context()); err != nil {
				t.Fatal(err)
			}
			w.wantVersion("1")
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
				t.Errorf("healed: %v, %v", ds, err)
			}
			w.wantHooks()
		})
	}
}

// What served before kedge, a tree or a link of another tool's, is kept, and is back in service when the first
// release fails.
func TestFirstReleaseGoesBackToWhatWasThere(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(w *world) error{
		"tree": func(w *world) error { return os.Rename(w.path("old"), w.dest()) },
		"link": func(w *world) error { return os.Symlink("../old", w.dest()) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			if err := os.MkdirAll(w.path("old", "dir"), 0o755); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"a", "dir/b", "z"} {
				if err := os.WriteFile(w.path("old", f), []byte("foreign"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if err := prepare(w); err != nil {
				t.Fatal(err)
			}
			var d drains
			u := w.open(func(c *Config) { c.Drain = d.drain })
			for _, version := range []string{"1", "2"} { // also the second time
				bad := w.publish(version, fails)
				w.wantFailed(u, bad, deployments.Pointer{})
				w.wantVersion("foreign")
				if s := u.State(); !s.Running.IsZero() || s.Drained || s.Unfinished || !slices.Contains(s.Quarantined, bad.Digest) {
					t.Errorf("state: %+v", s)
				}
				if got := d.take(); !slices.Equal(got, []bool{true, false}) {
					t.Errorf("drain: %v", got)
				}
			}
			good := w.publish("3", nil)
			w.deploy(u, good)
			w.wantVersion("3")
			// From now on a failure goes back to that one.
			w.wantFailed(u, w.publish("4", fails), good)
			w.wantVersion("3")
			kept, err := filepath.Glob(w.dest() + ".releases/adopted-*")
			if err != nil || len(kept) != 1 {
				t.Errorf("kept: %q, %v", kept, err)
			}
		})
	}
}
