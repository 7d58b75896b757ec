package policy

import (
	"fmt"
	"strings"
	"time"

	"kedge/deployments"
)

// words are a reason and its facts, as people read them.
type words struct {
	reason deployments.Reason
	facts  deployments.Facts
}

func (w words) String() string { return Message(w.reason, w.facts) }

// maxSaid bounds what nodes and settings say in a fact, in bytes: no node takes a record that is too large.
const maxSaid = 300

func clipped(s string) string {
	if len(s) <= maxSaid {
		return s
	}
	return strings.ToValidUTF8(s[:maxSaid-3], "") + "..."
}

// Message is the reason of a rollout, or for which an order is refused, in words.
func Message(reason deployments.Reason, f deployments.Facts) string {
	switch reason {
	case "":
		return ""
	case deployments.ReasonFrozen:
		s := "frozen by " + f["window"]
		if f["until"] != "" {
			s += " until " + sayMinute(f["until"])
		}
		if f["reason"] != "" {
			s += " (" + f["reason"] + ")"
		}
		return s
	case deployments.ReasonCanary:
		if f["admitted"] == "" {
			return "canaries go first"
		}
		return f["admitted"] + " of " + plural(f["of"], "canary", "canaries") + " admitted"
	case deployments.ReasonBaking:
		return f["who"] + " bake until " + f["until"]
	case deployments.ReasonAwaitingReports:
		return f["who"] + " have baked, and have yet to say how they are now"
	case deployments.ReasonBakingAgain:
		return "the bake begins anew when all are well again"
	case deployments.ReasonAwaitingApproval:
		return "the canaries are well: waits for promote"
	case deployments.ReasonUnhealthy:
		return "a canary is no longer well"
	case deployments.ReasonRolling:
		if f["admitted"] == "" {
			return "rolling out"
		}
		return f["admitted"] + " of " + f["of"] + " nodes admitted"
	case deployments.ReasonTooManyFailed:
		return fmt.Sprintf("%s of %s nodes failed (%s: %s), at most %s may",
			f["failed"], f["of"], f["node"], sayCause(f), f["limit"]) + sayNoWayBack(f)
	case deployments.ReasonAborted:
		return "aborted by an operator" + sayNoWayBack(f)
	case deployments.ReasonPaused:
		return "paused by an operator"
	case deployments.ReasonPromoted:
		return "promoted by an operator"
	case deployments.ReasonResumed:
		return "resumed by an operator"
	case deployments.ReasonForced:
		if f["starts"] != "" {
			return "started within a freeze by an operator"
		}
		return "goes on within a freeze by an operator"
	case deployments.ReasonFreezeEnded:
		return "goes on after a freeze"
	case deployments.ReasonRetried:
		if f["ended"] != "" {
			return "tried once more where it failed"
		}
		return "tried once more by an operator"
	case deployments.ReasonConverged:
		return "every node converged"
	case deployments.ReasonEveryNode:
		return "every node at once"
	case deployments.ReasonFirstRelease:
		return "first release: every node at once"
	case deployments.ReasonRunsAlready:
		return "every node runs it, or did so last"
	case deployments.ReasonNoLiveNodes:
		if f["known"] == "0" {
			return "waits for a node: none is known"
		}
		return "all of its " + f["known"] + " nodes are gone"
	case deployments.ReasonAllPinned:
		return "all of its " + f["nodes"] + " nodes are pinned"
	case deployments.ReasonNodesMissing:
		return f["live"] + " of " + f["known"] + " known nodes are there: waits for the others"
	case deployments.ReasonStorageUnavailable:
		return "node " + f["node"] + " can't reach the storage, and tries again: " + f["error"]
	case deployments.ReasonUnaware:
		return "node " + f["node"] + " is well, and has yet to notice that it was admitted"
	case deployments.ReasonReplacedTooOften:
		if f["paused"] != "" {
			return "replaced too often while it is paused: resume it first"
		}
		return "replaced too often: all nodes go to stable first"
	case deployments.ReasonNothingToGoBack:
		return "there is nothing to go back to"
	case deployments.ReasonPinned:
		return "a pin goes to its nodes"
	case deployments.ReasonOrphaned:
		return "its file is no longer in Git, so it stands where it is"
	case deployments.ReasonUnknownOrder:
		return "it is not one of " + strings.Join(Orders, ", ")
	case deployments.ReasonNotSeenYet:
		return "the rollout that it was given for was replaced by one that nobody has seen yet"
	case deployments.ReasonRollingBack:
		if f["order"] == "retry" {
			return "the release is being rolled back: retry when that is done"
		}
		return "the release is being rolled back: push another, or retry when that is done"
	case deployments.ReasonRolledBack:
		if f["pin"] != "" {
			return "it was so before the pin"
		}
		return "the release is rolled back: push another, or retry"
	case deployments.ReasonNothingUnderWay:
		return "no rollout is under way"
	case deployments.ReasonPausedAlready:
		if f["order"] == "promote" {
			return "the rollout is paused: resume it first"
		}
		return "it is paused already"
	case deployments.ReasonNotPaused:
		return "the rollout is not paused"
	case deployments.ReasonRollingAlready:
		return "it goes on already"
	}
	return string(reason)
}

// sayCause is why one node failed.
func sayCause(f deployments.Facts) string {
	switch cause, text := deployments.Reason(f["cause"]), f["error"]; {
	case cause == deployments.ReasonGone:
		return "gone while it switched"
	case cause == deployments.ReasonNotInTime:
		return "not converged in time, " + text
	case cause == deployments.ReasonUnhealthy && text == "":
		return "its health checks fail"
	default:
		return text
	}
}

func sayNoWayBack(f deployments.Facts) string {
	if f["stable"] == "none" {
		return "; there is nothing to go back to"
	}
	return ""
}

// sayRolledBack is why a release was rolled back.
func sayRolledBack(message string, left int) string {
	s := "rolled back: " + message
	if left > 0 {
		s += "; " + plural(fmt.Sprint(left), "node has", "nodes have") + " yet to come back"
	}
	return s
}

func plural(n, one, many string) string {
	if n == "1" {
		return "1 " + one
	}
	return n + " " + many
}

// sayMinute is a fact's time for people, to the minute.
func sayMinute(fact string) string {
	t, err := time.Parse(time.RFC3339, fact)
	if err != nil {
		return fact
	}
	return t.UTC().Format("2006-01-02 15:04Z")
}
