package agent

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	firstRetry = 500 * time.Millisecond
	maxRetry   = 30 * time.Second
)

// backOff gives the times to wait between tries: a random part of a time that doubles, so that a fleet that failed together does
// not try again together.
type backOff struct{ tries int }

func (b *backOff) next() time.Duration {
	ceiling := maxRetry
	if b.tries < 16 {
		ceiling = min(maxRetry, firstRetry<<b.tries)
	}
	b.tries++
	return 10*time.Millisecond + rand.N(ceiling)
}

func (b *backOff) reset() { b.tries = 0 }

// wait returns nil after d, or ctx's cause.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
