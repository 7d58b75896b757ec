package policy

import (
	"slices"
	"time"

	"kedge/deployments"
)

// room returns how many more nodes may begin to change. Nodes that are not listed count as changing. If it is
// below 0, more may be changing than allowed, and no node may be told to change, not even one that seems to be
// changing already. spent: nodes whose deadline has passed no longer count, as max_failures tolerates fewer.
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

// admit raises the cutoff over the next nodes, as far as there is room, to at most want admitted nodes in all. It
// looks for canaries first among the nodes that run a superseded target: these were canaries before.
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
			if !n.told { // the record applies to it later: see readmit
				if early {
					continue
				}
				st.p.Cutoff, moved = n.rank, true
				continue
			}
			counted := n.inflight && !(spent && n.overdue)
			if counted && room < 0 || !counted && !n.settled && room <= 0 {
				return
			}
			if !counted && !n.settled {
				room--
			}
			admitted++
			if n.admitted, moved = true, true; early {
				st.p.Early = n.rank
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

// isAdmitted reports whether a node runs the target, or may go to it.
func (x *place) isAdmitted(st state) bool {
	return x.admitted && (x.told || x.node.Report.Running.Digest == st.r.Target.Digest)
}

// readmit raises Record.Joined over nodes that came back, in the order in which they joined, as far as there is
// room, and over at most most of them.
func readmit(in *inputs, st state, v summary, most int) (next state, moved bool) {
	room, _ := room(in, v)
	room = min(room, most)
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

// lowerCutoff lowers the cutoff, so that the next nodes that run the failed release go back. left is set if some have
// to stay for now.
func lowerCutoff(in *inputs, st state, v summary) (next state, left, moved bool) {
	room, spent := room(in, v)
	stay := uint64(0) // the highest rank that stays for now
	for _, n := range slices.Backward(v.nodes) {
		if n.rank > st.p.Cutoff || n.settled {
			continue
		}
		counted := n.inflight && !(spent && n.overdue)
		if counted && room < 0 || !counted && room <= 0 {
			stay = n.rank
			break
		}
		if !counted {
			room--
		}
		moved = true
	}
	if moved {
		st.p.Cutoff, st.p.Since = stay, in.Now
	}
	return st, stay > 0, moved
}

// returned raises Record.Joined, after a rollout has ended, over nodes that were away, as far as the budget has
// room.
func returned(in *inputs, st state) state {
	if in.Unit.Rollout == nil || st.r.Joined == 0 {
		return st
	}
	to := st.r.Target
	if st.on { // its rollout ended by being rolled back
		to = st.r.Stable
	}
	var v summary
	r := st.record()
	v.unlisted, v.relisted = in.unlisted(r.Nodes)
	for i := range in.Nodes {
		n := &in.Nodes[i]
		u := &n.Report
		if pinned(u) || bare(u) && !unlooked(u) {
			continue
		}
		there := u.Running.Digest == to.Digest && u.State == deployments.StateConverged
		if to.IsZero() {
			there = !goesBack(&r, u) && !busy(u)
		}
		failed := slices.Contains(u.Quarantined, to.Digest) || u.State == deployments.StateUnhealthy ||
			u.State == deployments.StateInvalid
		if n.Gone {
			if u.State == deployments.StateSwitching && in.Now.Before(n.GoneSince.Add(in.deadline())) {
				v.inflight++
				st = st.wake(n.GoneSince.Add(in.deadline()))
			}
			continue
		}
		v.live++
		switch {
		case there || failed && !busy(u):
		case told(&r, n.Joined, false), busy(u):
			v.inflight++
		default:
			v.waiting = append(v.waiting, &place{node: n})
		}
	}
	slices.SortFunc(v.waiting, byJoined)
	if was := st.p; len(v.waiting) > 0 {
		st = st.wake(v.relisted)
		st, _ = readmit(in, st, v, len(v.waiting))
		st.p = was // the rollout has ended: only Joined changes
	}
	return st
}
