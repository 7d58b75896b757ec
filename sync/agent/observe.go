package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/agent/cache"
)

// watch watches one prefix of the store until ctx ends.
func (a *Agent) watch(ctx context.Context, s *cache.Source) {
	retry := newBackoff()
	for ctx.Err() == nil {
		err := a.c.Store.Watch(ctx, s.Prefix, func(v kv.View) {
			retry.Reset()
			a.saw(ctx, s, v)
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

// saw takes a view of the store, and starts makeFolder if a folder key is missing.
func (a *Agent) saw(ctx context.Context, s *cache.Source, v kv.View) {
	a.see(s, v)
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

// makeFolder makes the folder key without which nobody can tell a missing key from a lost permission. The mirror
// usually makes it; if there is no mirror, and the agent's token allows it, the agent does. It tries until the
// prefix can be read: the token may be new, or the store away.
func (a *Agent) makeFolder(ctx context.Context, s *cache.Source) {
	retry := newBackoff()
	for a.lacksFolder(s) {
		err := a.c.Store.EnsureFolders(ctx, s.Prefix)
		if err == nil {
			a.c.Log.Info("made the folder key, as there may be no mirror", "prefix", s.Prefix)
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

// lacksFolder records and reports whether a prefix can't be read because its folder key is missing.
func (a *Agent) lacksFolder(s *cache.Source) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := s.Trouble()
	a.making[s] = errors.Is(err, kv.ErrDenied)
	return a.making[s]
}

// see takes a view of the store.
func (a *Agent) see(s *cache.Source, v kv.View) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache.See(s, v, time.Now())
	a.metrics.seen(s.Prefix, v.Err == nil)
	a.changed.Set()
}

// useSnapshot offers a snapshot to the sources that know nothing, until there are none.
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
	return a.cache.Ignorant()
}

func (a *Agent) offerSnapshot(entries []kv.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache.Offer(entries, time.Now())
	a.changed.Set()
}

// findName finds the node's name if none was given: the name that the store's agent on this machine has for it, as
// other tools do, and so that the node's death is seen at once. It returns once the name is known. Before that
// nothing is reported and no view of the store is taken, as pins and turns depend on the name. That costs nothing:
// a store that doesn't tell the name has no records to give either.
func (a *Agent) findName(ctx context.Context) {
	namer, ok := a.c.Store.(kv.Namer)
	if a.naming == nil || !ok {
		return
	}
	retry := newBackoff()
	for answers := false; ; {
		name, err := namer.NodeName(ctx)
		if err == nil && name != "" {
			err = deployments.CheckSegment("node", name)
		}
		switch {
		case err == nil && name == "": // the store's agent is on another machine
			return
		case err == nil:
			a.rename(name)
			return
		case ctx.Err() != nil:
			return
		case a.naming.saved != "":
			a.c.Log.Debug("this node keeps its last known name", "node", a.naming.saved, "error", err)
			return
		case !passing(err) || answers && !errors.Is(err, kv.ErrTokenUnknown):
			a.c.Log.Info("this node takes its host's name", "node", a.Node(), "error", err)
			return
		}
		if answers = a.storeAnswers(ctx); answers && !errors.Is(err, kv.ErrTokenUnknown) {
			continue // once more: the store may have come up just now
		}
		if retry.Tries() == 0 {
			a.c.Log.Warn("the store is away, and this node's name isn't known yet: asking again", "error", err)
		}
		for _, r := range a.cache.Roles() {
			for _, s := range r.Sources() {
				a.saw(ctx, s, kv.View{Err: fmt.Errorf("this node's name isn't known yet: %w", err)})
			}
		}
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// passing reports whether the same call may succeed later: a new token is denied until all of Consul knows it.
func passing(err error) bool {
	return errors.Is(err, kv.ErrUnavailable) || errors.Is(err, kv.ErrDenied)
}

// storeAnswers reports whether the store is reachable, even if it doesn't tell this node's name.
func (a *Agent) storeAnswers(ctx context.Context) bool {
	_, err := a.c.Store.List(ctx, a.cache.Roles()[0].Records.Prefix)
	return err == nil
}

func (a *Agent) rename(name string) {
	a.mu.Lock()
	was := a.c.Node
	a.c.Node = name
	a.cache.Rename(name)
	a.mu.Unlock()
	if name == a.naming.saved {
		return
	}
	a.c.Log.Info("this node takes the name that the store's agent has for it", "node", name, "was", was)
	if err := a.dir.SetNodeName(a.naming.host, name); err != nil {
		a.c.Log.Warn("could not save this node's name for a start without the store", "node", name, "error", err)
	}
}
