package policy

import (
	"fmt"
	"strings"
	"time"

	"kedge/deployments"
)

// member is one node, as it is.
type member struct {
	name    string
	number  int
	gone    bool
	goneAt  time.Time // by the mirror's clock
	away    time.Time // the same, by the time that has passed
	left    bool
	sick    bool      // its health checks fail
	looked  bool      // at what lies at dest
	serves  bool      // something else does, until it runs a release
	kept    bool      // what did can be put back
	epoch   int       // the unit that it looks after: see world.epoch
	ends    bool      // it ends what it had begun under the unit's former name
	joined  uint64    // of its first report since it started, or was cut off; 0: that has yet to be stored
	told    entry     // as in the store
	silent  time.Time // since when it isn't there
	stale   bool      // it holds what the node put earlier, as a restored snapshot brings back
	seen    int       // what it has read of world.records last
	acts    int       // the one that it acts on; -1: none
	floor   int64     // the highest generation that it has acted on
	pin     Value[deployments.Pin]
	pinned  int // when that was set, as a number of events
	running deployments.Pointer
	going   deployments.Pointer // what it switches to; zero: it doesn't
	begun   string              // the failure key under which it does
	by      int                 // the record by which it does, an index into world.records
	hangs   bool
	// unserved is set while what it went back to is unhealthy, since outSince; seenOut is when the mirror saw that.
	unserved          bool
	outSince, seenOut time.Time
	toldOut           time.Time // UnitReport.Since, as the mirror saw it then
	// excused is set once it has been so for too long, or where what it went back to was never proven.
	excused bool
	started time.Time
	failed  map[deployments.Digest]string // digest to failure key
	tried   map[deployments.Digest]int    // the record by which that was begun
	// free is set while the node's switch is not the rollout's: it booted, came back, was pinned, or has hung for too
	// long.
	free bool

	// decision is what Resolve said last, for asked.
	decision Decision
	asked    question
}

type question struct {
	record  int
	pinned  bool
	running deployments.Pointer
	failed  int
	joined  uint64
	looked  bool
	kept    bool
}

// before stands for what serves on a node before its first release: a node that goes there leaves.
var before = release("before")

func (w *world) join() {
	w.names++
	n := &member{name: fmt.Sprint("n", w.names), number: w.names, failed: map[deployments.Digest]string{},
		tried: map[deployments.Digest]int{}, free: true, started: w.now, silent: w.passed(), acts: -1}
	n.read(w, len(w.records)-1)
	if len(w.records) > 1 && w.adopt != nil && w.adopt.IntN(3) == 0 {
		n.serves, n.free = true, false
	}
	w.nodes = append(w.nodes, n)
}

// leaveOrReturn has a node die or be cut off, or come back as one that joined later. One that left in mid-switch goes
// on when it is back.
func (w *world) leaveOrReturn(n *member) {
	if n.left {
		return
	}
	if n.gone = !n.gone; n.gone {
		n.goneAt, n.away = w.now, w.passed()
	} else {
		over := !n.going.IsZero() && !w.passed().Before(n.away.Add(w.unit.Rollout.Deadline)) // it has had its time
		n.joined, n.started, n.free = 0, w.now, n.free || n.running.IsZero() || over
	}
	w.say("%s gone: %v", n.name, n.gone)
}

// unsettled reports whether a node is switching, or would by the record that it acts on or one that it may yet read.
func (w *world) unsettled(n *member) bool {
	if n.left || n.gone {
		return false
	}
	if !n.going.IsZero() || n.ends {
		return true
	}
	for i := n.seen; i < len(w.records); i++ {
		if i > n.seen && w.records[i].Generation < n.floor {
			continue
		}
		at := i
		if i == n.seen {
			at = n.acts
		}
		if d := w.resolve(n, at); d.Action == ActLeave || !d.Target.IsZero() && d.Target != n.running {
			return true
		}
	}
	return false
}

func (w *world) resolve(n *member, i int) Decision {
	q := question{i, n.pin.Present, n.running, len(n.failed), n.joined, n.looked, n.kept}
	if i >= 0 && n.asked == q {
		return n.decision
	}
	record := Value[deployments.Record]{}
	if i >= 0 {
		record = good(w.records[i])
	}
	n.asked, n.decision = q, Resolve(ResolveInputs{
		Unit: app, Node: n.name, Now: w.now,
		Record: record, NodePin: n.pin, UnitPin: w.unitPin,
		Joined: n.joined, Running: n.running, Quarantined: keys(n.failed), AtDest: n.atDest(),
		Leavable: n.leavable(),
	})
	return n.decision
}

