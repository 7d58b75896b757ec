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

// watch follows one prefix of the store until ctx ends.
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
		a.c.Log.Error("watching the store ended, and begins again", "prefix", s.Prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// saw adopts a view of the store, and makes a missing folder key.
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

// makeFolder makes the folder key without which nobody can tell a missing key from a lost permission. That is the
// mirror's job; where there is none, and the agent's token may, it helps itself. It tries until the prefix can be
// read: the token may be new, or the store away.
func (a *Agent) makeFolder(ctx context.Context, s *cache.Source) {
	retry := newBackoff()
	for a.lacksFolder(s) {
		err := a.c.Store.EnsureFolders(ctx, s.Prefix)
		if err == nil {
			a.c.Log.Info("made the folder key, where there may be no mirror", "prefix", s.Prefix)
			a.mu.Lock()
			a.making[s] = false
			a.mu.Unlock()
			return
		}
		a.c.Log.Debug("the folder key can't be made by this agent", "prefix", s.Prefix, "error", err)
		if retry.Wait(ctx) != nil {
			return
		}
	}
}

// lacksFolder notes and reports whether a prefix can't be read for want of its folder key.
func (a *Agent) lacksFolder(s *cache.Source) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	_, err := s.Trouble()
	a.making[s] = errors.Is(err, kv.ErrDenied)
	return a.making[s]
}

// see adopts a view of the store.
func (a *Agent) see(s *cache.Source, v kv.View) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache.See(s, v, time.Now())
	a.metrics.seen(s.Prefix, v.Err == nil)
	a.kick()
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
	return a.cache.Ignorant()
}

func (a *Agent) offerSnapshot(entries []kv.Entry) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.cache.Offer(entries, time.Now())
	a.kick()
}

// findName settles the node's name, where none was given: what the store's agent on this machine calls it, as all
// other tools do, and so that its death is seen at once. It returns once the name is settled; before that nothing
// is reported, and no view of the store is taken, as pins and turns go by the name. That costs nothing: who can't
// be asked has nothing else to say either.
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
		case err == nil && name == "": // the store is asked through another machine
			return
		case err == nil:
			a.rename(name)
			return
		case ctx.Err() != nil:
			return
		case a.naming.saved != "":
			a.c.Log.Debug("this node's name is the one that it had", "node", a.naming.saved, "error", err)
			return
		case !passing(err) || answers && !errors.Is(err, kv.ErrTokenUnknown):
			a.c.Log.Info("this node goes by its host's name", "node", a.Node(), "error", err)
			return
		}
		if answers = a.storeAnswers(ctx); answers && !errors.Is(err, kv.ErrTokenUnknown) {
			continue // once more: it may have come up only now
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

// passing reports whether the same call may succeed later: a token that is new is denied until all of Consul knows it.
func passing(err error) bool {
	return errors.Is(err, kv.ErrUnavailable) || errors.Is(err, kv.ErrDenied)
}

// storeAnswers reports whether the store is reachable, whether or not it tells this node's name.
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
	a.c.Log.Info("this node's name, as the store's agent has it", "node", name, "was", was)
	if err := a.dir.SetNodeName(a.naming.host, name); err != nil {
		a.c.Log.Warn("this node's name can't be kept for a start without the store", "node", name, "error", err)
	}
}
