package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

const (
	minTTL, maxTTL = 10 * time.Second, 24 * time.Hour // Consul's bounds for a session's TTL
	// leaseLockDelay is how long Consul keeps a lost lease from the next holder: practically not at all. Consul's
	// default of 15 s protects writes that aren't fenced; kedge's are.
	leaseLockDelay = time.Millisecond
	// maxHeartbeatTries is how many times Lease tries to start its heartbeat at a Consul agent that
	// is unavailable, within some 10 s and while nobody holds the lease. After that it does without
	// a heartbeat. An agent with a full disk, for example, registers no service, but answers
	// other requests.
	maxHeartbeatTries = 8
)

func (s *Store) Lease(ctx context.Context, key, holder string, ttl time.Duration) (kv.Lease, error) {
	if err := backend.CheckKey(key); err != nil {
		return nil, fmt.Errorf("lease: %w", err)
	}
	if ttl < minTTL || ttl > maxTTL {
		return nil, fmt.Errorf("lease %s: the TTL is %v: Consul takes %v to %v", key, ttl, minTTL, maxTTL)
	}
	value, err := json.Marshal(kv.LeaseHolder{Holder: holder})
	if err != nil {
		return nil, fmt.Errorf("lease %s: %w", key, err)
	}
	pause := wait.NewBackoff(50*time.Millisecond, 5*time.Second)
	var causes backend.Causes
	heartbeatTries := 0
	for {
		var lease *lease
		held, err := s.awaitFree(ctx, key)
		if held {
			heartbeatTries = 0 // failures from before another process held the lease say nothing about now
		}
		if held && err == nil {
			pause.Reset()
			causes.FirstOfKind(nil)
		}
		if err == nil {
			lease, err = s.tryLease(ctx, key, holder, value, ttl, heartbeatTries >= maxHeartbeatTries)
		}
		switch {
		case err == nil && lease != nil:
			return lease, nil
		case err == nil:
			// Consul's lock-delay isn't over, or another process was faster.
			pause.Reset()
			causes.FirstOfKind(nil)
			heartbeatTries = 0
			err = wait.For(ctx, 50*time.Millisecond)
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case errors.Is(err, kv.ErrUnavailable):
			if errors.Is(err, errNoHeartbeat) {
				heartbeatTries++
			}
			if causes.FirstOfKind(err) {
				s.log.Warn("could not ask for the lease: trying again", "key", key, "error", err)
			}
			err = pause.Wait(ctx)
		}
		if err != nil {
			return nil, err
		}
	}
}

// tryLease tries once to take the lease. It returns nil without an error if Consul didn't grant the
// lease. See leaseSession for withoutHeartbeat.
func (s *Store) tryLease(
	ctx context.Context,
	key, holder string,
	value []byte,
	ttl time.Duration,
	withoutHeartbeat bool,
) (*lease, error) {
	asked := time.Now()
	heart, session, err := s.leaseSession(ctx, api.SessionEntry{
		Name: "kedge lease of " + holder, TTL: ttl.String(), Behavior: api.SessionBehaviorRelease, LockDelay: leaseLockDelay,
	}, withoutHeartbeat)
	if err != nil {
		return nil, err
	}
	var held bool
	err = s.do(ctx, "take the lease "+key, requestTimeout, func(q *api.QueryOptions) (err error) {
		held, _, err = s.client.KV().
			Acquire(&api.KVPair{Key: s.prefix + key, Value: value, Session: session}, writeOptions(q))
		return err
	})
	if err != nil || !held {
		s.destroySession(session)
		if heart != nil {
			heart.stop()
		}
		return nil, err
	}
	l := &lease{
		store:   s,
		key:     s.prefix + key,
		session: session,
		heart:   heart,
		ttl:     ttl,
		renewed: asked,
		done:    make(chan struct{}),
	}
	// The lease outlives the call that waited for it.
	l.ctx, l.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	go l.keep()
	return l, nil
}

// errNoHeartbeat means that the Consul agent was unavailable when the heartbeat was to start.
var errNoHeartbeat = errors.New("start the lease's heartbeat")

// leaseSession creates a session that ends soon after its holder's last heartbeat. If there can't
// be a heartbeat, as when the token may not register its service, heart is nil, and the session
// ends by its TTL. If the Consul agent is unavailable, the error is errNoHeartbeat and
// ErrUnavailable, unless withoutHeartbeat allows a session without a heartbeat.
func (s *Store) leaseSession(
	ctx context.Context,
	e api.SessionEntry,
	withoutHeartbeat bool,
) (heart *heartbeat, session string, err error) {
	if err = errStrayed; !s.strayed.allRecent() {
		heart, err = s.startHeartbeat(ctx, leaseHeartbeat)
	}
	if err == nil {
		if session, err = heart.newSession(ctx, e, heart.ttl/2); err == nil {
			return heart, session, nil
		}
		heart.stop()
	}
	if !withoutHeartbeat && errors.Is(err, kv.ErrUnavailable) && !missesCheck(err) {
		return nil, "", fmt.Errorf("%w: %w", errNoHeartbeat, err)
	}
	s.log.Warn("no heartbeat for the lease: if this process dies, another takes over after up to twice the ttl",
		"ttl", e.TTL, "error", err)
	session, err = s.createSession(ctx, &e)
	return nil, session, err
}

