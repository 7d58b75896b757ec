package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// sawDesired takes the newest view of desired/.
func (l *leader) sawDesired(v kv.View) {
	l.mu.Lock()
	l.desired = v
	l.mu.Unlock()
	l.poked()
	if v.Settled && v.Err == nil && l.c.Snapshot != nil {
		select {
		case <-l.snapshot: // the one before was not taken yet
		default:
		}
		l.snapshot <- v.Entries
	}
}

// sawControl takes the newest view of control/.
func (l *leader) sawControl(v kv.View) {
	l.mu.Lock()
	l.control = v
	l.mu.Unlock()
	l.poked()
}

// sawStatus takes the newest view of status/.
func (l *leader) sawStatus(v kv.View) {
	l.mu.Lock()
	l.status = v
	l.mu.Unlock()
	l.poked()
}

// sawState takes the newest view of mirror/, and heeds a webhook that another mirror passed on.
func (l *leader) sawState(v kv.View) {
	hook := l.hook
	for _, e := range v.Entries {
		if e.Key == kv.MirrorHook {
			hook = e.Version
		}
	}
	if hook != l.hook {
		l.hook = hook
		l.heed()
	}
	l.mu.Lock()
	l.state = v
	l.mu.Unlock()
	l.poked()
}

func (l *leader) poked() { l.wake.Set() }

// observe sorts the view by unit, and notes which writes of this mirror it shows.
func (l *leader) observe(view kv.View) map[deployments.UnitID]cell {
	cells := make(map[deployments.UnitID]cell, len(view.Entries))
	for _, e := range view.Entries {
		id, err := deployments.ParseUnitID(strings.TrimPrefix(e.Key, kv.DesiredPrefix))
		if err != nil {
			continue // not a record's key
		}
		c := cell{present: true, version: e.Version, value: e.Value}
		c.record, c.err = deployments.ParseRecord(e.Value)
		cells[id] = c
	}
	for id, o := range l.owned {
		c := cells[id]
		switch {
		case o.value == nil && !c.present:
			delete(l.owned, id)
		case o.value != nil && string(c.value) == string(o.value):
			o.version = c.version
			l.owned[id] = o
		}
	}
	return cells
}

// lostState reports whether mirror/state isn't what this mirror wrote there: somebody removed or changed it by hand. at is when it
// may be told, where a write may have yet to show.
func (l *leader) lostState(view kv.View, now time.Time) (lost bool, at time.Time) {
	if !view.Settled || view.Err != nil || l.writtenAt.IsZero() {
		return false, at
	}
	for _, e := range view.Entries {
		if e.Key == kv.MirrorKey && bytes.Equal(e.Value, writeStatus(l.written).ops[0].Value) {
			return false, at
		}
	}
	at = l.writtenAt.Add(settle)
	return !now.Before(at), at
}

// parsedReport is a report as it was parsed, so that of a fleet's reports only those that changed are parsed again.
type parsedReport struct {
	version uint64
	value   []byte // a restored store gives versions out again
	report  deployments.Report
}

// fleet sorts the view of status/ by role. A node whose report doesn't parse has said nothing yet.
func (l *leader) fleet(view kv.View) map[[2]string][]reported {
	byRole := map[[2]string][]reported{}
	reports := make(map[string]parsedReport, len(view.Entries))
	for _, e := range view.Entries {
		parts := strings.Split(strings.TrimPrefix(e.Key, kv.StatusPrefix), "/")
		if len(parts) != 3 {
			continue
		}
		known, ok := l.reports[e.Key]
		if !ok || known.version != e.Version || !bytes.Equal(known.value, e.Value) {
			report, err := deployments.ParseReport(e.Value)
			if err != nil {
				l.c.Log.Warn("a node's report doesn't parse", "key", e.Key, "error", err)
			}
			known = parsedReport{e.Version, e.Value, report}
		}
		reports[e.Key] = known
		role := [2]string{parts[0], parts[1]}
		byRole[role] = append(byRole[role], reported{node: parts[2], gone: e.Session == "", report: known.report})
	}
	l.reports = reports
	return byRole
}

// orders are those that were not obeyed yet.
func (l *leader) orders(view kv.View) map[deployments.UnitID]order {
	good, bad := orders(view)
	for _, id := range slices.SortedFunc(maps.Keys(good), compareIDs) {
		if l.obeyed[id] == good[id].version {
			delete(good, id) // it has yet to vanish from the watch
		} else if !slices.ContainsFunc(l.accepted.Tree.Units, func(u deployments.Unit) bool { return u.ID == id }) {
			bad = append(bad, fmt.Errorf("%s: the commit has no such unit, and one that comes later would be met by it: remove the key", kv.ControlKey(id)))
		}
	}
	if complaint := text(errors.Join(bad...)); complaint != l.complaint {
		l.complaint = complaint
		if complaint != "" {
			l.c.Log.Warn("an operator's order can't be obeyed", "error", complaint)
		}
	}
	return good
}
