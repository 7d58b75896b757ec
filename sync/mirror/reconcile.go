package mirror

import (
	"bytes"
	"cmp"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
	"kedge/sync/git"
)

// inputs has all that reconcile decides by.
type inputs struct {
	commit *git.Commit
	// unvouched is set if the commit isn't known to have been signed: then no record is removed or marked as orphaned.
	unvouched bool
	// acceptedByFlag is set if the commit was taken because Config.Accept names it.
	acceptedByFlag bool
	now            time.Time
	cells          map[deployments.UnitID]cell
	own            map[deployments.UnitID]writtenRecord
	orders         map[deployments.UnitID]order
	// pins has the pins of whole units. Nil: they have not been read. If that is because they may not be, nodes follow
	// them on their own.
	pins map[deployments.UnitID]policy.Value[deployments.Pin]
	// shownPins has all pins that the store shows, also those of single nodes. Nil: they may be out of date.
	shownPins map[deployments.UnitID][]deployments.PastPin
	// pastRead has the roles whose history was read: see needsHistory. history has the newest entries of their units,
	// pastPins and stable the pins and stable releases, as in historyKeeper.
	history  map[deployments.UnitID]deployments.History
	pastPins map[deployments.UnitID][]deployments.PastPin
	pastRead map[deployments.RoleID]bool
	stable   map[deployments.UnitID][]deployments.Digest
	// fleet has what each role's nodes report. blind is set until the reports, and the pins if they may be read, are
	// known; until then rollouts stay as they are.
	fleet map[deployments.RoleID][]reported
	blind bool
	// fleetSince is the time from which fleet has been up to date without a gap.
	fleetSince time.Time
	// leftSince is as observedFleet.leftSince; nil: no entry vanished, and the mirror has always watched for that.
	leftSince func(deployments.RoleID) ([]time.Time, time.Time)
	// lostSince has the time at which policy.IsLost was first true of a unit: its nodes report newer
	// records than the store has. It is kept between calls. Once rebuildWait has passed since then,
	// the record is rebuilt from the nodes' reports. Nil: no record is rebuilt.
	lostSince map[deployments.UnitID]time.Time
	// rebuildWait is how long nodes have to report before a missing or lost record is written, or a
	// rollout begins.
	rebuildWait time.Duration
	// ranks caches, between calls of reconcile and only for speed, the order in which each unit's
	// rollouts admit nodes; nil: the orders are computed anew.
	ranks map[deployments.UnitID]*policy.Ranks
	// freezes are the commit's freeze windows now. reconcile sets them, as to evaluate them for each unit is too slow.
	freezes policy.Freezes
}

// ranksOf returns a unit's ranks, which reconcile may change; nil: none are kept.
func (in inputs) ranksOf(id deployments.UnitID) *policy.Ranks {
	if in.ranks == nil {
		return nil
	}
	if in.ranks[id] == nil {
		in.ranks[id] = new(policy.Ranks)
	}
	return in.ranks[id]
}

// fleetCurrentSince returns the time from which the view of the fleet has been up to date, by the
// present clock: see toPresentClock.
func (in inputs) fleetCurrentSince() time.Time {
	return in.toPresentClock(in.fleetSince)
}

// toPresentClock converts the time of an earlier observation to the present clock, which may have
// been corrected since. It returns now minus the elapsed time. Zero stays zero.
func (in inputs) toPresentClock(at time.Time) time.Time {
	if at.IsZero() {
		return at
	}
	return in.now.UTC().Truncate(time.Millisecond).Add(-max(0, in.now.Sub(at)))
}

// vanishTimes returns the times at which entries of a unit's nodes vanished that have not come
// back. watchedSince is the time from which the mirror has watched for that without a gap; zero: it
// always has or, while in.blind is set, it has yet to begin. All times are by the present clock.
func (in inputs) vanishTimes(id deployments.UnitID) (left []time.Time, watchedSince time.Time) {
	if in.leftSince == nil {
		return nil, time.Time{}
	}
	seen, watchedSince := in.leftSince(id.RoleID())
	for _, at := range seen {
		left = append(left, in.toPresentClock(at))
	}
	if watchedSince.IsZero() {
		return left, watchedSince
	}
	if in.fleetSince.After(watchedSince) {
		watchedSince = in.fleetSince // nobody could see what vanished before that
	}
	return left, in.toPresentClock(watchedSince)
}

// nodes returns the nodes of a unit's role, with their reports on the unit.
func (in inputs) nodes(id deployments.UnitID) []policy.Node {
	role := in.fleet[id.RoleID()]
	nodes := make([]policy.Node, len(role))
	for i, r := range role {
		nodes[i] = policy.Node{Name: r.node, Gone: r.gone, GoneSince: in.toPresentClock(r.goneSince),
			UnhealthySince: in.toPresentClock(r.unhealthy[id.Unit].since), Started: r.report.Started, Joined: r.report.Joined,
			Report: r.report.Units[id.Unit]}
	}
	return nodes
}

