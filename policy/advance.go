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

// view is what the fleet's reports say about a record's rollout.
type view struct {
	live, gone, pinned int
	// nodes are the live ones that take part, by rank.
	nodes []place
	// inflight are live nodes that are changing, or may begin to at any time; pending those among them that were told to: admitted,
	// or on the way back no longer so.
	inflight, pending int
	// failed are nodes on which the target failed; failure names one of them, and says how.
	failed  int
	failure string
	// hung are those in flight whose time is over, late the pending ones among them; due is when the next one's is; zero: never.
	hung, late int
	firstLate  *Node
	due        time.Time
	// shaken is set where a pending node whose time is not over had been well: one that boots had not.
	shaken bool
}

// place is one live node in a rollout.
type place struct {
	rank     uint64
	inflight bool
	hung     bool // and its time is over
	settled  bool // admitting it, or on the way back letting it go, takes no room: it is there, or the release failed on it
}

const defaultDeadline = 10 * time.Minute

func (m *mover) deadline() time.Duration {
	if u := m.Unit.Rollout; u != nil && u.Deadline > 0 {
		return u.Deadline
	}
	return defaultDeadline
}

// due is when a node in flight has had its time. Who booted since the last step has it from then on: it would else be late at once
// where that was long ago, as in a bake. So do all after an outage of the store, in which none could say that it had converged.
func (m *mover) due(n *Node) time.Time {
	from, deadline := m.r.Rollout.Since, m.deadline()
	if m.Seen.After(from) {
		from = m.Seen
	}
	if n.Started.After(from) && n.Started.Before(m.Now.Add(deadline)) { // or the node's clock is off
		from = n.Started
	}
	return from.Add(deadline)
}

// look reads the reports.
func (m *mover) look() view {
	r, p := &m.r, m.r.Rollout
	order := m.Ranks.of(r.Target.Digest, m.Nodes)
	over := make([][]uint64, len(p.Superseded)) // the nodes' ranks for each
	for i, o := range p.Superseded {
		over[i] = m.Ranks.of(o.Digest, m.Nodes).ranks
	}
	v := view{nodes: make([]place, 0, len(m.Nodes))}
	back := p.Phase == deployments.PhaseRollingBack
	for _, i := range order.byRank {
		n := &m.Nodes[i]
		u := &n.Report
		if u.Pinned || u.State == deployments.StateHeld {
			v.pinned++
			continue
		}
		x := place{rank: order.ranks[i]}
		admitted := x.rank <= p.Cutoff
		aware := u.Generation == r.Generation
		there := u.State == deployments.StateConverged && u.Running.Digest == r.Target.Digest
		if n.Gone {
			v.gone++
			if !back && admitted && aware && !there && u.Want.Digest == r.Target.Digest {
				how := "gone while it switched"
				if u.State == deployments.StateQuarantined {
					how = cmp.Or(u.Error, string(u.State))
				}
				v.fail(n, how)
			}
			continue
		}
		v.live++
		final := aware && (u.State == deployments.StateQuarantined || u.State == deployments.StateInvalid)
		switch {
		case m.straggles(u, int(i), over):
			x.inflight = true
		case back:
			on := partOf(r, u.Running.Digest)
			x.settled = !on || final && u.Want.Digest == r.Stable.Digest
			x.inflight = !final && (busy(u) || on && !admitted || m.strays(u))
		case final && (u.Want.Digest == r.Target.Digest || admitted && u.Want.IsZero()): // or its own configuration forbids the target
			x.settled = true
			if admitted {
				v.fail(n, cmp.Or(u.Error, string(u.State)))
			}
		default:
			x.settled = there
			x.inflight = !there && !final && (admitted || busy(u) || m.strays(u))
		}
		if x.inflight {
			x.hung = m.fly(&v, n, admitted != back)
		}
		v.nodes = append(v.nodes, x)
	}
	if !back && v.late > 0 {
		u := &v.firstLate.Report
		v.fail(v.firstLate, "not converged in time, "+cmp.Or(u.Error, string(u.State), "and silent"))
		v.failed += v.late - 1
	}
	return v
}

// fly counts a node that is in flight, and reports whether its time is over.
func (m *mover) fly(v *view, n *Node, pending bool) (hung bool) {
	due := m.due(n)
	hung = !m.Now.Before(due)
	v.inflight++
	if pending {
		v.pending++
	}
	if hung {
		v.hung++
	} else if v.due.IsZero() || due.Before(v.due) {
		v.due = due
	}
	switch p := m.r.Rollout; {
	case !pending:
	case hung:
		v.firstLate = cmp.Or(v.firstLate, n)
		v.late++
	case p.Phase == deployments.PhaseRolling && n.Started.After(p.HealthySince):
		// Of a whole fleet that bakes there is always one that restarts.
	case !n.Report.Running.IsZero():
		v.shaken = true
	}
	return hung
}

