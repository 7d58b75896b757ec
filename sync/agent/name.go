package agent

import (
	"context"
	"errors"
	"fmt"

	"kedge/deployments"
	"kedge/kv"
)

// naming is the state of the search for a name, in an agent that was given none.
type naming struct {
	host string // as the machine calls itself
	// saved is what the store's agent called it at a start before this one; empty: not known. What another host was
	// called doesn't count: the disk may have been in its image.
	saved string
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

// Node returns this node's name, which may change once if Config gave none.
func (a *Agent) Node() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.c.Node
}
