package policy

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kedge/deployments"
)

var (
	oneSeed = flag.Uint64("seed", 0, "play the one history of this seed, and print its events")
	howMany = flag.Int("histories", histories, "how many seeded histories to play")
)

// TestSimulation drives the real Next and Resolve through seeded histories of fleets: nodes join, leave, die,
// return, are slow, hang, read old records and report late; releases fail; pushes supersede; operators pause,
// promote, abort, retry and pin; leaders change, clocks are put back. After every event the budget and what nodes
// run is checked, and every history has to end.
func TestSimulation(t *testing.T) {
	t.Parallel()
	if *oneSeed != 0 {
		w := play(*oneSeed, true)
		for _, line := range w.log {
			t.Log(line)
		}
		if w.broken != "" {
			t.Errorf("seed %d: %s", *oneSeed, w.broken)
		}
		return
	}
	var next, events, largest, ends atomic.Uint64
	var wg sync.WaitGroup
	var mu sync.Mutex
	kinds := map[string]int{}
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for seed := next.Add(1); seed <= uint64(*howMany) && !t.Failed(); seed = next.Add(1) {
				w := play(seed, false)
				events.Add(uint64(w.events))
				ends.Add(uint64(w.ended))
				mu.Lock()
				for kind, n := range w.kinds {
					kinds[kind] += n
				}
				mu.Unlock()
				for size := uint64(len(w.nodes)); ; {
					if was := largest.Load(); size <= was || largest.CompareAndSwap(was, size) {
						break
					}
				}
				if w.broken != "" {
					t.Errorf("seed %d: %s\nplay it again: go test ./policy -run TestSimulation -v -args -seed=%d", seed, w.broken, seed)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d histories, %d events, %d rollouts that ended, fleets of up to %d nodes", *howMany, events.Load(), ends.Load(), largest.Load())
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		t.Logf("%8d %s", kinds[kind], kind)
	}
}

// Seeds beyond those that are always played, each of which found something. 7257: a rollback that was replaced at
// once forgot the nodes that were on their way back. 3430: who had a pin of its own was counted as a part of the
// fleet. 76965: a node on which a release had failed was taken to be done with it, and had been told to retry.
func TestSimulationAgain(t *testing.T) {
	t.Parallel()
	for _, seed := range []uint64{3430, 4324, 4593, 7257, 76965} {
		if w := play(seed, false); w.broken != "" {
			t.Errorf("seed %d: %s", seed, w.broken)
		}
	}
}

// member is one node, as it is.
type member struct {
	name    string
	number  int
	gone    bool
	goneAt  time.Time
	left    bool
	sick    bool   // its health checks fail
	joined  uint64 // larger after each restart, and each time that it was cut off
	toldAs  uint64 // joined, as its report has it
	seen    int    // the record that it acts on, an index into world.records
	pin     Value[deployments.Pin]
	running deployments.Pointer
	going   deployments.Pointer // what it switches to; zero: it doesn't
	hangs   bool
	started time.Time
	failed  map[deployments.Digest]string // digest to claim
	// free is set while the node's switch is not the rollout's: it booted, came back, was pinned, or has hung for too
	// long.
	free   bool
	report deployments.UnitReport // as in the store

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
}

type world struct {
	rng     *rand.Rand
	aside   *rand.Rand // for what is only looked at
	now     time.Time
	unit    deployments.Unit
	freeze  Verdict
	records []deployments.Record
	lived   [][]bool // who took part as far as the mirror knew when it wrote a record: neither unknown, gone nor pinned; by number
	live    []bool   // and does now
	nodes   []*member
	seenBy  []Node // the mirror's view of the fleet
	ranks   Ranks  // which it keeps
	bad     map[deployments.Digest]float64
	cap     int // the most that may switch now
	names   int
	pushes  int
	joins   uint64
	unitPin Value[deployments.Pin]
	stables []deployments.Digest

	keep   bool
	log    []string
	events int
	kinds  map[string]int
	ended  int
	broken string
}

func (w *world) say(format string, args ...any) {
	w.events++
	if w.keep {
		w.log = append(w.log, w.now.Format("15:04:05 ")+fmt.Sprintf(format, args...))
	}
}

func (w *world) count(kind string) { w.kinds[kind]++ }

func (w *world) breaks(format string, args ...any) {
	if w.broken == "" {
		w.broken = fmt.Sprintf("event %d: ", w.events) + fmt.Sprintf(format, args...)
	}
}

func (w *world) latest() deployments.Record { return w.records[len(w.records)-1] }

func (w *world) chance(p float64) bool { return w.rng.Float64() < p }

// play plays the history of a seed.
func play(seed uint64, keep bool) *world {
	rng := rand.New(rand.NewPCG(seed, 42))
	w := &world{rng: rng, aside: rand.New(rand.NewPCG(seed, 43)), now: noon, keep: keep, bad: map[deployments.Digest]float64{}, kinds: map[string]int{}, records: []deployments.Record{{}}, lived: [][]bool{nil}}
	size := 1 + rng.IntN(12)
	switch {
	case seed == 7:
		size = min(10000, 4*histories) // fewer under the race detector
	case seed%1000 == 3:
		size = 100 + rng.IntN(900)
	case seed%10 == 1:
		size = 10 + rng.IntN(60)
	}
	amount := func(n int) deployments.Amount {
		if rng.IntN(2) == 0 {
			return deployments.Amount{N: 1 + rng.IntN(50), Percent: true}
		}
		return deployments.Amount{N: 1 + rng.IntN(n)}
	}
	large := size >= 100
	roll := &deployments.Rollout{MaxUnavailable: amount(max(2, size/3)), Deadline: 10 * time.Minute, OnFailure: deployments.Rollback, Approval: deployments.Auto}
	if large {
		roll.MaxUnavailable = deployments.Amount{N: 10 + rng.IntN(40), Percent: true}
	}
	if rng.IntN(3) > 0 {
		roll.Canary = amount(max(2, size/5))
		roll.Bake = time.Duration(rng.IntN(5)) * time.Minute
	}
	roll.MaxFailures = deployments.Amount{N: rng.IntN(3)}
	if rng.IntN(4) == 0 {
		roll.MaxFailures = deployments.Amount{N: 10 + rng.IntN(90), Percent: true}
	}
	if rng.IntN(4) == 0 {
		roll.OnFailure = deployments.Pause
	}
	if rng.IntN(4) == 0 {
		roll.Approval = deployments.Manual
	}
	roll.FastBack = rng.IntN(2) == 0
	w.unit = deployments.Unit{ID: app, Rollout: roll}
	for range size {
		w.join()
	}
	w.push(0)
	w.mirror("")
	w.settle(false)
	pushes := 3 + rng.IntN(3)
	if large {
		pushes = 1
	}
	for range pushes {
		w.push(rng.Float64() * 0.8)
		for range 20 + min(size*3, 200) {
			if w.event(); w.broken != "" {
				return w
			}
		}
	}
	w.end()
	return w
}

func (w *world) join() {
	w.names++
	w.joins++
	n := &member{name: fmt.Sprint("n", w.names), number: w.names, failed: map[deployments.Digest]string{}, free: true, started: w.now, seen: len(w.records) - 1, joined: w.joins}
	w.nodes = append(w.nodes, n)
}

// push makes Git name another release, or, at times, an earlier one.
func (w *world) push(fails float64) {
	if w.pushes > 1 && w.chance(0.15) {
		w.unit.Release = release(fmt.Sprint("v", 1+w.rng.IntN(w.pushes)))
	} else {
		w.pushes++
		w.unit.Release = release(fmt.Sprint("v", w.pushes))
		if w.chance(0.5) {
			w.bad[w.unit.Release.Digest] = fails
		}
	}
	w.count("pushes")
	w.say("push %s, fails at %.2f", w.unit.Release.URL, w.bad[w.unit.Release.Digest])
}

func (w *world) event() {
	w.now = w.now.Add(time.Duration(w.rng.IntN(20)) * time.Second)
	switch n := w.nodes[w.rng.IntN(len(w.nodes))]; w.rng.IntN(40) {
	case 0:
		w.join()
		w.count("joins")
		w.say("join")
	case 1:
		if w.chance(0.3) {
			n.left = true
			w.count("leaves")
			w.say("%s deregisters", n.name)
		}
	case 2:
		w.count("deaths and returns")
		w.leaveOrReturn(n)
	case 3:
		order := []string{"promote", "promote", "pause", "resume", "resume", "abort", "retry"}[w.rng.IntN(7)]
		if w.chance(0.4) {
			w.count("orders")
			w.mirror(order)
		}
	case 4:
		if w.chance(0.1) {
			w.push(w.rng.Float64())
		}
	case 5:
		n.free = true
		if n.pin.Present {
			n.pin = Value[deployments.Pin]{}
		} else if w.chance(0.2) {
			n.pin = good(deployments.Pin{Release: release("v1")})
		}
		w.count("pins set or taken")
		w.say("%s pinned: %v", n.name, n.pin.Present)
	case 18:
		if !w.chance(0.2) {
			break
		}
		w.count("many cut off, or back, at once")
		for _, n := range w.nodes {
			if w.chance(0.6) {
				w.leaveOrReturn(n)
			}
		}
	case 19:
		if !w.chance(0.2) {
			break
		}
		w.count("many restarted at once")
		for _, n := range w.nodes {
			if !n.gone && w.chance(0.6) {
				w.leaveOrReturn(n)
				w.leaveOrReturn(n)
			}
		}
	case 20:
		if n.sick = !n.sick && n.running == w.unit.Release && w.chance(0.3); n.sick {
			w.count("health that fails")
			w.say("%s is unhealthy", n.name)
		}
	case 21:
		if !w.chance(0.25) {
			break
		}
		w.count("unit pins set or taken")
		if w.unitPin.Present {
			w.unitPin = Value[deployments.Pin]{}
		} else {
			w.unitPin = good(deployments.Pin{Release: release(fmt.Sprint("v", 1+w.rng.IntN(max(1, w.pushes))))})
			if w.chance(0.3) {
				w.unitPin.Value.Until = w.now.Add(time.Duration(w.rng.IntN(60)) * time.Minute)
			}
		}
		w.say("unit pin %v", w.unitPin)
	case 6:
		w.count("freezes begun or ended")
		w.freeze = Verdict{Frozen: !w.freeze.Frozen && w.chance(0.3), By: "test", Wait: w.chance(0.5)}
	case 7:
		if w.chance(0.1) {
			w.count("clocks put back")
			w.now = w.now.Add(-time.Duration(w.rng.IntN(300)) * time.Minute)
			break
		}
		w.now = w.now.Add(time.Duration(w.rng.IntN(8)) * time.Minute)
	case 8, 9, 10, 11, 12, 13, 14:
		w.count("turns")
		w.look()
		w.mirror("")
	case 15: // the record is the newest, as it is written by compare and swap; what is known of the fleet need not be
		w.count("turns by a stale read")
		w.mirror("")
	case 16: // a leader that was cut off decides as well, by what stood then; that its write is refused is the store's part
		w.count("turns of an old leader")
		Next(Situation{Now: w.now, Unit: w.unit, Record: w.records[w.rng.IntN(len(w.records))], Nodes: w.seenBy, Ranks: &w.ranks})
	case 17: // another takes over: it remembers nothing, and reads what stands from the store's leader
		w.count("leaders replaced")
		w.ranks = Ranks{}
		w.look()
		w.mirror("")
	default:
		w.act(n, false)
		if w.chance(0.7) {
			w.tell(n)
		}
	}
	w.check()
}

// leaveOrReturn has a node die or be cut off, or come back as one that joined later. One that its report says to be
// in mid-switch goes on when it is back; of another nothing is known, and it begins anew.
func (w *world) leaveOrReturn(n *member) {
	if n.left {
		return
	}
	if n.gone = !n.gone; n.gone {
		n.goneAt = w.now
		if n.report.State != deployments.StateSwitching || n.report.Want != n.going {
			n.going = deployments.Pointer{}
		}
	} else {
		w.joins++
		over := !n.going.IsZero() && !w.now.Before(n.goneAt.Add(w.unit.Rollout.Deadline)) // it has had its time
		n.joined, n.started, n.free = w.joins, w.now, n.free || n.running.IsZero() || over
	}
	w.say("%s gone: %v, joined as %d", n.name, n.gone, n.joined)
}

// look brings the mirror's view of the fleet up to date.
func (w *world) look() {
	w.seenBy, w.live = w.seenBy[:0:0], make([]bool, w.names+1)
	for _, n := range w.nodes {
		w.live[n.number] = !n.report.Pinned
		if !n.left {
			w.seenBy = append(w.seenBy, Node{Name: n.name, Gone: n.gone, Started: n.started, Joined: n.toldAs, Report: n.report})
			if n.gone {
				w.seenBy[len(w.seenBy)-1].GoneSince = n.goneAt
			}
		}
	}
}

func (w *world) mirror(order string) (again time.Time) {
	before := w.latest()
	var was deployments.Progress
	if before.Rollout != nil {
		was = *before.Rollout
		was.Superseded = slices.Clone(was.Superseded)
	}
	s := Situation{Now: w.now, Unit: w.unit, Record: before, Nodes: w.seenBy, Order: order, Freeze: w.freeze, Ranks: &w.ranks, Pin: &w.unitPin,
		StableBefore: w.stables}
	m := Next(s)
	if s.Ranks = nil; len(w.nodes) < 100 && !reflect.DeepEqual(m, Next(s)) {
		w.breaks("what is remembered of ranks changed the answer")
	}
	if before.Rollout != nil {
		if !reflect.DeepEqual(was, *before.Rollout) {
			w.breaks("Next changed the record that stood")
		}
		// Those that hang have had their time: they give up their room.
		if !w.now.Before(before.Rollout.Since.Add(w.unit.Rollout.Deadline)) {
			for _, n := range w.nodes {
				if w.unsettled(n) {
					n.free = true
				}
			}
		}
	}
	w.stepped(before, m, order)
	if reflect.DeepEqual(m.Record, before) {
		w.sleeps(s, m)
		return m.Again
	}
	if !slices.Contains(w.stables, m.Record.Stable.Digest) {
		w.stables = append(w.stables, m.Record.Stable.Digest)
	}
	w.records = append(w.records, m.Record)
	w.lived = append(w.lived, w.live)
	if m.Record.Rollout == nil || m.Record.Rollout.Phase == deployments.PhaseRolledBack {
		w.ended++
	}
	if m.Record.Rollout == nil && m.Record.Stable.IsZero() {
		for _, n := range w.nodes { // every node at once
			n.free = true
		}
	}
	if w.keep {
		w.say("mirror %q: %s", order, brief(m.Record))
	}
	return m.Again
}

func brief(r deployments.Record) string {
	s := fmt.Sprintf("generation %d target %s stable %s", r.Generation, r.Target.URL, r.Stable.URL)
	if p := r.Rollout; p != nil {
		s += fmt.Sprintf(" %s cutoff %d over %d: %s", p.Phase, p.Cutoff, len(p.Superseded), p.Reason)
	}
	return s
}

// unsettled reports whether a node is switching, or would by the record that it acts on or one that it may yet read.
func (w *world) unsettled(n *member) bool {
	if n.left || n.gone {
		return false
	}
	if !n.going.IsZero() {
		return true
	}
	for i := n.seen; i < len(w.records); i++ {
		if d := w.resolve(n, i); !d.Target.IsZero() && d.Target != n.running {
			return true
		}
	}
	return false
}

func (w *world) resolve(n *member, i int) Decision {
	q := question{i, n.pin.Present, n.running, len(n.failed), n.joined}
	if i > 0 && n.asked == q {
		return n.decision
	}
	record := Value[deployments.Record]{}
	if r := w.records[i]; r.Generation > 0 {
		record = good(r)
	}
	n.asked, n.decision = q, Resolve(Facts{Unit: app, Node: n.name, Now: w.now, Record: record, NodePin: n.pin, UnitPin: w.unitPin, Joined: n.joined, Running: n.running, Quarantined: slices.Collect(maps.Keys(n.failed))})
	return n.decision
}

// act is one turn of a node's agent. promptly: it reads the newest record, and what it does ends at once.
func (w *world) act(n *member, promptly bool) {
	if n.gone || n.left {
		return
	}
	if last := len(w.records) - 1; n.seen < last {
		if n.seen += w.rng.IntN(last - n.seen + 1); promptly || w.chance(0.6) {
			n.seen = last
		}
	}
	r := w.records[n.seen]
	d := w.resolve(n, n.seen)
	claim := fmt.Sprint(claimOf(r), "/", r.Retry, "/", n.pin.Present)
	if !n.going.IsZero() && d.Target != n.going {
		w.count("switches given up")
		w.say("%s gives up %s", n.name, n.going.URL)
		n.going = deployments.Pointer{}
		return
	}
	switch {
	case d.Target.IsZero():
	case !n.going.IsZero():
		switch {
		case n.hangs && (!promptly || w.chance(0.7)) && w.chance(0.9):
		case !promptly && w.chance(0.4):
		case w.chance(w.bad[n.going.Digest]):
			w.count("failures")
			w.say("%s fails on %s", n.name, n.going.URL)
			n.failed[n.going.Digest] = claim
			n.going = deployments.Pointer{}
			// Who came back with what no part of the record names goes on to stable: no record can keep it where it is.
			n.free = n.free && n.running.Digest != r.Stable.Digest && (r.Rollout == nil || !partOf(&r, n.running.Digest))
		default:
			w.count("switches")
			w.say("%s runs %s", n.name, n.going.URL)
			n.running, n.going, n.free = n.going, deployments.Pointer{}, false
			delete(n.failed, n.running.Digest) // the success of another is none of it
		}
	case d.Target != n.running && n.failed[d.Target.Digest] != claim:
		n.going, n.hangs, n.sick = d.Target, w.chance(0.05), false
		if lived := w.lived[n.seen]; n.number >= len(lived) || !lived[n.number] {
			n.free = true // no budget can count who wasn't known to take part
		}
		w.say("%s begins to switch to %s, by generation %d", n.name, d.Target.URL, r.Generation)
		w.admitted(n, r)
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
	r := w.records[n.seen]
	d := w.resolve(n, n.seen)
	claim := fmt.Sprint(claimOf(r), "/", r.Retry, "/", n.pin.Present)
	u := deployments.UnitReport{Running: n.running, Want: d.Target, Generation: r.Generation, Pinned: d.Source == FromNodePin,
		Quarantined: slices.Collect(maps.Keys(n.failed))}
	switch {
	case d.Target.IsZero():
		u.State = deployments.StateWaiting
	case !n.going.IsZero():
		u.State = deployments.StateSwitching
	case d.Target == n.running && n.sick:
		u.State = deployments.StateUnhealthy
	case d.Target == n.running:
		u.State = deployments.StateConverged
	case n.failed[d.Target.Digest] == claim:
		u.State = deployments.StateQuarantined
	default:
		u.State = deployments.StateFetching
	}
	n.report, n.toldAs = u, n.joined
}

// settle lets every node finish, and the mirror go on, until nothing changes any more; it gives up after many rounds.
func (w *world) settle(resume bool) bool {
	for range 3000 {
		before := len(w.records)
		idle := true
		for _, n := range w.nodes {
			was, to := n.running, n.going
			w.act(n, true)
			if n.running != was || n.going != to || !n.going.IsZero() && !n.gone && !n.left {
				idle = false
			}
			w.tell(n)
		}
		w.look()
		again := w.mirror("")
		if w.check(); w.broken != "" {
			return false
		}
		p := w.latest().Rollout
		if before != len(w.records) {
			continue
		}
		switch {
		case p == nil && idle, p != nil && p.Phase == deployments.PhaseRolledBack && idle, !resume && idle && again.IsZero():
			return true
		case p != nil && p.Phase == deployments.PhasePaused:
			w.mirror([]string{"resume", "abort", "resume"}[w.rng.IntN(3)])
		case p != nil && p.Phase == deployments.PhasePendingApproval:
			w.mirror("promote")
		}
		if w.now = w.now.Add(30 * time.Second); again.After(w.now) {
			w.now = again
		}
	}
	return false
}

// end brings a history to its end, and looks at what is left.
func (w *world) end() {
	w.freeze, w.unitPin = Verdict{}, Value[deployments.Pin]{}
	for _, n := range w.nodes { // nobody who is gone comes back: it is deregistered
		n.left, n.sick = n.left || n.gone, false
		if n.pin.Present {
			n.pin, n.free = Value[deployments.Pin]{}, true
		}
	}
	if !slices.ContainsFunc(w.nodes, func(n *member) bool { return !n.left }) {
		w.join() // a rollout without nodes waits for one
	}
	settled := w.settle(true)
	if settled && w.chance(0.5) { // what has failed may be tried once more
		w.mirror("retry")
		settled = w.settle(true)
	}
	if !settled {
		w.breaks("it does not end: %s", brief(w.latest()))
		for _, n := range w.nodes {
			if !n.left && w.unsettled(n) {
				w.say("%s runs %q, goes to %q, acts on %d of %d, reports %+v", n.name, n.running.URL, n.going.URL, n.seen, len(w.records)-1, n.report)
			}
		}
		return
	}
	r := w.latest()
	for _, n := range w.nodes {
		if n.left {
			continue
		}
		want := r.Target
		if r.Rollout != nil {
			want = r.Stable
		}
		if n.running != want && len(n.failed) == 0 {
			w.breaks("in the end %s runs %s, want %s: %s", n.name, n.running.URL, want.URL, brief(r))
		}
	}
}
