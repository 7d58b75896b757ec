package drain

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

func TestMaintenanceFollowsDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var calls []bool
		var away atomic.Bool
		converged := make(chan struct{})
		d := New(func(_ context.Context, on bool, reason string) error {
			if on && (!strings.HasPrefix(reason, kv.MaintenanceReason) ||
				!strings.HasSuffix(reason, " //app: see kedge status")) {
				t.Errorf("the reason is %q", reason) // of another the node isn't taken back
			}
			if away.Load() {
				return errors.New("consul is away")
			}
			calls = append(calls, on)
			return nil
		}, converged, slog.New(slog.DiscardHandler))
		go d.Run(ctx)
		app, base := deployments.UnitID{Unit: "app"}, deployments.UnitID{Unit: "base"}
		set := func(id deployments.UnitID, on bool) time.Duration {
			began := time.Now()
			if err := d.Set(ctx, id, on); err != nil {
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
		if took := set(app, true); took > 0 {
			t.Errorf("a switch waited %v for maintenance mode that was on at once", took)
		}
		set(base, true)
		set(app, false)
		if len(calls) != 1 || !calls[0] {
			t.Fatalf("with one unit still drained, maintenance was turned %v", calls)
		}
		set(base, false)
		if len(calls) != 2 || calls[1] {
			t.Fatalf("maintenance was turned %v", calls)
		}

		// An outage delays a switch for a bounded time, and maintenance mode is set later.
		away.Store(true)
		if took := set(app, true); took != maxWait {
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

// Without maintenance mode no switch waits for it; nor does a cancelled switch, or a unit that is back in service.
func TestSwitchThatHasNothingToWaitFor(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		app := deployments.UnitID{Unit: "app"}
		began := time.Now()
		d := New(nil, make(chan struct{}), slog.New(slog.DiscardHandler))
		if err := d.Set(t.Context(), app, true); err != nil || !slices.Equal(d.Units(), []deployments.UnitID{app}) {
			t.Errorf("drained are %v, %v", d.Units(), err)
		}
		d.Run(t.Context()) // returns
		superseded := errors.New("superseded")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(superseded)
		away := func(context.Context, bool, string) error { return errors.New("consul is away") }
		d = New(away, make(chan struct{}), slog.New(slog.DiscardHandler))
		if err := d.Set(ctx, app, true); !errors.Is(err, superseded) {
			t.Errorf("got %v", err)
		}
		if err := d.Set(t.Context(), app, false); err != nil || len(d.Units()) > 0 {
			t.Errorf("drained are %v, %v", d.Units(), err)
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("it waited %v", took)
		}
	})
}

// If an agent is killed while the node is in maintenance mode, the next run ends that mode once the node has
// converged.
func TestMaintenanceOfARunBefore(t *testing.T) {
	t.Parallel()
	for _, drained := range []bool{false, true} { // whether what was cut off is gone through again
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var calls []bool
			converged := make(chan struct{})
			record := func(_ context.Context, on bool, _ string) error { calls = append(calls, on); return nil }
			d := New(record, converged, slog.New(slog.DiscardHandler))
			go d.Run(ctx)
			time.Sleep(time.Hour)
			if len(calls) > 0 {
				t.Fatalf("before the node was well, maintenance was turned %v", calls)
			}
			var want []bool
			if drained {
				for _, on := range []bool{true, false} {
					if err := d.Set(ctx, deployments.UnitID{Unit: "app"}, on); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
				}
				want = []bool{true, false}
			} else {
				want = []bool{false}
			}
			close(converged)
			synctest.Wait()
			if !slices.Equal(calls, want) {
				t.Errorf("drained again %v: maintenance was turned %v, want %v", drained, calls, want)
			}
			cancel()
			synctest.Wait()
		})
	}
}

// If the answer to switching maintenance mode on was lost, it is switched off as well, even at the start.
func TestMaintenanceThatMayBeOn(t *testing.T) {
	t.Parallel()
	for _, loses := range [][]bool{{true}, {false, true}} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			var on, lost atomic.Bool
			d := New(func(_ context.Context, to bool, _ string) error {
				on.Store(to)
				if lost.Load() {
					return errors.New("no answer")
				}
				return nil
			}, make(chan struct{}), slog.New(slog.DiscardHandler))
			go d.Run(ctx)
			app := deployments.UnitID{Unit: "app"}
			for _, lose := range loses {
				lost.Store(lose)
				if err := d.Set(ctx, app, true); err != nil {
					t.Fatal(err)
				}
				lost.Store(false)
				if err := d.Set(ctx, app, false); err != nil {
					t.Fatal(err)
				}
				time.Sleep(2 * maxRetry)
				synctest.Wait()
				if on.Load() {
					t.Errorf("answers lost %v: the node is still in maintenance mode", loses)
				}
			}
			cancel()
			synctest.Wait()
		})
	}
}

// Switching maintenance mode off may come late, or its answer may be lost: a unit that is drained meanwhile waits
// until the mode is on again, as it would otherwise be switched while in service.
func TestSwitchWaitsForMaintenanceThatIsBeingTurned(t *testing.T) {
	t.Parallel()
	for name, lost := range map[string]bool{"slow": false, "the answer is lost": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				var on, slow, switching atomic.Bool
				d := New(func(_ context.Context, to bool, _ string) error {
					if !slow.Load() {
						on.Store(to)
						return nil
					}
					slow.Store(false)
					var err error
					if time.Sleep(maxWait / 2); lost {
						err = errors.New("no answer")
					}
					if on.Store(to); switching.Load() {
						t.Error("maintenance mode went off after the switch had begun")
					}
					return err
				}, make(chan struct{}), slog.New(slog.DiscardHandler))
				go d.Run(ctx)
				app, base := deployments.UnitID{Unit: "app"}, deployments.UnitID{Unit: "base"}
				if err := d.Set(ctx, app, true); err != nil {
					t.Fatal(err)
				}
				slow.Store(true)
				if err := d.Set(ctx, app, false); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if err := d.Set(ctx, base, true); err != nil {
					t.Fatal(err)
				}
				if switching.Store(true); !on.Load() {
					t.Error("a unit is switched while the node is in service")
				}
				time.Sleep(time.Hour)
				if !on.Load() {
					t.Error("a node with a drained unit is in service")
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}
