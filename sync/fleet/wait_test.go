package fleet

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

const (
	first  = "1111111111111111111111111111111111111111"
	second = "2222222222222222222222222222222222222222"
	third  = "3333333333333333333333333333333333333333"
)

// patience is how long a Wait that can't end is let go on: enough for a look at the fleet on a busy machine.
const patience = 3 * time.Second

// waiting starts Wait, and gives its end.
func waiting(t *testing.T, s kv.Store, commit string) <-chan error {
	t.Helper()
	ended := make(chan error, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	go func() { ended <- Wait(ctx, s, Filter{Stage: "prod"}, WaitOptions{Commit: commit}) }()
	return ended
}

// goesOn checks that nothing that has been written so far ends a Wait: it makes the fleet's state pass before it
// once more.
func goesOn(t *testing.T, s kv.Store, ended <-chan error) {
	t.Helper()
	w := waiter{sinceBeforeOrder: map[waitKey]time.Time{}}
	seen := fleets(t, s)
	until(t, seen, "what was written", func(f *Fleet) bool { _, err := w.check(f); return err == nil })
	select {
	case err := <-ended:
		t.Fatalf("Wait ended too early: %v", err)
	case <-time.After(3 * watchPause):
	}
}

func ends(t *testing.T, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(25 * time.Second):
		t.Fatal("Wait goes on")
		return nil
	}
}

func recordOf(version string, generation int64) kv.Entry {
	return put(kv.DesiredKey(app), deployments.Record{Target: release("app", version), Generation: generation})
}

func reportOf(node string, r deployments.UnitReport) kv.Entry {
	return says(node, map[string]deployments.UnitReport{"app": r})
}

func TestWait(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	fetching := runs("app", "1")
	fetching.State = deployments.StateFetching
	store(t, s, recordOf("1", 2), reportOf("web-1", fetching), gone(reportOf("web-9", fetching)))
	ended := waiting(t, s, "")
	goesOn(t, s, ended)
	unreadable := reportOf("web-1", fetching)
	unreadable.Value = []byte("{")
	store(t, s, unreadable)
	goesOn(t, s, ended)
	store(t, s, reportOf("web-1", runs("app", "1")))
	if err := ends(t, ended); err != nil {
		t.Error(err)
	}
}

