package agent

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
)

func TestMaintenanceFollowsDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var calls []bool
		var away atomic.Bool
		d := newDrains(func(_ context.Context, on bool, _ string) error {
			if away.Load() {
				return errors.New("consul is away")
			}
			calls = append(calls, on)
			return nil
		}, quiet())
		go d.run(ctx)
		app, base := deployments.UnitID{Unit: "app"}, deployments.UnitID{Unit: "base"}
		set := func(id deployments.UnitID, on bool) time.Duration {
			began := time.Now()
			if err := d.set(ctx, id, on); err != nil {
				t.Fatal(err)
			}
			took := time.Since(began)
			synctest.Wait()
			return took
		}
		synctest.Wait()
		if len(calls) != 0 {
			t.Fatal("maintenance mode was turned that kedge had not turned on")
		}
		set(app, true)
		set(base, true)
		set(app, false)
		if len(calls) != 1 || !calls[0] {
			t.Fatalf("with one unit still drained, maintenance was turned %v", calls)
		}
		set(base, false)
		if len(calls) != 2 || calls[1] {
			t.Fatalf("maintenance was turned %v", calls)
		}

		// An outage delays a switch by a bounded time, and what could not be told is told later.
		away.Store(true)
		if took := set(app, true); took != drainWait {
			t.Errorf("a switch waited %v for maintenance mode", took)
		}
		away.Store(false)
		time.Sleep(2 * maxRetry)
		synctest.Wait()
		if len(calls) != 3 || !calls[2] {
			t.Fatalf("maintenance was turned %v", calls)
		}
		away.Store(true)
		set(app, false)
		away.Store(false)
		time.Sleep(2 * maxRetry)
		synctest.Wait()
		if len(calls) != 4 || calls[3] {
			t.Errorf("maintenance was turned %v", calls)
		}
		cancel()
		synctest.Wait()
	})
}
