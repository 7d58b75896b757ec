package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// The history records pins and orders in the newest entry of their unit. Pins are compared with
// what the store shows. So the next round also finds pins that began or ended while another mirror,
// or no mirror, ran. Orders are recorded in the transaction that consumes them.

const (
	// pinRoles is how many roles' histories recordPins reads in one round at most. The others wait for the next round,
	// so that pins and orders don't have to wait for all of them.
	pinRoles = 20
	// pinRetry is the time after which a history that could not be read or written is retried. Rollouts go on meanwhile.
	pinRetry = 10 * time.Second
)

// historyKeeper reads the history of units that the mirror needs, one role at a time, and records in it which pins
// begin and end.
type historyKeeper struct {
	store  kv.Store
	commit func(context.Context, ...kv.Op) error // under the lease
	log    *slog.Logger
	retry  time.Time      // pins aren't recorded before this time
	bound  rate.Sometimes // bounds the lines about failures

	newest map[deployments.UnitID]deployments.History
	stable map[deployments.UnitID][]deployments.Digest // releases that were stable and have not failed since
	// pins has the pins of the newest entry, and open pins of earlier entries that the newest lacks.
	// The newest entry lacks them if the mirror that wrote it had not read the history, or is of a
	// version that records no pins. Units without pins have no key.
	pins      map[deployments.UnitID][]deployments.PastPin
	readRoles map[deployments.RoleID]bool
}

func newHistoryKeeper(store kv.Store, commit func(context.Context, ...kv.Op) error, log *slog.Logger) *historyKeeper {
	return &historyKeeper{store: store, commit: commit, log: log, bound: rate.Sometimes{First: 1, Interval: time.Minute},
		newest: map[deployments.UnitID]deployments.History{},
		stable: map[deployments.UnitID][]deployments.Digest{}, pins: map[deployments.UnitID][]deployments.PastPin{},
		readRoles: map[deployments.RoleID]bool{}}
}

// forget drops what is known of a unit, so that its role's history is read again when it is needed.
func (a *historyKeeper) forget(id deployments.UnitID) {
	delete(a.newest, id)
	delete(a.stable, id)
	delete(a.pins, id)
	delete(a.readRoles, id.RoleID())
}

// add updates what is known of a unit's history by the entry e. e may be of a later generation, or a new version of the
// newest entry. If e is of an earlier generation or an absurd one, only its Stable and Failed count.
func (a *historyKeeper) add(id deployments.UnitID, e deployments.History) {
	if newest := a.newest[id].Generation; e.Generation >= newest && e.Generation < policy.AbsurdGeneration {
		pins := e.Pins
		if e.Generation > newest {
			missing := slices.DeleteFunc(openPins(a.pins[id]), func(open deployments.PastPin) bool {
				return slices.ContainsFunc(e.Pins, func(q deployments.PastPin) bool {
					return q.Node == open.Node && q.At.Equal(open.At)
				})
			})
			pins = slices.Concat(missing, e.Pins)
		}
		a.newest[id] = e
		if a.pins[id] = pins; len(pins) == 0 {
			delete(a.pins, id)
		}
	}
	stable := a.stable[id]
	if !e.Stable.IsZero() && !slices.Contains(stable, e.Stable.Digest) {
		stable = append(stable, e.Stable.Digest)
	}
	a.stable[id] = slices.DeleteFunc(stable, func(d deployments.Digest) bool { return d == e.Failed })
}

// addWritten adds the history entry that the change w has written, if its role's history was read
// before.
func (a *historyKeeper) addWritten(w change) {
	if w.history != nil && a.readRoles[w.unit.RoleID()] {
		a.add(w.unit, *w.history)
	}
}

// needsHistory reports whether the decision about a unit needs its history. It does if there is no record to go on
// from, or if an order is to be recorded. It also does if the target may be about to change, and fast_back lets a
// release that was stable before skip the gates.
func needsHistory(u deployments.Unit, c cell, pinned, ordered bool, s keyState) bool {
	if s == unknown || ordered {
		return true
	}
	return u.Rollout != nil && u.Rollout.FastBack && (c.record.Target != u.Release || pinned || c.record.Pinned != nil)
}

