package policy

import (
	"kedge/deployments"
	"kedge/sync/fleet/message"
)

// says puts a move in words, as the mirror does.
func says(m Transition) string {
	switch p := m.Record.Rollout; {
	case m.Refused:
		return "changes nothing: " + message.Text(m.Reason, m.Facts)
	case p != nil && p.Phase == deployments.PhaseRolledBack:
		return message.Rollout(p)
	}
	return message.Transition(m.Reason, m.Facts)
}

// frozenBy puts a freeze in words.
func frozenBy(v FreezeState) string { return message.Text(deployments.ReasonFrozen, v.Facts()) }

// saysRollout is where a rollout stands, in words; empty: there is none.
func saysRollout(r deployments.Record) string {
	if r.Rollout == nil {
		return ""
	}
	return message.Rollout(r.Rollout)
}
