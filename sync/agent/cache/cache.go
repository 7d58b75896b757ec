// Package cache is what a node knows of the records and pins of its roles: as the store has them, or, while the store
// is away, as this node saw them last, or as a snapshot has them.
//
// Trouble with the store takes nothing away from what is known. Before a record or pin decides anything, Save has it
// on disk: a node never goes back to something older by restarting.
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
	File        string // the last known state: see package statedir
	// Kept reports whether something of a unit is kept on this node's disk. Such units have a place before others, and
	// their pins count though they have no record.
	Kept func(id deployments.UnitID) bool
	Log  *slog.Logger
}

// Cache is what a node knows. Make it with Open.
type Cache struct {
	c         Config
	roles     []*Role
	lastKnown lastKnown
	unsaved   bool
	failing   bool // Save failed, and said so
}

// Open reads the last known state from disk. A damaged file is put aside.
func Open(c Config) (*Cache, error) {
	known, err := readLastKnown(c.File, c.Log)
	if err != nil {
		return nil, err
	}
	cache := &Cache{c: c, lastKnown: known}
	for _, name := range c.Roles {
		r := newRole(c.Stage, name)
		for _, s := range r.Sources() {
			entries, at, ok := known.get(s.Prefix)
			if !ok {
				continue
			}
			s.floors = maps.Clone(known.Prefixes[s.Prefix].Generations)
			s.offer(s.only(entries, cache.counts(s, entries, true)), fromLastKnown, at)
		}
		cache.roles = append(cache.roles, r)
	}
	return cache, nil
}

// Roles returns the node's roles, ordered by name.
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

// See adopts a view of the store.
func (c *Cache) See(s *Source, v kv.View, now time.Time) {
	counts := c.counts(s, v.Entries, v.Synced)
	if !s.desired && v.Synced {
		s.seen = v.Entries
		c.notePassedOver(s.role, counts)
	}
	if s.accept(v, counts, now, c.c.Log) {
		c.changed(s, now)
	}
}

// Offer adopts a snapshot for the sources of which nothing is known.
func (c *Cache) Offer(entries []kv.Entry, now time.Time) {
	for _, r := range c.roles {
		for _, s := range r.Sources() {
			below := slices.DeleteFunc(
				slices.Clone(entries),
				func(e kv.Entry) bool { return !strings.HasPrefix(e.Key, s.Prefix) },
			)
			own := s.only(below, c.counts(s, below, true))
			if s.offer(own, fromSnapshot, now) {
				c.c.Log.Warn("the store is away and nothing is known from before: using the snapshot",
					"prefix", s.Prefix, "keys", len(own))
			}
		}
	}
}

// Ignorant reports whether nothing at all is known of some source.
func (c *Cache) Ignorant() bool {
	return slices.ContainsFunc(c.roles, func(r *Role) bool {
		return r.Records.from == fromNowhere || r.Pins.from == fromNowhere
	})
}

// Review adopts the held records that have stood for long enough. It returns when the next one may be taken; zero:
// never.
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

// Save writes what changed to disk. If that fails, it returns when to try again; else zero. The caller acts on what is
// known all the same: if the disk refuses, running what is wanted still comes first.
func (c *Cache) Save(now time.Time) (retry time.Time) {
	if !c.unsaved {
		return time.Time{}
	}
	err := c.lastKnown.write(c.c.File)
	switch {
	case err == nil && c.failing:
		c.c.Log.Info("the last known state is written again")
	case err != nil && !c.failing:
		c.c.Log.Error("a restart without the store would go back to an older state", "error", err)
	}
	if c.unsaved, c.failing = err != nil, err != nil; err != nil {
		return now.Add(retrySave)
	}
	return time.Time{}
}

// Rename changes the node's name. Pins that are remembered are those of the name before: they are forgotten.
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
}

// Recount counts the pins of a role anew, after what is kept on disk has changed.
func (c *Cache) Recount(role string, now time.Time) {
	r := c.Role(role)
	if r == nil || r.Pins.seen == nil {
		return
	}
	entries := r.Pins.only(r.Pins.seen, c.counts(r.Pins, nil, true))
	if equalEntries(r.Pins.entries, entries) {
		return
	}
	r.Pins.set(entries, now)
	c.remember(r.Pins, now)
}

// changed updates the last known state from a source, and counts the pins of the records that came or went.
func (c *Cache) changed(s *Source, now time.Time) {
	c.remember(s, now)
	if s.desired {
		c.trimFloors(s)
		c.Recount(s.role.Name, now)
	}
}

func (c *Cache) remember(s *Source, now time.Time) {
	c.unsaved = c.lastKnown.set(s.Prefix, s.entries, s.floors, now) || c.unsaved
}
