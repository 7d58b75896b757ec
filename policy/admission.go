package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
)

// admission decides between a record's target, its stable release, and what runs.
func (d *Decision) admission(f Facts, r deployments.Record) {
	const what = "admission"
	origin := sayOrigin(r)
	p := r.Rollout
	told := told(&r, f.Joined, f.Running) && (f.Joined > 0 || r.Joined == 0 || f.Running.IsZero())
	if !told && f.Running.Digest != r.Target.Digest && (p == nil || f.Running.Digest != r.Stable.Digest && !partOf(&r, f.Running.Digest)) {
		d.Action, d.Source, d.Target, d.Why = ActRun, FromRunning, f.Running, "this node was away: it stays on what it runs until its turn"
		if p == nil || p.Phase != deployments.PhaseRollingBack && p.Phase != deployments.PhaseRolledBack {
			d.Action, d.Stage = ActStage, r.Target
		}
		d.note(Step{What: what, Says: "was away, and stays on what it runs until its turn", Decides: true})
		return
	}
	if p == nil {
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin
		d.note(Step{What: what, Says: "every node", Decides: true})
		return
	}
	d.note(Step{What: "rollout", Says: sayProgress(p), Unblock: Unblock(f.Unit, r)})
	back := p.Phase == deployments.PhaseRollingBack || p.Phase == deployments.PhaseRolledBack
	rank := Rank(f.Node, r.Target.Digest)
	replaced := f.Running.Digest != r.Target.Digest && partOf(&r, f.Running.Digest)
	admitted := rank <= p.Cutoff || replaced && rank <= p.Early && !back // who is to go back stays, if it is admitted or not told
	if back {
		admitted = admitted || !told
	} else {
		admitted = admitted && told
	}
	here := fmt.Sprintf("wait for its turn, or at once on this node: kedge pin %s %s --node %s", f.Unit, r.Target, f.Node)
	// What failed here before it became stable isn't tried again because a new rollout begins: that would be many nodes at once.
	refuses := !f.Running.IsZero() && f.Running.Digest != r.Stable.Digest && slices.Contains(f.Quarantined, r.Stable.Digest)
	switch {
	case back && admitted && partOf(&r, f.Running.Digest):
		d.Action, d.Source, d.Target = ActRun, FromRunning, f.Running
		d.Why = "the rollout of " + origin + " is being rolled back, and this node's turn has yet to come"
		d.note(Step{What: what, Says: "stays on what it runs until its turn to go back", Decides: true})
	case back && refuses && !partOf(&r, f.Running.Digest):
		d.Source, d.Why = FromStable, "the stable release failed on this node: it stays on what it runs"
		d.note(Step{What: what, Says: "stays on what it runs, as stable failed here: " + r.Stable.String(), Decides: true,
			Unblock: fmt.Sprintf("push a better release, or on this node alone: kedge pin %s POINTER --node %s", f.Unit, f.Node)})
	case back:
		rolled := "was rolled back"
		if p.Phase == deployments.PhaseRollingBack {
			rolled = "is being rolled back"
		}
		d.Action, d.Source, d.Target = ActRun, FromStable, r.Stable
		d.Why = "the stable release, as the one of " + origin + " " + rolled
		if r.Stable.IsZero() {
			d.Action, d.Why = ActKeep, "the release of "+origin+" "+rolled+", and there is none to go back to"
		}
		d.note(Step{What: what, Says: "runs stable: " + cmp.Or(r.Stable.String(), "none"), Decides: true})
	case admitted, r.Stable.IsZero() && f.Running.IsZero() && begun(p):
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin
		d.note(Step{What: what, Says: "admitted", Decides: true})
	case f.Running.Digest == r.Target.Digest:
		d.Action, d.Source, d.Target, d.Why = ActRun, FromTarget, r.Target, origin+", whose release this node runs already"
		d.note(Step{What: what, Says: "not admitted, but it runs the target already", Decides: true})
	case partOf(&r, f.Running.Digest):
		d.Action, d.Source, d.Target, d.Stage = ActStage, FromRunning, f.Running, r.Target
		d.Why = "stays on what it runs, of a rollout that was replaced, until it is admitted to the release of " + origin
		d.note(Step{What: what, Says: "not admitted yet", Decides: true, Unblock: here})
	case refuses:
		d.Action, d.Source, d.Stage = ActStage, FromStable, r.Target
		d.Why = "stays on what it runs, as the stable release failed on this node, until it is admitted to the release of " + origin
		d.note(Step{What: what, Says: "not admitted yet, and stable failed here: " + r.Stable.String(), Decides: true, Unblock: here})
	default:
		d.Action, d.Source, d.Target, d.Stage = ActStage, FromStable, r.Stable, r.Target
		d.Why = "the stable release, until this node is admitted to the one of " + origin
		says := "not admitted yet, so stable: " + r.Stable.String()
		if r.Stable.IsZero() {
			d.Source, d.Why, says = FromTarget, "waits to be admitted to the release of "+origin, "not admitted yet"
		}
		d.note(Step{What: what, Says: says, Decides: true, Unblock: here})
	}
}

// begun reports whether a rollout lets nodes that run nothing, and have nothing stable to run, take its target.
func begun(p *deployments.Progress) bool {
	return p.Phase != deployments.PhaseFrozen && p.Phase != deployments.PhasePaused
}

// sayProgress is a phase in words, and why the rollout stands there.
func sayProgress(p *deployments.Progress) string {
	return strings.TrimSuffix(SayPhase(p.Phase)+": "+SayReason(p), ": ")
}

// SayReason is why a rollout stands where it does, in words.
func SayReason(p *deployments.Progress) string {
	if p.Reason == deployments.ReasonOrphaned {
		return strings.TrimSuffix(Message(p.Reason, nil)+": "+p.Message, ": ")
	}
	return p.Message
}

// SayPhase is a phase in a word or two.
func SayPhase(p deployments.Phase) string {
	if p == deployments.PhaseRollingBack {
		return "going back"
	}
	return string(p)
}

// Unblock says what an operator can do about a unit's rollout, with the words to type; empty: it goes on by itself.
func Unblock(id deployments.UnitID, r deployments.Record) string {
	if IsOrphaned(r) {
		return "put " + id.String() + ".yaml back into Git, or pin what is to run: kedge pin " + id.String() + " POINTER"
	}
	if r.Rollout == nil {
		return ""
	}
	return unblock(id, r.Rollout)
}

func unblock(id deployments.UnitID, p *deployments.Progress) string {
	if heldUp(p) {
		return "wait, or let it go on within the freeze: kedge promote " + id.String()
	}
	switch p.Phase {
	case deployments.PhaseCanary:
		if !p.HealthySince.IsZero() {
			return "wait, or let the rest go at once: kedge promote " + id.String()
		}
	case deployments.PhaseFrozen:
		return "wait, or start it within the freeze: kedge promote " + id.String()
	case deployments.PhasePendingApproval:
		return "kedge promote " + id.String() + ", or kedge abort " + id.String()
	case deployments.PhasePaused:
		return "kedge resume " + id.String() + ", or kedge abort " + id.String()
	case deployments.PhaseRolledBack:
		return "push a better release, or try this one again: kedge retry " + id.String()
	}
	return ""
}
