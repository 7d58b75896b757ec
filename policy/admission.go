package policy

import (
	"slices"

	"kedge/deployments"
)

// decideAdmission decides between a record's target, its stable release, what the node runs now,
// and what was at dest before the first release.
func (d *Decision) decideAdmission(f ResolveInputs, r deployments.Record) {
	p, facts := r.Rollout, origin(r)
	run := func(action Action, from Source, target deployments.Pointer) {
		d.Action, d.Source, d.Target = action, from, target
	}
	because := func(reason deployments.Reason, facts deployments.Facts) {
		d.decide(deployments.Step{What: "admission", Reason: reason, Facts: facts})
	}

	idle := f.destIsFree(&r)
	applies := applies(&r, f.Joined, idle) && (f.Joined > 0 || r.Joined == 0 || idle)
	part := partOf(&r, f.Running.Digest)
	if !applies && f.Running.Digest != r.Target.Digest && (p == nil || f.Running.Digest != r.Stable.Digest && !part) {
		run(ActRun, FromRunning, f.Running)
		if p == nil || p.Phase != deployments.PhaseRollingBack && p.Phase != deployments.PhaseRolledBack {
			d.Action, d.Stage = ActRunAndStage, r.Target
		} else if f.Running.IsZero() && !r.Stable.IsZero() {
			d.Action, d.Stage = ActRunAndStage, r.Stable
		} else if f.Running.IsZero() {
			d.Action = ActKeep
		}
		reason := deployments.ReasonRejoined
		if f.Running.IsZero() {
			reason = deployments.ReasonNotAdmitted
		}
		because(reason, facts)
		return
	}
	if r.Orphaned && f.Running.Digest != r.Target.Digest && (part || f.Running == r.Stable && !r.Stable.IsZero()) {
		// The unit may go on under another name. Its budget then doesn't count nodes that begin under this name.
		if p != nil {
			d.note(deployments.Step{What: "rollout", Reason: p.Reason, Facts: progressFacts(r)})
		}
		run(ActRun, FromRunning, f.Running)
		because(deployments.ReasonOrphaned, facts)
		return
	}
	if p == nil {
		run(ActRun, FromTarget, r.Target)
		because(deployments.ReasonTarget, facts)
		return
	}

	d.note(deployments.Step{What: "rollout", Reason: p.Reason, Facts: progressFacts(r)})
	back := p.Phase == deployments.PhaseRollingBack || p.Phase == deployments.PhaseRolledBack
	rank := Rank(f.Node, r.Target.Digest)
	replaced := f.Running.Digest != r.Target.Digest && part
	admitted := rank <= p.Cutoff ||
		replaced && rank <= p.SupersededCutoff && !back
	if back { // a node stays on what it runs if it is admitted, or if the record doesn't apply to it
		admitted = admitted || !applies
	} else {
		admitted = admitted && applies
	}
	facts = facts.With("target", r.Target.String())
	stable := facts
	if !r.Stable.IsZero() {
		stable = facts.With("release", r.Stable.String())
	}
	// Something other than stable serves here. Unless part is set, the record doesn't name it.
	unnamed := (!f.Running.IsZero() || !idle && f.AtDest == FoundOther) && f.Running.Digest != r.Stable.Digest
	// A release that failed here before it became stable isn't tried again just because a new rollout begins: many
	// nodes would try it at once.
	refuses := unnamed && slices.Contains(f.Quarantined, r.Stable.Digest)
	// A node that runs what the record doesn't name goes to stable first, and on from there. If the target then fails
	// there, the node goes back to stable. If it went back to its old release, the next record or a rollback would move it
	// past the budget.
	first := unnamed && !refuses && !part && !r.Stable.IsZero()
	switch {
	// whether or not the node is admitted: the mirror has to know first what lies at dest
	case r.Stable.IsZero() && f.Running.IsZero() && f.AtDest == FoundUnknown:
		run(ActRunAndStage, FromTarget, deployments.Pointer{})
		d.Stage = r.Target
		because(deployments.ReasonNotAdmitted, facts)
	case back && admitted && part:
		run(ActRun, FromRunning, f.Running)
		because(deployments.ReasonAwaitingRollback, facts)
	case back && r.Stable.IsZero() && part && f.Leavable:
		run(ActLeave, FromStable, r.Stable)
		because(deployments.ReasonLeaving, facts.With("phase", string(p.Phase)))
	case back && r.Stable.IsZero() && !f.Running.IsZero():
		run(ActRun, FromRunning, f.Running)
		because(deployments.ReasonNothingToGoBack, facts.With("phase", string(p.Phase)))
	case back && r.Stable.IsZero() && f.AtDest == FoundOther:
		d.Source = FromStable
		because(deployments.ReasonRestored, facts.With("phase", string(p.Phase)))
	case back && refuses && !part:
		d.Source = FromStable
		because(deployments.ReasonStableQuarantined, stable.With("phase", string(p.Phase)))
	case back:
		run(ActRun, FromStable, r.Stable)
		if r.Stable.IsZero() {
			d.Action = ActKeep
		}
		because(deployments.ReasonRolledBack, stable.With("phase", string(p.Phase)))
	case admitted && !first, r.Stable.IsZero() && idle && admitsIdle(p):
		run(ActRun, FromTarget, r.Target)
		because(deployments.ReasonAdmitted, facts)
	case f.Running.Digest == r.Target.Digest:
		run(ActRun, FromTarget, r.Target)
		because(deployments.ReasonRunsTarget, facts)
	case part:
		run(ActRunAndStage, FromRunning, f.Running)
		d.Stage = r.Target
		because(deployments.ReasonSuperseded, facts)
	case refuses:
		d.Action, d.Source, d.Stage = ActRunAndStage, FromStable, r.Target
		because(deployments.ReasonStableQuarantined, stable)
	case admitted: // first is set
		run(ActRunAndStage, FromStable, r.Stable)
		d.Stage = r.Target
		because(deployments.ReasonStableFirst, stable)
	case r.Stable.IsZero():
		run(ActRunAndStage, FromTarget, r.Stable)
		d.Stage = r.Target
		because(deployments.ReasonNotAdmitted, facts)
	default:
		run(ActRunAndStage, FromStable, r.Stable)
		d.Stage = r.Target
		because(deployments.ReasonStable, stable)
	}
}

// destIsFree reports whether nothing serves on the node that a release would replace. That is so if no release of the
// unit runs, and either dest is empty or the machine has just booted. After a boot, what lies at dest doesn't serve
// yet, except perhaps while the unit's first release is rolled out. Without a boot, and during a first release, a dest
// that the agent hasn't examined counts as serving.
func (f *ResolveInputs) destIsFree(r *deployments.Record) bool {
	first := r.Rollout != nil && r.Stable.IsZero()
	return f.Running.IsZero() && (f.AtDest == FoundNothing || f.Booted && !first)
}

// admitsIdle reports whether a rollout lets nodes take its target at once if nothing serves on them and they have no
// stable release to run.
func admitsIdle(p *deployments.Progress) bool {
	return p.Phase != deployments.PhaseFrozen && p.Phase != deployments.PhasePaused
}
