package mirror

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git/gittest"
)

// led returns a leader whose rounds and views the test controls.
func led(t *testing.T, o *gittest.Origin) (*leader, *recorder) {
	t.Helper()
	store := &recorder{Store: dirStore(t)}
	m, err := New(Config{Store: store, Repo: o.Bare, Env: env()})
	if err != nil {
		t.Fatal(err)
	}
	lease, err := store.Lease(t.Context(), kv.MirrorLease, "a", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = lease.Release(context.Background()) })
	l := newLeader(m, lease)
	if err := l.begin(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.observer.pins(kv.View{Synced: true})
	return l, store
}

// Nothing is written on a view that isn't synced.
func TestNothingIsWrittenOnAnUnsettledView(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	git := l.branch.readBranch(t.Context(), gitState{})
	for _, view := range []kv.View{{}, {Err: kv.ErrUnavailable}} {
		l.observer.records(view)
		if _, err := l.round(t.Context(), git); err != nil {
			t.Error(err)
		}
		if got := store.taken(); len(got) != 0 {
			t.Errorf("on the view %+v it wrote %v", view, got)
		}
	}
	l.observer.records(kv.View{Synced: true})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Error(err)
	}
	if got := store.taken(); len(got) != 1 {
		t.Errorf("it wrote %v, want one transaction", got)
	}
}

// A push that comes before the watch shows the writes of the last one waits for them, with all its units.
func TestACommitWaitsForTheWritesOfTheLast(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	l.observer.records(kv.View{Synced: true})
	if _, err := l.round(t.Context(), l.branch.readBranch(t.Context(), gitState{})); err != nil {
		t.Fatal(err)
	}
	store.taken()

	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "prod/web/base.yaml": unitFile("base/1")})
	git := l.branch.readBranch(t.Context(), gitState{})
	// On a machine that is slow the write counts as lost by now, and the store refuses the next.
	if again, err := l.round(t.Context(), git); err == nil && again == 0 || err != nil && !errors.Is(err, kv.ErrConflict) {
		t.Errorf("it looks again after %v, %v", again, err)
	}
	if got := store.taken(); len(got) != 0 {
		t.Errorf("it wrote %v", got)
	}
	entries, err := store.List(t.Context(), kv.DesiredPrefix)
	if err != nil {
		t.Fatal(err)
	}
	l.observer.records(kv.View{Synced: true, Entries: entries})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Fatal(err)
	}
	if got := store.taken(); len(got) != 1 || l.writer.state.Head != head {
		t.Errorf("it wrote %v, and the status %+v", got, l.writer)
	}
}

// A write that is refused for a lost lease ends the loop, whatever the lease's clock says.
func TestALostLeaseEndsTheLoop(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	l.branch.set(l.branch.readBranch(t.Context(), gitState{}))
	l.observer.records(kv.View{Synced: true})
	store.setFail(kv.ErrLeaseLost)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.loop(ctx); !errors.Is(err, kv.ErrLeaseLost) {
		t.Errorf("the loop ended with %v", err)
	}
}

// While the store is away nodes can't report that they have converged: this makes no node late, neither during the
// outage nor after it. Nor does a clock that steps.
func TestAnOutageMakesNobodyLate(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2") + gradual})
	l, store := led(t, o)
	git := l.branch.readBranch(t.Context(), gitState{})
	long := time.Now().Add(-time.Hour)
	put(t, store.Store, "desired/prod/web/app", string(encode(deployments.Record{Target: pointer("app/2"), Stable: pointer("app/1"), Generation: 2,
		Commit:  strings.Repeat("c", 40),
		Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: math.MaxUint64, Promoted: true, Since: long.UTC().Truncate(time.Millisecond)}})))
	report := kv.Entry{Key: "status/prod/web/web-1", Version: 1, Session: "s", Value: []byte(`{"node":"web-1","units":{"app":{"state":"switching","generation":2,"running":"` +
		pointer("app/1").String() + `","want":"` + pointer("app/2").String() + `"}}}`)}
	for _, c := range []struct {
		name string
		view kv.View
		step time.Duration // of the mirror's clock
		late bool
	}{
		{"the store is back", kv.View{Since: time.Now()}, 0, false},
		{"it may be away", kv.View{Since: long, Err: kv.ErrUnavailable}, 0, false},
		{"the clock went forward", kv.View{Since: long}, time.Hour, false},
		{"it never was", kv.View{Since: long}, 0, true},
	} {
		now := time.Now()
		l.clock = clockSteps{log: l.c.Log, at: now, wall: now.Round(0).Add(-c.step)}
		entries, err := store.List(t.Context(), kv.DesiredPrefix)
		if err != nil {
			t.Fatal(err)
		}
		l.observer.records(kv.View{Synced: true, Entries: entries})
		c.view.Synced, c.view.Entries = true, []kv.Entry{report}
		l.observer.fleet(c.view)
		if _, err := l.round(t.Context(), git); err != nil {
			t.Fatal(err)
		}
		if got := desired(t, store)["prod/web/app"]; strings.Contains(got, "not converged in time") != c.late {
			t.Errorf("%s: %s", c.name, got)
		}
	}
}

