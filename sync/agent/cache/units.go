package cache

import (
	"cmp"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
)

// takeUnits returns which of the units in names a node takes, at most limit, and how many it leaves out. It takes units
// with files on this node first, then those that it had taken before, and each group by name.
func takeUnits(names []string, kept, before func(name string) bool, limit int) (taken map[string]bool, left int) {
	rank := func(name string) int {
		switch {
		case kept(name):
			return 0
		case before(name):
			return 1
		}
		return 2
	}
	if len(names) > limit {
		names = slices.Clone(names)
		slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a, b)) })
		names, left = names[:limit], len(names)-limit
	}
	taken = make(map[string]bool, len(names))
	for _, name := range names {
		taken[name] = true
	}
	return taken, left
}

// unitOf returns the name of the unit that a key below a role's prefix is about.
func (s *Source) unitOf(key string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(key, s.Prefix), "/")
	return name
}

// keyFilter returns a function that reports whether the node uses a key of s. all is set if view is complete: the keys
// that view lacks are gone.
func (c *Cache) keyFilter(s *Source, view []kv.Entry, all bool) func(key string) bool {
	if s.desired {
		return c.recordFilter(s, view, all)
	}
	own := concerns(s.Prefix, c.c.Node)
	return func(key string) bool {
		if !own(key) {
			return false
		}
		name := s.unitOf(key)
		_, recorded := s.role.Records.find(s.role.Records.Prefix + name)
		return recorded || c.c.Kept(s.role.unit(name))
	}
}

// recordFilter returns a function that reports whether the node takes a record, and sets the role's LeftOut to the
// number of units left out.
func (c *Cache) recordFilter(s *Source, view []kv.Entry, all bool) func(key string) bool {
	r := s.role
	var names []string
	for _, e := range view {
		if name := s.unitOf(e.Key); r.unit(name).Check() == nil {
			names = append(names, name)
		}
	}
	if !all { // what the node has stays beside what the view shows
		for _, e := range s.entries {
			if name := s.unitOf(e.Key); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	kept := func(name string) bool { return c.c.Kept(r.unit(name)) }
	before := func(name string) bool { _, ok := s.find(s.Prefix + name); return ok }
	taken, left := takeUnits(names, kept, before, deployments.MaxRoleUnits)
	if left > 0 && r.LeftOut == 0 {
		c.c.Log.Error("the role has more units than a node takes: some are left out; split the role",
			"role", r.Name, "limit", deployments.MaxRoleUnits, "left_out", left)
	}
	r.LeftOut = left
	own := concerns(s.Prefix, c.c.Node)
	return func(key string) bool { return own(key) && taken[s.unitOf(key)] }
}

// only returns copies of the entries that count, sorted.
func (s *Source) only(entries []kv.Entry, counts func(key string) bool) []kv.Entry {
	var own []kv.Entry
	for _, e := range entries {
		if counts(e.Key) {
			own = append(own, kv.Entry{Key: e.Key, Value: slices.Clone(e.Value)})
		}
	}
	sortEntries(own)
	return own
}

// maxGenerations is how many generations a role remembers before it forgets those of removed
// records.
const maxGenerations = 1000

// trimGenerations drops the generations of removed records without files on this node, if there are
// more than maxGenerations.
func (c *Cache) trimGenerations(s *Source) {
	if len(s.actedOn) <= maxGenerations {
		return
	}
	for key := range s.actedOn {
		if _, ok := s.find(key); !ok && !c.c.Kept(s.role.unit(s.unitOf(key))) {
			delete(s.actedOn, key)
		}
	}
}

// setPassedOver sets the role's PassedOver, and logs when that becomes more than zero.
func (c *Cache) setPassedOver(r *Role, counts func(key string) bool) {
	was, first := r.PassedOver, ""
	r.PassedOver = 0
	own := concerns(r.Pins.Prefix, c.c.Node)
	for _, e := range r.Pins.lastView {
		if own(e.Key) && !counts(e.Key) {
			if r.PassedOver++; r.PassedOver == 1 {
				first = e.Key
			}
		}
	}
	if was == 0 && r.PassedOver > 0 {
		c.c.Log.Warn("ignoring pins of units that have neither a record nor files on this node: remove the pins, "+
			"or add the units to Git", "pins", r.PassedOver, "key", first)
	}
}