// pin returns what pins/ holds for a unit; nil: in.pins is nil.
func (in inputs) pin(id deployments.UnitID) *policy.Value[deployments.Pin] {
	if in.pins == nil {
		return nil
	}
	pin := in.pins[id]
	return &pin
}

// plan is the result of reconcile.
type plan struct {
	changes []change // sorted by unit
	// agreed are units that Git names whose records need no change, but which this mirror has yet to adopt: see
	// written.adopt.
	agreed []deployments.UnitID
	// whole is false if a unit has to wait until the watch shows this mirror's last write of it, its nodes report, or
	// inputs.blind ends.
	whole bool
	// again is when to reconcile again though nothing changed; zero: never.
	again time.Time
	// waitingForReports is the number of units that wait for their nodes to report.
	waitingForReports int
}

// reconcile returns what to write so that the store holds what the commit asks for. It is pure, but for in.lostSince
// and in.ranks, which it updates.
func reconcile(in inputs) plan {
	p := plan{whole: true}
	in.freezes = policy.FreezesAt(in.commit.Tree.Settings.Freeze, in.now)
	inGit := map[deployments.UnitID]bool{}
	for _, u := range in.commit.Tree.Units {
		inGit[u.ID] = true
		w, todo, at := in.unit(u)
		if !at.IsZero() && (p.again.IsZero() || at.Before(p.again)) {
			p.again = at
		}
		switch todo {
		case doWrite:
			p.changes = append(p.changes, w)
		case doWait:
			p.whole = false
			if !at.IsZero() {
				p.waitingForReports++
			}
		case doNothing:
			c := in.cells[u.ID]
			own, known := in.own[u.ID]
			if ours(c.record) && !own.vouched && compareKey(c, own, known, in.now) != inFlight {
				p.agreed = append(p.agreed, u.ID)
			}
		}
	}
	for id, c := range in.cells {
		if !inGit[id] && !in.unvouched {
			if w, todo := in.removed(id, c); todo == doWrite {
				p.changes = append(p.changes, w)
			}
		}
	}
	slices.SortFunc(p.changes, func(a, b change) int { return a.unit.Compare(b.unit) })
	return p
}

// action says what to do for a unit.
type action int

const (
	doNothing action = iota
	doWrite
	doWait // until more is known; a new commit waits as a whole
)

// removed returns the change for a record whose unit Git doesn't name: the record is removed if
// kedge.yaml sets prune, or else marked as orphaned. It returns doNothing if no mirror wrote the
// record, if the record doesn't parse, or while a write of this mirror is in flight. Without prune,
// it also returns doNothing if the record is marked already.
func (in inputs) removed(id deployments.UnitID, c cell) (change, action) {
	own, known := in.own[id]
	if !c.present || c.err != nil || !ours(c.record) || compareKey(c, own, known, in.now) == inFlight {
		return change{}, doNothing
	}
	w := change{unit: id, kind: "remove", before: c.record, base: c.version}
	if in.commit.Tree.Settings.Prune {
		w.ops = []kv.Op{kv.DeleteIf(kv.DesiredKey(id), c.version)}
		return w, doWrite
	}
	w.kind, w.reason, w.after = "update", "its file is no longer in Git", policy.MarkOrphaned(c.record)
	w.vouched = own.vouched
	if w.value = encode(w.after); bytes.Equal(w.value, encode(c.record)) {
		return change{}, doNothing
	}
	w.ops = []kv.Op{kv.Replace(kv.DesiredKey(id), w.value, c.version)}
	return w, doWrite
}

