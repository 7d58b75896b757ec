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

// wasTaken looks for the commit in what the mirror wrote of all units, gone or not. The history of a large fleet is
// more than is read at once: then it is read by role, and by unit if there is too much of a role, of the units that
// have records. It tries until all was read, and tells unread what can't be; read is false if ctx ended first.
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

// tooLargeInterval is the time between two tries of a read that brought too much: each is a large one.
const tooLargeInterval = 10 * time.Second

// list reads what is below a prefix, which is nothing if nobody has written there. It tries until the store answers,
// and returns only ctx's error. If there is more than is read it tells unread and tries again, or without one returns
// kv.ErrTooLarge.
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
