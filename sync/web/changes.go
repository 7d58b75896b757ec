package web

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

// changeCache caches what began each unit's current generation: the history's entry of that generation, read once.
type changeCache struct {
	mu    sync.Mutex
	known map[deployments.UnitID]change
}

// change describes what began a unit's generation. Author, Subject and At are empty if the generation's entry in the
// history isn't known.
type change struct {
	generation int64
	Commit     string
	Author     string
	Subject    string
	At         time.Time
}

const (
	// maxChanges bounds the units whose newest change one load reads.
	maxChanges = 2000
	// changesWithin bounds one reading of histories, changesAtOnce how many are read in parallel.
	changesWithin = 20 * time.Second
	changesAtOnce = 4
)

// of returns what began the unit's current generation. It has only the Commit if the history has
// not been read yet, and nothing if the unit has no record.
func (c *changeCache) of(u *fleet.Unit) change {
	if u.Record == nil {
		return change{}
	}
	latest := change{Commit: u.Record.Commit}
	if c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if known, ok := c.known[u.ID]; ok && known.generation == u.Record.Generation {
			latest = known
		}
	}
	return latest
}

// load reads what began the current generation of each unit, unless it is cached, for at most maxChanges units. It
// returns true if there was anything to read, and all of it was read or can't be: denied, missing or malformed.
func (c *changeCache) load(ctx context.Context, store kv.Store, f *fleet.Fleet) bool {
	ctx, cancel := context.WithTimeout(ctx, changesWithin)
	defer cancel()
	c.mu.Lock()
	var missing []*fleet.Unit
	exists := map[deployments.UnitID]bool{}
	for i := range f.Units {
		u := &f.Units[i]
		if exists[u.ID] = true; u.Record == nil || len(missing) >= maxChanges {
			continue
		}
		if known, ok := c.known[u.ID]; !ok || known.generation != u.Record.Generation {
			missing = append(missing, u)
		}
	}
	for id := range c.known {
		if !exists[id] {
			delete(c.known, id)
		}
	}
	c.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(changesAtOnce)
	for _, u := range missing {
		g.Go(func() error {
			found := change{generation: u.Record.Generation, Commit: u.Record.Commit}
			e, err := store.Get(ctx, kv.HistoryKey(u.ID, u.Record.Generation))
			switch {
			case errors.Is(err, kv.ErrNotFound), errors.Is(err, kv.ErrDenied):
			case err != nil:
				return err // the store's error: the next change tries again
			default:
				h, err := deployments.ParseHistory(e.Value)
				if err == nil {
					found = changeOf(h)
				}
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			c.known[u.ID] = found
			return nil
		})
	}
	return g.Wait() == nil && len(missing) > 0
}

// changeOf returns the change that an entry of a history describes.
func changeOf(h deployments.History) change {
	return change{generation: h.Generation, Commit: h.Commit, Author: fleet.AuthorName(h.Author),
		Subject: fleet.Clean(h.Subject, maxText), At: h.At}
}
