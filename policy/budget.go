package policy

import (
	"slices"
	"time"

	"kedge/deployments"
)

// room returns how many more nodes may begin to change. Nodes that are not listed count as changing. A negative room
// means that more nodes may be changing than allowed. Then only nodes that have outsideBudget and don't count as
// changing yet may be told to change. spent is set if nodes past their deadline had used up the room. They are then
// left out of the count, as max_failures stops the rollout if there are too many of them.
func room(in *inputs, v summary) (room int, spent bool) {
	budget := v.live
	if u := in.Unit.Rollout; u != nil && (u.MaxUnavailable != deployments.Amount{}) {
		budget = max(1, u.MaxUnavailable.Of(v.live))
	}
	if room = budget - v.inflight - v.unlisted; room > 0 || v.overdue == 0 {
		return room, false
	}
	return room + v.overdue, true
}

// admit raises the cutoff, so that nodes are admitted by rank: as many as the budget has room for, until want nodes
// are admitted. In the canary phase it first raises SupersededCutoff for nodes that run a superseded target, as
// these were canaries before. admitted is how many nodes are admitted now, missing canaries included. If a cutoff
// rose, moved is set, and the deadlines and the bake start anew.
func admit(in *inputs, st state, v summary, want int) (next state, admitted int, moved bool) {
	room, spent := room(in, v)
	admitted = v.missing
	for i := range v.nodes {
		if v.nodes[i].isAdmitted(st) {
			admitted++
		}
	}
	raise := func(early bool) {
		for i := range v.nodes {
			n := &v.nodes[i]
			if n.admitted || early && !n.replaced {
				continue
			}
			if admitted >= want || v.unlisted > 0 && room < 0 { // the cutoff admits nodes that are not listed, too
				return
			}
			if !n.applies { // the record applies to it later: see readmit
				if early {
					continue
				}
				st.p.Cutoff, moved = n.rank, true
				continue
			}
			counted := n.inflight && !(spent && n.overdue)
			if counted && room < 0 || !counted && !n.outsideBudget && room <= 0 {
				return
			}
			if !counted && !n.outsideBudget {
				room--
			}
			admitted++
			if n.admitted, moved = true, true; early {
				st.p.SupersededCutoff = n.rank
			} else {
				st.p.Cutoff = n.rank
			}
		}
	}
	if st.p.Phase == deployments.PhaseCanary {
		raise(true)
	}
	raise(false)
	if moved {
		st.p.Since, st.p.HealthySince = in.Now, time.Time{}
		st.r.Nodes = max(st.r.Nodes, v.live+v.gone+v.pinned)
	}
	return st, admitted, moved
}

// isAdmitted reports whether the node is admitted by its rank, and either runs the target or may go
// to it.
func (x *rolloutNode) isAdmitted(st state) bool {
	return x.admitted && (x.applies || x.node.Report.Running.Digest == st.r.Target.Digest)
}

// readmit raises Record.Joined, so that the record applies to nodes that came back, in the order in which they joined.
// It readmits no more nodes than the budget has room for, and no more than limit; nodes of equal Joined count as one.
// If Record.Joined rose, moved is set, and the deadlines and the bake start anew.
func readmit(in *inputs, st state, v summary, limit int) (next state, moved bool) {
	room, _ := room(in, v)
	room = min(room, limit)
	for _, n := range v.waiting {
		if room <= 0 {
			break
		}
		if n.node.Joined > st.r.Joined { // unless another has the same Joined
			room--
			st.r.Joined, moved = n.node.Joined, true
		}
	}
	if moved {
		st.p.Since, st.p.HealthySince = in.Now, time.Time{}
	}
	return st, moved
}

// readmitReturned readmits nodes that were away, after a rollout has ended: it raises Record.Joined as far as the
// budget has room.
func readmitReturned(in *inputs, st state) state {
	if in.Unit.Rollout == nil || st.r.Joined == 0 {
		return st
	}
	to := st.r.Target
	if st.on { // its rollout ended by being rolled back
		to = st.r.Stable
	}
	var v summary
	r := st.record()
	v.unlisted, v.unlistedUntil = in.unlisted(r.Nodes)
	for i := range in.Nodes {
		n := &in.Nodes[i]
		u := &n.Report
		if pinned(u) || servesNothing(u) && !destUnknown(u) {
			continue
		}
		there := u.Running.Digest == to.Digest && u.State == deployments.StateConverged
		if to.IsZero() {
			there = !goesBack(&r, u) && !busy(u)
		}
		failed := slices.Contains(u.Quarantined, to.Digest) || u.State == deployments.StateUnhealthy ||
			u.State == deployments.StateInvalid
		if n.Gone {
			if (u.State == deployments.StateSwitching || u.RollingBack) && in.Now.Before(n.GoneSince.Add(in.deadline())) {
				v.inflight++
				st = st.recheckBy(n.GoneSince.Add(in.deadline()))
			}
			continue
		}
		v.live++
		if due := in.dueBack(st, n); u.RollingBack && failed && in.Now.Before(due) {
			v.inflight++
			st = st.recheckBy(due)
			continue
		}
		switch {
		case there || failed && !busy(u):
		case applies(&r, n.Joined, false), busy(u):
			v.inflight++
		default:
			v.waiting = append(v.waiting, &rolloutNode{node: n})
		}
	}
	slices.SortFunc(v.waiting, byJoined)
	if was := st.p; len(v.waiting) > 0 {
		st = st.recheckBy(v.unlistedUntil)
		st, _ = readmit(in, st, v, len(v.waiting))
		st.p = was // the rollout has ended: only Joined changes
	}
	return st
}

