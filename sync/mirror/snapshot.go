package mirror

import (
	"context"
	"slices"
	"strings"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
)

// snapshotEvery is how often a snapshot is written anew though nothing changed: readers bound its age.
const snapshotEvery = time.Hour

// offerSnapshot hands the records that this mirror wrote, or agreed with, to keepSnapshot, if there is something
// new. What somebody else wrote to desired/ is not to be vouched for by a signature.
func (l *leader) offerSnapshot() {
	if l.c.Snapshot == nil {
		return
	}
	entries := make([]kv.Entry, 0, len(l.written.records))
	for id, own := range l.written.records {
		if own.value != nil && own.vouched {
			entries = append(entries, kv.Entry{Key: kv.DesiredKey(id), Value: own.value, Version: own.version})
		}
	}
	slices.SortFunc(entries, func(a, b kv.Entry) int { return strings.Compare(a.Key, b.Key) })
	same := func(a, b kv.Entry) bool { return a.Key == b.Key && string(a.Value) == string(b.Value) }
	if l.offered != nil && slices.EqualFunc(l.offered, entries, same) {
		return
	}
	l.offered = entries
	select {
	case <-l.snapshot: // the one before was not taken yet
	default:
	}
	l.snapshot <- entries
}

// keepSnapshot passes the newest records to Config.Snapshot, and tries again until it succeeds.
func (l *leader) keepSnapshot(ctx context.Context) error {
	retry := wait.NewBackoff(time.Second, time.Minute)
	var entries []kv.Entry
	var again <-chan time.Time
	for {
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
			if retry.Tries() > 0 {
				l.c.Log.Info("the snapshot of the desired state is written again")
			}
			retry.Reset()
			again = time.After(snapshotEvery)
		case ctx.Err() == nil:
			if retry.Tries() == 0 {
				l.c.Log.Warn("the snapshot of the desired state can't be written", "error", err)
			}
			again = time.After(retry.Next())
		}
	}
}
