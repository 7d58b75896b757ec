package consul

import (
	"context"
	"errors"
	"testing"
	"time"

	"kedge/kv"
)

// A suspended machine's monotonic clock stands still; the lease must not.
func TestLeaseCountsByBothClocks(t *testing.T) {
	t.Parallel()
	now := time.Now()
	for name, renewed := range map[string]time.Time{
		"both clocks":    now.Add(-20 * time.Second),
		"the wall clock": now.Round(0).Add(-20 * time.Second),
	} {
		l := &lease{ttl: 15 * time.Second, renewed: renewed}
		l.ctx, l.cancel = context.WithCancelCause(t.Context())
		if !l.expired() || !errors.Is(context.Cause(l.ctx), kv.ErrLeaseLost) {
			t.Errorf("%s: a lease that wasn't renewed for 20 s goes on", name)
		}
	}
	l := &lease{ttl: 15 * time.Second, renewed: now}
	l.ctx, l.cancel = context.WithCancelCause(t.Context())
	if l.expired() {
		t.Error("a fresh lease is over")
	}
}