// act is one turn of a node's agent. promptly: it reads the newest record, and what it does ends at once.
func (w *world) act(n *member, promptly bool) {
	if n.gone || n.left {
		return
	}
	if last := len(w.records) - 1; n.seen < last {
		next := n.seen + w.rng.IntN(last-n.seen+1)
		if promptly || w.chance(0.6) {
			next = last
		}
		n.read(w, next)
	}
	if n.ends {
		if promptly || w.chance(0.3) {
			w.say("%s has ended what it had begun under another name", n.name)
			n.ends = false
		}
		return
	}
	if n.unserved && w.wayBack.IntN(20) == 0 {
		w.say("%s is healthy again", n.name)
		n.unserved = false
	}
	r := w.acting(n)
	d := w.resolve(n, n.acts)
	key := w.key(n, r)
	if n.going != before && !n.going.IsZero() && !d.Target.IsZero() && d.Target != n.going {
		w.count("switches given up")
		w.say("%s gives up %s", n.name, n.going.URL)
		n.going = deployments.Pointer{}
		return
	}
	// The first rollout ended, or will go back to a release: the agent gives up what was there.
	n.kept = n.kept && (n.acts < 0 || r.Rollout != nil && r.Stable.IsZero() || n.running.IsZero())
	switch {
	case !n.going.IsZero(): // also if nothing is wanted any more: it finishes what it began
		switch {
		case n.hangs && (!promptly || w.chance(0.7)) && w.chance(0.9):
		case !promptly && w.chance(0.4):
		case w.chance(w.bad[n.going.Digest]):
			w.count("failures")
			w.say("%s fails on %s", n.name, n.going.URL)
			n.failed[n.going.Digest], n.tried[n.going.Digest] = n.begun, n.by
			n.going = deployments.Pointer{}
			if n.unserved = w.wayBack.IntN(6) == 0 && (!n.running.IsZero() || n.serves); n.unserved {
				n.outSince, n.excused = w.passed(), n.free // it may have had its time
				w.count("ways back that are unhealthy")
				w.say("%s is unhealthy on what it went back to", n.name)
			}
			n.free = n.free && n.running.Digest != r.Stable.Digest &&
				(r.Rollout == nil || !partOf(&r, n.running.Digest))
		case n.going == before:
			w.count("ways back to what was there before")
			w.say("%s leaves %s", n.name, n.running.URL)
			n.running, n.going, n.free, n.serves, n.kept, n.looked = deployments.Pointer{}, deployments.Pointer{}, false,
				true, false, true
		default:
			w.count("switches")
			w.say("%s runs %s", n.name, n.going.URL)
			n.kept = n.kept || n.serves
			n.running, n.going, n.free, n.serves = n.going, deployments.Pointer{}, false, false
			delete(n.failed, n.running.Digest) // the success of another is none of it
			delete(n.tried, n.running.Digest)
		}
	case d.Target.IsZero() && !d.Stage.IsZero() && !n.looked:
		if n.looked = true; promptly {
			w.act(n, true)
		}
	case d.Action == ActLeave:
		n.unserved = false
		n.going, n.hangs, n.sick = before, w.chance(0.05), false
		w.say("%s begins to leave %s, by generation %d", n.name, n.running.URL, r.Generation)
		if p := r.Rollout; p == nil || p.Failed == (deployments.Digest{}) || !r.Stable.IsZero() {
			w.breaks("%s leaves %s, which was not rolled back: %s", n.name, n.running.URL, brief(r))
		}
		w.tell(n)
		if promptly {
			w.act(n, false)
		}
	case d.Target.IsZero():
	case d.Target != n.running && !w.isOut(n, d.Target, key):
		n.unserved = false
		n.going, n.begun, n.by, n.hangs, n.sick = d.Target, key, n.acts, w.chance(0.05), false
		n.free = n.free || n.pin.Present
		// A node that runs nothing, or what is rolled back, tries what is stable once for each commit. It may have hung
		// until after the others were back.
		leaves := r.Rollout != nil && partOf(&r, n.running.Digest) &&
			(r.Rollout.Phase == deployments.PhaseRollingBack || r.Rollout.Phase == deployments.PhaseRolledBack)
		boots := n.going == r.Stable && (n.running.IsZero() || leaves)
		by, failed := n.tried[n.going.Digest]
		failed = failed && !strings.HasPrefix(n.failed[n.going.Digest], "pin ") // Git's request is another one
		if failed && !boots && !n.pin.Present && n.epoch == w.epoch && w.asked[n.going.Digest] <= by {
			w.breaks("%s tries %s again, which failed there, and nobody has asked for it since: %s, not %s",
				n.name, n.going.URL, key, n.failed[n.going.Digest])
		}
		w.say("%s begins to switch to %s, by generation %d", n.name, d.Target.URL, r.Generation)
		w.admitted(n, r)
		w.tell(n) // before it does anything
		if promptly {
			w.act(n, false)
		}
	}
}

