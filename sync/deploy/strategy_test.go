package deploy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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

// If the first switch has exchanged dest when it fails by the node's fault, what was there before is put back.
func TestFirstSwitchThatIsUndone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.foreign((*world).tree)
	u := w.open(nil)
	p := w.publish("1", nil)
	r, err := u.admit(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		u.at = func(point string) {
			if point != "before switch" {
				return
			}
			u.at = func(string) {}
			if err := u.switcher(r).Switch(t.Context(), r); err != nil {
				t.Error(err)
			}
			err := u.handleStepError(t.Context(), u.j.Deployment, syscall.ENOSPC)
			if !errors.Is(err, syscall.ENOSPC) || errors.As(err, new(*Failed)) {
				t.Errorf("got %v", err)
			}
			panic("undone")
		}
		func() {
			defer func() { _ = recover() }()
			_ = u.Deploy(t.Context(), Request{Release: p, MayLeave: true})
		}()
		w.wantForeign()
		if s := u.State(); !s.Running.IsZero() || s.Drained || s.Unfinished || len(s.Quarantined) > 0 {
			t.Errorf("state: %+v", s)
		}
	}
	w.deploy(u, p)
	w.wantVersion("1")
}

// What served before kedge, a tree or a link of another tool's, is kept, and is back in service when the first
// release fails, or a command has moved it away and fails then.
func TestFirstReleaseGoesBackToWhatWasThere(t *testing.T) {
	t.Parallel()
	all := []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv}
	for _, strategy := range all {
		for name, prepare := range map[string]func(w *world) error{
			"tree": (*world).tree,
			"link": func(w *world) error { return os.Symlink("../old", w.dest()) },
		} {
			t.Run(string(strategy)+" "+name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.foreign(prepare)
				inStrategy := func(m *deployments.Manifest) {
					m.Strategy = strategy
					if strategy == deployments.StrategyMv {
						m.Commands.Pre = []deployments.Command{{Run: "rm -rf DEST.old; mv DEST DEST.old"}}
						m.Commands.Pre[0].Run = strings.ReplaceAll(m.Commands.Pre[0].Run, "DEST", w.dest())
					}
				}
				var d drains
				u := w.open(func(c *Config) { c.Drain = d.drain })
				for version, change := range map[string]func(*deployments.Manifest){
					"1": fails, // and another one, after it
					"2": func(m *deployments.Manifest) {
						fails(m)
						if strategy != deployments.StrategyRelease {
							m.Commands.Post[0].Run = "rm -rf " + w.dest() + "; false"
						}
					},
					"3": func(m *deployments.Manifest) {
						m.Commands.Pre = append(m.Commands.Pre, deployments.Command{Run: "false"})
					},
				} {
					bad := w.publish(version, func(m *deployments.Manifest) { inStrategy(m); change(m) })
					w.wantFailed(u, bad, deployments.Pointer{})
					w.wantForeign()
					w.wantRestored(u, bad)
					if got := d.take(); !slices.Equal(got, []bool{true, false}) {
						t.Errorf("drain: %v", got)
					}
				}
				good := w.publish("4", inStrategy)
				w.deploy(u, good)
				w.wantVersion("4")
				// From now on a failure goes back to that one.
				w.wantFailed(u, w.publish("5", func(m *deployments.Manifest) { inStrategy(m); fails(m) }), good)
				w.wantVersion("4")
				kept, err := filepath.Glob(w.dest() + ".releases/adopted-*")
				if err != nil || len(kept) != 1 && strategy == deployments.StrategyRelease {
					t.Errorf("kept: %q, %v", kept, err)
				}
				if left, _ := os.ReadDir(u.beforeDir()); len(left) > 0 {
					t.Errorf("nobody needs %v any more", left)
				}
			})
		}
	}
}

// foreign makes a tree that kedge knows nothing of, as a release of another tool's.
func (w *world) foreign(prepare func(w *world) error) {
	w.t.Helper()
	err := os.MkdirAll(w.path("old", "dir"), 0o755)
	for _, f := range []string{"a", "dir/b", "z"} {
		err = errors.Join(err, os.WriteFile(w.path("old", f), []byte("foreign"), 0o640))
	}
	if err := errors.Join(err, prepare(w)); err != nil {
		w.t.Fatal(err)
	}
}

// tree has what foreign made be a tree at dest.
func (w *world) tree() error { return os.Rename(w.path("old"), w.dest()) }

// wantRestored wants nothing to run, and bad to be in quarantine.
func (w *world) wantRestored(u *Unit, bad deployments.Pointer) {
	w.t.Helper()
	s := u.State()
	if !s.Running.IsZero() || s.Drained || s.Unfinished || !slices.Contains(s.Quarantined, bad.Digest) {
		w.t.Errorf("state: %+v", s)
	}
}

// wantForeign wants what foreign made to be at dest, with its modes.
func (w *world) wantForeign() {
	w.t.Helper()
	w.wantVersion("foreign")
	info, err := os.Stat(filepath.Join(w.dest(), "a"))
	if err != nil {
		w.t.Fatal(err)
	}
	if info.Mode() != 0o640 {
		w.t.Errorf("a has mode %v", info.Mode())
	}
}

// Wherever the first release is killed, it ends, and what served before is whole again.
func TestFirstReleaseKilledAnywhere(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRsync, deployments.StrategyMv} {
		for _, point := range []string{
			"begun", "after pre", "before switch", "after switch", "after post", "before back", "after back", "before failure",
		} {
			t.Run(string(strategy)+" "+point, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.foreign((*world).tree)
				bad := w.publish("1", func(m *deployments.Manifest) {
					m.Strategy = strategy
					if strategy == deployments.StrategyMv {
						m.Commands.Pre = []deployments.Command{{Run: "mv " + w.dest() + " " + w.dest() + ".old"}}
					}
					fails(m)
				})
				w.cut(w.open(nil), bad, point)
				u := w.open(nil)
				if err := u.Recover(t.Context()); err == nil && w.version() == "foreign" {
					w.wantFailed(u, bad, deployments.Pointer{}) // it was taken back, and is tried again
				}
				w.wantForeign()
				w.wantRestored(u, bad)
			})
		}
	}
}
