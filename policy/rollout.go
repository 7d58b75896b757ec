package policy

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

// Situation is all that decides what becomes of a unit's record: plain data, read by the mirror.
type Situation struct {
	Now time.Time
	// Unit is the unit's file in the commit that is mirrored; Commit is that one's hash.
	Unit   deployments.Unit
	Commit string
	// Record is the one that stands; the zero Record: none.
	Record deployments.Record
	// Nodes are those that have an entry in status/ for the unit's role.
	Nodes []Node
	// Seen is since when Nodes are as they report themselves, without a gap: while the store is away nothing that they do is told. Zero:
	// always.
	Seen time.Time
	// Order is what an operator put at control/: promote, pause, resume, abort, retry; empty: nothing.
	Order string
	// Freeze is Frozen's verdict for the unit now.
	Freeze Verdict
	// Ranks, where it is kept from one call for a unit to the next, spares hashing and sorting a fleet that has not changed; it
	// has no influence on the answer. Nil: all is computed anew.
	Ranks *Ranks
}

// Node is what is known of one node.
type Node struct {
	Name string
	// Gone is set where the node's session has ended: it died, or is cut off. A node that deregistered isn't there at all.
	Gone bool
	// Started is when its agent started, by the node's clock; zero: unknown.
	Started time.Time
	// Report is the node's for the unit; zero: it has said nothing of it yet.
	Report deployments.UnitReport
}

// Move is Next's answer.
type Move struct {
	// Record is what the record becomes; the same as before where nothing is to be done.
	Record deployments.Record
	// Reason says in words for an operator what was done, or why nothing is; empty where there is nothing to say.
	Reason string
	// Did says what an order has done, where it changed something.
	Did string
	// Again is when time alone could change the answer; zero: never.
	Again time.Time
}

// Next is the step of a rollout: from the record, the unit's file, the fleet's reports, an order and the time to the next record.
// It has no side effects, and the same Situation gives the same Move; where its record is written, Next is asked again. An order
// is always consumed: one that makes no sense where the rollout stands changes nothing, and Reason says so.
//
// A new target goes to a canary, bakes, waits for approval where that is asked for, and then goes on by as many nodes as
// max_unavailable leaves room for. The bake begins anew where a canary was not well in between.
//
// In flight is every live node that was admitted and has yet to converge, and every one that may still act on an earlier record,
// as its report doesn't name the newest generation. Pinned and held nodes are no part of it, and where all are it waits; nodes that
// boot aren't in flight before they ran anything, but are counted once they are admitted.
func Next(s Situation) (move Move) {
	m := &mover{Situation: s, r: s.Record}
	if m.Ranks == nil {
		m.Ranks = new(Ranks)
	}
	if s.Record.Rollout != nil { // the one that stands is the caller's
		p := *s.Record.Rollout
		p.Superseded = slices.Clone(p.Superseded)
		// Times that are yet to come are of a clock that went back, or of another mirror's: counted from them, a rollout would stand
		// for as long.
		for _, at := range []*time.Time{&p.Since, &p.HealthySince} {
			if at.After(s.Now) {
				*at = s.Now
			}
		}
		if p.Reason == deployments.ReasonOrphaned {
			p.Reason = reasonOf(p.Message)
		}
		m.r.Rollout = &p
	}
	if s.Record.Generation == 0 || m.goal() != s.Unit.Release {
		m.begin()
	}
	m.r.After, m.r.Drift = s.Unit.After, s.Unit.Drift
	did := ""
	switch {
	case m.r.Target != s.Record.Target && s.Order == "promote":
		m.refuse("the rollout that it was given for was replaced by one that nobody has seen yet")
	case s.Order != "":
		m.obey()
		if !m.refused {
			did = m.say
		}
	}
	if refused := m.say; m.refused { // is no reason for where the rollout stands
		m.say = ""
		defer func() { move.Reason = cmp.Or(refused, move.Reason) }()
	}
	for range 5 { // canary, waiting, rolling, finished at most
		if m.r.Rollout == nil || !m.step() {
			break
		}
	}
	if p := m.r.Rollout; p != nil && m.say != "" && p.Phase != deployments.PhaseRolledBack {
		p.Reason, p.Message = reasonOf(m.say), m.say
	}
	if m.r.Rollout == nil {
		m.Ranks.forget()
	}
	return Move{Record: m.r, Reason: m.say, Did: did, Again: m.again}
}

