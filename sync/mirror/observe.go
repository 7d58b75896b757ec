package mirror

import (
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
	"kedge/sync/fleet/reports"
)

// observer holds the latest views of the mirror's watches. Each value is parsed once, when it changes.
type observer struct {
	changed wait.Signal // set after each view, and when an inspection ends
	hooked  func()      // called when another mirror passes a webhook on
	log     *slog.Logger

	mu  sync.Mutex
	now observed

	// These fields need no lock: each belongs to one watch, whose views come one at a time.
	parsedRecords kv.ParseCache[deployments.Record]
	parsedPins    kv.ParseCache[deployments.Pin]
	parsedOrders  kv.ParseCache[deployments.Order]
	reports       reports.Reader
	listed        map[string]time.Time // when each key in status/ was first seen without a session; zero: it has one
	outages       map[string]outages   // by key in status/
	left          map[string]time.Time // when each key that is missing in status/ vanished
	hook          uint64               // the last version of kv.MirrorHook that was seen
	// reportLogLimit bounds the lines about reports that can't be used, as a node can write many.
	reportLogLimit rate.Sometimes
}

func newObserver(log *slog.Logger, hooked func()) *observer {
	return &observer{
		changed:        wait.NewSignal(),
		hooked:         hooked,
		log:            log,
		listed:         map[string]time.Time{},
		left:           map[string]time.Time{},
		reportLogLimit: rate.Sometimes{First: 1, Interval: time.Minute},
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

// records stores a view of desired/, parsed.
func (o *observer) records(v kv.View) {
	var parse func(kv.Entry) (deployments.Record, error)
	o.parsedRecords, parse = o.parsedRecords.Next(len(v.Entries), deployments.ParseRecord)
	cells := make(map[deployments.UnitID]cell, len(v.Entries))
	for _, e := range v.Entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			continue // not the key of a record
		}
		record, err := parse(e)
		cells[key.UnitID()] = cell{present: true, version: e.Version, value: e.Value, record: record, err: err}
	}
	o.update(func(now *observed) {
		now.desired = observedRecords{v.Synced, cells}
		now.sawFolders(kv.DesiredPrefix, v)
	})
}

// orders stores a view of control/, parsed.
func (o *observer) orders(v kv.View) {
	var parse func(kv.Entry) (deployments.Order, error)
	o.parsedOrders, parse = o.parsedOrders.Next(len(v.Entries), deployments.ParseOrder)
	good, bad := parseOrders(v, parse)
	o.update(func(now *observed) { now.orders = observedOrders{good, bad}; now.sawFolders(kv.ControlPrefix, v) })
}

// parseOrders parses a view of control/. bad has an error for each key or order that doesn't parse; these keys stay in
// the store.
func parseOrders(
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

// fleet stores a view of status/, parsed. A node whose report can't be used counts as one that has not reported.
func (o *observer) fleet(v kv.View) {
	at := time.Now()
	roles := map[deployments.RoleID][]reported{}
	listed := make(map[string]time.Time, len(v.Entries))
	out := map[string]outages{}
	bad, worst, why := 0, "", error(nil)
	for _, r := range o.reports.Read(v.Entries) {
		if r.Err != nil {
			bad, worst, why = bad+1, r.Entry.Key, r.Err
		}
		gone, goneSince := r.Entry.Session == "", time.Time{}
		if gone {
			if goneSince = o.listed[r.Entry.Key]; goneSince.IsZero() {
				goneSince = at
			}
		}
		listed[r.Entry.Key] = goneSince
		unhealthy := o.outages[r.Entry.Key].next(r.Report.Units, at)
		if unhealthy != nil {
			out[r.Entry.Key] = unhealthy
		}
		roles[r.Key.Role] = append(roles[r.Key.Role], reported{r.Key.Node, gone, goneSince, unhealthy, r.Report})
	}
	o.outages = out
	left := o.trackLeft(listed, at)
	if bad > 0 {
		o.reportLogLimit.Do(func() {
			o.log.Warn("a node's report can't be used: the node counts as one that has not reported",
				"key", worst, "such", bad, "error", clip(why.Error(), maxLogged))
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

// trackLeft records which keys of status/ are no longer in listed, the keys that the store shows. It returns, by role,
// when the keys vanished that are still missing. It forgets keys after leftFor and, if there are more than maxLeft,
// those that vanished first.
func (o *observer) trackLeft(listed map[string]time.Time, at time.Time) map[deployments.RoleID][]time.Time {
	for name := range o.listed {
		if _, there := listed[name]; !there {
			o.left[name] = at
		}
	}
	o.listed = listed
	left := map[deployments.RoleID][]time.Time{}
	for name, since := range o.left {
		key, err := kv.ParseKey(name)
		if _, back := listed[name]; back || err != nil || at.Sub(since) >= leftFor {
			delete(o.left, name)
			continue
		}
		left[key.Role] = append(left[key.Role], since)
	}
	if len(o.left) > maxLeft {
		o.forgetOldest()
		return o.trackLeft(listed, at)
	}
	return left
}

// forgetOldest forgets the keys that vanished first, so that maxLeft stay.
func (o *observer) forgetOldest() {
	names := slices.SortedFunc(maps.Keys(o.left), func(a, b string) int { return o.left[a].Compare(o.left[b]) })
	for _, name := range names[:len(names)-maxLeft] {
		delete(o.left, name)
	}
}

// state stores a view of mirror/. It calls hooked if another mirror has passed a webhook on since the last view or, for
// the first view, ever.
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

// pins stores a view of pins/, parsed. Pins of single nodes are applied by the agents: here they only go into the
// history.
func (o *observer) pins(v kv.View) {
	units := map[deployments.UnitID]policy.Value[deployments.Pin]{}
	shown := map[deployments.UnitID][]deployments.PastPin{}
	var parse func(kv.Entry) (deployments.Pin, error)
	o.parsedPins, parse = o.parsedPins.Next(len(v.Entries), deployments.ParsePin)
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
		shown[id] = append(shown[id], historyPin(key.Node, pin, err))
	}
	o.update(func(now *observed) {
		now.pins = observedPins{v.Synced, v.Err, units, shown}
		now.sawFolders(kv.PinsPrefix, v)
	})
}

// sawFolders records the folder keys in a view of a kind of keys, and whether the kind's own folder key is missing.
func (now *observed) sawFolders(kind string, v kv.View) {
	folders := maps.Clone(now.folders)
	if folders == nil {
		folders = map[string]observedFolders{}
	}
	folders[kind] = observedFolders{errors.Is(v.Err, kv.ErrNoFolder), v.Folders}
	now.folders = folders
}
