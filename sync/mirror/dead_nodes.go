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

// absence is the time since which an entry of status/ has been without a session, as this mirror saw it.
type absence struct {
	version uint64
	since   time.Time
}

// deadNodes removes the entries of nodes that died from status/.
type deadNodes struct {
	commit func(context.Context, ...kv.Op) error // under the lease
	after  time.Duration                         // as Mirror.forgetAfter
	log    *slog.Logger

	absent map[string]absence // by key
	denied bool               // this mirror's token may not remove entries
}

// forget removes the entries that forgettable selects: with AutoScaling, the number of dead nodes
// would only grow. It does nothing while status/ can't be read, or once the store has denied a
// removal. again is the time after which to call forget again even if nothing changes; 0: never.
func (d *deadNodes) forget(ctx context.Context, seen observed, now time.Time) (again time.Duration, err error) {
	if d.denied || !seen.fleet.synced || seen.fleet.err != nil {
		return 0, nil
	}
	ops, next := forgettable(seen.fleet.entries, d.absent, underWay(seen.desired.cells), now, d.after)
	if len(ops) > 0 {
		switch err := d.commit(ctx, ops...); {
		case errors.Is(err, kv.ErrConflict): // a node is back, as the watch will show
			next = now.Add(watchLag)
		case errors.Is(err, kv.ErrDenied):
			d.log.Info("nodes that died stay in status/: this mirror may not remove them", "error", err)
			d.denied = true
			return 0, nil
		case err != nil:
			return 0, fmt.Errorf("removing the reports of nodes that died (%d): %w", len(ops), err)
		default:
			for _, op := range ops {
				delete(d.absent, op.Key)
				d.log.Info("removed the report of a node that died", "key", op.Key, "gone", d.after)
			}
		}
	}
	if next.IsZero() {
		return 0, nil
	}
	return max(time.Millisecond, next.Sub(now)), nil
}

// forgettable returns the operations that remove the entries of nodes that have been dead for the
// time after or longer, at most one transaction's. next is when more are due; zero: never. absent
// is kept between calls, and updated. Entries of busy roles stay, because a rollout may count a
// dead node as failed.
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
		case busy[key.Role]: // the end of its rollout will wake the mirror
		case due.After(now):
			if next.IsZero() || due.Before(next) {
				next = due
			}
		case len(ops) == maxForgotten:
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

// maxForgotten is how many entries one transaction can remove.
var maxForgotten = kv.MaxOps / kv.DeleteIf("", 0).Cost()

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
