package cache

import (
	"cmp"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// origin says where a source's entries come from, in ascending order of trust.
type origin int

const (
	fromNowhere origin = iota
	fromSnapshot
	fromLastKnown
	fromStore
)

func (o origin) String() string {
	return [...]string{"nothing yet", "snapshot", "last known state", "store"}[o]
}

// Source is what a node knows of the keys below one watched prefix: the records of a role, or its pins. Only a
// synced view, the last known state or a snapshot can show that a key is missing.
type Source struct {
	Prefix   string
	role     *Role
	desired  bool // records, not pins
	entries  []kv.Entry
	lastView []kv.Entry // of pins: all entries of the last synced view; see Cache.RefilterPins
	from     origin
	at       time.Time // when entries last changed, or began to come from the store
	err      error     // why the store's view may be out of date
	since    time.Time // when err last became nil or non-nil; zero: the store has not answered

	// The parsed entries, by key.
	records map[string]policy.Value[deployments.Record]
	pins    map[string]policy.Value[deployments.Pin]
	// actedOn has the highest generation of each record that was acted on, also of removed ones:
	// see trimGenerations. confirmed are the records of the last synced view, and held are those of
	// them that aren't acted on yet.
	actedOn   map[string]int64
	held      map[string]heldRecord
	confirmed []kv.Entry
	recheck   time.Time // when a record in held may be acted on; zero: not by waiting
}

// set replaces the entries, parses those that changed, and raises actedOn.
func (s *Source) set(entries []kv.Entry, at time.Time) {
	records, pins := map[string]policy.Value[deployments.Record]{}, map[string]policy.Value[deployments.Pin]{}
	for _, e := range entries {
		was, known := s.find(e.Key)
		switch same := known && string(was.Value) == string(e.Value); {
		case s.desired && same:
			records[e.Key] = s.records[e.Key]
		case s.desired:
			records[e.Key] = parsed(e.Value, deployments.ParseRecord)
		case same:
			pins[e.Key] = s.pins[e.Key]
		default:
			pins[e.Key] = parsed(e.Value, deployments.ParsePin)
		}
	}
	s.entries, s.at, s.records, s.pins = entries, at, records, pins
	for key, r := range records {
		if r.Value.Generation > s.actedOn[key] {
			if s.actedOn == nil {
				s.actedOn = map[string]int64{}
			}
			s.actedOn[key] = r.Value.Generation
		}
	}
}

// bareWait is how long a record without a generation must be in the store before a node accepts it in place of a
// mirror's record. A running mirror restores its own record within milliseconds.
const bareWait = 5 * time.Second

// accept updates the entries from a view of the store. It reports whether they changed, or only now
// count as the store's. It uses only the keys for which concerns returns true. Of a view that isn't
// synced it takes no pins, and only records that are new or have a higher generation. It does so
// even if nothing was known before, because a missing record never decides anything.
func (s *Source) accept(v kv.View, concerns func(key string) bool, now time.Time, log *slog.Logger) bool {
	if (v.Err == nil) != (s.err == nil) || s.since.IsZero() {
		s.since = cmp.Or(v.Since, now)
	}
	s.err = v.Err
	var entries []kv.Entry
	for _, e := range v.Entries {
		if concerns(e.Key) {
			entries = append(entries, kv.Entry{Key: e.Key, Value: slices.Clone(e.Value)})
		}
	}
	sortEntries(entries)
	if !v.Synced {
		if !s.desired || len(entries) == 0 {
			return false
		}
		entries = s.newer(entries, log)
	} else if s.desired {
		s.confirmed = entries
		entries = s.withoutHeld(entries, now, log)
	}
	better := s.from != fromStore && (v.Synced || s.from == fromNowhere)
	changed := better || !equalEntries(s.entries, entries)
	if better {
		s.from = fromStore
	}
	if changed {
		s.set(entries, now)
	}
	return changed
}

// withoutHeld returns the entries of a synced view that may be acted on, and sets held and recheck.
// A record of a lower generation than one that was acted on comes from a restored backup of the
// store. The known record, if there is one, then stays until a mirror that knows the higher
// generation has written. If a record without a generation replaces a mirror's record, the known
// record stays for bareWait.
func (s *Source) withoutHeld(entries []kv.Entry, now time.Time, log *slog.Logger) []kv.Entry {
	held := map[string]heldRecord{}
	s.recheck = time.Time{}
	var taken []kv.Entry
	for _, e := range entries {
		known, ok := s.find(e.Key)
		actedOn, g := s.actedOn[e.Key], int64(0)
		if actedOn > 0 && !(ok && string(known.Value) == string(e.Value)) {
			r := parsed(e.Value, deployments.ParseRecord)
			g = r.Value.Generation
			h, seen := s.held[e.Key]
			if seen = seen && h.value == string(e.Value); !seen {
				h = heldRecord{value: string(e.Value), generation: g, since: now}
			}
			bare := r.Err == nil && g == 0 && now.Sub(h.since) < bareWait
			if bare && (s.recheck.IsZero() || h.since.Add(bareWait).Before(s.recheck)) {
				s.recheck = h.since.Add(bareWait)
			}
			if bare || g > 0 && g < actedOn {
				if held[e.Key] = h; !seen && g > 0 {
					log.Error("ignoring a record that is older than the one this node has acted on: the unit stays as it is "+
						"until a mirror writes a newer one; was the store restored from a backup?",
						"key", e.Key, "generation", g, "acted_on", actedOn)
				}
				if ok {
					taken = append(taken, known)
				}
				continue
			}
		}
		taken = append(taken, e)
	}
	s.held = held
	return taken
}

// review accepts records that have been in the store for long enough, and reports whether the entries have changed.
func (s *Source) review(now time.Time, log *slog.Logger) bool {
	if s.recheck.IsZero() || now.Before(s.recheck) {
		return false
	}
	entries := s.withoutHeld(s.confirmed, now, log)
	if equalEntries(entries, s.entries) {
		return false
	}
	s.set(entries, now)
	return true
}

// heldRecord is a record in the store that isn't acted on yet.
type heldRecord struct {
	value      string
	generation int64
	since      time.Time
}

// offer uses entries from the disk or a snapshot if nothing as good is known, and reports whether it did.
func (s *Source) offer(entries []kv.Entry, from origin, at time.Time) bool {
	if s.from >= from {
		return false
	}
	s.set(entries, at)
	s.from = from
	return true
}

// newer returns the source's entries, with those of the given entries that are new or have a higher generation.
func (s *Source) newer(entries []kv.Entry, log *slog.Logger) []kv.Entry {
	merged := slices.Clone(s.entries)
	for _, e := range entries {
		i, known := slices.BinarySearchFunc(merged, e.Key,
			func(e kv.Entry, key string) int { return strings.Compare(e.Key, key) })
		switch {
		case !known:
			merged = slices.Insert(merged, i, e)
		case generation(e) > generation(merged[i]):
			merged[i] = e
		case generation(e) < generation(merged[i]):
			log.Warn("ignoring an older record, as the store's answer may be out of date: keeping the newer one", "key", e.Key,
				"generation", generation(e), "kept", generation(merged[i]))
		}
	}
	return merged
}

func (s *Source) find(key string) (kv.Entry, bool) {
	i, ok := slices.BinarySearchFunc(s.entries, key,
		func(e kv.Entry, key string) int { return strings.Compare(e.Key, key) })
	if !ok {
		return kv.Entry{}, false
	}
	return s.entries[i], true
}

// Answered reports whether the store has answered, even with an error.
func (s *Source) Answered() bool { return !s.since.IsZero() }

// Origin returns where the entries come from, and since when they have come from there unchanged.
func (s *Source) Origin() (from string, since time.Time) { return s.from.String(), s.at }

// Error returns why the store's view may be out of date, and since when. If err is nil, the view has been up to date
// since then; since is zero before the store's first answer.
func (s *Source) Error() (since time.Time, err error) { return s.since, s.err }

// Value returns the known value of a key; empty if there is none.
func (s *Source) Value(key string) string {
	e, _ := s.find(key)
	return string(e.Value)
}

// concerns returns a function that reports whether a key is below prefix and concerns node. Such a
// key names a unit, or a unit's pin for that node.
func concerns(prefix, node string) func(key string) bool {
	return func(key string) bool {
		rest, ok := strings.CutPrefix(key, prefix)
		if !ok {
			return false
		}
		name, of, scoped := strings.Cut(rest, "/")
		return name != "" && (!scoped || of == node)
	}
}

func parsed[T any](value []byte, parse func([]byte) (T, error)) policy.Value[T] {
	v, err := parse(value)
	return policy.Value[T]{Present: true, Value: v, Err: err}
}

func generation(e kv.Entry) int64 {
	r, err := deployments.ParseRecord(e.Value)
	if err != nil {
		return 0
	}
	return r.Generation
}

func sortEntries(entries []kv.Entry) {
	slices.SortFunc(entries, func(a, b kv.Entry) int { return strings.Compare(a.Key, b.Key) })
}

func equalEntries(a, b []kv.Entry) bool {
	return slices.EqualFunc(a, b, func(x, y kv.Entry) bool { return x.Key == y.Key && string(x.Value) == string(y.Value) })
}