type mover struct {
	Situation
	r     deployments.Record
	say   string
	again time.Time
	// refused is set where an order changed nothing, and say tells why.
	refused bool
}

// goal is the release that the record is about: also the one that was rolled back, where that is what Git still names.
func (m *mover) goal() deployments.Pointer {
	if p := m.Record.Rollout; p != nil && p.Failed == m.Unit.Release.Digest && !p.Failed.IsZero() {
		return m.Unit.Release
	}
	return m.Record.Target
}

// begin makes the record of a new target.
func (m *mover) begin() {
	was := m.Record
	r := deployments.Record{Target: m.Unit.Release, Stable: was.Target, Generation: was.Generation + 1, Retry: was.Retry, Commit: m.Commit}
	p := &deployments.Progress{Since: m.Now}
	if old := was.Rollout; old != nil {
		r.Stable = was.Stable
		if old.Phase != deployments.PhaseRolledBack {
			p.Superseded = m.over(was)
		}
	}
	if len(p.Superseded) > deployments.MaxSuperseded {
		// Replaced so often that the record can't tell them apart: nodes come together again first.
		if p := m.r.Rollout; p.Phase != deployments.PhaseRollingBack && m.r.Stable != m.r.Target {
			m.back("replaced too often: all nodes go to stable first")
		} else if p.Phase == deployments.PhasePaused {
			m.say = "replaced too often while it is paused: resume it first"
		}
		return
	}
	m.r = r
	revert := r.Stable == r.Target
	switch {
	case revert && len(p.Superseded) == 0 && (was.Rollout == nil || !m.anew(p)):
		m.say = "every node runs it, or did so last"
	case m.Freeze.Frozen && !revert:
		m.r.Rollout = p
		m.start()
	case m.Unit.Rollout == nil:
		m.say = "every node at once"
	case r.Stable.IsZero():
		m.say = "first release: every node at once"
	default:
		m.r.Rollout = p
		m.start()
	}
}

// over lists the targets that nodes may run, or be on their way to, beside what a record's successor names: its own, and those that
// it had replaced. What no node has to do with any more is forgotten.
func (m *mover) over(was deployments.Record) (over []deployments.Superseded) {
	own := deployments.Superseded{Digest: was.Target.Digest, Cutoff: was.Rollout.Cutoff, Generation: was.Generation}
	if was.Rollout.Phase == deployments.PhaseRollingBack {
		own.Cutoff, own.Generation = 0, 0 // what it had admitted stands in its Over
	}
	for _, o := range append([]deployments.Superseded{own}, was.Rollout.Superseded...) {
		ranks, used := m.Ranks.of(o.Digest, m.Nodes).ranks, false
		for i := range m.Nodes {
			n := &m.Nodes[i]
			u := &n.Report
			if used = u.Running.Digest == o.Digest || !n.Gone && ranks[i] <= o.Cutoff &&
				(u.Generation < was.Generation || u.Want.Digest == o.Digest || o == own); used {
				break
			}
		}
		if !used {
			continue
		}
		o.Back = o.Back || was.Rollout.Phase == deployments.PhaseRollingBack
		if i := slices.IndexFunc(over, func(x deployments.Superseded) bool { return x.Digest == o.Digest }); i >= 0 {
			x := &over[i]
			x.Cutoff, x.Generation, x.Back = max(x.Cutoff, o.Cutoff), max(x.Generation, o.Generation), x.Back || o.Back
			continue
		}
		over = append(over, o)
	}
	return over
}

// start sets the phase in which a rollout begins.
func (m *mover) start() {
	p, u := m.r.Rollout, m.Unit.Rollout
	revert := m.r.Stable == m.r.Target // Git went back while nodes were on the way: gates would only keep them there
	switch {
	case m.Freeze.Frozen && !p.Forced && !revert:
		p.Phase = deployments.PhaseFrozen
		m.say = m.Freeze.String()
	case u == nil || revert || u.Canary.N == 0:
		p.Phase, p.Promoted = deployments.PhaseRolling, true
		m.say = "rolling out"
	default:
		p.Phase = deployments.PhaseCanary
		m.say = "canaries go first"
	}
	p.Since, p.HealthySince = m.Now, time.Time{} // what was paused was not watched: it bakes anew
}

