package mirror

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// absence is since when this mirror has seen an entry of status/ without a session.
type absence struct {
	version uint64
	since   time.Time
}

// deadNodes removes the entries of status/ of nodes that died.
type deadNodes struct {
	commit func(context.Context, ...kv.Op) error // under the lease
	after  time.Duration                         // forgetAfter
	log    *slog.Logger

	absent map[string]absence // by key
	denied bool               // this mirror may not remove what is there
}

// forget removes the entries of nodes that died, and that nobody replaced by name: where AutoScaling replaces
// them, they would only become more. again is when to look even if nothing changes; 0: never.
func (d *deadNodes) forget(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	if d.denied || !seen.fleet.synced || seen.fleet.err != nil {
		return 0, nil
	}
	ops, next := forgettable(seen.fleet.entries, d.absent, underWay(seen.desired.cells), now, d.after)
	if len(ops) > 0 {
		switch err := d.commit(ctx, ops...); {
		case errors.Is(err, kv.ErrConflict): // one is back, as the watch will show
			next = now.Add(watchLag)
		case errors.Is(err, kv.ErrDenied):
			d.log.Info("nodes that died stay in status/: this mirror may not remove them", "error", err)
			d.denied = true
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("remove what %d nodes said that are gone: %w", len(ops), err)
		default:
			for _, op := range ops {
				delete(d.absent, op.Key)
				d.log.Info("a node that died is forgotten", "key", op.Key, "gone", d.after)
			}
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
