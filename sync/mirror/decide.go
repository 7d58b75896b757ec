package mirror

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/git"
)

// cell is what the store shows at a unit's key in desired/; the zero cell: nothing.
type cell struct {
	present bool
	version uint64
	value   []byte
	record  deployments.Record
	err     error // the value doesn't parse
}

// own is what this mirror last wrote, or took over, at a unit's key.
type own struct {
	record deployments.Record
	value  []byte // nil: it removed the key
	// over is the version that the write replaced (0: none). version is that of the write, 0 until the store has shown it.
	over, version uint64
	at            time.Time
}

// settle is how long a write may take to show in a watch, before what the watch shows is taken for the truth.
const settle = 5 * time.Second

// absurd generations are nobody's who counts: one more, and they would be negative, which no node takes.
const absurd = 1 << 53

// standing is where a unit's key stands.
type standing int

const (
	inOrder  standing = iota // holds what this mirror wrote, or found at its start
	inFlight                 // this mirror's write has yet to show
	foreign                  // somebody else wrote, or removed, it
	unknown                  // this mirror knows nothing of it, and there is no record that it could, or should, go on from
)

// stand compares what the store shows with what this mirror wrote.
func stand(c cell, o own, known bool, now time.Time) standing {
	if known && o.version == 0 && c.version == o.over && now.Sub(o.at) < settle {
		return inFlight
	}
	known = known && o.value != nil // a key that it removed is as good as one that it never knew
	switch {
	case known && c.present && bytes.Equal(c.value, o.value):
		return inOrder
	case known:
		return foreign
	case c.present && c.err == nil && c.record.Generation > 0 && c.record.Generation < absurd:
		return inOrder
	default:
		return unknown
	}
}

// facts are all that decides what to write.
type facts struct {
	commit *git.Commit
	now    time.Time
	cells  map[deployments.UnitID]cell
	owned  map[deployments.UnitID]own
	orders map[deployments.UnitID]order
	// past is the newest history of the units whose standing is unknown.
	past map[deployments.UnitID]History
	// fleet is what each role's nodes report. blind: that is not known yet, and rollouts stay as they are.
	fleet map[[2]string][]reported
	blind bool
	// seen is since when fleet is up to date, without a gap.
	seen time.Time
	// ranks are kept from one turn to the next, for speed alone; nil: nowhere.
	ranks map[deployments.UnitID]*policy.Ranks
}

// ranksOf gives a unit's, which decide may change.
func (f facts) ranksOf(id deployments.UnitID) *policy.Ranks {
	if f.ranks == nil {
		return nil
	}
	if f.ranks[id] == nil {
		f.ranks[id] = new(policy.Ranks)
	}
	return f.ranks[id]
}

// reported is a node's entry in status/.
type reported struct {
	node   string
	gone   bool // its session has ended
	report deployments.Report
}

// nodes are those of a unit's role, with what they say of the unit.
func (f facts) nodes(id deployments.UnitID) []policy.Node {
	role := f.fleet[[2]string{id.Stage, id.Role}]
	nodes := make([]policy.Node, len(role))
	for i, r := range role {
		nodes[i] = policy.Node{Name: r.node, Gone: r.gone, Started: r.report.Started, Report: r.report.Units[id.Unit]}
	}
	return nodes
}

// write is what to do about one unit's key, or about mirror/state where status is set.
type write struct {
	status *Status
	unit   deployments.UnitID
	kind   string // as Change.Kind, or "restore", or "none" where only an order is consumed
	before deployments.Record
	after  deployments.Record
	value  []byte // nil: remove the key
	over   uint64
	note   string
	reason string // policy.Next's
	order  order  // what is consumed; its version is 0 where nothing is
	ops    []kv.Op
}

