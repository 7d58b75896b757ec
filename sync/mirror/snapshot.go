package mirror

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
)

// snapshotEvery is the time after which a snapshot is written again even if nothing changed: readers refuse one that is
// too old.
const snapshotEvery = time.Hour

// snapshots passes what this mirror wrote or adopted to Config.Snapshot.
type snapshots struct {
	save    func(ctx context.Context, desired []kv.Entry) error // nil: no snapshots are kept
	log     *slog.Logger
	offers  chan []kv.Entry // to run; has room for one
	offered []kv.Entry
}

// offer gives run the records that this mirror wrote or adopted and that are vouched for (see
// writtenRecord), if they changed since the last call. The snapshot's signature must not vouch for
// what somebody else wrote.
func (s *snapshots) offer(own map[deployments.UnitID]writtenRecord) {
	if s.save == nil {
		return
	}
	entries := make([]kv.Entry, 0, len(own))
	for id, own := range own {
		if own.value != nil && own.vouched {
			entries = append(entries, kv.Entry{Key: kv.DesiredKey(id), Value: own.value, Version: own.version})
		}
	}
	slices.SortFunc(entries, func(a, b kv.Entry) int { return strings.Compare(a.Key, b.Key) })
	same := func(a, b kv.Entry) bool { return a.Key == b.Key && string(a.Value) == string(b.Value) }
	if s.offered != nil && slices.EqualFunc(s.offered, entries, same) {
		return
	}
	s.offered = entries
	select {
	case <-s.offers: // the offer before, which run has yet to take, is dropped
	default:
	}
	s.offers <- entries
}

// run passes the newest records to Config.Snapshot after each change and every snapshotEvery, until ctx ends. A failed
// call is retried.
func (s *snapshots) run(ctx context.Context) error {
	retry := wait.NewBackoff(time.Second, time.Minute)
	var entries []kv.Entry
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case entries = <-s.offers:
		case <-again:
		}
		again = nil
		err := s.save(ctx, entries)
		switch {
		case err == nil:
			if retry.Tries() > 0 {
				s.log.Info("the snapshot of the desired state was written, after errors")
			}
			retry.Reset()
			again = time.After(snapshotEvery)
		case ctx.Err() == nil:
			if retry.Tries() == 0 {
				s.log.Warn("could not write the snapshot of the desired state: trying again, and nodes that boot without the "+
					"store use the last one", "error", err)
			}
			again = time.After(retry.Next())
		}
	}
}