// superseded returns the Progress.Superseded of the record that follows was: was's target, and the
// targets that it had superseded. It leaves out targets that no node runs or may yet begin. If
// there is no stable release, it also leaves out targets beyond MaxSuperseded that none may begin.
func superseded(in *inputs, was deployments.Record) (list []deployments.Superseded) {
	own := deployments.Superseded{Digest: was.Target.Digest, Cutoff: max(was.Rollout.Cutoff, was.Rollout.SupersededCutoff),
		Generation: was.Generation}
	back := was.Rollout.Phase == deployments.PhaseRollingBack
	if back {
		own.Cutoff, own.Generation = 0, 0 // in a rollback the cutoff says who stays, not who may begin
	}
	unlisted, _ := in.unlisted(was.Nodes)
	var mayBegin []deployments.Digest // releases that a node may yet begin to deploy
	for _, o := range append([]deployments.Superseded{own}, was.Rollout.Superseded...) {
		ranks, used, runs := in.Ranks.of(o.Digest, in.Nodes).ranks, unlisted > 0, false
		for i := 0; i < len(in.Nodes) && !used; i++ {
			n := &in.Nodes[i]
			u := &n.Report
			runs = runs || u.Running.Digest == o.Digest
			used = (!n.Gone || u.State == deployments.StateSwitching) && ranks[i] <= o.Cutoff &&
				(u.Generation < was.Generation || u.Want.Digest == o.Digest || o == own)
		}
		if !used && !runs {
			continue
		}
		if used {
			mayBegin = append(mayBegin, o.Digest)
		}
		o.RollingBack = o.RollingBack || back
		if i := slices.IndexFunc(list, func(x deployments.Superseded) bool { return x.Digest == o.Digest }); i >= 0 {
			x := &list[i]
			x.Cutoff, x.Generation = max(x.Cutoff, o.Cutoff), max(x.Generation, o.Generation)
			x.RollingBack = x.RollingBack || o.RollingBack
			continue
		}
		list = append(list, o)
	}
	// Without a stable release, nodes keep what they run, whether the list names it or not. So a list that is too long can
	// lose the targets that no node may begin.
	for i := len(list) - 1; i >= 0 && len(list) > deployments.MaxSuperseded && was.Stable.IsZero(); i-- {
		if !slices.Contains(mayBegin, list[i].Digest) {
			list = slices.Delete(list, i, i+1)
		}
	}
	return list
}

func lastJoined(nodes []Node) (last uint64) {
	for i := range nodes {
		last = max(last, nodes[i].Joined)
	}
	return last
}

// nextJoined returns Record.Joined for a new record, which applies to all known nodes but those
// that have to wait for room in the budget. A node waits if it joined after the last record or has
// no Joined, and may serve something that the record doesn't name. It would leave that for stable
// as soon as the record applied to it. Record.Joined stays while nodes are missing from the list.
// If Record.Joined was 0, no known node waits.
func nextJoined(in *inputs, st state) uint64 {
	last := lastJoined(in.Nodes)
	switch {
	case st.r.Joined == 0 && st.r.Stable.IsZero():
		return max(last, 1) // a node that comes with something that serves waits for its turn
	case st.r.Joined == 0:
		return last
	}
	if unlisted, _ := in.unlisted(in.Record.Nodes); unlisted > 0 { // any of them may be such a node
		return st.r.Joined
	}
	r := st.record()
	for i := range in.Nodes {
		n := &in.Nodes[i]
		if (n.Joined == 0 || n.Joined > st.r.Joined) && (destUnknown(&n.Report) || runsUnnamed(&r, &n.Report)) {
			last = min(last, max(n.Joined, 1)-1)
		}
	}
	return max(last, st.r.Joined)
}
