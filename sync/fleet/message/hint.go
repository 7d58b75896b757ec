package message

import "kedge/deployments"

// Hint returns what an operator can do about a reason, with the command to type; empty: nothing, or nothing is needed.
// node is empty if the reason is about the whole unit.
func Hint(id deployments.UnitID, node string, reason deployments.Reason) string {
	unit := id.String()
	switch reason {
	case deployments.ReasonFrozen:
		return "wait, or let the rollout go on despite the freeze: kedge promote " + unit
	case deployments.ReasonOrphaned:
		return "put " + unit + ".yaml back into Git, or pin what is to run: kedge pin " + unit + " POINTER"
	case deployments.ReasonBaking:
		return "wait, or end the bake now, so that the other nodes follow within max_unavailable: kedge promote " + unit
	case deployments.ReasonAwaitingApproval:
		return "kedge promote " + unit + ", or kedge abort " + unit
	case deployments.ReasonPaused:
		return "kedge resume " + unit + ", or kedge abort " + unit
	case deployments.ReasonAborted, deployments.ReasonTooManyFailed:
		return "push a better release, or try this one again: kedge retry " + unit
	case deployments.ReasonQuarantined:
		return "name another release in Git, or kedge retry " + unit
	case deployments.ReasonAllPinned, deployments.ReasonPinned, deployments.ReasonHeld:
		return "kedge unpin " + scopeArgs(id, node)
	case deployments.ReasonInvalidPin:
		return "write it anew, or remove it: kedge unpin " + scopeArgs(id, node)
	case deployments.ReasonNoLiveNodes, deployments.ReasonGone, deployments.ReasonNodesMissing:
		return "see whether the machine, its agent and its Consul agent run"
	case deployments.ReasonNoRecord:
		return "add " + unit + ".yaml to the deployments repo; without a mirror, put a pointer at desired/" + unit +
			", below the store's prefix"
	case deployments.ReasonInvalidRecord:
		return "if a mirror runs, it writes the record anew; otherwise write it by hand"
	case deployments.ReasonNotAdmitted, deployments.ReasonStable, deployments.ReasonSuperseded:
		if node == "" {
			return ""
		}
		return "wait for the node's turn, or deploy on this node at once: kedge pin " + unit + " POINTER --node " + node
	case deployments.ReasonSourceNotAllowed:
		return "publish to an allowed place, or extend sources in the agent's configuration"
	case deployments.ReasonUnsigned:
		return "publish it signed, as a new version, with a key that this node trusts: kedge publish --sign KEYFILE"
	case deployments.ReasonAgentTooOld:
		return "upgrade kedge on this node"
	case deployments.ReasonOlderThanFloor:
		return "publish the old tree anew, as a new version; or start the agent with --allow-older-pins, and pin the " +
			"release: kedge pin " + unit + " POINTER"
	case deployments.ReasonUnhealthy:
		return "mend what the check finds, or go back: kedge rollback " + unit
	case deployments.ReasonDiskFull:
		return "make room on the node: it tries again by itself"
	}
	return ""
}

// scopeArgs returns the arguments that name a unit, or one of its nodes, to a command.
func scopeArgs(id deployments.UnitID, node string) string {
	if node == "" {
		return id.String()
	}
	return id.String() + " --node " + node
}