// awaitFree waits until no session holds the key. held reports whether a session was seen to hold it, even with an
// error.
func (s *Store) awaitFree(ctx context.Context, key string) (held bool, err error) {
	var index uint64
	for {
		var free bool
		asked := time.Now()
		err := s.do(ctx, "wait for the lease "+key, watchTimeout, func(q *api.QueryOptions) error {
			q.WaitIndex, q.WaitTime = index, watchWait
			pair, meta, err := s.client.KV().Get(s.prefix+key, q)
			if err != nil {
				return err
			}
			free = pair == nil || pair.Session == ""
			index = nextIndex(index, meta.LastIndex, time.Since(asked), watchWait)
			return nil
		})
		if err != nil || free {
			return held, err
		}
		held = true
		if index == 0 {
			if err := wait.For(ctx, 50*time.Millisecond); err != nil {
				return held, err
			}
		}
	}
}

// lease is a held key and the session that holds it. It is used instead of the Lock of Consul's client, which may take
// minutes to notice that its lock is lost.
type lease struct {
	store   *Store
	key     string // with the store's prefix
	session string
	heart   *heartbeat // nil: no heartbeat
	ttl     time.Duration

	ctx    context.Context
	cancel context.CancelCauseFunc
	done   chan struct{} // closed once keep has ended

	mu      sync.Mutex
	renewed time.Time // when the last request that renewed the session was sent
}

func (l *lease) Context() context.Context { return l.ctx }

// left returns for how long neither the session's TTL nor its heartbeat's check can end the
// session; 0 or less: one of them may have ended it. Consul counts from the request's arrival, so
// the true time is longer.
func (l *lease) left() time.Duration {
	l.mu.Lock()
	left := l.ttl - elapsed(l.renewed)
	l.mu.Unlock()
	if l.heart != nil {
		left = min(left, l.heart.left())
	}
	return left
}

// elapsed returns the time since a moment by the monotonic clock or by the wall clock, whichever shows more. The
// monotonic clock stands still while the machine is suspended.
func elapsed(since time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(since), now.Round(0).Sub(since.Round(0)))
}

func (l *lease) expired() bool {
	if l.left() <= 0 {
		l.lose()
	}
	return l.ctx.Err() != nil
}

func (l *lease) lose() { l.cancel(kv.ErrLeaseLost) }

// keep renews the session every third of its TTL until the lease ends. It ends the lease if the session or its hold of
// the key is lost, or if the session can't be renewed in time.
func (l *lease) keep() {
	defer close(l.done)
	if l.heart != nil {
		defer l.heart.stop()
		go l.heart.keep(l.ctx)
	}
	next := l.ttl / 3
	for {
		// The clock is checked at least once a second, in case it jumped.
		if wait.For(l.ctx, min(next, l.left(), time.Second)) != nil {
			break
		}
		if l.expired() {
			break
		}
		if next -= time.Second; next > 0 {
			continue
		}
		asked := time.Now()
		err := l.check(min(l.left(), l.ttl/3))
		switch {
		case err == nil:
			l.mu.Lock()
			l.renewed = asked
			l.mu.Unlock()
			next = l.ttl / 3
		case errors.Is(err, kv.ErrLeaseLost):
			l.lose()
		case l.ctx.Err() == nil:
			l.store.log.Warn("could not renew the lease: trying again until it expires", "key", l.key,
				"expires_in", l.left(), "error", err)
			next = min(time.Second, l.ttl/10)
		}
	}
	if errors.Is(context.Cause(l.ctx), kv.ErrLeaseLost) {
		l.store.destroySession(l.session) // it may still hold the key
	}
}

// check renews the session, and verifies that the session still locks the key, which anyone who may
// write the key can unlock. The error is ErrLeaseLost if the session or the lock is gone.
func (l *lease) check(timeout time.Duration) error {
	err := l.store.renewSession(l.ctx, l.session, timeout)
	if errors.Is(err, kv.ErrNotFound) {
		return kv.ErrLeaseLost
	}
	if err != nil {
		return err
	}
	return l.store.do(l.ctx, "look at the lease", timeout, func(q *api.QueryOptions) error {
		pair, _, err := l.store.client.KV().Get(l.key, consistent(q))
		if err == nil && (pair == nil || pair.Session != l.session) {
			return kv.ErrLeaseLost
		}
		return err
	})
}

func (l *lease) Release(ctx context.Context) error {
	l.cancel(context.Canceled)
	<-l.done
	// The key is unlocked first, as destroying a session that holds the key would start the lock-delay. The
	// end of a heartbeat may have ended the session already.
	err := l.store.do(ctx, "release the lease", requestTimeout, func(q *api.QueryOptions) error {
		pair, _, err := l.store.client.KV().Get(l.key, consistent(q))
		if err != nil || pair == nil || pair.Session != l.session {
			return err
		}
		_, _, err = l.store.client.KV().
			Release(&api.KVPair{Key: l.key, Value: pair.Value, Session: l.session}, writeOptions(q))
		return err
	})
	if err != nil {
		return err
	}
	l.store.destroySession(l.session)
	return nil
}
