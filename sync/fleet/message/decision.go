package message

import (
	"cmp"
	"strings"
	"time"

	"kedge/deployments"
)

// Decision returns one line that says why a node runs what it runs, for the reason and facts of a policy.Decision.
func Decision(reason deployments.Reason, f deployments.Facts) string {
	from := origin(f)
	switch reason {
	case deployments.ReasonPinned, deployments.ReasonHeld:
		return OneLine(cmp.Or(f["pin"], "pin") + pinStory(f))
	case deployments.ReasonInvalidPin:
		return "the " + OneLine(cmp.Or(f["pin"], "pin")) + " doesn't parse, so nothing changes"
	case deployments.ReasonNoRecord:
		if f["pin"] != "" {
			return "the " + OneLine(f["pin"]) + " is for a unit without a record, so nothing changes"
		}
	case deployments.ReasonInvalidRecord:
		return "the record doesn't parse, so nothing changes"
	case deployments.ReasonTarget, deployments.ReasonAdmitted:
		return from
	case deployments.ReasonRunsTarget:
		return from + ", whose release this node runs already"
	case deployments.ReasonStable:
		return "the stable release, until this node is admitted to the release of " + from
	case deployments.ReasonStableFirst:
		return "the stable release first, then the release of " + from + ", as the record doesn't name what this node runs"
	case deployments.ReasonNotAdmitted:
		return "waits to be admitted to the release of " + from
	case deployments.ReasonSuperseded:
		return "keeps the release of a superseded rollout, until it is admitted to the release of " + from
	case deployments.ReasonAwaitingRollback:
		return "the rollout of " + from + " is being rolled back, and this node's turn has yet to come"
	case deployments.ReasonRolledBack:
		if f["release"] == "" {
			return "the release of " + from + rolledBack(f) + ", and there is none to go back to"
		}
		return "the stable release, as the release of " + from + rolledBack(f)
	case deployments.ReasonOrphaned:
		return "stays on what it runs, as the unit's file is no longer in Git"
	case deployments.ReasonNothingToGoBack:
		return "the release of " + from + rolledBack(f) + ", and there is none to go back to"
	case deployments.ReasonLeaving:
		return "goes back to what was there before kedge, as the release of " + from + rolledBack(f)
	case deployments.ReasonRestored:
		return "keeps what was there before kedge, as the release of " + from + rolledBack(f)
	case deployments.ReasonStableQuarantined:
		if f["phase"] == "" {
			return "stays on what it runs, as the stable release failed on this node, until it is admitted to the release " +
				"of " + from
		}
	case deployments.ReasonSourceNotAllowed:
		return "the release may not be used on this node"
	}
	return Text(reason, f)
}

// Trace puts the steps of a decision about a unit on a node in words.
func Trace(id deployments.UnitID, node string, steps []deployments.Step) []deployments.StepStatus {
	trace := make([]deployments.StepStatus, len(steps))
	for i, s := range steps {
		says, hint := Step(id, node, s.What, s.Reason, s.Facts)
		trace[i] = deployments.StepStatus{What: s.What, Message: says, Reason: s.Reason, Facts: s.Facts,
			Decides: s.Decides, Blocks: s.Blocks, Hint: hint}
	}
	return trace
}

// Step returns the result of one step of a decision in words, and what an operator can do about it; hint may be
// empty. id and node are what the decision is about.
func Step(
	id deployments.UnitID,
	node, what string,
	reason deployments.Reason,
	f deployments.Facts,
) (says, hint string) {
	switch what {
	case "record":
		return recordStep(id, reason, f)
	case "rollout":
		return rolloutStep(id, reason, f)
	case "admission":
		return admissionStep(id, node, reason, f)
	case "bounds":
		return OneLine(f["error"]), Hint(id, node, deployments.ReasonSourceNotAllowed)
	case "quarantine":
		return quarantineStep(id, reason, f)
	}
	if strings.HasSuffix(what, "pin") {
		return pinStep(id, node, what, reason, f)
	}
	return Text(reason, f), ""
}

func pinStep(
	id deployments.UnitID,
	node, what string,
	reason deployments.Reason,
	f deployments.Facts,
) (says, hint string) {
	if what != "node pin" {
		node = ""
	}
	unpin := "kedge unpin " + scopeArgs(id, node)
	says = OneLine(cmp.Or(f["release"], "hold") + pinStory(f))
	switch reason {
	case "":
		return "none", ""
	case deployments.ReasonInvalidPin:
		return OneLine(f["key"] + ": " + f["error"]), "write it anew, or remove it: " + unpin
	case deployments.ReasonPinPaced:
		atOnce := " --at-once"
		if f["until"] != "" {
			atOnce += " --until " + f["until"]
		}
		return says + ": the mirror rolls it out, within max_unavailable",
			unpin + "; or deploy on every node at once: kedge pin " + id.String() + " " + f["release"] + atOnce
	case deployments.ReasonExpired:
		return says + ": it has ended", ""
	case deployments.ReasonOutranked:
		return says + ": the " + OneLine(f["outranked_by"]) + " takes precedence", ""
	case deployments.ReasonHeld:
		return says + ": keeps what runs", unpin
	}
	return says, unpin
}

