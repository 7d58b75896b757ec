// Package wait holds what loops need to wait: a pause and a send that a context ends, backoff, jitter and a signal.
package wait

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/cenkalti/backoff/v5"
)

// For pauses for d, by the monotonic clock. It returns nil, or the cause of ctx's end if that comes first.
func For(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return context.Cause(ctx)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Send sends v on c. If ctx ends first, it returns ctx's error.
func Send[T any](ctx context.Context, c chan<- T, v T) error {
	select {
	case c <- v:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Jitter returns a random duration within part of d on either side, so that many processes don't act in step.
// A part of 0.2 is ±20 %.
func Jitter(d time.Duration, part float64) time.Duration {
	return time.Duration(float64(d) * (1 - part + 2*part*rand.Float64()))
}

// Backoff computes the pauses between tries. Their average doubles from first to limit: see NewBackoff. Each pause is
// random between nothing and twice the average, so that a fleet that failed together doesn't try again together.
type Backoff struct {
	pauses *backoff.ExponentialBackOff
	tries  int
}

// NewBackoff returns a Backoff. Its average pause begins at first, and grows up to limit.
func NewBackoff(first, limit time.Duration) *Backoff {
	b := backoff.NewExponentialBackOff()
	b.InitialInterval, b.MaxInterval = first, limit
	b.Multiplier, b.RandomizationFactor = 2, 1
	b.Reset()
	return &Backoff{pauses: b}
}

// Next returns the length of the next pause.
func (b *Backoff) Next() time.Duration {
	b.tries++
	return b.pauses.NextBackOff()
}

// Wait pauses, as For does, for the duration that Next returns.
func (b *Backoff) Wait(ctx context.Context) error { return For(ctx, b.Next()) }

// Tries returns the number of pauses since the last Reset.
func (b *Backoff) Tries() int { return b.tries }

// Reset starts again at the shortest pauses, after a success.
func (b *Backoff) Reset() {
	b.tries = 0
	b.pauses.Reset()
}

// Signal wakes one goroutine, which receives from C. Several calls of Set before it receives count as one. NewSignal
// makes a Signal: Set of the zero Signal wakes nobody.
type Signal struct{ c chan struct{} }

// NewSignal returns a signal that isn't set.
func NewSignal() Signal { return Signal{make(chan struct{}, 1)} }

// Set wakes the receiver, now or when it next receives from C. It never blocks.
func (s Signal) Set() {
	select {
	case s.c <- struct{}{}:
	default:
	}
}

// C returns a channel that delivers one value for all calls of Set since the last value was
// received.
func (s Signal) C() <-chan struct{} { return s.c }

// Rest returns how long to pause after recurring work that took the duration took: 20 times as
// long, but no longer than most. Below that bound the work takes less than a twentieth of a core.
func Rest(took, most time.Duration) time.Duration { return min(20*took, most) }
