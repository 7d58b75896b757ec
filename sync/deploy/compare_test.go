package deploy

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments"
)

// lay puts the tree of publish's releases at dest, as something else would have.
func (w *world) lay(version string) {
	w.t.Helper()
	for name, mode := range map[string]fs.FileMode{"a": 0o644, "dir/b": 0o600, "z": 0o755} {
		file := filepath.Join(w.dest(), name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(version), mode)); err != nil {
			w.t.Fatal(err)
		}
	}
}

func inode(t *testing.T, path string) fs.FileInfo {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// beside lists what lies beside dest.
func (w *world) beside() string {
	w.t.Helper()
	entries, err := os.ReadDir(filepath.Dir(w.dest()))
	if err != nil {
		w.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

var strategies = []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv}

// Observing compares by each strategy, and touches nothing at dest or beside it.
func TestObserveTouchesNothing(t *testing.T) {
	t.Parallel()
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			p := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
			observe := func() *deployments.Compared {
				t.Helper()
				found, err := u.Observe(t.Context(), p, 0)
				if err != nil {
					t.Fatal(err)
				}
				return found
			}
			if found := observe(); !found.Missing || found.Differs != 1 || w.beside() != "" {
				t.Errorf("nothing at dest: %+v; beside lie %q", found, w.beside())
			}
			w.lay("1")
			file := filepath.Join(w.dest(), "a")
			before := inode(t, file)
			if found := observe(); found.Differs != 0 || found.Missing {
				t.Errorf("the same at dest: %+v", found)
			}
			if err := os.WriteFile(filepath.Join(w.dest(), "extra"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(filepath.Join(w.dest(), "z"), 0o700); err != nil {
				t.Fatal(err)
			}
			if found := observe(); found.Differs != 2 || strings.Join(found.Paths, " ") != "extra z" {
				t.Errorf("a file more, a mode: %+v", found)
			}
			if !os.SameFile(before, inode(t, file)) || w.beside() != "app" || w.hooks() != nil || !u.State().Running.IsZero() {
				t.Errorf("it touched something: %q, %+v", w.beside(), u.State())
			}
			// A tree that was compared stays until it is of no use any more.
			if err := u.Deploy(t.Context(), Request{Release: p}); err != nil && strategy != deployments.StrategyMv {
				t.Fatal(err)
			}
			if left, _ := os.ReadDir(u.treesDir()); len(left) > 0 && strategy == deployments.StrategyRelease {
				t.Errorf("it left %v", left)
			}
		})
	}
}

// What is the release's already is adopted without commands; its files stay the same ones by the strategies that
// change dest in place.
func TestAdopt(t *testing.T) {
	t.Parallel()
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.lay("1")
			drained := &drains{}
			u := w.open(func(c *Config) { c.Drain = drained.drain })
			one := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
			before := inode(t, filepath.Join(w.dest(), "a"))
			if err := u.Deploy(t.Context(), Request{Release: one, Adopt: true}); err != nil {
				t.Fatal(err)
			}
			w.wantVersion("1")
			w.wantHooks()
			s := u.State()
			if s.Running != one || !s.Confirmed || s.LastGood != one || s.Compared == nil || !s.Compared.Adopted || s.Drained {
				t.Errorf("%+v", s)
			}
			for _, on := range drained.take() {
				if on {
					t.Error("the node was drained")
				}
			}
			if same := os.SameFile(before, inode(t, filepath.Join(w.dest(), "a"))); same == (strategy == deployments.StrategyRelease) {
				t.Errorf("its files are the same ones: %v", same)
			}
			if ds, err := u.Verify(t.Context(), 0); err != nil || len(ds) > 0 {
				t.Errorf("%v, %v", ds, err)
			}
			// It is still known after a restart; the next release is deployed as any other, and a failing one goes back to it.
			u = w.reopen(func(c *Config) { c.Drain = drained.drain })
			if s := u.State(); s.Running != one || s.Compared == nil || !s.Compared.Adopted {
				t.Errorf("after a restart: %+v", s)
			}
			if strategy == deployments.StrategyMv {
				return // which needs a pre command of its own
			}
			bad := w.publish("2", func(m *deployments.Manifest) {
				m.Strategy = strategy
				m.Commands.Post = []deployments.Command{{Run: "false"}}
			})
			if err := u.Deploy(t.Context(), Request{Release: bad, Adopt: true}); !errors.As(err, new(*Failed)) {
				t.Errorf("got %v", err)
			}
			w.wantVersion("1")
			w.wantHooks("pre 2", "post 1", "failure 2")
			three := w.publish("3", func(m *deployments.Manifest) { m.Strategy = strategy })
			if err := u.Deploy(t.Context(), Request{Release: three, Adopt: true}); err != nil {
				t.Fatal(err)
			}
			w.wantVersion("3")
			if s := u.State(); s.Compared != nil {
				t.Errorf("%+v", s.Compared)
			}
		})
	}
}

