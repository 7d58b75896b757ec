package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
)

// observer holds the latest views of the mirror's watches. Each value is parsed once, when it changes.
type observer struct {
	changed wait.Signal // set after each change
	hooked  func()      // called when another mirror passes a webhook on
	log     *slog.Logger

	mu  sync.Mutex
	now observed

	// Each watch calls its method one call at a time: only that method uses these fields.
	cells    map[string]cell // by key in desired/
	pinned   parsed[deployments.Pin]
	ordered  parsed[deployments.Order]
	reports  map[string]parsedReport // by key in status/
	left     map[string]time.Time    // when each key in status/ vanished that is not back
	hook     uint64                  // the last version of kv.MirrorHook that was passed on
	complain rate.Sometimes          // bounds the lines about reports that don't parse, as a node can write many
}

// parsedReport is a report with the entry that it was parsed from, so that only reports that changed are parsed
// again.
type parsedReport struct {
	version uint64
	value   []byte // compared too, as a restored store reuses versions
	report  deployments.Report
	// goneSince is when the entry was first seen without a session; zero: it has one.
	goneSince time.Time
}

// parsed holds a watch's values by key, with what they were parsed to.
type parsed[T any] map[string]parsedValue[T]

type parsedValue[T any] struct {
	value  []byte
	result T
	err    error
}

// next returns a parser for the entries of the watch's next view. It parses only values that changed: an operator's
// token can write keys by the ten thousand, and each change of one brings them all. Keys that the parser isn't
// called for are dropped.
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

// records takes a view of desired/.
func (o *observer) records(v kv.View) {
	cells := make(map[string]cell, len(v.Entries))
	byUnit := make(map[deployments.UnitID]cell, len(v.Entries))
	for _, e := range v.Entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			continue // not the key of a record
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

// orders takes a view of control/.
func (o *observer) orders(v kv.View) {
	good, bad := parseOrders(v, o.ordered.next(v, deployments.ParseOrder))
	o.update(func(now *observed) { now.orders = observedOrders{good, bad}; now.sawFolders(kv.ControlPrefix, v) })
}

// parseOrders parses a view of control/. Orders that can't be obeyed stay in the store, and bad names them.
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

// fleet takes a view of status/. A node whose report doesn't parse counts as one that has not reported.
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

// state takes a view of mirror/, to which another mirror may have written a webhook.
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

// pins takes a view of pins/. Pins of single nodes are applied by the agents: here they only go into the history.
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
		shown[id] = append(shown[id], historyPin(key.Node, pin, err))
	}
	o.update(func(now *observed) {
		now.pins = observedPins{v.Synced, v.Err, units, shown}
		now.sawFolders(kv.PinsPrefix, v)
	})
}

// sawFolders records the folder keys of a view.
func (now *observed) sawFolders(kind string, v kv.View) {
	folders := maps.Clone(now.folders)
	if folders == nil {
		folders = map[string]observedFolders{}
	}
	folders[kind] = observedFolders{errors.Is(v.Err, kv.ErrNoFolder), v.Folders}
	now.folders = folders
}