// tell publishes a node's report.
func (w *world) tell(n *member) {
	if n.gone || n.left {
		return
	}
	if n.epoch < w.epoch { // what it says of the unit's former name is nothing of this one
		w.publish(n, deployments.UnitReport{})
		return
	}
	r := w.acting(n)
	d := w.resolve(n, n.acts)
	u := deployments.UnitReport{Running: n.running, Want: d.Target, Generation: max(r.Generation, n.floor),
		OtherServes: n.looked && n.serves, Leavable: n.leavable(), Pinned: d.Source == FromNodePin,
		Quarantined: keys(n.failed)}
	if u.RollingBack = n.unserved; n.unserved && w.isOut(n, d.Target, w.key(n, r)) {
		u.Failed = d.Target.Digest
	}
	switch {
	case n.ends:
		u.State, u.OtherServes = deployments.StateSwitching, true
	case !n.going.IsZero():
		u.State = deployments.StateSwitching
	case n.unserved:
		u.State, u.Since = deployments.StateUnhealthy, n.outSince
	case d.Target.IsZero():
		u.State = deployments.StateWaiting
	case d.Target == n.running && n.sick:
		u.State = deployments.StateUnhealthy
	case d.Target == n.running:
		u.State = deployments.StateConverged
	case w.isOut(n, d.Target, w.key(n, r)):
		u.State = deployments.StateQuarantined
	default:
		u.State = deployments.StateFetching
	}
	w.publish(n, u)
}

// publish puts a node's report. The first one gives the node its number, which stands in the next.
func (w *world) publish(n *member, u deployments.UnitReport) {
	n.told, n.stale = entry{true, n.joined, u}, false
	if n.joined == 0 {
		w.joins++
		n.joined = w.joins
		w.say("%s joined as %d", n.name, n.joined)
	}
}

// unsaid notes that a node's entry in status/ is gone.
func (n *member) unsaid(w *world) { n.told, n.silent, n.stale = entry{}, w.passed(), false }

// unknown reports whether nothing in the store tells that a node left in mid-switch: no budget can count it.
func (n *member) unknown() bool {
	return n.gone && !n.going.IsZero() && n.told.report.State != deployments.StateSwitching
}

// relist has the nodes put back what was removed, which takes them less than a minute. Those whose entries are not as
// they were put see it at once, and join anew.
func (w *world) relist() {
	for _, n := range w.nodes {
		if n.stale && !n.gone && !n.left {
			n.joined = 0
			w.tell(n)
		}
		if !n.gone && !n.left && !n.told.listed && w.passed().Sub(n.silent) >= time.Minute {
			w.tell(n)
		}
	}
}

// read takes what the store holds, as an agent does: nothing takes the place of a record, and one of a lower
// generation than it has acted on doesn't.
func (n *member) read(w *world, i int) {
	if n.epoch < w.epoch && i >= w.renamed && w.records[i].Generation > 0 {
		n.rename(w)
	}
	switch r := w.records[i]; {
	case r.Generation == 0:
		n.acts = -1
	case r.Generation >= n.floor:
		n.acts, n.floor = i, r.Generation
	}
	n.seen = i
}

// rename has Git name the unit otherwise, with the same dest: its keys are new, and those of before are removed or
// orphaned, so that who has begun nothing by them stays on what it runs.
func (w *world) rename() {
	w.count("renames")
	w.epoch++
	w.history, w.unitPin, w.saved, w.pushed, w.wished = nil, Value[deployments.Pin]{}, nil, true, false
	w.asked = map[deployments.Digest]int{}
	w.put(deployments.Record{})
	w.renamed, w.named = len(w.records), time.Time{}
	w.own, w.stables, w.lostAt, w.ranks = deployments.Record{}, nil, time.Time{}, Ranks{}
	for _, n := range w.nodes {
		if n.told.listed {
			n.told.report = deployments.UnitReport{}
		}
		if n.pin.Present {
			n.pin, n.free = Value[deployments.Pin]{}, true
		}
	}
	w.look()
	w.say("the unit is renamed")
}

// rename has a node look after the unit under its new name: what it ran under the former one is what serves there.
func (n *member) rename(w *world) {
	n.epoch, n.acts, n.floor = w.epoch, -1, 0
	n.serves, n.looked, n.kept, n.sick = n.serves || !n.running.IsZero(), false, false, false
	n.ends, n.unserved = !n.going.IsZero() || n.unserved, false
	if n.ends {
		w.count("renames in mid-switch")
	}
	n.running, n.going = deployments.Pointer{}, deployments.Pointer{}
	n.failed, n.tried = map[deployments.Digest]string{}, map[deployments.Digest]int{}
}

// acting is the record that a node acts on; zero: none.
func (w *world) acting(n *member) deployments.Record {
	if n.acts < 0 {
		return deployments.Record{}
	}
	return w.records[n.acts]
}

// key is what asks for what a node is to run.
func (w *world) key(n *member, r deployments.Record) string {
	if n.pin.Present {
		return fmt.Sprint("pin ", n.pinned)
	}
	return FailureKey(r)
}

// isOut reports whether a release failed on a node, and nothing has asked for it anew.
func (w *world) isOut(n *member, p deployments.Pointer, key string) bool {
	failed, ok := n.failed[p.Digest]
	return ok && SameRequest(failed, key)
}

// leavable reports whether the node can go back to what it served before its first release.
func (n *member) leavable() bool { return n.kept && !n.running.IsZero() }

// atDest is what the node finds at dest, once it has looked: on some something else serves.
func (n *member) atDest() Found {
	switch {
	case !n.looked:
		return FoundUnknown
	case n.serves:
		return FoundOther
	}
	return FoundNothing
}
