package kv

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestBackoff(t *testing.T) {
	t.Parallel()
	const first, limit = 50 * time.Millisecond, 5 * time.Second
	b := newBackoff(first, limit)
	if d := b.NextBackOff(); d > 2*first {
		t.Errorf("the first pause is %v", d)
	}
	var short, long int
	for range 1000 {
		d := b.NextBackOff()
		if d < 0 || d > 2*limit {
			t.Fatalf("a pause of %v", d)
		}
		if d < limit/2 {
			short++
		}
		if d > limit {
			long++
		}
	}
	if short < 100 || long < 300 {
		t.Errorf("of 1000 pauses %d were short and %d long: no full jitter", short, long)
	}
	b.Reset()
	if d := b.NextBackOff(); d > 2*first {
		t.Errorf("the pause after a success is %v", d)
	}
}

func TestWait(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		if err := wait(t.Context(), time.Hour); err != nil || time.Since(start) != time.Hour {
			t.Fatalf("after %v: %v", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := wait(ctx, time.Hour); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != time.Hour+time.Minute {
			t.Fatalf("after %v: %v", time.Since(start), err)
		}
	})
}

// A suspended machine's monotonic clock stands still; the lease must not.
func TestLeaseCountsByBothClocks(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for name, renewed := range map[string]time.Time{
		"both clocks":    now.Add(-20 * time.Second),
		"the wall clock": now.Round(0).Add(-20 * time.Second),
	} {
		l := &consulLease{ttl: 15 * time.Second, renewed: renewed}
		l.ctx, l.cancel = context.WithCancelCause(t.Context())
		if !l.expired() || !errors.Is(context.Cause(l.ctx), ErrLeaseLost) {
			t.Errorf("%s: a lease that wasn't renewed for 20 s goes on", name)
		}
	}
	l := &consulLease{ttl: 15 * time.Second, renewed: now}
	l.ctx, l.cancel = context.WithCancelCause(t.Context())
	if l.expired() {
		t.Error("a fresh lease is over")
	}
}
