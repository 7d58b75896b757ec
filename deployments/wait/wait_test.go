package wait_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments/wait"
)

func TestForEndsWithTheTimeOrTheCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		if err := wait.For(t.Context(), time.Minute); err != nil || time.Since(began) != time.Minute {
			t.Errorf("For a minute took %v and returned %v", time.Since(began), err)
		}
		if err := wait.For(t.Context(), 0); err != nil {
			t.Errorf("For no time returned %v", err)
		}
		cause := errors.New("cause")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(cause) })
		for _, d := range []time.Duration{time.Minute, 0} {
			if err := wait.For(ctx, d); err != cause {
				t.Errorf("For %v of an ended context returned %v, want its cause", d, err)
			}
		}
		if waited := time.Since(began); waited != time.Minute+time.Second {
			t.Errorf("waited %v, want to end with the context", waited)
		}
	})
}

func TestJitterStaysWithinItsPart(t *testing.T) {
	for range 1000 {
		if d := wait.Jitter(time.Minute, 0.2); d < 48*time.Second || d > 72*time.Second {
			t.Fatalf("Jitter of a minute by 20 %% gave %v", d)
		}
	}
}

func TestBackoffDoublesUpToItsLimit(t *testing.T) {
	b := wait.NewBackoff(time.Second, 4*time.Second)
	for range 2 {
		for i, most := range []time.Duration{2 * time.Second, 4 * time.Second, 8 * time.Second, 8 * time.Second} {
			if b.Tries() != i {
				t.Errorf("%d tries, want %d", b.Tries(), i)
			}
			if d := b.Next(); d < 0 || d > most {
				t.Errorf("a pause of %v, want at most %v", d, most)
			}
		}
		b.Reset()
	}
}

func TestSignalsCountAsOneUntilReceived(t *testing.T) {
	s := wait.NewSignal()
	s.Set()
	s.Set()
	<-s.C()
	select {
	case <-s.C():
		t.Error("received twice, want once")
	default:
	}
	s.Set()
	<-s.C()
}