func TestWaitForACommit(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		then []kv.Entry
		says string // empty: it ends well
	}{
		"the mirror takes it": {[]kv.Entry{recordOf("2", 3), put(kv.MirrorKey,
			deployments.MirrorState{Head: second})}, ""},
		"the mirror takes a later": {[]kv.Entry{recordOf("2", 3), put(kv.MirrorKey,
			deployments.MirrorState{Head: third, Ancestors: second[:12] + " " + first[:12]})}, ""},
		"the mirror takes a much later": {[]kv.Entry{recordOf("2", 3), put(kv.MirrorKey,
			deployments.MirrorState{Head: third, Ancestors: strings.Repeat("4", 12)})}, ""},
		"the mirror refuses it": {[]kv.Entry{put(kv.MirrorKey,
			deployments.MirrorState{Head: first, Refused: second, Error: "prod/web/app.yaml:2:1: unknown field"})},
			"prod/web/app.yaml:2:1"},
		"it changed nothing of ours": {[]kv.Entry{put(kv.MirrorKey, deployments.MirrorState{Head: second})}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openDir(t)
			store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: first}),
				reportOf("web-1", runs("app", "1")))
			ended := waiting(t, s, second[:8])
			goesOn(t, s, ended) // all is converged, on the commit before
			store(t, s, c.then...)
			if c.says != "" {
				if err := ends(t, ended); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("%v, want it refused, with %q", err, c.says)
				}
				return
			}
			if len(c.then) > 1 {
				goesOn(t, s, ended) // taken, and not converged yet
				next := runs("app", "2")
				next.Generation = 3
				store(t, s, reportOf("web-1", next))
			}
			if err := ends(t, ended); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("it was superseded before", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: third}),
			reportOf("web-1", runs("app", "1")),
			put("history/prod/web/app/0000000001", deployments.History{Generation: 1, Commit: second}))
		if err := ends(t, waiting(t, s, second)); err != nil {
			t.Error(err)
		}
	})
	t.Run("it was superseded before, and all of its units are gone", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: third}),
			reportOf("web-1", runs("app", "1")),
			put("history/prod/db/main/0000000001", deployments.History{Generation: 1, Commit: second}))
		if err := ends(t, waiting(t, s, second)); err != nil {
			t.Error(err)
		}
	})
	t.Run("it was superseded before, and changed no unit", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: third, Ancestors: second[:12]}),
			reportOf("web-1", runs("app", "1")))
		if err := ends(t, waiting(t, s, second)); err != nil {
			t.Error(err)
		}
	})
	t.Run("the mirror takes the one before it first", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: first}),
			reportOf("web-1", runs("app", "1")))
		ended := waiting(t, s, third)
		goesOn(t, s, ended)
		store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: second, Ancestors: first[:12]}))
		goesOn(t, s, ended)
		store(t, s, put(kv.MirrorKey,
			deployments.MirrorState{Head: second, Ancestors: first[:12], Refused: third, Error: "a typo"}))
		if err := ends(t, ended); !errors.Is(err, ErrRefused) {
			t.Errorf("%v, want it refused", err)
		}
	})
	t.Run("it is half written", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: first, Applying: second}),
			reportOf("web-1", runs("app", "1")),
			put("history/prod/web/base/0000000001", deployments.History{Generation: 1, Commit: second}))
		ended := waiting(t, s, second)
		goesOn(t, s, ended)
		store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: second}))
		if err := ends(t, ended); err != nil {
			t.Error(err)
		}
	})
	t.Run("it has no unit", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, put(kv.MirrorKey, deployments.MirrorState{Head: second}))
		if err := Wait(t.Context(), s, Filter{}, WaitOptions{Commit: second}); err != nil {
			t.Error(err)
		}
	})
	t.Run("it has no such unit", func(t *testing.T) {
		t.Parallel()
		s := openDir(t)
		store(t, s, recordOf("1", 2), put(kv.MirrorKey, deployments.MirrorState{Head: second}),
			reportOf("web-1", runs("app", "1")))
		err := Wait(t.Context(), s, Filter{Stage: "prod", Role: "wbe"}, WaitOptions{Commit: second})
		if err == nil || !strings.Contains(err.Error(), "has no such unit") {
			t.Errorf("%v, want the end of it", err)
		}
	})
	t.Run("it left alone what is halted", func(t *testing.T) {
		t.Parallel()
		other := deployments.UnitID{Stage: "prod", Role: "web", Unit: "other"}
		halted := deployments.Record{Target: release("other", "2"), Stable: release("other", "1"), Generation: 3, Commit: first,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolledBack, Since: noon, Message: "1 node failed"}}
		ours := deployments.Record{Target: release("app", "2"), Generation: 3, Commit: second}
		late := runs("app", "2")
		late.Generation, late.State = 3, deployments.StateFetching
		s := openDir(t)
		store(t, s, put(kv.DesiredKey(other), halted), put(kv.DesiredKey(app), ours), reportOf("web-1", late),
			put(kv.MirrorKey, deployments.MirrorState{Head: third, Ancestors: second[:12] + " " + first[:12]}))
		for commit, says := range map[string]string{second: "fetching", first: "1 node failed"} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			err := Wait(ctx, s, Filter{}, WaitOptions{Commit: commit, Push: true})
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", commit, err, says)
			}
			cancel()
		}
		if err := Wait(t.Context(), s, Filter{}, WaitOptions{Commit: third, Push: true}); err != nil {
			t.Errorf("it changed nothing, and waits for others: %v", err)
		}
	})
	t.Run("its release waits until another is rolled back", func(t *testing.T) {
		t.Parallel()
		back := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3, Commit: first,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRollingBack, Since: noon, Next: release("app", "3"),
				Reason: deployments.ReasonAborted}}
		on := runs("app", "1")
		on.Generation = 3
		s := openDir(t)
		store(t, s, put(kv.DesiredKey(app), back), reportOf("web-1", on),
			put(kv.MirrorKey, deployments.MirrorState{Head: second, Ancestors: first[:12]}))
		for _, push := range []bool{false, true} {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			err := Wait(ctx, s, Filter{}, WaitOptions{Commit: second, Push: push})
			const says = "the release that Git names now starts when the freeze ends"
			if err == nil || errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), says) {
				t.Errorf("push %t: %v, want %q", push, err, says)
			}
			cancel()
		}
	})
	t.Run("it is no commit", func(t *testing.T) {
		t.Parallel()
		for _, bad := range []string{"main", "abc", "../../../x"} {
			err := Wait(t.Context(), openDir(t), Filter{}, WaitOptions{Commit: bad})
			if err == nil || !strings.Contains(err.Error(), "hash") {
				t.Errorf("%q: %v", bad, err)
			}
		}
	})
}