// A tree that isn't the release's is deployed over, with all commands, and how much differed is kept.
func TestAdoptWhatDiffers(t *testing.T) {
	t.Parallel()
	for _, strategy := range strategies[:2] {
		for _, before := range []string{"0", ""} {
			t.Run(string(strategy)+before, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				if before != "" {
					w.lay(before)
				}
				u := w.open(nil)
				p := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
				if err := u.Deploy(t.Context(), Request{Release: p, Adopt: true}); err != nil {
					t.Fatal(err)
				}
				w.wantVersion("1")
				w.wantHooks("pre 1", "post 1", "success 1")
				if c := u.State().Compared; c == nil || c.Adopted || c.Missing != (before == "") || before != "" && c.Differs != 3 {
					t.Errorf("%+v", c)
				}
			})
		}
	}
}

// What was adopted and isn't healthy is given back as it was.
func TestAdoptWhatIsUnhealthy(t *testing.T) {
	t.Parallel()
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.lay("1")
			before := inode(t, filepath.Join(w.dest(), "a"))
			u := w.open(nil)
			p := w.publish("1", func(m *deployments.Manifest) {
				m.Strategy = strategy
				m.Health = deployments.Health{Timeout: 1, Checks: []deployments.Check{{Exec: "false", Interval: 1, Timeout: 1}}}
			})
			if err := u.Deploy(t.Context(), Request{Release: p, Adopt: true}); !errors.As(err, new(*Failed)) {
				t.Errorf("got %v", err)
			}
			w.wantHooks("failure 1")
			if !os.SameFile(before, inode(t, filepath.Join(w.dest(), "a"))) {
				t.Error("dest isn't what it was")
			}
			if s := u.State(); !s.Running.IsZero() || s.Drained || len(s.Quarantined) != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// Killed at any point, adopting begins or goes on with the next start: no command runs, and the tree is whole.
func TestAdoptCutOffAnywhere(t *testing.T) {
	t.Parallel()
	for _, strategy := range strategies {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.lay("1")
			p := w.publish("1", func(m *deployments.Manifest) { m.Strategy = strategy })
			passed := map[string]bool{}
			die := func(u *Unit) {
				u.at = func(point string) {
					if !passed[point] {
						passed[point] = true
						panic(cutOff(point))
					}
				}
			}
			for done := false; !done; {
				func() {
					defer func() {
						if r := recover(); r != nil {
							if _, ours := r.(cutOff); !ours {
								panic(r)
							}
							w.wantVersion("1")
						}
					}()
					u := w.open(nil)
					u.maxCutOff = 100 // it is cut off at each point of a step
					die(u)
					if err := u.Recover(t.Context()); err != nil {
						t.Fatal(err)
					}
					if err := u.Deploy(t.Context(), Request{Release: p, Adopt: true}); err != nil {
						t.Fatal(err)
					}
					done = true
				}()
			}
			if len(passed) < 10 {
				t.Errorf("it was cut off at %v alone", passed)
			}
			w.wantVersion("1")
			w.wantHooks()
			if s := w.open(nil).State(); s.Running != p || !s.Confirmed || s.Compared == nil || !s.Compared.Adopted {
				t.Errorf("%+v", s)
			}
		})
	}
}

// cutOff is a point at which the process ends.
type cutOff string
