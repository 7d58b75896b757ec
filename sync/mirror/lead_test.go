package mirror

import (
	"context"
	"errors"
	"testing"
	"time"

	"kedge/kv"
)

// led is a leader whose rounds, and what its watches show, are the test's to call.
func led(t *testing.T, o *origin) (*leader, *recorder) {
	t.Helper()
	store := &recorder{Store: dirStore(t)}
	m, err := New(Config{Store: store, Repo: o.bare, Env: env()})
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
	return l, store
}

// What a watch shows before it knows the prefix for certain is no ground to write anything.
func TestNothingIsWrittenOnAnUnsettledView(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	git := l.look(t.Context(), gitState{})
	for _, view := range []kv.View{{}, {Err: kv.ErrUnavailable}} {
		l.sawDesired(view)
		if _, err := l.round(t.Context(), git); err != nil {
			t.Error(err)
		}
		if got := store.taken(); len(got) != 0 {
			t.Errorf("on the view %+v it wrote %v", view, got)
		}
	}
	l.sawDesired(kv.View{Settled: true})
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
	o := newOrigin(t)
	o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	l.sawDesired(kv.View{Settled: true})
	if _, err := l.round(t.Context(), l.look(t.Context(), gitState{})); err != nil {
		t.Fatal(err)
	}
	store.taken()

	head := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "prod/web/base.yaml": unitFile("base/1")})
	git := l.look(t.Context(), gitState{})
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
	l.sawDesired(kv.View{Settled: true, Entries: entries})
	if _, err := l.round(t.Context(), git); err != nil {
		t.Fatal(err)
	}
	if got := store.taken(); len(got) != 1 || l.written.Head != head {
		t.Errorf("it wrote %v, and the status %+v", got, l.written)
	}
}

// A write that is refused for the lease's sake is the end of it, whatever the lease's clock says.
func TestALostLeaseEndsTheLoop(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	l, store := led(t, o)
	l.setState(l.look(t.Context(), gitState{}))
	l.sawDesired(kv.View{Settled: true})
	store.setFail(kv.ErrLeaseLost)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := l.loop(ctx); !errors.Is(err, kv.ErrLeaseLost) {
		t.Errorf("the loop ended with %v", err)
	}
}
