package fleet

import (
	"regexp"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// words are what people read for each reason of a node; those of a rollout and of a refused order are policy's, which
// writes them into records for readers of the version before. {name} stands for a fact; what stands in brackets is left out
// if one of its facts is missing.
var words = map[deployments.Reason]string{
	deployments.ReasonNoRecord:           "there is no record, so nothing changes",
	deployments.ReasonInvalidRecord:      "the record doesn't parse, so nothing changes[: {error}]",
	deployments.ReasonInvalidPin:         "the pin doesn't parse, so nothing changes[: {key}][: {error}]",
	deployments.ReasonPinned:             "pinned[ by {by}][ until {until}][ ({reason})]",
	deployments.ReasonHeld:               "held[ by {by}][ until {until}][ ({reason})]",
	deployments.ReasonTarget:             "the record's target[ of Git commit {commit}][, generation {generation}]",
	deployments.ReasonStable:             "the stable release, until this node is admitted to the target",
	deployments.ReasonNotAdmitted:        "not admitted to the target yet",
	deployments.ReasonRolledBack:         "the stable release, as the target was rolled back",
	deployments.ReasonSuperseded:         "stays on what it runs, of a rollout that was replaced, until it is admitted",
	deployments.ReasonSourceNotAllowed:   "its sources don't allow this place[: {url}]",
	deployments.ReasonUnsigned:           "no trusted key has signed the release[: {error}]",
	deployments.ReasonDigestMismatch:     "the content doesn't match its digest[: {error}]",
	deployments.ReasonOlderThanFloor:     "older than the release that this node settled on[: {error}]",
	deployments.ReasonCreatedAhead:       "the release says that it was made ahead of this node's clock[: {created}][; older ones count from {settled}]",
	deployments.ReasonAgentTooOld:        "this agent is too old for the record[: it needs format level {needs}]",
	deployments.ReasonOldGeneration:      "the record is older than one that this node acted on[: {generation} after {acted_on}]",
	deployments.ReasonUnproven:           "a bare pointer beside a running mirror: waits until the mirror has written",
	deployments.ReasonQuarantined:        "failed on this node[ at {step}][: {error}]",
	deployments.ReasonUnhealthy:          "unhealthy[: {check}][: {error}]",
	deployments.ReasonStorageUnavailable: "can't reach the object storage[: {error}]",
	deployments.ReasonDiskFull:           "no space left on the disk[: {error}]",
	deployments.ReasonDependency:         "waits for another unit of its role[: {unit}]",
	deployments.ReasonDestInUse:          "another unit has its dest[: {unit} has {dest}]",
	deployments.ReasonGone:               "its agent is away[: {error}]",
	deployments.ReasonNotInTime:          "not converged in time[: {error}]",
}

// Message puts a reason and its facts in words, in one line. A reason that a newer kedge wrote, and that has
// no words here, is shown as its code with its error.
func Message(reason deployments.Reason, facts deployments.Facts) string {
	pattern, known := words[reason]
	if !known {
		text := oneLine(policy.Message(reason, facts))
		if text == string(reason) && facts["error"] != "" {
			text += ": " + oneLine(facts["error"])
		}
		return text
	}
	text := oneLine(optional.ReplaceAllStringFunc(pattern, func(part string) string { return fill(part[1:len(part)-1], facts) }))
	if text == "" {
		return clean(string(reason))
	}
	return text
}

var (
	optional    = regexp.MustCompile(`\[[^][]*\]`)
	placeholder = regexp.MustCompile(`\{([a-z_]+)\}`)
)

// fill puts facts in their places; empty: one is missing. A time is shown in minutes, in UTC.
func fill(part string, facts deployments.Facts) string {
	complete := true
	text := placeholder.ReplaceAllStringFunc(part, func(name string) string {
		value := facts[strings.Trim(name, "{}")]
		complete = complete && value != ""
		if t, err := time.Parse(time.RFC3339, value); err == nil {
			return t.UTC().Format("2006-01-02 15:04Z")
		}
		return value
	})
	if !complete {
		return ""
	}
	return text
}

// Hint says what an operator can do about a reason, with the command to type; empty: it goes on by itself, or
// nothing can be done from here. node is empty if the reason is the whole unit's.
func Hint(id deployments.UnitID, node string, reason deployments.Reason) string {
	unit := id.String()
	switch reason {
	case deployments.ReasonFrozen:
		return "wait, or let it go on within the freeze: kedge promote " + unit
	case deployments.ReasonOrphaned:
		return "put " + unit + ".yaml back into Git, or pin what is to run: kedge pin " + unit + " POINTER"
	case deployments.ReasonBaking:
		return "wait, or let the rest go at once: kedge promote " + unit
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
	case deployments.ReasonNoLiveNodes, deployments.ReasonGone:
		return "see whether the machine, its agent and its Consul agent run"
	case deployments.ReasonNoRecord:
		return "add " + unit + ".yaml to the deployments repo, or put a pointer at desired/" + unit
	case deployments.ReasonInvalidRecord:
		return "the mirror, where one runs, writes it anew; else write it by hand"
	case deployments.ReasonNotAdmitted, deployments.ReasonStable, deployments.ReasonSuperseded:
		if node == "" {
			return ""
		}
		return "wait for its turn, or at once on this node: kedge pin " + unit + " POINTER --node " + node
	case deployments.ReasonSourceNotAllowed:
		return "publish to an allowed place, or extend sources in the agent's configuration"
	case deployments.ReasonUnsigned:
		return "sign it with a key that this node trusts: kedge publish --sign KEYFILE"
	case deployments.ReasonAgentTooOld:
		return "upgrade kedge on this node"
	case deployments.ReasonUnproven:
		return "change the release in Git, or pin it: kedge pin " + unit + " POINTER"
	case deployments.ReasonOlderThanFloor:
		return "publish the old tree anew, as a new version; or start the agent with --allow-older-pins"
	case deployments.ReasonDiskFull:
		return "make room on the node: it tries again by itself"
	}
	return ""
}

// scopeArgs are the arguments that name a unit, or one node of it, to a command.
func scopeArgs(id deployments.UnitID, node string) string {
	if node == "" {
		return id.String()
	}
	return id.String() + " --node " + node
}
