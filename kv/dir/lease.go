package dir

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

// leasePoll is how often a holder checks its lease, and a waiting process checks whether the lease is free.
const leasePoll = 200 * time.Millisecond

// Lease waits until it holds the lease at key. The holder keeps it until its process dies or releases it, or somebody
// removes its files. ttl must be positive, and has no other effect: a suspended process keeps its flock. Each commit
// under the lease checks that the lease is still held.
func (d *Store) Lease(ctx context.Context, key, holder string, ttl time.Duration) (kv.Lease, error) {
	if err := backend.CheckKey(key); err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	if ttl <= 0 {
		return nil, fmt.Errorf("lease %s: the TTL %v is not positive", key, ttl)
	}
	value, err := json.Marshal(kv.LeaseHolder{Holder: holder})
	if err != nil {
		return nil, fmt.Errorf("lease %s: %w", key, err)
	}
	var causes backend.Causes
	for {
		var session *session
		err := d.withWriteLock(ctx, func() error {
			if holder, err := d.holder(key); err != nil || holder != "" {
				return err
			}
			s, err := d.openSession("lease of " + holder)
			if err != nil {
				return err
			}
			if err := d.commit([]change{{Key: key, Value: value, Holder: s.id}}); err != nil {
				s.close()
				return err
			}
			session = s
			return nil
		})
		if err != nil && !errors.Is(err, kv.ErrUnavailable) {
			return nil, fmt.Errorf("lease %s: %w", key, err)
		}
		if causes.FirstOfKind(err) {
			d.log.Warn("could not ask for the lease: trying again", "key", key, "error", err)
		}
		if session != nil {
			l := &lease{store: d, key: key, session: session, done: make(chan struct{})}
			l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
			go l.endWhenLost()
			return l, nil
		}
		if err := wait.For(ctx, leasePoll); err != nil {
			return nil, err
		}
	}
}

type lease struct {
	store   *Store
	key     string
	session *session

	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{}
}

func (l *lease) Context() context.Context { return l.ctx }

func (l *lease) lose() { l.cancel(kv.ErrLeaseLost) }

// valid reports whether the lease still holds its key; false once it was released or lost. Anyone who may write the
// files can end it, as in Consul by deleting the key.
func (l *lease) valid() bool {
	if l.ctx.Err() != nil || !l.session.valid() {
		return false
	}
	id, err := os.ReadFile(l.store.path(heldDir + "/" + heldName(l.key)))
	if err != nil || string(id) != l.session.id {
		return false
	}
	_, ok := l.store.find(l.key)
	return ok
}

// endWhenLost ends the lease's context once the lease is lost, or the store is gone.
func (l *lease) endWhenLost() {
	defer close(l.done)
	for wait.For(l.ctx, leasePoll) == nil {
		valid := true
		// The lease is checked under the store's lock, so that a write in progress doesn't look like a loss.
		err := l.store.withReadLock(l.ctx, func() error {
			valid = l.valid()
			return nil
		})
		if err == nil && !valid || errors.Is(err, kv.ErrUnavailable) && !l.store.exists() {
			l.lose()
		}
	}
	if errors.Is(context.Cause(l.ctx), kv.ErrLeaseLost) {
		l.session.close()
	}
}

func (l *lease) Release(ctx context.Context) error {
	l.cancel(context.Canceled)
	<-l.done
	if errors.Is(context.Cause(l.ctx), kv.ErrLeaseLost) {
		return nil
	}
	defer l.session.close()
	err := l.store.withWriteLock(ctx, func() error {
		if holder, err := l.store.holder(l.key); err != nil || holder != l.session.id {
			return err
		}
		return l.store.commit([]change{{Key: l.key, KeepValue: true, DropHolder: true}})
	})
	if err != nil {
		return fmt.Errorf("release the lease %s: %w", l.key, err)
	}
	return nil
}