func recordStep(id deployments.UnitID, reason deployments.Reason, f deployments.Facts) (says, hint string) {
	switch reason {
	case deployments.ReasonNoRecord:
		return "none", Hint(id, "", reason)
	case deployments.ReasonAgentTooOld: // the error says what to do
		return OneLine(f["key"] + ": " + f["error"]), ""
	case deployments.ReasonInvalidRecord:
		return OneLine(f["key"] + ": " + f["error"]), Hint(id, "", reason)
	}
	says = f["release"] + ", written by hand"
	if f["commit"] != "" || f["by_pin"] != "" {
		says = f["release"] + " of " + origin(f)
	}
	if f["generation"] != "" {
		says += ", generation " + f["generation"]
	}
	if f["orphaned"] != "" {
		says += "; orphaned: its file is no longer in Git"
	}
	if f["outranked_by"] != "" {
		says += ": the " + f["outranked_by"] + " takes precedence"
	}
	return OneLine(says), ""
}

func rolloutStep(id deployments.UnitID, reason deployments.Reason, f deployments.Facts) (says, hint string) {
	p := &deployments.Progress{Phase: deployments.Phase(f["phase"]), Reason: reason, Facts: f, Message: f["message"],
		Forced: f["forced"] != ""}
	if f["baking"] != "" {
		p.HealthySince = time.Unix(0, 0) // any time but zero will do
	}
	if f["outranked_by"] == "" {
		hint = rolloutHint(id, p, f["by_pin"] != "", f["first"] != "")
	}
	return Progress(p), hint
}

func admissionStep(
	id deployments.UnitID,
	node string,
	reason deployments.Reason,
	f deployments.Facts,
) (says, hint string) {
	pin := "kedge pin " + id.String() + " "
	waits := "wait for the node's turn, or deploy on this node at once: " + pin + f["target"] + " --node " + node
	switch reason {
	case deployments.ReasonTarget:
		return "every node", ""
	case deployments.ReasonAdmitted:
		return "admitted", ""
	case deployments.ReasonRejoined:
		return "the node was away, and stays on what it runs until its turn", ""
	case deployments.ReasonRolledBack:
		if f["release"] == "" {
			return "rolled back, and there is no stable release", ""
		}
		return OneLine("rolled back, so the stable release: " + f["release"]), ""
	case deployments.ReasonStableQuarantined:
		if f["phase"] != "" {
			return OneLine("stays on what it runs, as the stable release failed here: " + f["release"]),
				"push a better release, or pin one on this node alone: " + pin + "POINTER --node " + node
		}
		return OneLine("not admitted yet, and the stable release failed here: " + f["release"]), waits
	case deployments.ReasonNotAdmitted, deployments.ReasonSuperseded:
		return "not admitted yet", waits
	case deployments.ReasonStable:
		return OneLine("not admitted yet, so the stable release: " + f["release"]), waits
	case deployments.ReasonStableFirst:
		return OneLine("admitted, but goes to the stable release first: " + f["release"]), ""
	}
	return Text(reason, f), ""
}

func quarantineStep(id deployments.UnitID, reason deployments.Reason, f deployments.Facts) (says, hint string) {
	switch {
	case reason == "":
		return "none", ""
	case f["named_by"] == "" && f["pinned"] != "":
		return OneLine(f["release"] + " failed on this node, and isn't tried again by itself"),
			"unpin it, pin another release, or try it again: kedge retry " + id.String()
	case f["named_by"] == "":
		return OneLine(f["release"] + " failed on this node, and isn't tried again by itself"), Hint(id, "", reason)
	case f["pinned"] != "":
		hint = "before you unpin, name another release in Git"
	}
	return OneLine(f["release"] + ", which the record names, failed on this node"), hint
}

// pinStory returns who pinned, until when and why, as words to follow the pin's release.
func pinStory(f deployments.Facts) string {
	story := ""
	if f["by"] != "" {
		story += " by " + f["by"]
	}
	if f["until"] != "" {
		story += " until " + minute(f["until"])
	}
	if f["reason"] != "" {
		story += " (" + f["reason"] + ")"
	}
	return story
}

// origin returns where a record comes from, in words: a Git commit, the unit's pin, or somebody's hand.
func origin(f deployments.Facts) string {
	if f["by_pin"] != "" {
		return "the unit's pin"
	}
	if f["commit"] == "" {
		return "a record written by hand"
	}
	return "Git commit " + OneLine(f["commit"])
}

func rolledBack(f deployments.Facts) string {
	if deployments.Phase(f["phase"]) == deployments.PhaseRollingBack {
		return " is being rolled back"
	}
	return " was rolled back"
}
