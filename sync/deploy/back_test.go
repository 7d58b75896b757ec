package deploy

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"kedge/deployments"
)

func (w *world) moves(m *deployments.Manifest) {
	m.Strategy = deployments.StrategyMv
	m.Commands.Pre = []deployments.Command{{Run: "rm -rf " + w.dest()}}
}

func fails(m *deployments.Manifest) { m.Commands.Post = []deployments.Command{{Run: "false"}} }

func (w *world) wantFailed(u *Unit, p, back deployments.Pointer) {
	w.t.Helper()
	var failed *Failed
	if err := u.Deploy(w.t.Context(), Request{Release: p}); !errors.As(err, &failed) || failed.Back != back {
		w.t.Fatalf("got %v, want a failure that goes back to %s", err, back)
	}
}

// cut deploys p with a unit that ends at a point, as a kill would end it.
func (w *world) cut(u *Unit, p deployments.Pointer, point string) {
	w.t.Helper()
	defer func() {
		if recover() == nil {
			w.t.Errorf("it was not cut off %s", point)
		}
	}()
	u.at = func(at string) {
		if at == point {
			panic("killed")
		}
	}
	_ = u.Deploy(w.t.Context(), Request{Release: p})
}

// Whatever strategy the failed release had, dest holds the good one again.
func TestGoesBackAcrossStrategies(t *testing.T) {
	t.Parallel()
	all := []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv}
	for _, from := range all {
		for _, to := range all {
			t.Run(string(from)+" "+string(to), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				as := func(s deployments.Strategy) func(*deployments.Manifest) {
					if s == deployments.StrategyMv {
						return w.moves
					}
					return func(m *deployments.Manifest) { m.Strategy = s }
				}
				good := w.publish("1", as(from))
				u := w.open(nil)
				w.deploy(u, good)
				w.wantFailed(u, w.publish("2", func(m *deployments.Manifest) { as(to)(m); fails(m) }), good)
				w.wantVersion("1")
			})
		}
	}
}

// What a way back left aside that another release cut short says nothing of a later one.
func TestGoesBackAfterAWayBackThatWasCutShort(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	if err := os.Mkdir(w.path("srv", ".app.kedge-failed"), 0o755); err != nil {
		t.Fatal(err)
	}
	good := w.publish("1", w.moves)
	w.deploy(u, good)
	w.wantFailed(u, w.publish("2", func(m *deployments.Manifest) { w.moves(m); fails(m) }), good)
	w.wantVersion("1")
}

// Taken back, a deployment leaves a node out of service that a release before it had left so, with nothing good to run.
func TestTakenBackToAFailedReleaseStaysDrained(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	u := w.open(nil)
	w.wantFailed(u, w.publish("1", fails), deployments.Pointer{})
	ctx, cancel := context.WithCancel(t.Context())
	u.at = func(point string) {
		if point == "before pre" {
			cancel()
		}
	}
	if err := u.Deploy(ctx, Request{Release: w.publish("2", nil)}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if s := u.State(); !s.Drained || s.Unfinished {
		t.Errorf("the failed release is in service: %+v", s)
	}
}

// A release that was switched to, and superseded before it had proved itself, is not taken for the good one.
func TestGoesBackBehindWhatWasSuperseded(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv} {
		for name, breakIt := range map[string]func(*deployments.Manifest){
			"pre":    func(m *deployments.Manifest) { m.Commands.Pre = []deployments.Command{{Run: "false"}} },
			"switch": func(m *deployments.Manifest) { m.Strategy, m.Commands.Pre = deployments.StrategyMv, nil },
		} {
			for _, point := range []string{"after switch", "before post"} { // before and after the journal knows of the switch
				if strategy == deployments.StrategyRelease && name == "switch" {
					continue // a link of ours is not in the way of mv
				}
				t.Run(string(strategy)+" "+name+" "+point, func(t *testing.T) {
					t.Parallel()
					w := newWorld(t)
					as := func(m *deployments.Manifest) {
						if m.Strategy = strategy; strategy == deployments.StrategyMv {
							w.moves(m)
						}
					}
					good := w.publish("1", as)
					u := w.open(nil)
					w.deploy(u, good)
					two := w.publish("2", as)
					w.cut(u, two, point)
					u = w.open(nil)
					w.wantFailed(u, w.publish("3", func(m *deployments.Manifest) { as(m); breakIt(m) }), good)
					w.wantVersion("1")
				})
			}
		}
	}
}

// A release of strategy mv, whose tree may hold what it has written by now, stays as it is where one that failed
// was never in its place.
func TestBackToATreeThatWasNotTouched(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*world, *deployments.Manifest){
		"elsewhere": func(w *world, m *deployments.Manifest) { m.Dest = w.path("srv", "other") },
		"elsewhere, moved": func(w *world, m *deployments.Manifest) {
			m.Dest, m.Strategy = w.path("srv", "other"), deployments.StrategyMv
		},
		"commands only": func(_ *world, m *deployments.Manifest) { m.Src, m.Checksum, m.Dest = "", "", "" },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			u := w.open(nil)
			one := w.publish("1", func(m *deployments.Manifest) { m.Strategy = deployments.StrategyMv })
			w.deploy(u, one)
			written := filepath.Join(w.dest(), "written")
			if err := os.WriteFile(written, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			w.wantFailed(u, w.publish("2", func(m *deployments.Manifest) { fails(m); change(w, m) }), one)
			w.wantVersion("1")
			if _, err := os.Stat(written); err != nil {
				t.Error(err)
			}
		})
	}
}

// Nothing that a deployment does at dest, on its way there and back, is taken for somebody else's.
func TestOwnSwitchesAreNotForeign(t *testing.T) {
	t.Parallel()
	for _, strategy := range []deployments.Strategy{
		deployments.StrategyRelease, deployments.StrategyRsync, deployments.StrategyMv,
	} {
		t.Run(string(strategy), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			as := func(m *deployments.Manifest) {
				if m.Strategy = strategy; strategy == deployments.StrategyMv {
					w.moves(m)
				}
			}
			u := w.open(nil)
			looks := 0
			u.at = func(point string) {
				looks++
				if found, changed := u.Mark().Changed(); changed {
					t.Errorf("%s: dest has changed: %s", point, found)
				}
			}
			good := w.publish("1", as)
			w.deploy(u, good)
			w.wantFailed(u, w.publish("2", func(m *deployments.Manifest) { as(m); fails(m) }), good)
			w.deploy(u, w.publish("3", as))
			mark := u.Mark()
			if found, changed := mark.Changed(); changed || looks == 0 {
				t.Errorf("after %d points dest has changed: %s", looks, found)
			}
			if err := os.Rename(w.dest(), w.dest()+".away"); err != nil {
				t.Fatal(err)
			}
			if _, changed := mark.Changed(); !changed {
				t.Error("a dest that is gone is not seen")
			}
		})
	}
}
