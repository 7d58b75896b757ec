// Package cache keeps what a node knows of the records and pins of its roles: from the store or, while the store is
// away, from the node's last known state or a snapshot.
//
// An error of the store removes nothing from what is known. The agent calls Save before it decides by a new record or
// pin. So a restart goes back to an older record or pin only if the disk refused to save the new one.
//
// A Cache isn't safe for concurrent use: the agent guards it with its mutex.
package cache

import (
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// retrySave is how long after a failed Save the next one is due.
const retrySave = 30 * time.Second

// Config configures a Cache.
type Config struct {
	Node, Stage string
	Roles       []string
	File        string // of the last known state: see package statedir
	// Kept reports whether this node's disk has files of a unit. If a role has too many units, those with files are
	// taken first. The pins of units with files count even without a record.
	Kept func(id deployments.UnitID) bool
	Log  *slog.Logger
}

// Cache keeps what a node knows. Create it with Open.
type Cache struct {
	c         Config
	roles     []*Role
	lastKnown lastKnown
	unsaved   bool // lastKnown has changed since it was last written to the file
	failing   bool // the last Save failed, and logged that
}

// Open reads the last known state from disk; a missing file is an empty state. A damaged file is moved aside. Pins
// that were saved under another name of the node, as in the image of another host's disk, don't count.
func Open(c Config) (*Cache, error) {
	known, err := readLastKnown(c.File, c.Log)
	if err != nil {
		return nil, err
	}
	cache := &Cache{c: c, lastKnown: known}
	cache.unsaved = cache.lastKnown.rename(c.Node)
	for _, name := range c.Roles {
		r := newRole(c.Stage, name)
		for _, s := range r.Sources() {
			entries, at, ok := cache.lastKnown.get(s.Prefix)
			if !ok {
				continue
			}
			s.actedOn = maps.Clone(known.Prefixes[s.Prefix].Generations)
			s.offer(s.only(entries, cache.keyFilter(s, entries, true)), fromLastKnown, at)
		}
		cache.roles = append(cache.roles, r)
	}
	return cache, nil
}

// Roles returns the node's roles, sorted by name.
func (c *Cache) Roles() []*Role { return c.roles }

// Role returns one of the node's roles; nil if it has no such role.
func (c *Cache) Role(name string) *Role {
	for _, r := range c.roles {
		if r.Name == name {
			return r
		}
	}
	return nil
}

// See updates a source from a view of the store.
func (c *Cache) See(s *Source, v kv.View, now time.Time) {
	counts := c.keyFilter(s, v.Entries, v.Synced)
	if !s.desired && v.Synced {
		s.lastView = v.Entries
		c.setPassedOver(s.role, counts)
	}
	if s.accept(v, counts, now, c.c.Log) {
		c.changed(s, now)
	}
}

// Offer uses a snapshot's entries for each source of which nothing is known yet.
func (c *Cache) Offer(entries []kv.Entry, now time.Time) {
	for _, r := range c.roles {
		for _, s := range r.Sources() {
			below := slices.DeleteFunc(slices.Clone(entries),
				func(e kv.Entry) bool { return !strings.HasPrefix(e.Key, s.Prefix) })
			own := s.only(below, c.keyFilter(s, below, true))
			if s.offer(own, fromSnapshot, now) {
				c.c.Log.Warn("using the mirror's snapshot, as neither the store nor this node's disk has what is below a prefix",
					"prefix", s.Prefix, "keys", len(own))
			}
		}
	}
}

// NeedsSnapshot reports whether nothing at all is known of some source.
func (c *Cache) NeedsSnapshot() bool {
	return slices.ContainsFunc(c.roles, func(r *Role) bool {
		return r.Records.from == fromNowhere || r.Pins.from == fromNowhere
	})
}

// Review accepts the records that were held back and have been in the store for long enough. It returns when the next
// record may be accepted; zero: no record is accepted by waiting.
func (c *Cache) Review(now time.Time) (next time.Time) {
	for _, r := range c.roles {
		for _, s := range r.Sources() {
			if s.review(now, c.c.Log) {
				c.changed(s, now)
			}
			if at := s.recheck; !at.IsZero() && (next.IsZero() || at.Before(next)) {
				next = at
			}
		}
	}
	return next
}

// Save writes what changed to disk. If that fails, it returns when to retry; otherwise zero. The caller acts on what is
// known even after a failure: to run what is wanted matters more than a disk that refuses.
func (c *Cache) Save(now time.Time) (retry time.Time) {
	if !c.unsaved {
		return time.Time{}
	}
	err := c.lastKnown.write(c.c.File)
	switch {
	case err == nil && c.failing:
		c.c.Log.Info("the last known state can be saved again")
	case err != nil && !c.failing:
		c.c.Log.Error("could not save the last known state: a restart without the store would use an older one", "error", err)
	}
	if c.unsaved, c.failing = err != nil, err != nil; err != nil {
		return now.Add(retrySave)
	}
	return time.Time{}
}

// Rename changes the node's name. Pins from the last known state are forgotten, on disk too once Save is called, as
// they were chosen by the old name.
func (c *Cache) Rename(node string) {
	if node == c.c.Node {
		return
	}
	c.c.Node = node
	for _, r := range c.roles {
		if r.Pins.from == fromLastKnown {
			r.Pins.set(nil, time.Time{})
			r.Pins.from = fromNowhere
		}
	}
	c.unsaved = c.lastKnown.rename(node) || c.unsaved
}

// RefilterPins decides anew which pins of a role's last synced view count. It is called after the role's units with
// records, or those with files on this node, have changed. It does nothing for an unknown role or without such a view.
func (c *Cache) RefilterPins(role string, now time.Time) {
	r := c.Role(role)
	if r == nil || r.Pins.lastView == nil {
		return
	}
	entries := r.Pins.only(r.Pins.lastView, c.keyFilter(r.Pins, nil, true))
	if equalEntries(r.Pins.entries, entries) {
		return
	}
	r.Pins.set(entries, now)
	c.remember(r.Pins, now)
}

// changed updates the last known state from a source. If the source has records, it also trims
// their generations, and decides anew which pins count.
func (c *Cache) changed(s *Source, now time.Time) {
	c.remember(s, now)
	if s.desired {
		c.trimGenerations(s)
		c.RefilterPins(s.role.Name, now)
	}
}

func (c *Cache) remember(s *Source, now time.Time) {
	c.unsaved = c.lastKnown.set(s.Prefix, s.entries, s.actedOn, now) || c.unsaved
}
