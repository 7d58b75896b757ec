package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// observer holds the views of the mirror's watches, parsed. Values are parsed once, when they come.
type observer struct {
	changed wait.Signal // set after every change
	hooked  func()      // called when another mirror passed a webhook on
	log     *slog.Logger

	mu  sync.Mutex
	now observed

	// Each watch calls its method one call at a time, so these belong to it alone.
	cells    map[string]cell // by key in desired/
	pinned   parsed[deployments.Pin]
	ordered  parsed[deployments.Order]
	reports  map[string]parsedReport // by key in status/
	left     map[string]time.Time    // when keys in status/ vanished that are not back
	hook     uint64                  // the version of kv.MirrorHook that was passed on last
	complain rate.Sometimes          // bounds the lines about reports that don't parse: a node can write one after the other
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

// parsedReport is a report with the entry that it was parsed from: of a fleet's reports only what changed is parsed
// again.
type parsedReport struct {
	version uint64
	value   []byte // a restored store gives versions out again
	report  deployments.Report
	// goneSince is when its entry was first seen without a session; zero: it has one.
	goneSince time.Time
}

// parsed holds values of a watch, by key, with what they were parsed to.
type parsed[T any] map[string]parsedValue[T]

type parsedValue[T any] struct {
	value  []byte
	result T
	err    error
}

// next returns a parser for the entries of the watch's next view, which parses what changed alone: an operator's token
// can write keys by the ten thousand, and each change of one brings them all. What is not asked for is forgotten.
func (p *parsed[T]) next(v kv.View, parse func([]byte) (T, error)) func(kv.Entry) (T, error) {
	was := *p
	*p = make(parsed[T], len(v.Entries))
	return func(e kv.Entry) (T, error) {
		now, known := was[e.Key]
		if !known || !bytes.Equal(now.value, e.Value) {
			now.value = e.Value
			now.result, now.err = parse(e.Value)
		}
		(*p)[e.Key] = now
		return now.result, now.err
	}
}

func newObserver(log *slog.Logger, hooked func()) *observer {
	return &observer{
		changed:  wait.NewSignal(),
		hooked:   hooked,
		log:      log,
		cells:    map[string]cell{},
		reports:  map[string]parsedReport{},
		left:     map[string]time.Time{},
		complain: rate.Sometimes{First: 1, Interval: time.Minute},
	}
}

// latest returns the present view of the store.
func (o *observer) latest() observed {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.now
}

func (o *observer) update(f func(*observed)) {
	o.mu.Lock()
	f(&o.now)
	o.mu.Unlock()
	o.changed.Set()
}

// records adopts a view of desired/.
func (o *observer) records(v kv.View) {
	cells := make(map[string]cell, len(v.Entries))
	byUnit := make(map[deployments.UnitID]cell, len(v.Entries))
	for _, e := range v.Entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			continue // not a record's key
		}
		c, known := o.cells[e.Key]
		if !known || !bytes.Equal(c.value, e.Value) {
			c = cell{present: true, value: e.Value}
			c.record, c.err = deployments.ParseRecord(e.Value)
		}
		c.version = e.Version
		cells[e.Key], byUnit[key.UnitID()] = c, c
	}
	o.cells = cells
	o.update(func(now *observed) {
		now.desired = observedRecords{v.Synced, byUnit}
		now.sawFolders(kv.DesiredPrefix, v)
	})
}

// orders adopts a view of control/.
func (o *observer) orders(v kv.View) {
	good, bad := orders(v, o.ordered.next(v, deployments.ParseOrder))
	o.update(func(now *observed) { now.orders = observedOrders{good, bad}; now.sawFolders(kv.ControlPrefix, v) })
}

