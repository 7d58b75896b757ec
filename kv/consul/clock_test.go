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

// Heartbeats that stray now and then, as after a suspension, don't make one Consul agent several.
func TestRareStraysAreOneAgent(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		ago  []time.Duration
		want bool
	}{
		"none":             {nil, false},
		"one":              {[]time.Duration{0}, false},
		"two in a minute":  {[]time.Duration{time.Minute, 0}, true},
		"two in a day":     {[]time.Duration{24 * time.Hour, 0}, false},
		"two, a day ago":   {[]time.Duration{25 * time.Hour, 24 * time.Hour}, false},
		"the last of many": {[]time.Duration{time.Hour, 40 * time.Minute, time.Minute}, false},
	} {
		var s strays
		for _, ago := range c.ago {
			s.add(time.Now().Add(-ago))
		}
		if got := s.allRecent(); got != c.want {
			t.Errorf("%s: several agents: %v, want %v", name, got, c.want)
		}
	}
}
