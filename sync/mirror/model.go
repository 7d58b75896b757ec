package mirror

import (
	"bytes"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// What one step of a round hands to the next: the store as the watches show it, what this mirror wrote there, and what
// it is about to write.

// watchLag is how long a write may take to show in a watch, before what the watch shows is taken for the truth.
const watchLag = 5 * time.Second

// maxError bounds MirrorState.Error, in bytes: a commit may have any number of mistakes.
const maxError = 4 << 10

// maxLogged bounds what a line of the log says of keys that others may write, in bytes.
const maxLogged = 1 << 10

// gitState is the branch as the mirror last read it.
type gitState struct {
	head string      // its newest commit; empty: not known yet
	good *git.Commit // that commit, where it can be taken
	bad  error       // else why it can't
	away error       // why head may be out of date; nil: it isn't
}

// observed is the store as the watches show it. What it refers to is never changed again.
type observed struct {
	desired observedRecords
	orders  observedOrders
	fleet   observedFleet
	state   observedState
	pins    observedPins
	folders map[string]observedFolders // by kind
}

// observedRecords is what desired/ shows. Until it is synced, nothing may be told from what is missing.
type observedRecords struct {
	synced bool
	cells  map[deployments.UnitID]cell
}

// observedOrders is what control/ shows; bad tells which keys can't be obeyed, and why.
type observedOrders struct {
	good map[deployments.UnitID]order
	bad  []error
}

// observedFleet is what status/ shows.
type observedFleet struct {
	synced  bool
	err     error     // why it may be out of date
	since   time.Time // since when err is nil, or isn't
	entries []kv.Entry
	roles   map[deployments.RoleID][]reported
	// left is when entries of a role vanished that have not come back since; began is when the first view came.
	left  map[deployments.RoleID][]time.Time
	began time.Time
}

// leftFor is how long it is remembered that a node has left the list: longer than any decision asks.
const leftFor = 10 * time.Minute

// leftSince returns when each of a role's nodes vanished that is not back; following: since when that was looked for.
// Zero: nothing is known.
func (f observedFleet) leftSince(role deployments.RoleID) (left []time.Time, following time.Time) {
	return f.left[role], f.began
}

// observedPins is what pins/ shows.
type observedPins struct {
	synced bool
	err    error                                                // why it may be out of date
	units  map[deployments.UnitID]policy.Value[deployments.Pin] // of whole units
	shown  map[deployments.UnitID][]deployments.PastPin         // all of them, as the history keeps them; At is zero
}

// observedState is what mirror/ shows.
type observedState struct {
	current bool   // it is known for certain, and not out of date
	value   []byte // of kv.MirrorKey; nil: it isn't there
}

// observedFolders are the folder keys that the watch of one kind shows.
type observedFolders struct {
	none bool     // not even the kind's own is there
	keys []string // sorted; nil: the store has none that could be lost
}

// cell is the entry at a unit's key in desired/; the zero cell: none.
type cell struct {
	present bool
	version uint64
	value   []byte
	record  deployments.Record
	err     error // the value doesn't parse
}

// reported is a node's entry in status/.
type reported struct {
	node string
	gone bool // its session has ended
	// goneSince is when that was seen; zero: it is there.
	goneSince time.Time
	report    deployments.Report
}

// order is what an operator wrote at control/STAGE/ROLE/UNIT. It is consumed, which is to say removed, in the
// transaction that does it.
type order struct {
	deployments.Order
	version uint64
}

// written is what this mirror wrote to the store since it holds the lease, or found there and took over.
type written struct {
	records map[deployments.UnitID]writtenRecord
	orders  map[deployments.UnitID]uint64 // versions of the orders that were consumed
	state   deployments.MirrorState       // at mirror/state
	stateAt time.Time
}

// writtenRecord is what this mirror wrote last at a unit's key.
type writtenRecord struct {
	record deployments.Record
	value  []byte // nil: it removed the key
	// base is the version that the write replaced (0: none). version is that of the write, 0 until the store has shown it.
	base, version uint64
	at            time.Time
	// vouched is set if a commit named the unit: it goes into the snapshot, which is signed. A record whose unit Git never
	// named was only marked as orphaned.
	vouched bool
}

// standing says how a unit's key stands to what this mirror wrote there.
type standing int

const (
	inOrder  standing = iota // holds what this mirror wrote, or found at its start
	inFlight                 // this mirror's write has yet to show
	foreign                  // somebody else wrote, or removed, it
	unknown                  // this mirror knows nothing of it, and there is no record that it should go on from
)

// stand compares what the store shows with what this mirror wrote.
func stand(c cell, o writtenRecord, known bool, now time.Time) standing {
	if known && o.version == 0 && c.version == o.base && now.Sub(o.at) < watchLag {
		return inFlight
	}
	known = known && o.value != nil // a key that it removed is as good as one that it never knew
	switch {
	case known && c.present && bytes.Equal(c.value, o.value):
		return inOrder
	case known:
		return foreign
	case c.present && c.err == nil && c.record.Generation > 0 && c.record.Generation < policy.AbsurdGeneration:
		return inOrder
	default:
		return unknown
	}
}

// change is one write: at a unit's key, or at mirror/state if status is set.
type change struct {
	status  *deployments.MirrorState
	unit    deployments.UnitID
	kind    string // as Change.Kind, or "restore", or "none" if only an order is consumed
	before  deployments.Record
	after   deployments.Record
	value   []byte // nil: remove the key
	base    uint64 // the version that it replaces; 0: none
	note    string
	history *deployments.History // the entry of a new generation, or what the newest becomes; nil: neither
	reason  string               // policy.Next's
	order   order                // what is consumed; its version is 0 if nothing is
	ops     []kv.Op
}

// batches packs the writes, each whole and in order, into as few transactions as fit.
func batches(writes []change) [][]change {
	var all [][]change
	sum, size := 0, 0
	for _, w := range writes {
		cost, bytes := 0, 0
		for _, op := range w.ops {
			cost, bytes = cost+op.Cost(), bytes+len(op.Key)+len(op.Value)
		}
		if len(all) == 0 || sum+cost > kv.MaxOps || size+bytes > maxBatch {
			all, sum, size = append(all, nil), 0, 0
		}
		last := len(all) - 1
		all[last], sum, size = append(all[last], w), sum+cost, size+bytes
	}
	return all
}

// maxBatch bounds a transaction's keys and values, in bytes: Consul takes 512 KiB of JSON, in which values grow by
// a third.
const maxBatch = 300 << 10

// ours reports whether a mirror wrote a record: a person's bare pointer is not a mirror's to remove.
func ours(r deployments.Record) bool { return r.Generation > 0 && r.Commit != "" }

// follow returns the record that a unit's file asks for, from the one that is there (zero: none). Where the file
// names another release than the record, it begins a new generation, open to every node; else only what the agents
// read of the file changes.
func follow(u deployments.Unit, commit string, r deployments.Record) deployments.Record {
	if r.Generation == 0 || goal(r, u.Release) != u.Release {
		r = deployments.Record{
			Target:     u.Release,
			Stable:     lastGood(r),
			Generation: r.Generation + 1,
			Commit:     commit,
		}
	}
	r.After, r.Drift, r.Adopt, r.Orphaned = u.After, u.Drift, u.Adopt, false
	return r
}

// goal is the release that a record is about. One that was rolled back has another Target, but is still about the
// release that Git names: want is that where the record says that it was tried.
func goal(r deployments.Record, want deployments.Pointer) deployments.Pointer {
	if r.Rollout != nil && !r.Rollout.Failed.IsZero() && r.Rollout.Failed == want.Digest {
		return want
	}
	return r.Target
}

// lastGood is what nodes run that are not admitted to the next target.
func lastGood(r deployments.Record) deployments.Pointer {
	if r.Rollout == nil {
		return r.Target
	}
	return r.Stable
}

// sooner is the shorter of two times to wait, where 0 is for ever.
func sooner(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// text is an error's, "" for nil: errors of some types can't be compared themselves.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// clip cuts an error's text at a line's end.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[:n]
	for i := len(s) - 1; i > n/2; i-- {
		if s[i] == '\n' {
			return s[:i] + "\n..."
		}
	}
	return s + "..."
}
