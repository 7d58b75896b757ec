package agent

import (
	"cmp"
	"os"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// takeUnits returns those of a role's units that a node looks after, and how many it leaves out: at most limit. Units
// that something is kept of on this node go first, then those that it has looked after so far, then by name.
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
func (s *source) unitOf(key string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(key, s.prefix), "/")
	return name
}

// records says which records of a view the node takes, and notes how many it leaves out. a.mu is held.
func (a *Agent) records(r *role, v []kv.Entry, all bool) func(key string) bool {
	s := r.desired
	var names []string
	for _, e := range v {
		if name := s.unitOf(e.Key); (deployments.UnitID{Stage: a.c.Stage, Role: r.name, Unit: name}).Check() == nil {
			names = append(names, name)
		}
	}
	if !all { // what it has goes on beside what the view shows
		for _, e := range s.entries {
			if name := s.unitOf(e.Key); !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	before := func(name string) bool { _, ok := s.find(s.prefix + name); return ok }
	taken, left := takeUnits(names, func(name string) bool { return a.keeps(r, name) }, before, deployments.MaxRoleUnits)
	if left > 0 && r.left == 0 {
		a.c.Log.Error("there are more units than a node of one role takes: some are left out",
			"role", r.name, "limit", deployments.MaxRoleUnits, "left_out", left)
	}
	r.left = left
	own := mine(s.prefix, a.c.Node)
	return func(key string) bool { return own(key) && taken[s.unitOf(key)] }
}

// keeps reports whether something of a unit is kept on this node's disk. a.mu is held.
func (a *Agent) keeps(r *role, name string) bool {
	id := deployments.UnitID{Stage: a.c.Stage, Role: r.name, Unit: name}
	if u := a.units[id]; u != nil {
		return !u.state().Empty()
	}
	return a.onDisk[id]
}

// counts returns which pins of a view count: those of units that have a record, or that something is kept of. a.mu is
// held.
func (a *Agent) counts(r *role) func(key string) bool {
	own := mine(r.pins.prefix, a.c.Node)
	return func(key string) bool {
		if !own(key) {
			return false
		}
		name := r.pins.unitOf(key)
		_, recorded := r.desired.find(r.desired.prefix + name)
		return recorded || a.keeps(r, name)
	}
}

// recount takes the pins of units that have got a record, and drops those of units that are gone. It says whether the
// pins that decide have changed. a.mu is held.
func (a *Agent) recount(r *role, now time.Time) bool {
	s := r.pins
	if s.seen == nil {
		return false
	}
	entries := s.only(s.seen, a.counts(r))
	if equalEntries(s.entries, entries) {
		return false
	}
	s.set(entries, now)
	return true
}

// only returns copies of the entries that count, sorted.
func (s *source) only(entries []kv.Entry, counts func(key string) bool) []kv.Entry {
	var own []kv.Entry
	for _, e := range entries {
		if counts(e.Key) {
			own = append(own, kv.Entry{Key: e.Key, Value: slices.Clone(e.Value)})
		}
	}
	sortEntries(own)
	return own
}

// maxFloors bounds the generations that a role remembers of records that are gone.
const maxFloors = 1000

// trimFloors forgets the generations of records that are gone, where there are many.
func (a *Agent) trimFloors(r *role) {
	s := r.desired
	if len(s.floors) <= maxFloors {
		return
	}
	for key := range s.floors {
		if _, ok := s.find(key); !ok && !a.keeps(r, s.unitOf(key)) {
			delete(s.floors, key)
		}
	}
}

// retire lets units go that nobody desires, and that nothing is kept of: their workers end, and then their directories
// go. a.mu is held.
func (a *Agent) retire() {
	for _, u := range a.units {
		if u.decided && !u.record.Present && u.deploy != nil && u.busy.kind == jobNone && u.state().Empty() && !u.retired {
			u.retired = true
			u.cancel()
		}
	}
}

// leave removes what is left of a unit whose worker has ended as it was retired.
func (a *Agent) leave(u *unit) {
	a.mu.Lock()
	retired := u.retired
	a.mu.Unlock()
	if !retired {
		return
	}
	if err := os.RemoveAll(unitDir(a.c.StateDir, u.id)); err != nil {
		u.log.Warn("the directory of a unit that is gone can't be removed", "error", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.units, u.id)
	delete(a.onDisk, u.id)
	a.metrics.forget(u.id)
	for _, r := range a.roles {
		if r.name == u.id.Role && a.recount(r, time.Now()) {
			a.unsaved = a.known.set(r.pins.prefix, r.pins.entries, nil, time.Now()) || a.unsaved
		}
	}
	a.kick()
}

// below returns the entries below a prefix.
func below(entries []kv.Entry, prefix string) []kv.Entry {
	return slices.DeleteFunc(slices.Clone(entries), func(e kv.Entry) bool { return !strings.HasPrefix(e.Key, prefix) })
}

// notePassedOver says once that there are pins that nothing comes of, as their units have no record. a.mu is held.
func (a *Agent) notePassedOver(r *role, counts func(key string) bool) {
	was, first := r.passed, ""
	r.passed = 0
	own := mine(r.pins.prefix, a.c.Node)
	for _, e := range r.pins.seen {
		if own(e.Key) && !counts(e.Key) {
			if r.passed++; r.passed == 1 {
				first = e.Key
			}
		}
	}
	if was == 0 && r.passed > 0 {
		a.c.Log.Warn("pins are passed over, as their units have no record", "pins", r.passed, "first", first)
	}
}