// readNeeded reads the history of the roles that need it, each once.
func (a *historyKeeper) readNeeded(ctx context.Context, commit *git.Commit, seen observed,
	records map[deployments.UnitID]writtenRecord, now time.Time) error {
	for _, u := range commit.Tree.Units {
		role := u.ID.RoleID()
		own, known := records[u.ID]
		c := seen.desired.cells[u.ID]
		_, ordered := seen.orders.good[u.ID]
		pinned := seen.pins.units[u.ID].Present
		if a.readRoles[role] || !needsHistory(u, c, pinned, ordered, compareKey(c, own, known, now)) {
			continue
		}
		if err := a.readRole(ctx, role); err != nil {
			return err
		}
	}
	return nil
}

// readRole reads the history of all units of a role.
func (a *historyKeeper) readRole(ctx context.Context, role deployments.RoleID) error {
	entries, err := a.store.List(ctx, kv.RolePrefix(kv.HistoryPrefix, role.Stage, role.Role))
	if err != nil {
		return fmt.Errorf("reading the history of %s: %w", role, err)
	}
	a.readRoles[role] = true
	for _, e := range entries { // sorted by generation
		name := strings.TrimPrefix(e.Key, kv.HistoryPrefix)
		id, err := deployments.ParseUnitID(name[:max(0, strings.LastIndex(name, "/"))])
		if err != nil {
			continue
		}
		if past, err := deployments.ParseHistory(e.Value); err == nil {
			a.add(id, past)
		}
	}
	return nil
}

// recordPins writes in the newest entries of the history which pins began and ended, while all pins are known. again is
// the time after which to call recordPins again even if nothing changes; 0: never. Errors of the history don't hold up
// rollouts: only a lost lease is returned.
func (a *historyKeeper) recordPins(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	if !seen.pins.synced || seen.pins.err != nil {
		return 0, nil
	}
	if wait := a.retry.Sub(now); wait > 0 {
		return wait, nil
	}
	again, err = a.writePins(ctx, seen, now)
	switch {
	case err == nil, ctx.Err() != nil:
		return again, nil
	case errors.Is(err, kv.ErrLeaseLost):
		return 0, err
	}
	a.bound.Do(func() {
		a.log.Warn("could not record pins in the history: trying again", "store", a.store, "error", err)
	})
	a.retry = now.Add(pinRetry)
	return pinRetry, nil
}

func (a *historyKeeper) writePins(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	cells := seen.desired.cells
	unread := 0
	for id := range cells {
		role := id.RoleID()
		if a.readRoles[role] {
			continue
		}
		if unread++; unread > pinRoles {
			again = time.Millisecond
			break
		}
		if err := a.readRole(ctx, role); err != nil {
			return 0, err
		}
	}

	units := map[deployments.UnitID]bool{}
	for id := range a.pins {
		units[id] = true
	}
	for id := range seen.pins.historyPins {
		units[id] = true
	}
	var todo []change
	for id := range units {
		entry, known := a.newest[id]
		if c := cells[id]; !known && a.readRoles[id.RoleID()] && c.err == nil && ours(c.record) {
			entry, known = lostEntry(c.record, now), true
		}
		if !known {
			continue // there is no record by a mirror, or its role's history is yet to be read
		}
		stored, truncated := entry, false
		entry.Pins, truncated = followPins(a.pins[id], seen.pins.historyPins[id], now)
		entry.Truncated = entry.Truncated || truncated
		for _, p := range entry.Pins {
			if p.Ended.IsZero() && !p.Until.IsZero() {
				again = minWait(again, max(time.Millisecond, p.Until.Sub(now)))
			}
		}
		if !sameEntry(stored, entry) {
			todo = append(todo, change{unit: id, history: &entry, ops: writeHistory(id, &entry)})
		}
	}
	slices.SortFunc(todo, func(a, b change) int { return a.unit.Compare(b.unit) })
	for _, batch := range batches(todo) {
		var ops []kv.Op
		for _, w := range batch {
			ops = append(ops, w.ops...)
		}
		if err := a.commit(ctx, ops...); err != nil {
			return 0, fmt.Errorf("writing entries of the history (%d, the first is of %s): %w", len(batch), batch[0].unit, err)
		}
		for _, w := range batch {
			a.add(w.unit, *w.history)
			a.log.Info("pins recorded in the history", "unit", w.unit, "generation", w.history.Generation,
				"pins", len(openPins(w.history.Pins)))
		}
	}
	return again, nil
}
