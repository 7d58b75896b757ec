package mirror

import (
	"bytes"
	"encoding/json"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// This file has the types that the steps of a round share: the store as the watches show it, what this mirror wrote
// to it, and what it will write.

// watchLag is how long a write may take to show in a watch. After that the mirror believes what the watch shows.
const watchLag = 5 * time.Second

// maxError bounds MirrorState.Error, in bytes: a commit may contain any number of mistakes.
const maxError = 4 << 10

// maxLogged bounds the text in a log line that comes from keys that others may write, in bytes.
const maxLogged = 1 << 10

// gitState is the branch as the mirror last read it.
type gitState struct {
	head string      // the newest commit's hash; empty: not known yet
	good *git.Commit // the commit head, if it is valid
	bad  error       // why head is invalid, or its signature doesn't count; nil: it is valid
	away error       // why head may be out of date; nil: it is current
}

// observed is the store as the watches show it. What it refers to is immutable.
type observed struct {
	desired observedRecords
	orders  observedOrders
	fleet   observedFleet
	state   observedState
	pins    observedPins
	folders map[string]observedFolders // by kind
}

// observedRecords is the view of desired/. Until synced is set, a missing key doesn't mean that there is no record.
type observedRecords struct {
	synced bool
	cells  map[deployments.UnitID]cell
}

// observedOrders is the view of control/; bad says which keys or orders don't parse, and why.
type observedOrders struct {
	good map[deployments.UnitID]order
	bad  []error
}

// observedFleet is the view of status/.
type observedFleet struct {
	synced  bool
	err     error     // why the view may be out of date
	since   time.Time // when err last became nil or non-nil
	entries []kv.Entry
	roles   map[deployments.RoleID][]reported
	// left has, by role, the times at which entries vanished that have not come back. began is when the first view came.
	left  map[deployments.RoleID][]time.Time
	began time.Time
}

// leftFor is how long the mirror remembers that a node's entry vanished: longer than any decision needs.
const leftFor = 10 * time.Minute

// maxLeft bounds the vanished entries that the mirror remembers, of all roles: a stolen token can write and remove any
// number. The earliest are forgotten first.
const maxLeft = 10_000

// leftSince returns the times at which entries of a role vanished that have not come back. watchedSince is the time
// from which the mirror has watched for that; zero: it has yet to begin.
func (f observedFleet) leftSince(role deployments.RoleID) (left []time.Time, watchedSince time.Time) {
	return f.left[role], f.began
}

// observedPins is the view of pins/.
type observedPins struct {
	synced      bool
	err         error                                                // why the view may be out of date
	units       map[deployments.UnitID]policy.Value[deployments.Pin] // of whole units
	historyPins map[deployments.UnitID][]deployments.PastPin         // of units and nodes; At is zero
}

// observedState is the view of mirror/.
type observedState struct {
	current bool   // the view is synced and up to date
	value   []byte // the value of kv.MirrorKey; nil: it isn't there
}

// observedFolders has the folder keys that the watch of one kind shows.
type observedFolders struct {
	kindMissing bool     // even the kind's own key is missing, or may not be read
	keys        []string // sorted; nil: the store needs none, or none are known yet
}

// cell is the entry at a unit's key in desired/; zero: there is none.
type cell struct {
	present bool
	version uint64
	value   []byte
	record  deployments.Record
	err     error // why the value doesn't parse
}

// reported is a node's entry in status/.
type reported struct {
	node string
	gone bool // the node's session has ended
	// goneSince is when the end of the session was seen; zero: the session lives.
	goneSince time.Time
	unhealthy outages
	report    deployments.Report
}

// outages are the units of a node that are unhealthy or roll back, by name.
type outages map[string]outage

// outage is the time since which a unit is out of service. state and entered are the unit's state in the newest report,
// and the time at which the unit entered it, by the node's clock. since is by this mirror's clock.
type outage struct {
	since   time.Time
	state   deployments.State
	entered time.Time
}

// next returns the outages after a node's next report; nil: none. A watch shows only the newest report, so a unit may
// meanwhile have tried another release and failed again: that begins a new outage.
func (o outages) next(units map[string]deployments.UnitReport, now time.Time) outages {
	var all outages
	for name, u := range units {
		if u.State != deployments.StateUnhealthy && !u.RollingBack {
			continue
		}
		since := now
		if was, known := o[name]; known && was.goesOn(u) {
			since = was.since
		}
		if all == nil {
			all = outages{}
		}
		all[name] = outage{since, u.State, u.Since}
	}
	return all
}

// goesOn reports whether u, a unit's next report, continues the outage o instead of beginning another.
func (o outage) goesOn(u deployments.UnitReport) bool {
	if u.State == o.state {
		return u.Since.Equal(o.entered)
	}
	return o.state == deployments.StateSwitching // the unit has gone back, and now its checks fail
}

// order is an operator's order at control/STAGE/ROLE/UNIT. The transaction that obeys or refuses it removes the key.
type order struct {
	deployments.Order
	version uint64
}

// written is what this mirror wrote to the store since it got the lease, or found there and took over.
type written struct {
	records map[deployments.UnitID]writtenRecord
	orders  map[deployments.UnitID]uint64 // versions of the orders that were consumed
	state   deployments.MirrorState       // at mirror/state
	stateAt time.Time                     // when this mirror wrote state; zero: it has not
}

// writtenRecord is what this mirror last wrote at a unit's key, or found there and adopted.
type writtenRecord struct {
	record deployments.Record
	value  []byte // nil: the key was removed
	// base is the version that the write replaced (0: none). version is the version that it made; 0
	// until the store has shown that. In an adopted record both are the version of its entry.
	base, version uint64
	at            time.Time
	// vouched is set if a commit that was signed, or that needs no signature, named the unit. Then
	// the record goes into the signed snapshot. It stays set if a later commit no longer names the
	// unit and the record is marked as orphaned.
	vouched bool
}

// keyState says how the entry at a unit's key relates to what this mirror wrote there.
type keyState int

const (
	inOrder  keyState = iota // the key holds what this mirror wrote or, if it wrote none, a record with a generation
	inFlight                 // the watch has yet to show this mirror's write, for up to watchLag
	foreign                  // the key doesn't hold what this mirror wrote: somebody else changed or removed it
	unknown                  // this mirror wrote nothing or removed the key, and there is no record to go on from
)

// compareKey compares what the store shows at a unit's key with what this mirror wrote there. known is false if it
// wrote nothing there.
func compareKey(c cell, o writtenRecord, known bool, now time.Time) keyState {
	if known && o.version == 0 && c.version == o.base && now.Sub(o.at) < watchLag {
		return inFlight
	}
	known = known && o.value != nil // a key that this mirror removed counts as unknown
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

// change is one write: at a unit's key, only to its history, or at mirror/state if status is set.
type change struct {
	status  *deployments.MirrorState
	unit    deployments.UnitID
	kind    string // "create", "update", "remove", "restore", "rebuild", or "none" if only an order is consumed
	before  deployments.Record
	after   deployments.Record
	value   []byte // nil: the key is removed
	base    uint64 // the version that the write replaces; 0: none
	vouched bool   // as writtenRecord.vouched
	note    string
	history *deployments.History // the entry of a new generation, or the changed newest one; nil: neither
	reason  string               // why it is made, in words: see reasonOf
	order   order                // the order that is consumed; version 0: none
	ops     []kv.Op
}

// batches packs the changes into as few transactions as possible, in order and without splitting a change.
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

// ours reports whether a mirror wrote a record. A mirror doesn't remove a bare pointer that a person wrote.
func ours(r deployments.Record) bool { return r.Generation > 0 && r.Commit != "" }

// recordFor returns the record that a unit's file asks for, given the present record r (zero:
// none). The result is a new generation, open to every node, if r has generation 0 or was made to
// roll out another release (see goal). Otherwise r is kept. In both cases After, Drift and Adopt
// are the file's, and Orphaned is cleared.
func recordFor(u deployments.Unit, commit string, r deployments.Record) deployments.Record {
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

// goal returns the release that r was made to roll out. That is want if r rolls back, or has rolled
// back, a release with want's digest, whatever its URL. Otherwise it is r.Target.
func goal(r deployments.Record, want deployments.Pointer) deployments.Pointer {
	if r.Rollout != nil && !r.Rollout.Failed.IsZero() && r.Rollout.Failed == want.Digest {
		return want
	}
	return r.Target
}

// lastGood returns the release that is stable as of r. That is r's Target or, while r has a Rollout, r's Stable, which
// nodes run that aren't admitted yet.
func lastGood(r deployments.Record) deployments.Pointer {
	if r.Rollout == nil {
		return r.Target
	}
	return r.Stable
}

// minWait returns the shorter of two times to wait, in which 0 means for ever.
func minWait(a, b time.Duration) time.Duration {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// text returns an error's text, "" for nil. Callers compare texts, as errors of some types can't be compared.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// clip hides what may be secret in the URLs of a text. It cuts text beyond n bytes, at the end of a line after n/2 or
// else of a character, and adds "...".
func clip(s string, n int) string {
	s = safetext.URLs(s)
	if len(s) <= n {
		return s
	}
	s = safetext.Prefix(s, n)
	if i := strings.LastIndexByte(s, '\n'); i > n/2 {
		return s[:i] + "\n..."
	}
	return s + "..."
}

// encode returns a record's JSON. Equal records have equal bytes.
func encode(r deployments.Record) []byte {
	value, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain data
	}
	return value
}
