package mirror

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// pastGenerations holds the newest generation of units, of the roles whose history was read.
type pastGenerations struct {
	newest map[deployments.UnitID]deployments.History
	read   map[deployments.RoleID]bool
}

func newPastGenerations() pastGenerations {
	return pastGenerations{newest: map[deployments.UnitID]deployments.History{}, read: map[deployments.RoleID]bool{}}
}

// forget makes a unit's role be read again when it is needed.
func (p pastGenerations) forget(id deployments.UnitID) {
	delete(p.newest, id)
	delete(p.read, id.RoleID())
}

// readHistory reads the history of the units whose record isn't there to go on from.
func (l *leader) readHistory(ctx context.Context, cells map[deployments.UnitID]cell, now time.Time) error {
	for _, u := range l.acceptance.commit.Tree.Units {
		role := u.ID.RoleID()
		own, known := l.written.records[u.ID]
		if l.history.read[role] || stand(cells[u.ID], own, known, now) != unknown {
			continue
		}
		entries, err := l.c.Store.List(ctx, kv.RolePrefix(kv.HistoryPrefix, role.Stage, role.Role))
		if err != nil {
			return fmt.Errorf("history of %s: %w", role, err)
		}
		l.history.read[role] = true
		for _, e := range entries {
			key, err := kv.ParseKey(e.Key)
			if err != nil {
				continue
			}
			id := key.UnitID()
			h, err := deployments.ParseHistory(e.Value)
			if err == nil && h.Generation > l.history.newest[id].Generation && h.Generation < absurd {
				l.history.newest[id] = h
			}
		}
	}
	return nil
}

// recordOf returns the record of a generation that only the history knows. How far its rollout had come is lost: what was rolled
// back stays so, and all else goes on by max_unavailable, past its canaries, which ends at once if every node is there.
func recordOf(h deployments.History, now time.Time) deployments.Record {
	r := deployments.Record{Target: h.Release, Stable: h.Stable, Generation: h.Generation, Commit: h.Commit}
	p := &deployments.Progress{Since: now.UTC().Truncate(time.Millisecond)}
	switch {
	case h.Stable.IsZero() || h.Stable == h.Release:
		return r
	case h.Failed == h.Release.Digest:
		p.Phase, p.Cutoff, p.Failed, p.Message = deployments.PhaseRollingBack, math.MaxUint64, h.Failed, h.Note
	default:
		p.Phase, p.Promoted = deployments.PhaseRolling, true
	}
	r.Rollout = p
	return r
}

// record returns the operations that note a new generation, and remove the one that is too old.
func (in inputs) record(w change) []kv.Op {
	value, err := json.Marshal(deployments.History{
		Generation: w.after.Generation,
		Release:    w.after.Target,
		Stable:     w.after.Stable,
		Commit:     in.commit.Hash,
		Author:     in.commit.Author,
		Subject:    in.commit.Subject,
		Committed:  in.commit.When,
		At:         in.now.UTC().Truncate(time.Millisecond),
		Failed:     in.failedBy(w),
		Note:       in.noteOf(w),
	})
	if err != nil {
		panic(err) // plain data
	}
	ops := []kv.Op{kv.Put(kv.HistoryKey(w.unit, w.after.Generation), value)}
	if old := w.after.Generation - deployments.HistoryKept; old > 0 {
		ops = append(ops, kv.Delete(kv.HistoryKey(w.unit, old)))
	}
	return ops
}

// noteOf returns what history says of a change.
func (in inputs) noteOf(w change) string {
	if !in.overruled {
		return w.note
	}
	return strings.TrimPrefix(w.note+"; an operator accepted the commit, whatever its history (--accept)", "; ")
}

// failedBy returns the release that a new generation knows to have failed; zero: none.
func (in inputs) failedBy(w change) deployments.Digest {
	if w.after.Rollout != nil && !w.after.Rollout.Failed.IsZero() {
		return w.after.Rollout.Failed
	}
	was := w.before.Target.Digest
	if was == w.after.Target.Digest || !slices.ContainsFunc(in.nodes(w.unit), func(n policy.Node) bool { return slices.Contains(n.Report.Quarantined, was) }) {
		return deployments.Digest{}
	}
	return was
}
