package kv

import (
	"context"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// newBackoff gives pauses that double from first to limit on average, each anywhere between nothing and twice that,
// so that a fleet which failed together does not come back together.
func newBackoff(first, limit time.Duration) *backoff.ExponentialBackOff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = first, limit
	b.Multiplier, b.RandomizationFactor = 2, 1
	return b
}

// wait pauses for d, or until ctx ends, whose error it returns.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
