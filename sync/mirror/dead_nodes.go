package mirror

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// forgetAfter is how long a node that died stays in status/, for people to see: longer than a weekend.
const forgetAfter = 72 * time.Hour

// absence is since when this mirror has seen an entry of status/ without a session.
type absence struct {
	version uint64
	since   time.Time
}

// deadNodes are the entries of status/ without a session, by key.
type deadNodes struct {
	absent map[string]absence
	denied bool // this mirror may not remove what is there
}

// forgetDead removes the entries of nodes that died, and that nobody replaced by name: where AutoScaling replaces
// them, they would only become more. again is when to look even if nothing changes; 0: never.
func (l *leader) forgetDead(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	if l.dead.denied || !seen.fleet.synced || seen.fleet.err != nil {
		return 0, nil
	}
	ops, next := forgettable(seen.fleet.entries, l.dead.absent, underWay(seen.desired.cells), now, l.forgetAfter)
	if len(ops) > 0 {
		switch err := l.c.Store.Commit(ctx, l.lease, ops...); {
		case errors.Is(err, kv.ErrConflict): // one is back, as the watch will show
			next = now.Add(watchLag)
		case errors.Is(err, kv.ErrDenied):
			l.c.Log.Info("nodes that died stay in status/: this mirror may not remove them", "error", err)
			l.dead.denied = true
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("remove what %d nodes said that are gone: %w", len(ops), err)
		default:
			for _, op := range ops {
				delete(l.dead.absent, op.Key)
				l.c.Log.Info("a node that died is forgotten", "key", op.Key, "gone", l.forgetAfter)
			}
			l.metrics.wrote(len(ops))
		}
	}
	if next.IsZero() {
		return 0, nil
	}
	return max(time.Millisecond, next.Sub(now)), nil
}

// forgettable returns the entries of dead nodes to remove now, as many as go into one transaction, and when there is
// more; absent is kept from call to call. Roles that are busy keep theirs: there, a node that died may count as
// failed.
func forgettable(
	entries []kv.Entry,
	absent map[string]absence,
	busy map[deployments.RoleID]bool,
	now time.Time,
	after time.Duration,
) (ops []kv.Op, next time.Time) {
	dead := map[string]bool{}
	for _, e := range entries {
		key, err := kv.ParseKey(e.Key)
		if err != nil || e.Session != "" {
			continue
		}
		dead[e.Key] = true
		a, known := absent[e.Key]
		if !known || a.version != e.Version {
			a = absence{e.Version, now}
			absent[e.Key] = a
		}
		due := a.since.Add(after)
		switch {
		case busy[key.Role]: // its end will be seen
		case due.After(now):
			if next.IsZero() || due.Before(next) {
				next = due
			}
		case len(ops) == forgetMost:
			next = now
		default:
			ops = append(ops, kv.DeleteIf(e.Key, e.Version))
		}
	}
	for key := range absent {
		if !dead[key] {
			delete(absent, key)
		}
	}
	return ops, next
}

// forgetMost is how many entries one transaction can remove.
var forgetMost = kv.MaxOps / kv.DeleteIf("", 0).Cost()

// underWay returns the roles that have a rollout under way.
func underWay(cells map[deployments.UnitID]cell) map[deployments.RoleID]bool {
	busy := map[deployments.RoleID]bool{}
	for id, c := range cells {
		if p := c.record.Rollout; p != nil && p.Phase != deployments.PhaseRolledBack {
			busy[id.RoleID()] = true
		}
	}
	return busy
}
