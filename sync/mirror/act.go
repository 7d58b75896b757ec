package mirror

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
)

// prepare makes the folders of new roles, and reads the history of units whose record is not there to go on from.
func (l *leader) prepare(ctx context.Context, cells map[deployments.UnitID]cell, now time.Time) error {
	var folders []string
	all := roles(l.accepted.Tree)
	for _, r := range all {
		if !l.folders[r] {
			for _, kind := range []string{kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix, kv.ControlPrefix, kv.HistoryPrefix} {
				folders = append(folders, kv.RolePrefix(kind, r[0], r[1]))
			}
		}
	}
	if len(folders) > 0 {
		if err := l.c.Store.EnsureFolders(ctx, folders...); err != nil {
			return fmt.Errorf("folders of %d keys: %w", len(folders), err)
		}
		for _, r := range all {
			l.folders[r] = true
		}
	}
	for _, u := range l.accepted.Tree.Units {
		role := [2]string{u.ID.Stage, u.ID.Role}
		o, known := l.owned[u.ID]
		if l.pastOf[role] || stand(cells[u.ID], o, known, now) != unknown {
			continue
		}
		entries, err := l.c.Store.List(ctx, kv.RolePrefix(kv.HistoryPrefix, role[0], role[1]))
		if err != nil {
			return fmt.Errorf("history of %s/%s: %w", role[0], role[1], err)
		}
		l.pastOf[role] = true
		for _, e := range entries {
			name := strings.TrimPrefix(e.Key, kv.HistoryPrefix)
			id, err := deployments.ParseUnitID(name[:max(0, strings.LastIndex(name, "/"))])
			if err != nil {
				continue
			}
			var h History
			if err := json.Unmarshal(e.Value, &h); err == nil && h.Generation > l.past[id].Generation && h.Generation < absurd {
				l.past[id] = h
			}
		}
	}
	return nil
}

// act writes. What takes several transactions is announced in the first and confirmed in the last, so that a mirror that
// takes over in between knows which commit it finds half written.
//
// The state is written where it differs from what it was, or where lost says that it isn't there.
func (l *leader) act(ctx context.Context, writes []write, status Status, lost bool, now time.Time) error {
	all := writes
	if lost || status != l.written {
		all = append(slices.Clone(writes), writeStatus(status))
	}
	todo := batches(all)
	if len(todo) > 1 && status.Head != l.written.Head {
		announced := l.written
		announced.Holder, announced.Applying, announced.Rules = status.Holder, status.Head, status.Rules
		todo = batches(append([]write{writeStatus(announced)}, all...))
	}
	for _, batch := range todo {
		var ops []kv.Op
		for _, w := range batch {
			ops = append(ops, w.ops...)
		}
		if err := l.c.Store.Commit(ctx, l.lease, ops...); err != nil {
			if !errors.Is(err, kv.ErrConflict) && !errors.Is(err, kv.ErrLeaseLost) {
				for _, w := range batch {
					delete(l.owned, w.unit) // it may have been written all the same: take what the store shows
				}
			}
			return fmt.Errorf("write %d keys: %w", len(ops), err)
		}
		l.metrics.wrote(len(ops))
		for _, w := range batch {
			l.done(w, now)
		}
	}
	return nil
}

// complain says in mirror/state why what the commit asks for can't be written, where the store takes at least that.
func (l *leader) complain(ctx context.Context, err error, now time.Time) {
	for _, passes := range []error{kv.ErrConflict, kv.ErrLeaseLost, kv.ErrUnavailable} {
		if errors.Is(err, passes) {
			return
		}
	}
	status := l.written
	status.Holder, status.Error = l.c.Name, clip("the commit can't be written: "+err.Error(), maxError)
	if ctx.Err() != nil || !worthWriting(l.written, status, l.writtenAt, now) {
		return
	}
	w := writeStatus(status)
	if err := l.c.Store.Commit(ctx, l.lease, w.ops...); err == nil {
		l.done(w, now)
	}
}

// done notes a write that the store has taken.
func (l *leader) done(w write, now time.Time) {
	if w.status != nil {
		l.written, l.writtenAt = *w.status, now
		l.metrics.applied(l.written)
		return
	}
	if w.order.version != 0 {
		l.obeyed[w.unit] = w.order.version
		l.c.Log.Info("order taken", "unit", w.unit, "order", w.order.verb, "outcome", w.reason)
	}
	if w.kind == "none" {
		return
	}
	l.owned[w.unit] = own{record: w.after, value: w.value, over: w.over, at: now}
	if w.value == nil {
		delete(l.past, w.unit)
		delete(l.pastOf, [2]string{w.unit.Stage, w.unit.Role})
	}
	l.c.Log.Info("record written", "unit", w.unit, "kind", w.kind, "target", w.after.Target, "generation", w.after.Generation, "commit", w.after.Commit, "reason", w.reason)
}

// snapshotEvery is how often a snapshot is written anew though nothing changed: readers bound its age.
const snapshotEvery = time.Hour

// keepSnapshot hands the newest records to Config.Snapshot, until it takes them.
func (l *leader) keepSnapshot(ctx context.Context) error {
	retry := wait.NewBackoff(time.Second, time.Minute)
	var entries []kv.Entry
	var again <-chan time.Time
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case entries = <-l.snapshot:
		case <-again:
		}
		again = nil
		err := l.c.Snapshot(ctx, entries)
		switch {
		case err == nil:
			if failed {
				l.c.Log.Info("the snapshot of the desired state is written again")
			}
			failed = false
			retry.Reset()
			again = time.After(snapshotEvery)
		case ctx.Err() == nil:
			if !failed {
				l.c.Log.Warn("the snapshot of the desired state can't be written", "error", err)
			}
			failed = true
			again = time.After(retry.Next())
		}
	}
}
