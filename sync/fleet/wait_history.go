package fleet

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// wasTaken reports in taken whether an entry of the history names w.commit. read is false if ctx
// ended before that was known. A history that is too large for one read is read by role, and by
// unit if a role has too much; then units without a record are left out. wasTaken retries until all
// was read. It calls unread with the error if the records, or the history of one unit, are too
// large.
func (w *waiter) wasTaken(ctx context.Context, store kv.Store, unread func(error)) (taken, read bool) {
	names := func(past []kv.Entry) bool {
		return slices.ContainsFunc(past, func(e kv.Entry) bool {
			return strings.HasPrefix(readHistory(e).Commit, w.commit)
		})
	}
	past, err := w.list(ctx, store, w.filter.prefix(kv.HistoryPrefix), nil)
	if !errors.Is(err, kv.ErrTooLarge) {
		return names(past), err == nil
	}
	records, err := w.list(ctx, store, w.filter.prefix(kv.DesiredPrefix), unread)
	if err != nil {
		return false, false
	}
	for role, units := range unitsByRole(records) {
		past, err := w.list(ctx, store, kv.RolePrefix(kv.HistoryPrefix, role.Stage, role.Role), nil)
		switch {
		case err == nil && names(past):
			return true, true
		case err == nil:
			continue
		case !errors.Is(err, kv.ErrTooLarge):
			return false, false
		}
		for _, id := range units {
			past, err := w.list(ctx, store, kv.HistoryPrefixOf(id), unread)
			if err != nil {
				return false, false
			}
			if names(past) {
				return true, true
			}
		}
	}
	return false, true
}

// unitsByRole returns the units that have a record among entries.
func unitsByRole(entries []kv.Entry) map[deployments.RoleID][]deployments.UnitID {
	units := map[deployments.RoleID][]deployments.UnitID{}
	for _, e := range entries {
		if key, err := kv.ParseKey(e.Key); err == nil && key.Kind == kv.DesiredPrefix {
			units[key.Role] = append(units[key.Role], key.UnitID())
		}
	}
	return units
}

// tooLargeInterval is the time between two tries of a read that failed with kv.ErrTooLarge, as each try transfers much.
const tooLargeInterval = 10 * time.Second

// list returns the entries below prefix, none if nobody has written there or the token may not read them. It retries
// until the store answers; if ctx ends, it returns ctx.Err(). If more is stored than is read, it calls unread with the
// error and tries again. With unread nil it returns that error, which wraps kv.ErrTooLarge.
func (w *waiter) list(
	ctx context.Context, store kv.Store, prefix string, unread func(error),
) ([]kv.Entry, error) {
	for {
		entries, err := store.List(ctx, prefix)
		if err == nil || errors.Is(err, kv.ErrDenied) {
			w.outage.end()
			return entries, nil
		}
		pause := retryInterval
		switch {
		case !errors.Is(err, kv.ErrTooLarge):
			w.outage.begin()
		case unread == nil:
			w.outage.end()
			return nil, err
		default:
			w.outage.end()
			unread(err)
			pause = tooLargeInterval
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
	}
}