// Refusal says why an order would change nothing where a record stands; empty: it would change something.
func Refusal(order string, r deployments.Record) string {
	p := r.Rollout
	switch {
	case !slices.Contains(Orders, order):
		return "it is not one of " + strings.Join(Orders, ", ")
	case IsOrphaned(r):
		return orphaned
	case order == "retry" && p != nil && p.Phase == deployments.PhaseRollingBack:
		return "the release is being rolled back: retry when that is done"
	case order == "retry":
		return ""
	case p == nil:
		return "no rollout is under way"
	case p.Phase == deployments.PhaseRollingBack:
		return "the release is being rolled back: push another, or retry when that is done"
	case p.Phase == deployments.PhaseRolledBack:
		return "the release is rolled back: push another, or retry"
	case order == "promote" && p.Phase == deployments.PhasePaused:
		return "the rollout is paused: resume it first"
	case order == "promote" && p.Phase == deployments.PhaseRolling && !heldUp(p):
		return "it goes on already"
	case order == "pause" && p.Phase == deployments.PhasePaused:
		return "it is paused already"
	case order == "resume" && p.Phase != deployments.PhasePaused:
		return "the rollout is not paused"
	}
	return ""
}

// heldUp reports whether a rollout that had begun waits for a window, or did so when last something was said of it.
func heldUp(p *deployments.Progress) bool {
	return (p.Phase == deployments.PhaseCanary || p.Phase == deployments.PhaseRolling) && !p.Forced && p.Reason == deployments.ReasonFrozen
}

// reasonOf is the code of what a rollout's message says.
func reasonOf(message string) deployments.Reason {
	if strings.HasPrefix(message, frozenBy) {
		return deployments.ReasonFrozen
	}
	return ""
}

// orphaned begins the message of a rollout of a unit that Git doesn't have any more.
const orphaned = "its file is no longer in Git, so it stands where it is"

// Orphaned is what becomes of a record whose unit Git doesn't have any more, and that stays: nothing moves, as nothing says how, and
// its rollout tells so. Next takes it up again where it stood.
func Orphaned(r deployments.Record) deployments.Record {
	if r.Rollout == nil || IsOrphaned(r) {
		return r
	}
	p := *r.Rollout
	p.Reason = deployments.ReasonOrphaned
	r.Rollout = &p
	return r
}

// IsOrphaned reports whether a record has a rollout with which no mirror goes on, as its unit is gone from Git.
func IsOrphaned(r deployments.Record) bool {
	return r.Rollout != nil && r.Rollout.Reason == deployments.ReasonOrphaned
}

// Orders are what an operator may ask for.
var Orders = []string{"promote", "pause", "resume", "abort", "retry"}

func (m *mover) refuse(why string) { m.refused, m.say = true, m.Order+" changes nothing: "+why }

// obey does what an operator ordered.
func (m *mover) obey() {
	if why := Refusal(m.Order, m.r); why != "" {
		m.refuse(why)
		return
	}
	p := m.r.Rollout
	switch m.Order {
	case "retry":
		m.retry()
	case "promote":
		switch {
		case p.Phase == deployments.PhaseFrozen: // the step that follows starts it
			p.Forced, m.say = true, "started within a freeze by an operator"
		case heldUp(p): // the freeze alone: who lets it pass may want the canaries to bake
			p.Forced, m.say = true, "goes on within a freeze by an operator"
		default:
			m.roll("promoted by an operator")
		}
	case "pause":
		m.pause("paused by an operator")
	case "resume":
		p.Tolerated = m.look().failed
		if p.Promoted {
			m.roll("resumed by an operator")
			return
		}
		m.start()
		m.say = "resumed by an operator"
	case "abort":
		m.back("aborted by an operator")
	}
}

// retry begins the rollout anew. Nodes on the target stay there; those on which it failed are admitted once more, in their turn.
func (m *mover) retry() {
	m.r.Retry++
	p := m.r.Rollout
	if p == nil {
		if p = (&deployments.Progress{}); m.anew(p) {
			m.r.Generation++
			m.r.Rollout = p
			m.roll("tried once more where it failed")
			return
		}
		m.say = "tried once more where it failed"
		return
	}
	over := m.over(m.r)
	m.r.Generation++
	m.r.Rollout = &deployments.Progress{Forced: p.Forced, Superseded: over}
	m.start()
	m.say = "tried once more by an operator"
}