// decide gives what to write so that the store holds what the commit asks for, sorted by unit; pure. all is false where a unit
// has to wait, as this mirror's last write of it has yet to show, or the fleet isn't known yet. again is when time alone could
// change the answer; zero: never.
func decide(f facts) (writes []write, all bool, again time.Time) {
	all = true
	inGit := map[deployments.UnitID]bool{}
	for _, u := range f.commit.Tree.Units {
		inGit[u.ID] = true
		w, what, at := decideUnit(f, u)
		if !at.IsZero() && (again.IsZero() || at.Before(again)) {
			again = at
		}
		switch what {
		case doWrite:
			writes = append(writes, w)
		case doWait:
			all = false
		}
	}
	for id, c := range f.cells {
		o, known := f.owned[id]
		if inGit[id] || !c.present || c.err != nil || !ours(c.record) || stand(c, o, known, f.now) == inFlight {
			continue
		}
		w := write{unit: id, kind: "remove", before: c.record, over: c.version}
		if f.commit.Tree.Settings.Prune {
			w.ops = []kv.Op{kv.DeleteIf(kv.DesiredKey(id), c.version)}
			writes = append(writes, w)
		} else if w.after = policy.Orphaned(c.record); w.after.Rollout != c.record.Rollout {
			w.kind, w.reason, w.value = "update", w.after.Rollout.Message, encode(w.after)
			w.ops = []kv.Op{kv.Replace(kv.DesiredKey(id), w.value, c.version)}
			writes = append(writes, w)
		}
	}
	slices.SortFunc(writes, func(a, b write) int { return compareIDs(a.unit, b.unit) })
	return writes, all, again
}

// verdict is what is to be done about a unit.
type verdict int

const (
	doNothing verdict = iota
	doWrite
	doWait
)

func decideUnit(f facts, u deployments.Unit) (write, verdict, time.Time) {
	c := f.cells[u.ID]
	mine, known := f.owned[u.ID]
	w := write{unit: u.ID, kind: "update", over: c.version}
	floor := int64(0) // generations up to it were used
	switch stand(c, mine, known, f.now) {
	case inFlight:
		if !bytes.Equal(encode(follow(u, f.commit.Hash, mine.record)), mine.value) {
			return write{}, doWait, time.Time{}
		}
		return write{}, doNothing, time.Time{}
	case inOrder:
		w.before, floor = c.record, c.record.Generation
	case foreign:
		w.before, floor, w.kind, w.note = mine.record, mine.record.Generation, "restore", "a change by hand was put back"
	case unknown:
		past := f.past[u.ID]
		floor = past.Generation
		switch {
		case c.present && c.err == nil: // a bare pointer: nodes run it
			w.before = deployments.Record{Target: c.record.Target}
		case past.Generation > 0:
			w.before = recordOf(past, f.now)
		}
		if !c.present {
			w.kind = "create"
		}
	}
	if f.blind && (u.Rollout != nil || w.before.Rollout != nil) {
		return write{}, doWait, time.Time{}
	}
	o, ordered := f.orders[u.ID]
	nodes := f.nodes(u.ID)
	move := policy.Next(policy.Situation{
		Now: f.now.UTC().Truncate(time.Millisecond), Unit: u, Commit: f.commit.Hash, Record: w.before, Nodes: nodes, Seen: f.seen, Order: o.verb,
		Freeze: policy.Frozen(f.commit.Tree.Settings.Freeze, u.ID, f.now), Ranks: f.ranksOf(u.ID),
	})
	w.after, w.reason = move.Record, move.Reason
	if turn := mine.at.Add(pace(len(nodes))); known && !ordered && w.kind == "update" && f.now.Before(turn) && onlyMoves(w.before, w.after) {
		return write{}, doNothing, turn
	}
	if more := w.after.Generation - w.before.Generation; more > 0 {
		w.after.Generation = floor + more
		if w.note == "" && w.after.Target == w.before.Target {
			w.note = cmp.Or(move.Did, move.Reason)
		}
	}
	// A generation must never go down: agents would take the record for an old one. Absurd ones are not believed.
	if c.err == nil && c.record.Generation >= w.after.Generation && c.record.Generation < absurd && !bytes.Equal(encode(c.record), encode(w.after)) {
		w.after.Generation = max(w.after.Generation, c.record.Generation)
		if w.kind == "restore" {
			w.after.Generation = c.record.Generation + 1
		}
	}
	if ordered {
		w.order = o
		w.ops = append(w.ops, kv.DeleteIf(kv.ControlKey(u.ID), o.version))
	}
	w.value = encode(w.after)
	switch {
	case !c.present:
		w.ops = append(w.ops, kv.Create(kv.DesiredKey(u.ID), w.value))
	case c.err != nil || !bytes.Equal(encode(c.record), w.value):
		w.ops = append(w.ops, kv.Replace(kv.DesiredKey(u.ID), w.value, c.version))
	case ordered:
		w.kind, w.value = "none", c.value
	default:
		return write{}, doNothing, move.Again
	}
	if w.after.Generation > floor {
		w.ops = append(w.ops, history(w, f)...)
	}
	return w, doWrite, move.Again
}

