package agent

import (
	"context"
	"errors"
	"time"

	"kedge/kv"
	"kedge/sync/agent/cache"
)

// watch watches one prefix of the store until ctx ends.
func (a *Agent) watch(ctx context.Context, s *cache.Source) {
	retry := newBackoff()
	for ctx.Err() == nil {
		err := a.c.Store.Watch(ctx, s.Prefix, func(v kv.View) {
			retry.Reset()
			a.takeView(ctx, s, v)
		})
		if ctx.Err() != nil {
			return
		}
		a.c.Log.Error("the watch of the store ended: watching again", "prefix", s.Prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// takeView updates the cache from a view of the store. If the view isn't synced, takeView starts
// makeFolder after ErrDenied, and useSnapshot at the first error.
func (a *Agent) takeView(ctx context.Context, s *cache.Source, v kv.View) {
	a.mu.Lock()
	a.cache.See(s, v, time.Now())
	a.mu.Unlock()
	a.changed.Set()
	if v.Synced {
		return
	}
	if errors.Is(v.Err, kv.ErrDenied) {
		a.mu.Lock()
		making := a.making[s]
		a.making[s] = true
		a.mu.Unlock()
		if !making {
			a.workers.Go(func() { a.makeFolder(ctx, s) })
		}
	}
	if v.Err != nil {
		a.snapshot.Do(func() { a.workers.Go(func() { a.useSnapshot(ctx) }) })
	}
}

// makeFolder makes the folder key of s. While that key is missing, reading the prefix is denied,
// because nobody can tell a missing key from a lost permission. The mirror usually makes the folder
// key; without a mirror, the agent does if its token allows it. makeFolder tries again after an
// error, as a new token may lack its rights for a while. It ends once the key is there, the prefix
// is no longer denied, or ctx ends.
func (a *Agent) makeFolder(ctx context.Context, s *cache.Source) {
	retry := newBackoff()
	for a.lacksFolder(s) {
		err := a.c.Store.EnsureFolders(ctx, s.Prefix)
		if err == nil {
			a.c.Log.Info("the folder key is there now, made by this agent or by a mirror", "prefix", s.Prefix)
			a.mu.Lock()
			a.making[s] = false
			a.mu.Unlock()
			return
		}
		a.c.Log.Debug("could not make the folder key", "prefix", s.Prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// lacksFolder records in a.making, and reports, whether reading the prefix of s is denied: see makeFolder.
func (a *Agent) lacksFolder(s *cache.Source) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := s.Error()
	a.making[s] = errors.Is(err, kv.ErrDenied)
	return a.making[s]
}

// useSnapshot reads a snapshot, and offers it to the sources of which nothing is known. It retries until it has read
// one, or until something is known of every source.
func (a *Agent) useSnapshot(ctx context.Context) {
	if a.c.Snapshot == nil {
		return
	}
	retry := newBackoff()
	for a.needsSnapshot() {
		entries, err := a.c.Snapshot(ctx)
		if err == nil {
			a.offerSnapshot(entries)
			return
		}
		if retry.Tries() == 0 && ctx.Err() == nil {
			a.c.Log.Warn(
				"could not read the mirror's snapshot: trying again. Neither the store nor this node's disk has all "+
					"records and pins of this node: see that the store or the snapshot can be reached",
				"error",
				err,
			)
		}
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

func (a *Agent) needsSnapshot() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cache.NeedsSnapshot()
}

func (a *Agent) offerSnapshot(entries []kv.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache.Offer(entries, time.Now())
	a.changed.Set()
}
