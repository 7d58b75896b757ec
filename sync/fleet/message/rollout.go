package message

import (
	"strings"

	"kedge/deployments"
)

// Transition returns why a rollout went on, or stays in its phase, in words; empty: there is no reason.
func Transition(reason deployments.Reason, facts deployments.Facts) string {
	switch reason { // these reasons also explain a node's state, in other words
	case "":
		return ""
	case deployments.ReasonUnhealthy:
		return "a canary is no longer healthy"
	case deployments.ReasonPinned:
		return "a pin is in force, and nodes follow it at once"
	}
	return Text(reason, facts)
}

// Phase returns a phase in a word or two.
func Phase(p deployments.Phase) string {
	if p == deployments.PhaseRollingBack {
		return "going back"
	}
	return OneLine(string(p))
}

// Rollout returns why a rollout is in its phase; empty: unknown.
func Rollout(p *deployments.Progress) string {
	reason, facts := p.Reason, p.Facts
	prefix := ""
	if reason == deployments.ReasonOrphaned {
		prefix = Text(reason, nil) + ": "
		reason = deployments.Reason(facts["was"])
	}
	text := Transition(reason, facts)
	if reason == "" {
		text = OneLine(p.Message) // the mirror that wrote the record gave no code
	}
	if p.Phase == deployments.PhaseRolledBack {
		text = strings.TrimSuffix(rolledBackPrefix+strings.TrimPrefix(text, rolledBackPrefix), ": ")
		if n := facts["left"]; n != "" {
			text += "; " + plural(n, "node has", "nodes have") + " yet to go back"
		}
	}
	if p.WaitsForRollback() {
		text += waitsForRollback
	}
	return strings.TrimSuffix(prefix+text, ": ")
}

const waitsForRollback = "; the release that Git names now starts when the freeze ends"

const rolledBackPrefix = "rolled back: "

// Progress returns a rollout's phase, and why the rollout is in it.
func Progress(p *deployments.Progress) string {
	phase, text := Phase(p.Phase), strings.TrimPrefix(Rollout(p), rolledBackPrefix)
	if strings.HasPrefix(text, phase+" ") { // as in "frozen by", "paused by"
		return text
	}
	return strings.TrimSuffix(phase+": "+text, ": ")
}

// RolloutHint returns what an operator can do about a rollout or an orphaned unit, with the command
// to type. It is empty for a unit that is neither orphaned nor in a rollout. It is also empty while
// the rollout is rolling back and no other release waits, or admits nodes without being held up by
// a freeze.
func RolloutHint(id deployments.UnitID, r deployments.Record) string {
	p := r.Rollout
	switch {
	case r.Orphaned:
		return Hint(id, "", deployments.ReasonOrphaned)
	case p == nil:
		return ""
	}
	return rolloutHint(id, p, r.Pinned != nil && r.Pinned.Target != r.Target, !r.CanGoBack())
}

// rolloutHint is RolloutHint for a rollout p, without the record. byPin is set if its target is a
// pin's release. first is set if there is nothing to go back to: to abort the rollout would only
// pause it.
func rolloutHint(id deployments.UnitID, p *deployments.Progress, byPin, first bool) string {
	switch {
	case p.Reason == deployments.ReasonOrphaned:
		return Hint(id, "", deployments.ReasonOrphaned)
	case p.HeldUp():
		return Hint(id, "", deployments.ReasonFrozen)
	}
	switch p.Phase {
	case deployments.PhaseCanary:
		if !p.HealthySince.IsZero() {
			return Hint(id, "", deployments.ReasonBaking)
		}
	case deployments.PhaseRollingBack:
		if p.WaitsForRollback() {
			return "wait, or start the release that Git names despite the freeze: kedge promote " + id.String()
		}
	case deployments.PhaseFrozen:
		return "wait, or start the rollout despite the freeze: kedge promote " + id.String()
	case deployments.PhasePendingApproval:
		if first {
			return "kedge promote " + id.String()
		}
		return Hint(id, "", deployments.ReasonAwaitingApproval)
	case deployments.PhasePaused:
		switch goOn := "go on all the same: kedge resume " + id.String(); {
		case first && byPin:
			return "pin a better release, or " + goOn
		case first:
			return "push a better release, or " + goOn
		}
		return Hint(id, "", deployments.ReasonPaused)
	case deployments.PhaseRolledBack:
		if byPin {
			return "kedge unpin " + id.String() + ", pin another release, or try this one again: kedge retry " + id.String()
		}
		return Hint(id, "", deployments.ReasonAborted)
	}
	return ""
}