// recordOf gives the record of a generation that the history alone knows. How far its rollout had come is lost: what was rolled back
// stays so, and all else goes on by max_unavailable, past its canaries, which ends at once where every node is there.
func recordOf(h History, now time.Time) deployments.Record {
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

// pace is the least time between two writes that only tell more nodes that it is their turn. Each wakes all nodes of the role, which
// come ready one by one: with a write for each, a fleet's wakes would be the square of its nodes.
func pace(nodes int) time.Duration { return time.Duration(nodes) * 100 * time.Microsecond }

// onlyMoves reports whether a record differs from the one before in nothing but how far its rollout is within a phase.
func onlyMoves(before, after deployments.Record) bool {
	if before.Rollout == nil || after.Rollout == nil || before.Rollout.Cutoff == after.Rollout.Cutoff {
		return false
	}
	still := *before.Rollout
	still.Cutoff, still.Since, still.HealthySince = after.Rollout.Cutoff, after.Rollout.Since, after.Rollout.HealthySince
	still.Reason, still.Facts, still.Message = after.Rollout.Reason, after.Rollout.Facts, after.Rollout.Message
	before.Rollout = &still
	return bytes.Equal(encode(before), encode(after))
}

// history records a new generation, and removes the one that is too old.
func history(w write, f facts) []kv.Op {
	value, err := json.Marshal(History{
		Generation: w.after.Generation,
		Release:    w.after.Target,
		Stable:     w.after.Stable,
		Commit:     f.commit.Hash,
		Author:     f.commit.Author,
		Subject:    f.commit.Subject,
		Committed:  f.commit.When,
		At:         f.now.UTC().Truncate(time.Millisecond),
		Failed:     badBy(w, f),
		Note:       w.note,
	})
	if err != nil {
		panic(err) // plain data
	}
	ops := []kv.Op{kv.Put(historyKey(w.unit, w.after.Generation), value)}
	if old := w.after.Generation - HistoryKept; old > 0 {
		ops = append(ops, kv.Delete(historyKey(w.unit, old)))
	}
	return ops
}

// badBy is the release that a new generation knows to be bad; zero: none.
func badBy(w write, f facts) deployments.Digest {
	if w.after.Rollout != nil && !w.after.Rollout.Failed.IsZero() {
		return w.after.Rollout.Failed
	}
	was := w.before.Target.Digest
	if was == w.after.Target.Digest || !slices.ContainsFunc(f.nodes(w.unit), func(n policy.Node) bool { return slices.Contains(n.Report.Quarantined, was) }) {
		return deployments.Digest{}
	}
	return was
}

// historyKey sorts as the generations do.
func historyKey(id deployments.UnitID, generation int64) string {
	return fmt.Sprintf("%s%010d", kv.HistoryPrefixOf(id), generation)
}

// encode gives a record's JSON: equal records have equal bytes.
func encode(r deployments.Record) []byte {
	value, err := json.Marshal(r)
	if err != nil {
		panic(err) // plain data
	}
	return value
}

// batches packs the writes, each whole and in order, into as few transactions as fit.
func batches(writes []write) [][]write {
	var all [][]write
	sum, size := 0, 0
	for _, w := range writes {
		cost, bytes := 0, 0
		for _, op := range w.ops {
			cost, bytes = cost+op.Cost(), bytes+len(op.Key)+len(op.Value)
		}
		if len(all) == 0 || sum+cost > kv.MaxOps || size+bytes > maxBatch {
			all, sum, size = append(all, nil), 0, 0
		}
		last := len(all) - 1
		all[last], sum, size = append(all[last], w), sum+cost, size+bytes
	}
	return all
}

// maxBatch bounds a transaction's keys and values, in bytes: Consul takes 512 KiB of JSON, in which values grow by a third.
const maxBatch = 300 << 10