// unit returns the change for a unit that Git names; zero unless the action is doWrite. It also returns when to
// reconcile the unit again even if nothing changes; zero: never.
func (in inputs) unit(u deployments.Unit) (change, action, time.Time) {
	c := in.cells[u.ID]
	mine, known := in.own[u.ID]
	w := change{unit: u.ID, kind: "update", base: c.version, vouched: !in.unvouched}
	nodes := in.nodes(u.ID)
	var base policy.Base
	noRecord := false
	switch compareKey(c, mine, known, in.now) {
	case inFlight:
		if !bytes.Equal(encode(recordFor(u, in.commit.Hash, mine.record)), mine.value) {
			return change{}, doWait, time.Time{}
		}
		return change{}, doNothing, time.Time{}
	case inOrder:
		base = policy.Base{Record: c.record, Floor: c.record.Generation}
	case foreign:
		base = policy.Base{Record: mine.record, Floor: mine.record.Generation, Restored: true}
		w.kind, w.note = "restore", "another writer's change of the record was undone"
	case unknown:
		noRecord = true
		past := in.history[u.ID]
		base.Floor = past.Generation
		switch {
		case c.present && c.err == nil: // a bare pointer: nodes run it
			base.Record = deployments.Record{Target: c.record.Target}
		case past.Generation > 0:
			base.Record = policy.FromHistory(u, past, in.now)
		}
		if !c.present {
			w.kind = "create"
		}
	}
	// If a record is missing, its nodes may have yet to report what they know of it.
	left, following := in.vanishTimes(u.ID)
	lastVanish := slices.MaxFunc(append([]time.Time{following}, left...), time.Time.Compare)
	if until := lastVanish.Add(in.rebuildWait); noRecord && u.Rollout != nil && !in.blind && in.now.Before(until) {
		return change{}, doWait, until
	}
	if !base.Restored {
		if record, until, lost := in.lost(u, nodes, base.Floor); lost {
			if in.now.Before(until) {
				return change{}, doWait, until
			}
			base = policy.Base{Record: record, Floor: record.Generation, Rebuilt: true}
			w.kind, w.note = "rebuild", policy.RebuildNote(nodes)
		}
	}
	w.before = base.Record
	if in.blind && (u.Rollout != nil || w.before.Rollout != nil) {
		return change{}, doWait, time.Time{}
	}
	o, ordered := in.orders[u.ID]
	step := policy.Next(policy.Situation{
		Now: in.now.UTC().Truncate(time.Millisecond), Unit: u, Commit: in.commit.Hash, Record: w.before, Nodes: nodes,
		Seen: in.fleetCurrentSince(), Left: left, Listed: following, Pin: in.pin(u.ID), StableBefore: in.stable[u.ID],
		Order: string(o.Verb), Freeze: in.freezes.Of(u.ID), Ranks: in.ranksOf(u.ID),
	})
	// After the store was restored, nodes report anew, with a new Joined. A new generation waits for that: it must not
	// rely on their earlier reports.
	if until := in.fleetCurrentSince().Add(in.rebuildWait); u.Rollout != nil &&
		step.Record.Generation > w.before.Generation && in.now.Before(until) {
		return change{}, doWait, until
	}
	w.after, w.reason = worded(step.Record), reasonOf(o.Verb, step)
	if turn := mine.at.Add(pace(len(nodes))); known && !ordered && w.kind == "update" && in.now.Before(turn) &&
		onlyMoves(w.before, w.after) {
		return change{}, doNothing, turn
	}
	var stored *deployments.Record
	if c.present && c.err == nil {
		stored = &c.record
	}
	w.after = base.WithGeneration(w.after, stored, nodes)
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
		return change{}, doNothing, step.Recheck
	}
	if w.after.Generation > base.Floor {
		w.note = in.noteOf(w, cmp.Or(message.Transition(step.OrderReason, step.OrderFacts), w.reason))
		w.history = in.historyEntry(w)
	}
	if ordered {
		w.history = in.noteOrder(w, step)
	}
	if w.history != nil {
		w.ops = append(w.ops, writeHistory(w.unit, w.history)...)
	}
	return w, doWrite, step.Recheck
}

// lost returns the record to go on from if the store lost newer records of a unit. ok reports
// whether the store did. until is the end of the time that nodes have to report. known is the
// highest generation in the store, its history included.
func (in inputs) lost(
	u deployments.Unit,
	nodes []policy.Node,
	known int64,
) (r deployments.Record, until time.Time, ok bool) {
	if in.lostSince == nil || !policy.IsLost(nodes, known) {
		delete(in.lostSince, u.ID)
		return r, until, false
	}
	since, noted := in.lostSince[u.ID]
	if !noted {
		since = in.now
		in.lostSince[u.ID] = since
	}
	return policy.Rebuild(u, in.commit.Hash, nodes, known, in.now), since.Add(in.rebuildWait), true
}

// worded returns r with its rollout's Message filled in, for readers of the previous version.
func worded(r deployments.Record) deployments.Record {
	if r.Rollout == nil || r.Rollout.Reason == "" {
		return r
	}
	p := *r.Rollout
	p.Message = message.Rollout(&p)
	r.Rollout = &p
	return r
}

// reasonOf returns what policy decided, in words; empty: there is nothing to say.
func reasonOf(order deployments.Verb, m policy.Transition) string {
	switch p := m.Record.Rollout; {
	case m.Refused:
		return string(order) + " changes nothing: " + message.Text(m.Reason, m.Facts)
	case p != nil && p.Phase == deployments.PhaseRolledBack && m.Reason != "":
		return message.Rollout(p)
	}
	return message.Transition(m.Reason, m.Facts)
}

// pace returns the least time between two writes of a unit that only move its rollout's cutoff. Each write wakes all
// nodes of the role, which get ready one by one. With one write for each node, the number of wake-ups would be the
// square of the number of nodes.
func pace(nodes int) time.Duration { return time.Duration(nodes) * 100 * time.Microsecond }