// watch looks on while a rollout goes forward. Where all was well until now, what has changed since has its time from now on, and
// the bake begins anew.
func (m *mover) watch() view {
	v, p := m.look(), m.r.Rollout
	if !p.HealthySince.IsZero() && (v.shaken || v.late > 0 && v.failed > m.limit(v)) {
		p.Since, p.HealthySince, m.say = m.Now, time.Time{}, "the bake begins anew when all are well again"
		v = m.look()
	}
	return v
}

// fail counts a node on which the target failed, and keeps the first one's reason.
func (v *view) fail(n *Node, how string) {
	if v.failed++; v.failed == 1 {
		v.failure = n.Name + ": " + said(how)
	}
}

// maxSaid bounds what nodes and settings say in a reason, in bytes: no node takes a record that is too large.
const maxSaid = 300

func said(s string) string {
	if len(s) <= maxSaid {
		return s
	}
	return strings.ToValidUTF8(s[:maxSaid-3], "") + "..."
}

// busy reports whether a node that ran something is changing.
func busy(u *deployments.UnitReport) bool {
	switch u.State {
	case deployments.StateFetching, deployments.StateSwitching, deployments.StateRetrying:
		return !u.Running.IsZero()
	}
	return false
}

// straggles reports whether a node may still act on an earlier record that admitted it: it has yet to say that it knows this one.
// over holds the nodes' ranks for each target that was replaced; i is this node's index.
func (m *mover) straggles(u *deployments.UnitReport, i int, over [][]uint64) bool {
	if u.Generation >= m.r.Generation {
		return false
	}
	for k, o := range m.r.Rollout.Superseded {
		if over[k][i] > o.Cutoff {
			continue
		}
		switch {
		case u.State == deployments.StateConverged && u.Running.Digest == o.Digest && !o.Back:
		case u.State == deployments.StateQuarantined && slices.Contains(u.Quarantined, o.Digest) && u.Generation >= o.Generation:
		default:
			return true
		}
	}
	return false
}

// strays reports whether a node runs what no part of the record names, so that it goes to stable when it gets around to it.
func (m *mover) strays(u *deployments.UnitReport) bool {
	stable := m.r.Stable.Digest
	return !u.Running.IsZero() && u.Running.Digest != stable && !partOf(&m.r, u.Running.Digest) && !stable.IsZero() && !slices.Contains(u.Quarantined, stable)
}

// room is how many more nodes may begin to change. Below 0 more may be changing than should, and none may be told to: also not one
// that seems to be, as it may only be about to. spent: those that have had their time count no more, as so few failures are borne.
func (m *mover) room(v view) (room int, spent bool) {
	budget := v.live
	if u := m.Unit.Rollout; u != nil && (u.MaxUnavailable != deployments.Amount{}) {
		budget = max(1, u.MaxUnavailable.Of(v.live))
	}
	if room = budget - v.inflight; room > 0 || v.hung == 0 {
		return room, false
	}
	return room + v.hung, true
}

// admit raises the cutoff over the next nodes, to at most want admitted in all, as far as there is room.
func (m *mover) admit(v view, want int) (admitted int, moved bool) {
	p := m.r.Rollout
	room, spent := m.room(v)
	for _, n := range v.nodes {
		if n.rank <= p.Cutoff {
			admitted++
			continue
		}
		if admitted >= want {
			break
		}
		counted := n.inflight && !(spent && n.hung)
		if counted && room < 0 || !counted && !n.settled && room <= 0 {
			break
		}
		if !counted && !n.settled {
			room--
		}
		admitted++
		p.Cutoff, moved = n.rank, true
	}
	if moved {
		p.Since, p.HealthySince = m.Now, time.Time{}
	}
	return admitted, moved
}

// waits says why nothing may go on now; "": it may.
func (m *mover) waits(v view) string {
	p := m.r.Rollout
	frozen := m.Freeze.Frozen && m.Freeze.Wait && !p.Forced && m.r.Stable != m.r.Target
	if !frozen && heldUp(p) {
		m.say = cmp.Or(m.say, "goes on after a freeze")
	}
	switch {
	case frozen:
		m.wake(m.Freeze.Until)
		if v.pending == 0 && p.HealthySince.IsZero() {
			p.HealthySince = m.Now // what comes into flight before it ends is not late for the last step: see watch
		}
		return m.Freeze.String()
	case v.live == 0 && v.gone > 0:
		return fmt.Sprintf("all of its %d nodes are gone", v.gone)
	case v.live == 0 && v.pinned > 0: // else the first to run it, once they are let go, would be all of them
		return fmt.Sprintf("all of its %d nodes are pinned", v.pinned)
	}
	return ""
}