func TestWaitEndsWhereANodeRefuses(t *testing.T) {
	t.Parallel()
	failed := runs("app", "1")
	failed.State, failed.Want, failed.Generation = deployments.StateQuarantined, release("app", "2"), 3
	failed.Quarantined, failed.Error = []deployments.Digest{release("app", "2").Digest}, "health: 503"
	refused := failed
	refused.State, refused.Quarantined, refused.Error = deployments.StateInvalid, nil, "no signature of a signer"
	for name, r := range map[string]deployments.UnitReport{"health: 503": failed, "no signature": refused} {
		s := openDir(t)
		earlier := r
		earlier.Generation = 2
		store(t, s, recordOf("2", 3), reportOf("web-1", earlier))
		ended := waiting(t, s, "")
		goesOn(t, s, ended) // it may try again under the new generation
		store(t, s, reportOf("web-1", r))
		err := ends(t, ended)
		if !errors.Is(err, ErrRefused) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, want := range []string{"web-1", "prod/web/app", name} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%v: want %q in it", err, want)
			}
		}
	}
}

func TestWaitForARollout(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	r := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3, Rollout: &deployments.Progress{Phase: deployments.PhaseCanary, Since: noon}}
	store(t, s, put(kv.DesiredKey(app), r), reportOf("web-1", runs("app", "1")))
	store(t, s, put(kv.PinKey(app), expired("hold")))
	ended := waiting(t, s, "")
	goesOn(t, s, ended) // the node runs what it should, but the rollout isn't over, and a pin that is says nothing of it
	r.Rollout.Phase, r.Rollout.Message = deployments.PhaseRolledBack, "1 node failed"
	store(t, s, put(kv.DesiredKey(app), r))
	if err := ends(t, ended); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "1 node failed") {
		t.Error(err)
	}
}