// fleet takes a view of status/. A node whose report doesn't parse has said nothing yet.
func (o *observer) fleet(v kv.View) {
	roles := map[deployments.RoleID][]reported{}
	reports := make(map[string]parsedReport, len(v.Entries))
	bad, worst, why := 0, "", error(nil)
	for _, e := range v.Entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			continue
		}
		known, ok := o.reports[e.Key]
		if !ok || known.version != e.Version || !bytes.Equal(known.value, e.Value) {
			report, err := deployments.ParseReport(e.Value)
			if err != nil {
				bad, worst, why = bad+1, e.Key, err
			}
			known = parsedReport{e.Version, e.Value, report, known.goneSince}
		}
		switch {
		case e.Session != "":
			known.goneSince = time.Time{}
		case known.goneSince.IsZero():
			known.goneSince = time.Now()
		}
		reports[e.Key] = known
		roles[key.Role] = append(
			roles[key.Role],
			reported{node: key.Node, gone: e.Session == "", goneSince: known.goneSince, report: known.report},
		)
	}
	at := time.Now()
	for name := range o.reports {
		if _, there := reports[name]; !there {
			o.left[name] = at
		}
	}
	left := map[deployments.RoleID][]time.Time{}
	for name, since := range o.left {
		key, err := kv.ParseKey(name)
		if _, back := reports[name]; back || err != nil || at.Sub(since) >= leftFor {
			delete(o.left, name)
			continue
		}
		left[key.Role] = append(left[key.Role], since)
	}
	o.reports = reports
	if bad > 0 {
		o.complain.Do(func() {
			o.log.Warn("a node's report doesn't parse", "key", worst, "such", bad, "error", clip(why.Error(), maxLogged))
		})
	}
	o.update(func(now *observed) {
		began := now.fleet.began
		if began.IsZero() {
			began = at
		}
		now.fleet = observedFleet{v.Synced, v.Err, v.Since, v.Entries, roles, left, began}
		now.sawFolders(kv.StatusPrefix, v)
	})
}

// state takes a view of mirror/, where another mirror may have passed on a webhook.
func (o *observer) state(v kv.View) {
	hook, state := o.hook, observedState{current: v.Synced && v.Err == nil}
	for _, e := range v.Entries {
		switch e.Key {
		case kv.MirrorHook:
			hook = e.Version
		case kv.MirrorKey:
			state.value = e.Value
		}
	}
	if hook != o.hook {
		o.hook = hook
		o.hooked()
	}
	o.update(func(now *observed) { now.state = state; now.sawFolders(kv.MirrorPrefix, v) })
}

// pins takes a view of pins/. Those of single nodes are the agents' business: here they go into the history alone.
func (o *observer) pins(v kv.View) {
	units := map[deployments.UnitID]policy.Value[deployments.Pin]{}
	shown := map[deployments.UnitID][]deployments.PastPin{}
	parse := o.pinned.next(v, deployments.ParsePin)
	for _, e := range v.Entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			continue
		}
		id := key.UnitID()
		pin, err := parse(e)
		if key.Node == "" {
			units[id] = policy.Value[deployments.Pin]{Present: true, Value: pin, Err: err}
		}
		shown[id] = append(shown[id], pastPin(key.Node, pin, err))
	}
	o.update(func(now *observed) {
		now.pins = observedPins{v.Synced, v.Err, units, shown}
		now.sawFolders(kv.PinsPrefix, v)
	})
}

// order is what an operator wrote at control/STAGE/ROLE/UNIT. It is consumed, which is to say removed, in the
// transaction that does it.
type order struct {
	deployments.Order
	version uint64
}

// orders reads a view of control/. What can't be obeyed is left where it is, and named in bad.
func orders(
	view kv.View,
	parse func(kv.Entry) (deployments.Order, error),
) (good map[deployments.UnitID]order, bad []error) {
	good = map[deployments.UnitID]order{}
	for _, e := range view.Entries {
		key, err := kv.ParseKey(e.Key)
		var o deployments.Order
		if err == nil {
			o, err = parse(e)
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", e.Key, err))
			continue
		}
		good[key.UnitID()] = order{o, e.Version}
	}
	return good, bad
}

// pendingOrders returns the orders that were not obeyed yet, and logs which can't be.
func (l *leader) pendingOrders(commit *git.Commit, seen observedOrders) map[deployments.UnitID]order {
	pending, bad := map[deployments.UnitID]order{}, slices.Clone(seen.bad)
	units := map[deployments.UnitID]bool{}
	for _, u := range commit.Tree.Units {
		units[u.ID] = true
	}
	for _, id := range slices.SortedFunc(maps.Keys(seen.good), deployments.UnitID.Compare) {
		switch o := seen.good[id]; {
		case l.written.orders[id] == o.version: // it has yet to vanish from the watch
		case !units[id]:
			bad = append(bad, fmt.Errorf("%s: the commit has no such unit, and one that comes later would be met by it: "+
				"remove the key", kv.ControlKey(id)))
		default:
			pending[id] = o
		}
	}
	// Past the limit nothing is remembered either, so that the last state is logged by a later round.
	if words := text(errors.Join(bad...)); words != l.badOrders && (words == "" || l.badOrderLines.Allow()) {
		if l.badOrders = words; words != "" {
			l.c.Log.Warn("an operator's order can't be obeyed", "orders", len(bad), "error", clip(words, maxLogged))
		}
	}
	return pending
}