// baked notes since when all is well, and reports whether that is long enough. who is whom it waits for.
func (m *mover) baked(who string) bool {
	p, u := m.r.Rollout, m.Unit.Rollout
	if p.HealthySince.IsZero() {
		p.HealthySince = m.Now
	}
	if u == nil {
		return true
	}
	ends, told := p.HealthySince.Add(u.Bake), m.Seen.Add(min(u.Bake, retell))
	switch {
	case m.Now.Before(ends):
		m.wake(ends)
		m.say = cmp.Or(m.say, who+" bake until "+ends.UTC().Format("2006-01-02 15:04:05Z"))
	case m.Now.Before(told):
		m.wake(told)
		m.say = cmp.Or(m.say, who+" have baked, and have yet to say how they are now")
	default:
		return true
	}
	return false
}

// retell is how long nodes may take to say how they are once the store is back.
const retell = 30 * time.Second

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func (m *mover) stepCanary() bool {
	if m.Unit.Rollout == nil {
		m.roll("rolling out")
		return true
	}
	v := m.watch()
	if m.failing(v) {
		return true
	}
	if why := m.waits(v); why != "" {
		m.say = why
		m.wakeLate(v, false)
		return false
	}
	want := min(max(1, m.Unit.Rollout.Canary.Of(v.live)), v.live)
	admitted, moved := m.admit(v, want)
	if moved {
		m.say = fmt.Sprintf("%d of %s admitted", admitted, count(want, "canary", "canaries"))
	}
	switch {
	case moved || admitted < want || v.pending > v.late:
		m.wakeLate(v, moved)
		return false
	case !m.baked("the canaries"):
		return false
	case m.Unit.Rollout.Approval == deployments.Manual:
		p := m.r.Rollout
		p.Phase, p.Since, m.say = deployments.PhasePendingApproval, m.Now, "the canaries are well: waits for promote"
		return false
	}
	m.roll("rolling out")
	return true
}

func (m *mover) stepRolling() bool {
	if m.Unit.Rollout == nil {
		m.r.Rollout, m.say = nil, "every node at once"
		return false
	}
	v := m.watch()
	if m.failing(v) {
		return true
	}
	if why := m.waits(v); why != "" {
		m.say = why
		m.wakeLate(v, false)
		return false
	}
	p := m.r.Rollout
	admitted, moved := m.admit(v, v.live)
	if admitted == v.live {
		p.Cutoff = math.MaxUint64
	}
	if moved {
		m.say = fmt.Sprintf("%d of %d nodes admitted", admitted, v.live)
	}
	if moved || admitted < v.live || v.inflight > v.hung {
		m.wakeLate(v, moved)
		return false
	}
	if m.Unit.Rollout.Canary.N == 0 && !m.baked("all nodes") { // without canaries all of them bake
		return false
	}
	m.r.Stable, m.r.Rollout, m.say = m.r.Target, nil, "every node converged"
	return false
}

// wakeLate asks to look again when what is in flight should have come.
func (m *mover) wakeLate(v view, moved bool) {
	if moved { // they all have their time from now on
		v.due = m.Now.Add(m.deadline())
	}
	m.wake(v.due)
}

// stepBack lowers the cutoff over the next nodes that run what was rolled back.
func (m *mover) stepBack() bool {
	p, v := m.r.Rollout, m.look()
	if v.live == 0 && v.gone+v.pinned > 0 {
		return false
	}
	room, spent := m.room(v)
	moved := false
	left := uint64(0) // the highest rank that stays for now
	for _, n := range slices.Backward(v.nodes) {
		if n.rank > p.Cutoff || n.settled {
			continue
		}
		counted := n.inflight && !(spent && n.hung)
		if counted && room < 0 || !counted && room <= 0 {
			left = n.rank
			break
		}
		if !counted {
			room--
		}
		moved = true
	}
	switch {
	case left == 0 && v.inflight == v.hung && !moved:
		reason := "rolled back: " + p.Message
		if v.hung > 0 { // they go on trying, and count as in flight in whatever comes next
			reason += "; " + count(v.hung, "node has", "nodes have") + " yet to come back"
		}
		m.r.Rollout = &deployments.Progress{Phase: deployments.PhaseRolledBack, Since: m.Now, Failed: p.Failed, Message: reason}
		m.say = reason
		return false
	case moved:
		p.Cutoff, p.Since = left, m.Now
		m.wakeLate(v, true)
	default:
		m.wakeLate(v, false)
	}
	return false
}
