package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"kedge/kv"
)

// watch follows one prefix of the store until ctx ends.
func (a *Agent) watch(ctx context.Context, s *source) {
	retry := newBackoff()
	for ctx.Err() == nil {
		err := a.c.Store.Watch(ctx, s.prefix, func(v kv.View) {
			retry.Reset()
			a.saw(ctx, s, v)
		})
		if ctx.Err() != nil {
			return
		}
		a.c.Log.Error("watching the store ended, and begins again", "prefix", s.prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// saw takes a view of the store, and helps itself where there is nothing to see.
func (a *Agent) saw(ctx context.Context, s *source, v kv.View) {
	a.see(s, v)
	if v.Synced {
		return
	}
	if errors.Is(v.Err, kv.ErrDenied) {
		a.mu.Lock()
		making := s.making
		s.making = true
		a.mu.Unlock()
		if !making {
			a.workers.Go(func() { a.makeFolder(ctx, s) })
		}
	}
	if v.Err != nil {
		a.snapshot.Do(func() { a.workers.Go(func() { a.useSnapshot(ctx) }) })
	}
}

// makeFolder makes the folder key without which nobody can tell a missing key from a lost permission. That is the
// mirror's job; where there is none, and the agent's token may, it helps itself. It tries until the prefix can be
// read: the token may be new, or the store away.
func (a *Agent) makeFolder(ctx context.Context, s *source) {
	retry := newBackoff()
	for a.lacksFolder(s) {
		err := a.c.Store.EnsureFolders(ctx, s.prefix)
		if err == nil {
			a.c.Log.Info("made the folder key, where there may be no mirror", "prefix", s.prefix)
			a.mu.Lock()
			s.making = false
			a.mu.Unlock()
			return
		}
		a.c.Log.Debug("the folder key can't be made by this agent", "prefix", s.prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// lacksFolder reports whether there is something left for makeFolder to do.
func (a *Agent) lacksFolder(s *source) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.making = errors.Is(s.trouble, kv.ErrDenied)
	return s.making
}

// see takes a view of the store.
func (a *Agent) see(s *source, v kv.View) {
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.roleOf(s)
	var counts func(key string) bool
	switch {
	case s.desired:
		counts = a.records(r, v.Entries, v.Synced)
	default:
		counts = a.counts(r)
		if v.Synced {
			s.seen = v.Entries
			a.notePassedOver(r, counts)
		}
	}
	now := time.Now()
	if s.accept(v, counts, now, a.c.Log) {
		a.unsaved = a.known.set(s.prefix, s.entries, s.floors, now) || a.unsaved
		a.changedRecords(r, s, now)
	}
	a.metrics.seen(s.prefix, v.Err == nil)
	a.kick()
}

// changedRecords has the pins of a role counted anew after its records changed.
func (a *Agent) changedRecords(r *role, s *source, now time.Time) {
	if !s.desired {
		return
	}
	a.trimFloors(r)
	if a.recount(r, now) {
		a.unsaved = a.known.set(r.pins.prefix, r.pins.entries, nil, now) || a.unsaved
	}
}

// roleOf returns the role that a source is of.
func (a *Agent) roleOf(s *source) *role {
	i := slices.IndexFunc(a.roles, func(r *role) bool { return r.desired == s || r.pins == s })
	return a.roles[i]
}

// useSnapshot offers a snapshot to the sources that know nothing, as long as there are any.
func (a *Agent) useSnapshot(ctx context.Context) {
	if a.c.Snapshot == nil {
		return
	}
	retry := newBackoff()
	for a.ignorant() {
		entries, err := a.c.Snapshot(ctx)
		if err == nil {
			a.offerSnapshot(entries)
			return
		}
		if retry.Tries() == 0 && ctx.Err() == nil {
			a.c.Log.Warn(
				"the store is away, nothing is known from before, and the snapshot can't be read: trying again",
				"error",
				err,
			)
		}
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

func (a *Agent) ignorant() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(
		a.roles,
		func(r *role) bool { return r.desired.from == fromNowhere || r.pins.from == fromNowhere },
	)
}

func (a *Agent) offerSnapshot(entries []kv.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, r := range a.roles {
		for _, s := range r.sources() {
			counts := a.counts(r)
			if s.desired {
				counts = a.records(r, below(entries, s.prefix), true)
			}
			own := s.only(entries, counts)
			if s.offer(own, fromSnapshot, time.Now()) {
				a.c.Log.Warn(
					"the store is away and nothing is known from before: using the snapshot",
					"prefix",
					s.prefix,
					"keys",
					len(own),
				)
			}
		}
	}
	a.kick()
}
