package mirror

import (
	"context"
	"errors"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
)

// lead waits for the lease, works while it holds, and waits again.
func (m *Mirror) lead(ctx context.Context) {
	retry := wait.NewBackoff(500*time.Millisecond, 30*time.Second)
	for ctx.Err() == nil {
		lease, err := m.c.Store.Lease(ctx, kv.MirrorLease, m.c.Name, m.c.LeaseTTL)
		if err != nil {
			if ctx.Err() != nil {
				return
			}
			if retry.Tries() == 0 {
				m.c.Log.Warn("cannot ask for the mirror's lease", "store", m.c.Store, "error", err)
			}
			_ = retry.Wait(ctx)
			continue
		}
		retry.Reset()
		m.work(ctx, lease)
		_ = wait.For(ctx, wait.Jitter(time.Second, 0.2)) // whoever else waits goes first
	}
}

// work holds the lease until it is lost or ctx ends, and gives it back.
func (m *Mirror) work(ctx context.Context, lease kv.Lease) {
	m.c.Log.Info("this mirror holds the lease", "name", m.c.Name)
	m.setLeading(lease)
	defer m.setLeading(nil)
	m.Trigger() // a webhook may have come to the mirror before this one, or while none led
	defer m.setScene(nil)
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := lease.Release(ctx); err != nil && !errors.Is(err, kv.ErrLeaseLost) {
			m.c.Log.Warn("cannot give back the mirror's lease, it will run out", "error", err)
		}
	}()
	held, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(lease.Context(), func() { cancel(context.Cause(lease.Context())) })()

	err := newLeader(m, lease).run(held)
	if ctx.Err() == nil {
		m.c.Log.Warn("this mirror lost the lease", "name", m.c.Name, "error", err)
	}
}

// setLeading notes the lease that is held; nil: none.
func (m *Mirror) setLeading(lease kv.Lease) {
	m.mu.Lock()
	m.holds = lease
	m.mu.Unlock()
	m.metrics.led(lease != nil)
}
