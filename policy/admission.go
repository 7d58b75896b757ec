package policy

import (
	"fmt"
	"slices"

	"kedge/deployments"
)

// admission decides between a record's target, its stable release, and what runs.
func (d *Decision) admission(f Facts, r deployments.Record) {
	const what = "admission"
	origin := sayOrigin(r)
	p := r.Rollout
	if p == nil {
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin
		d.note(Step{What: what, Says: "every node", Decides: true})
		return
	}
	stage := Step{What: "rollout", Says: sayProgress(p), Unblock: unblock(f.Unit, p)}
	d.note(stage)
	back := p.Phase == deployments.PhaseBack || p.Phase == deployments.PhaseHalted
	rank := Rank(f.Node, r.Target.Digest)
	admitted := rank <= p.Cutoff
	at := fmt.Sprintf("rank %d, cutoff %d", rank, p.Cutoff)
	// What failed here before it became stable isn't tried again because a new rollout begins: that would be many nodes at once.
	refuses := !f.Running.IsZero() && f.Running != r.Stable && slices.Contains(f.Quarantined, r.Stable.Digest)
	switch {
	case back && admitted && partOf(&r, f.Running.Digest):
		d.Action, d.Source, d.Target = ActRun, FromRunning, f.Running
		d.Why = "the rollout of " + origin + " is rolled back, and this node's turn has yet to come"
		d.note(Step{What: what, Says: "stays on what it runs until its turn: " + at, Decides: true})
	case back && refuses && !partOf(&r, f.Running.Digest):
		d.Source, d.Why = FromStable, "the stable release failed on this node: it stays on what it runs"
		d.note(Step{What: what, Says: "stays on what it runs, as stable failed here", Decides: true, Unblock: "push a better release, or pin this node"})
	case back:
		d.Action, d.Source, d.Target = ActRun, FromStable, r.Stable
		d.Why = "stable release: the one of " + origin + " was rolled back"
		if r.Stable.IsZero() {
			d.Action, d.Why = ActKeep, "the release of "+origin+" was rolled back, and there is none to go back to"
		}
		d.note(Step{What: what, Says: "runs stable: " + at, Decides: true, Unblock: "push a better release, or kedge retry " + f.Unit.String()})
	case admitted:
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin
		d.note(Step{What: what, Says: "admitted to the target: " + at, Decides: true})
	case f.Running.Digest == r.Target.Digest:
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin+", which this node runs already"
		d.note(Step{What: what, Says: "not admitted, but runs the target already: " + at, Decides: true})
	case partOf(&r, f.Running.Digest):
		d.Action, d.Source, d.Target, d.Stage = ActStage, FromRunning, f.Running, r.Target
		d.Why = "stays on what it runs, of a rollout that was replaced, until it is admitted to " + origin
		d.note(Step{What: what, Says: "not admitted yet: " + at, Decides: true, Unblock: "wait for its turn, or pin this node"})
	case refuses:
		d.Action, d.Source, d.Stage = ActStage, FromStable, r.Target
		d.Why = "stays on what it runs, as the stable release failed on this node, until it is admitted to " + origin
		d.note(Step{What: what, Says: "not admitted yet, and stable failed here: " + at, Decides: true, Unblock: "wait for its turn, or pin this node"})
	default:
		d.Action, d.Source, d.Target, d.Stage = ActStage, FromStable, r.Stable, r.Target
		d.Why = "stable release, until this node is admitted to " + origin
		if r.Stable.IsZero() {
			d.Source, d.Why = FromTarget, "waits to be admitted to "+origin
		}
		d.note(Step{What: what, Says: "not admitted yet: " + at, Decides: true, Unblock: "wait for its turn, or pin this node"})
	}
}

// partOf reports whether a release is the record's target, or one whose rollout this one replaced, and not what is stable.
func partOf(r *deployments.Record, d deployments.Digest) bool {
	if d.IsZero() || d == r.Stable.Digest {
		return false
	}
	if d == r.Target.Digest {
		return true
	}
	for _, o := range r.Rollout.Over {
		if o.Digest == d {
			return true
		}
	}
	return false
}

func sayProgress(p *deployments.Progress) string {
	if p.Reason == "" {
		return string(p.Phase)
	}
	return string(p.Phase) + ": " + p.Reason
}

// unblock says what an operator can do about a rollout that stands.
func unblock(id deployments.UnitID, p *deployments.Progress) string {
	switch p.Phase {
	case deployments.PhaseWaiting:
		return "kedge promote " + id.String()
	case deployments.PhasePaused:
		return "kedge resume " + id.String() + ", or kedge abort " + id.String()
	case deployments.PhaseHalted:
		return "push a better release, or kedge retry " + id.String()
	}
	return ""
}