// anew reports whether nodes that run something else would go to the record's target once more, and at once, were there no rollout;
// it bears their failures, which were borne before.
func (m *mover) anew(p *deployments.Progress) bool {
	if m.Unit.Rollout == nil {
		return false
	}
	for i := range m.Nodes {
		n := &m.Nodes[i]
		u := &n.Report
		if !n.Gone && !u.Pinned && u.State != deployments.StateHeld && !u.Running.IsZero() && u.Running.Digest != m.r.Target.Digest {
			p.Tolerated++
		}
	}
	return p.Tolerated > 0
}

func (m *mover) roll(why string) {
	p := m.r.Rollout
	p.Phase, p.Promoted, p.Since, p.HealthySince, m.say = deployments.PhaseRolling, true, m.Now, time.Time{}, why
}

func (m *mover) pause(why string) {
	m.r.Rollout.Phase, m.r.Rollout.Since, m.say = deployments.PhasePaused, m.Now, why
}

// stop is what failures lead to.
func (m *mover) stop(why string) {
	if m.Unit.Rollout != nil && m.Unit.Rollout.OnFailure == deployments.Pause {
		m.pause(why)
		return
	}
	m.back(why)
}

// back begins the way back to stable. The generation grows, so that reports tell who knows of it.
func (m *mover) back(why string) {
	if m.r.Stable.IsZero() || m.r.Stable == m.r.Target {
		m.pause(why + "; there is nothing to go back to")
		return
	}
	p := m.r.Rollout
	over := m.over(m.r)
	m.r.Generation++
	m.r.Rollout = &deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: math.MaxUint64, Since: m.Now,
		Message: why, Failed: m.r.Target.Digest, Superseded: over, Forced: p.Forced}
	m.say = why
}

// wake asks to look again at a time; zero: never.
func (m *mover) wake(at time.Time) { m.again = earlier(m.again, at) }

// step goes on from the phase in which the rollout stands, and reports whether another step may follow at once.
func (m *mover) step() bool {
	p, u := m.r.Rollout, m.Unit.Rollout
	switch p.Phase {
	case deployments.PhaseRolledBack:
		return false
	case deployments.PhaseRollingBack:
		return m.stepBack()
	case deployments.PhasePaused:
		return false
	case deployments.PhaseFrozen:
		if m.Freeze.Frozen && !p.Forced {
			m.say = m.Freeze.String()
			m.wake(m.Freeze.Until)
			return false
		}
		if m.r.Stable.IsZero() {
			m.r.Rollout, m.say = nil, "first release: every node at once"
			return false
		}
		m.start()
		return true
	case deployments.PhasePendingApproval:
		v := m.watch()
		if m.failing(v) {
			return true
		}
		if p.HealthySince.IsZero() {
			p.Phase, m.say = deployments.PhaseCanary, "a canary is no longer well"
			return true
		}
		if u == nil || u.Approval != deployments.Manual {
			m.roll("rolling out")
			return true
		}
		m.wakeLate(v, false)
		return false
	case deployments.PhaseCanary:
		return m.stepCanary()
	default:
		return m.stepRolling()
	}
}

// failing stops the rollout where more nodes have failed than are borne.
func (m *mover) failing(v view) bool {
	if m.Unit.Rollout == nil {
		return false // every node at once: each protects itself
	}
	if m.r.Stable == m.r.Target && len(m.r.Rollout.Superseded) > 0 {
		return false // Git went back: whoever fails on stable is to keep no other on what Git went back from
	}
	limit := m.limit(v)
	if v.failed <= limit {
		return false
	}
	m.stop(fmt.Sprintf("%d of %d nodes failed (%s), at most %d may", v.failed, v.live, v.failure, limit))
	return true
}

// limit is how many nodes may have failed.
func (m *mover) limit(v view) int {
	limit := m.r.Rollout.Tolerated
	if u := m.Unit.Rollout; u != nil {
		limit += u.MaxFailures.Of(v.live)
	}
	return limit
}