// If a commit waits because the nodes' reports can't be read, mirror/state says so.
func TestACommitThatWaitsForReportsSaysWhy(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	head := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual})
	l, _ := led(t, o)
	l.rebuildWait = 0
	git := l.branch.readBranch(t.Context(), gitState{})
	l.observer.records(kv.View{Synced: true})
	l.observer.fleet(kv.View{Err: fmt.Errorf("list status/: %w", kv.ErrDenied)})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Fatal(err)
	}
	if l.writer.state.Head != "" || !strings.Contains(l.writer.state.Error, "list status/: permission denied") {
		t.Errorf("status %+v", l.writer)
	}
	l.observer.fleet(kv.View{Synced: true})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Fatal(err)
	}
	if l.writer.state.Head != head || l.writer.state.Error != "" {
		t.Errorf("status %+v", l.writer)
	}
}

// A commit with a record that waits for reports is looked at again as soon as these have had their time.
func TestACommitThatWaitsForReportsIsNotLate(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1") + gradual})
	l, _ := led(t, o)
	l.rebuildWait = watchLag / 10
	git := l.branch.readBranch(t.Context(), gitState{})
	l.observer.records(kv.View{Synced: true})
	l.observer.fleet(kv.View{Synced: true})
	again, err := l.round(t.Context(), git)
	if err != nil || l.writer.state.Head != "" || again == 0 || again > l.rebuildWait {
		t.Errorf("after %v, %v, with %+v; want a round within %v", again, err, l.writer.state, l.rebuildWait)
	}
}

// An order that was replaced between the mirror's read and its write is neither carried out nor removed.
func TestAnOrderThatIsReplacedMeanwhile(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	git := l.branch.readBranch(t.Context(), gitState{})
	l.observer.records(kv.View{Synced: true})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Fatal(err)
	}
	see := func(prefix string) kv.View {
		entries, err := store.List(t.Context(), prefix)
		if err != nil {
			t.Fatal(err)
		}
		return kv.View{Synced: true, Entries: entries}
	}
	l.observer.records(see(kv.DesiredPrefix))
	put(t, store.Store, "control/prod/web/app", "retry")
	l.observer.orders(see(kv.ControlPrefix))
	put(t, store.Store, "control/prod/web/app", "pause")
	if _, err := l.round(t.Context(), git); !errors.Is(err, kv.ErrConflict) {
		t.Errorf("it obeyed what is no longer asked for: %v", err)
	}
	if e, err := store.Get(t.Context(), "control/prod/web/app"); err != nil || string(e.Value) != "pause" || strings.Contains(desired(t, store)["prod/web/app"], "retry") {
		t.Errorf("the order is %q, %v, and the record %s", e.Value, err, desired(t, store)["prod/web/app"])
	}
	l.observer.orders(see(kv.ControlPrefix))
	if _, err := l.round(t.Context(), git); err != nil {
		t.Error(err)
	}
	if _, err := store.Get(t.Context(), "control/prod/web/app"); !errors.Is(err, kv.ErrNotFound) {
		t.Errorf("the order was not taken: %v", err)
	}
}

// Writes that the store keeps refusing are tried about once a second, however often the store changes meanwhile.
func TestConflictsOfAFleetThatReports(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	l.branch.set(l.branch.readBranch(t.Context(), gitState{}))
	l.observer.records(kv.View{Synced: true})
	var tries atomic.Int32
	second := make(chan struct{})
	store.setRefuse(func([]kv.Op) error {
		if tries.Add(1) == 2 {
			close(second)
		}
		return kv.ErrConflict
	})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.loop(ctx) }()
	reports := time.NewTicker(time.Millisecond)
	defer reports.Stop()
	var enough <-chan time.Time
	for waiting := true; waiting; {
		select {
		case <-reports.C:
			l.observer.changed.Set()
		case <-second:
			second, enough = nil, time.After(300*time.Millisecond)
		case <-enough:
			waiting = false
		}
	}
	cancel()
	<-ended
	if n := tries.Load(); n != 2 {
		t.Errorf("it tried %d times, want 2", n)
	}
}

// An error of Config.Leading ends the leadership, and isn't taken for the loss of the lease.
func TestLeadingFails(t *testing.T) {
	t.Parallel()
	m := start(t, Config{Store: dirStore(t), Repo: gittest.New(t).Bare,
		Leading: func(context.Context, kv.Lease) error { return errors.New("no receiver") }})
	m.await("the log", func() error {
		if text := m.log.String(); !strings.Contains(text, "gives up the lease") || !strings.Contains(text, "no receiver") ||
			strings.Contains(text, "lost the lease") {
			return errors.New("it says something else")
		}
		return nil
	})
}