// A pin that the mirror rolls out is waited for from when it is written until its rollout has ended, and so is its end.
func TestWaitForAPin(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	git := deployments.Record{Target: release("app", "1"), Generation: 3, Paced: true}
	rolledBack := &deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: release("app", "3").Digest}
	pinned := deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 4, Paced: true,
		Pinned: &deployments.Pinned{Target: release("app", "1")}}
	rolling := pinned
	rolling.Rollout = &deployments.Progress{Phase: deployments.PhaseRolling, Since: noon}
	stopped := pinned
	stopped.Rollout = &deployments.Progress{Phase: deployments.PhasePaused, Reason: deployments.ReasonTooManyFailed}
	was := git
	was.Target, was.Stable, was.Rollout = release("app", "3"), release("app", "1"), rolledBack
	store(t, s, put(kv.DesiredKey(app), was), reportOf("web-1", runs("app", "1")))
	store(t, s, put(kv.PinKey(app), release("app", "2").String()))
	ended := waiting(t, s, "")
	goesOn(t, s, ended) // what the record says of an earlier release doesn't count
	store(t, s, put(kv.DesiredKey(app), rolling))
	goesOn(t, s, ended) // its only node isn't admitted yet, and runs stable
	store(t, s, put(kv.DesiredKey(app), stopped))
	goesOn(t, s, ended)
	f, err := Read(t.Context(), s, Filter{})
	if err != nil {
		t.Fatal(err)
	}
	u := unitOf(t, f, app.String())
	if next := u.Next(noon); !strings.Contains(next, "kedge unpin prod/web/app") {
		t.Errorf("an operator is told: %q", next)
	}
	store(t, s, put(kv.DesiredKey(app), pinned), reportOf("web-1", runs("app", "2")))
	if err := ends(t, ended); err != nil {
		t.Error(err)
	}

	store(t, s, put(kv.PinKey(app), expired(release("app", "2").String())))
	ended = waiting(t, s, "")
	goesOn(t, s, ended)
	if f, err = Read(t.Context(), s, Filter{}); err != nil {
		t.Fatal(err)
	}
	pending := Note{Text{"pin:", Plain}, Text{"the mirror has yet to take the end of the pin", Warn}}
	u = unitOf(t, f, app.String())
	if notes := f.Notes(&u); !slices.Contains(notes, pending) {
		t.Errorf("the notes are %+v, want %+v among them", notes, pending)
	}
	store(t, s, put(kv.DesiredKey(app), git), reportOf("web-1", runs("app", "1")))
	if err := ends(t, ended); err != nil {
		t.Error(err)
	}

	// nodes follow these by themselves, whatever the record's rollout does
	store(t, s, put(kv.DesiredKey(app), was))
	for _, pin := range []string{"hold", "{release: " + release("app", "2").String() + ", at_once: true}"} {
		held := runs("app", "2")
		held.Pinned = true
		if pin == "hold" {
			held.State = deployments.StateHeld
		}
		store(t, s, put(kv.PinKey(app), pin), reportOf("web-1", held))
		if err := ends(t, waiting(t, s, "")); err != nil {
			t.Errorf("%s: %v", pin, err)
		}
	}
}

// A rollout that stands as its unit is gone from Git never ends: whoever pushes next must not wait for it, nor fail
// for it.
func TestWaitPassesOverWhatIsGoneFromGit(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, reportOf("web-1", runs("app", "1")))
	for _, phase := range []deployments.Phase{deployments.PhaseRolling, deployments.PhaseRolledBack} {
		store(t, s, put(kv.DesiredKey(app),
			policy.MarkOrphaned(deployments.Record{Target: release("app", "2"), Stable: release("app", "1"), Generation: 3,
				Rollout: &deployments.Progress{Phase: phase, Since: noon}})))
		if err := ends(t, waiting(t, s, "")); err != nil {
			t.Errorf("%s: %v", phase, err)
		}
	}
}

func TestWaitSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		entries []kv.Entry
		commit  string
		says    string
	}{
		"a node": {[]kv.Entry{recordOf("2", 3), reportOf("web-1", runs("app", "1"))}, "", "0 of 1 nodes converged, web-1"},
		"the unit": {
			[]kv.Entry{put(kv.MirrorKey, deployments.MirrorState{Head: first})}, "", "the store knows no such unit",
		},
		"what was refused": {
			[]kv.Entry{put(kv.MirrorKey, deployments.MirrorState{Refused: second, Error: "app.yaml:1:1: a typo\nmore"})},
			"", "no mirror has taken a commit yet; the mirror refused 222222222222: app.yaml:1:1: a typo",
		},
		"what was refused beside an older head": {
			[]kv.Entry{put(kv.MirrorKey, deployments.MirrorState{Head: first, Refused: second, Error: "a typo"})},
			"", "no such unit; the mirror refused 222222222222: a typo",
		},
		"all of it": {nil, "", "no such unit, and no mirror has taken a commit yet"},
		"the head": {
			[]kv.Entry{recordOf("1", 3), put(kv.MirrorKey, deployments.MirrorState{Head: first, Error: "Git is away"})},
			second, "still at 111111111111: Git is away",
		},
		"a leader": {
			[]kv.Entry{recordOf("1", 3), put(kv.MirrorKey, deployments.MirrorState{Head: first})},
			second, "still at 111111111111; no mirror runs now",
		},
		"a mirror": {[]kv.Entry{recordOf("1", 3)}, second, "no mirror"},
		"why an order stands": {[]kv.Entry{recordOf("1", 3), reportOf("web-1", runs("app", "1")),
			put(kv.ControlKey(app), "retry"),
			put(kv.MirrorKey, deployments.MirrorState{Head: first, Error: "the store refuses what the commit asks for"})}, "", "yet to take the order to retry; the mirror says: the store refuses"},
		"a record": {[]kv.Entry{put(kv.DesiredKey(app), "x")}, "", "prod/web/app: record"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := openDir(t)
			store(t, s, c.entries...)
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := Wait(ctx, s, Filter{}, WaitOptions{Commit: c.commit})
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.says)
			}
		})
	}
}

// blind is a store of which a part can't be seen, or can't be read a number of times.
type blind struct {
	kv.Store
	prefix string
	fails  atomic.Int32
}

func (b *blind) List(ctx context.Context, prefix string) ([]kv.Entry, error) {
	if strings.HasPrefix(prefix, b.prefix) {
		return nil, kv.ErrDenied
	}
	if b.fails.Add(-1) >= 0 {
		return nil, kv.ErrUnavailable
	}
	return b.Store.List(ctx, prefix)
}

// Nodes that a token may not see aren't nodes that have converged.
func TestWaitTakesNothingUnseenForGood(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, recordOf("1", 2), reportOf("web-1", runs("app", "1")))
	for _, prefix := range []string{kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix} {
		t.Run(prefix, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := Wait(ctx, &blind{Store: s, prefix: prefix}, Filter{}, WaitOptions{})
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), prefix) {
				t.Error(err)
			}
		})
	}
	shaky := &blind{Store: s, prefix: "none of these"}
	shaky.fails.Store(2)
	if err := Wait(t.Context(), shaky, Filter{}, WaitOptions{}); err != nil {
		t.Errorf("a store that is away for a moment: %v", err)
	}
}

// away is a store that can't be reached for a while.
type away struct {
	kv.Store
	until <-chan struct{}
}

func (a *away) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	f(kv.View{Err: fmt.Errorf("%w: connection refused", kv.ErrUnavailable)})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-a.until:
	}
	return a.Store.Watch(ctx, prefix, f)
}

// A store that can't be reached ends the wait once patience is over, and says what it can't reach meanwhile; an outage
// that is shorter is waited through.
func TestWaitEndsWhenTheStoreStaysAway(t *testing.T) {
	t.Parallel()
	s := openDir(t)
	store(t, s, recordOf("1", 2), reportOf("web-1", runs("app", "1")))
	told := ""
	tell := func(missing string) { told += missing + "\n" }
	err := Wait(t.Context(), &away{Store: s}, Filter{}, WaitOptions{Patience: 2 * time.Second, Progress: tell})
	if !errors.Is(err, kv.ErrUnavailable) || !strings.Contains(err.Error(), "connection refused") || !strings.Contains(told, "connection refused") {
		t.Errorf("%v, told %q", err, told)
	}
	back := make(chan struct{})
	tell = func(string) { close(back) } // once it is known to be away
	err = Wait(t.Context(), &away{Store: s, until: back}, Filter{}, WaitOptions{Patience: time.Minute, Progress: tell})
	if err != nil {
		t.Errorf("an outage that ended: %v", err)
	}
}