// onlyMoves reports whether the rollouts of two records have different cutoffs, and the records
// otherwise differ at most in how far the rollout got within its phase.
func onlyMoves(before, after deployments.Record) bool {
	if before.Rollout == nil || after.Rollout == nil || before.Rollout.Cutoff == after.Rollout.Cutoff {
		return false
	}
	still := *before.Rollout
	still.SupersededCutoff, before.Joined, before.Nodes = after.Rollout.SupersededCutoff, after.Joined, after.Nodes
	still.Cutoff, still.Since, still.HealthySince = after.Rollout.Cutoff, after.Rollout.Since, after.Rollout.HealthySince
	still.Reason, still.Facts, still.Message = after.Rollout.Reason, after.Rollout.Facts, after.Rollout.Message
	before.Rollout = &still
	return bytes.Equal(encode(before), encode(after))
}

// historyEntry returns the history entry of a new generation.
func (in inputs) historyEntry(w change) *deployments.History {
	h := &deployments.History{
		Generation: w.after.Generation,
		Release:    w.after.Target,
		Stable:     w.after.Stable,
		Commit:     in.commit.Hash,
		Author:     in.commit.Author,
		Subject:    in.commit.Subject,
		Committed:  in.commit.When,
		At:         in.now.UTC().Truncate(time.Millisecond),
		Failed:     in.failedBy(w),
		Claim:      w.after.RequestGeneration(),
		Retry:      w.after.Retry,
		Pinned:     w.after.Pinned,
		Note:       in.withAcceptNote(w.note),
	}
	in.carryPins(w.unit, h)
	return h
}

// withAcceptNote returns the note of a history entry. If the commit was taken because Config.Accept
// names it, the note says so.
func (in inputs) withAcceptNote(note string) string {
	if !in.acceptedByFlag {
		return note
	}
	return strings.TrimPrefix(note+"; an operator accepted the commit, whatever its history (--accept)", "; ")
}

// failedBy returns the release that failed before the new generation in w; zero: none. It is the
// release that the rollout went back from, or a replaced target that a node has in quarantine.
func (in inputs) failedBy(w change) deployments.Digest {
	if w.after.Rollout != nil && !w.after.Rollout.Failed.IsZero() {
		return w.after.Rollout.Failed
	}
	was := w.before.Target.Digest
	if was == w.after.Target.Digest ||
		!slices.ContainsFunc(in.nodes(w.unit),
			func(n policy.Node) bool { return slices.Contains(n.Report.Quarantined, was) }) {
		return deployments.Digest{}
	}
	return was
}

// noteOf returns the note of a history entry: what led to the generation besides the commit; empty: nothing. did says
// what policy did, in words.
func (in inputs) noteOf(w change, did string) string {
	who := func(by, reason string) (words string) {
		if by != "" {
			words += " by " + clip(by, 100)
		}
		if reason != "" {
			words += ": " + clip(reason, 200)
		}
		return words
	}
	switch pin := in.pins[w.unit].Value; {
	case w.note != "":
		return w.note
	case w.after.Pinned != nil && w.after.Target != w.before.Target:
		return "pinned" + who(pin.By, pin.Reason)
	case w.before.Pinned != nil && w.after.Pinned == nil:
		return "the pin ended"
	case w.after.Target != w.before.Target:
		return ""
	case w.order.version != 0:
		return did + who(w.order.By, w.order.Reason)
	}
	return did
}

// carryPins copies the open pins of the last generation into h, the entry of a new one, and updates them if all pins
// are known. If the last entry was not read, recordPins copies the pins later, because carryPins doesn't know when a
// pin began.
func (in inputs) carryPins(id deployments.UnitID, h *deployments.History) {
	if !in.pastRead[id.RoleID()] {
		return
	}
	h.Pins = openPins(in.pastPins[id])
	if in.shownPins != nil {
		h.Pins, h.Truncated = followPins(h.Pins, in.shownPins[id], in.now)
	}
}

// noteOrder returns the history entry that records the order consumed by a change: the entry of the change's new
// generation or, if it begins none, the newest entry. If the newest entry isn't known, it is made from the record.
func (in inputs) noteOrder(w change, step policy.Transition) *deployments.History {
	entry := w.history
	if newest, known := in.history[w.unit]; entry == nil && known {
		newest.Pins = in.pastPins[w.unit]
		entry = &newest
	}
	if entry == nil {
		lost := lostEntry(w.after, in.now)
		in.carryPins(w.unit, &lost)
		entry = &lost
	}
	var refused deployments.Reason
	if step.Refused {
		refused = step.Reason
	}
	noted := withOrder(*entry, w.order, refused, in.now)
	return &noted
}
