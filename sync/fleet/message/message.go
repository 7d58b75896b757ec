// Package message puts reasons, rollouts and decisions in words for people, with commands to type.
// The code that makes decisions knows only codes and facts.
package message

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"kedge/deployments"
)

// texts has the words for each reason that rolloutText doesn't have. {name} stands for a fact. A part in brackets is
// left out if one of its facts is missing.
var texts = map[deployments.Reason]string{
	// of a rollout
	deployments.ReasonFrozen:           "frozen[ by {window}][ until {until}][, and {opens} opens][ ({reason})]",
	deployments.ReasonBaking:           "[{who} ]bake[ until {until}]",
	deployments.ReasonAwaitingReports:  "[{who} ]have baked, and have yet to report how they are now",
	deployments.ReasonBakingAgain:      "the bake begins anew when all are healthy again",
	deployments.ReasonAwaitingApproval: "the canaries are healthy: waits for promote",
	deployments.ReasonAborted:          "aborted by an operator",
	deployments.ReasonPromoted:         "promoted by an operator",
	deployments.ReasonResumed:          "resumed by an operator",
	deployments.ReasonFreezeEnded:      "goes on after a freeze",
	deployments.ReasonConverged:        "the rollout is complete",
	deployments.ReasonEveryNode:        "every node at once",
	deployments.ReasonFirstRelease:     "first release: every node at once",
	deployments.ReasonRunsAlready:      "every node runs the release already, or did when it last reported",
	deployments.ReasonNodesMissing: "waits, for a limited time, for nodes that are away[: {live} of {known} known " +
		"nodes are live and follow the rollout]",
	deployments.ReasonUnheard:         "[node {node} ]has yet to report whether anything serves at dest",
	deployments.ReasonUnaware:         "[node {node} ]is healthy, and has yet to notice that it was admitted",
	deployments.ReasonNothingToGoBack: "there is nothing to go back to",
	deployments.ReasonOrphaned:        "the unit's file is no longer in Git, so nodes keep what they run",

	// of a refused order
	deployments.ReasonUnknownOrder:    "there is no such order: want promote, pause, resume, abort or retry",
	deployments.ReasonNotSeenYet:      "the order was for a rollout that has been replaced: look at the new one first",
	deployments.ReasonNothingUnderWay: "no rollout is under way",
	deployments.ReasonNotPaused:       "the rollout is not paused",
	deployments.ReasonRollingAlready:  "the rollout goes on already",

	// of a node
	deployments.ReasonNoRecord:          "there is no record, so nothing changes",
	deployments.ReasonInvalidRecord:     "the record doesn't parse, so nothing changes[: {error}]",
	deployments.ReasonInvalidPin:        "the pin doesn't parse, so nothing changes[: {key}][: {error}]",
	deployments.ReasonPinned:            "pinned[ by {by}][ until {until}][ ({reason})]",
	deployments.ReasonHeld:              "held[ by {by}][ until {until}][ ({reason})]",
	deployments.ReasonTarget:            "the record's target[ of Git commit {commit}][, generation {generation}]",
	deployments.ReasonAdmitted:          "admitted to the target[ of Git commit {commit}]",
	deployments.ReasonRunsTarget:        "not admitted, but this node runs the target already",
	deployments.ReasonStable:            "the stable release, until this node is admitted to the target",
	deployments.ReasonStableFirst:       "the stable release first, as this node runs one that the record doesn't name",
	deployments.ReasonNotAdmitted:       "not admitted to the target yet",
	deployments.ReasonRejoined:          "this node was away: it stays on what it runs until its turn",
	deployments.ReasonAwaitingRollback:  "stays on what it runs until its turn to go back",
	deployments.ReasonLeaving:           "goes back to what was there before kedge",
	deployments.ReasonRestored:          "went back to what was there before kedge",
	deployments.ReasonStableQuarantined: "the stable release failed on this node, which stays on what it runs",
	deployments.ReasonPinPaced:          "the mirror rolls the pin out, within max_unavailable",
	deployments.ReasonExpired:           "the pin has ended",
	deployments.ReasonOutranked:         "another key takes precedence[: the {outranked_by}]",
	deployments.ReasonSuperseded:        "keeps the release of a superseded rollout, until it is admitted",
	deployments.ReasonSourceNotAllowed:  "this node's configuration doesn't allow releases from this source[: {url}]",
	deployments.ReasonUnsigned:          "no trusted key has signed the release[: {error}]",
	deployments.ReasonDigestMismatch:    "the content doesn't match its digest[: {error}]",
	deployments.ReasonOlderThanFloor:    "the release is too old for this node[: {error}]",
	deployments.ReasonCreatedAhead: "the release says that it was made in the future[: {created}]" +
		"[; releases made before {floor} are refused from now on]",
	deployments.ReasonAgentTooOld: "the record needs a newer kedge, so nothing changes",
	deployments.ReasonOldGeneration: "the record is older than the one followed last" +
		"[: generation {generation}, not {acted_on}]",
	deployments.ReasonQuarantined:        "failed on this node[ at {step}][: {error}]",
	deployments.ReasonUnhealthy:          "unhealthy[: {check}][: {error}]",
	deployments.ReasonStorageUnavailable: "[node {node} ]can't read from the object storage, and tries again[: {error}]",
	deployments.ReasonSecretUnavailable:  "[node {node} ]can't read a secret, and tries again[: {error}]",
	deployments.ReasonDiskFull:           "no space left on the disk[: {error}]",
	deployments.ReasonObserving:          "the node only observes the unit, and touches nothing[; {differs} paths differ]",
	deployments.ReasonDependency:         "waits for another unit of its role[: {unit}]",
	deployments.ReasonDestInUse:          "another unit deploys to the same directory, or above or below it[: {error}]",
	deployments.ReasonForeignDeployment:  "something other than the agent has deployed to dest[ {dest}][: {found}]",
	deployments.ReasonTooManyUnits: "the role has more units than a node takes" +
		"[: at most {limit}, so {left_out} are left out]",
	deployments.ReasonGone:      "its agent is away[: {error}]",
	deployments.ReasonNotInTime: "not converged in time[: {error}]",
}

// Text returns a reason and its facts in words, in one line. A reason from a newer kedge that has no words here is
// shown as its code with its error.
func Text(reason deployments.Reason, facts deployments.Facts) string {
	text := ""
	if pattern, known := texts[reason]; known {
		text = optional.ReplaceAllStringFunc(pattern, func(part string) string {
			return fill(part[1:len(part)-1], facts)
		})
	} else if text = rolloutText(reason, facts); text == "" {
		text = string(reason)
		if facts["error"] != "" {
			text += ": " + facts["error"]
		}
	}
	if facts["stable"] == "none" && reason != deployments.ReasonReplacedTooOften {
		text += "; there is nothing to go back to"
	}
	if text = OneLine(text); text == "" {
		return OneLine(string(reason))
	}
	return text
}

var (
	optional    = regexp.MustCompile(`\[[^][]*\]`)
	placeholder = regexp.MustCompile(`\{([a-z_]+)\}`)
)

// fill returns a part of a text with each {name} replaced by the fact of that name; empty: a fact is missing. Times are
// shown in UTC, to the minute.
func fill(part string, facts deployments.Facts) string {
	complete := true
	text := placeholder.ReplaceAllStringFunc(part, func(name string) string {
		value := facts[strings.Trim(name, "{}")]
		complete = complete && value != ""
		return minute(value)
	})
	if !complete {
		return ""
	}
	return text
}

// minute formats a time, in UTC and to the minute, and returns any other fact unchanged.
func minute(fact string) string {
	t, err := time.Parse(time.RFC3339, fact)
	if err != nil {
		return fact
	}
	return t.UTC().Format("2006-01-02 15:04Z")
}

// rolloutText returns the words for those reasons of rollouts and orders that texts lacks; empty: another reason. Most
// of these words depend on a fact's value.
func rolloutText(reason deployments.Reason, f deployments.Facts) string {
	switch reason {
	case deployments.ReasonCanary:
		if f["admitted"] == "" {
			return "canaries go first"
		}
		return f["admitted"] + " of " + plural(f["of"], "canary", "canaries") + " admitted"
	case deployments.ReasonRolling:
		if f["admitted"] == "" {
			return "rolling out"
		}
		return f["admitted"] + " of " + f["of"] + " nodes admitted"
	case deployments.ReasonTooManyFailed:
		says := fmt.Sprintf("%s of %s failed (%s: %s)", f["failed"], plural(f["of"], "node", "nodes"), f["node"],
			failure(f))
		failed, _ := strconv.Atoi(f["failed"])
		if limit, err := strconv.Atoi(f["limit"]); err == nil && failed <= limit {
			return says + ", and no node runs the release"
		}
		return says + ", at most " + f["limit"] + " may"
	case deployments.ReasonForced:
		if f["starts"] != "" {
			return "started by an operator, despite a freeze"
		}
		return "promoted by an operator, despite a freeze"
	case deployments.ReasonRetried:
		if f["ended"] != "" {
			return "tried once more where it failed"
		}
		return "tried once more by an operator"
	case deployments.ReasonPaused:
		return "paused by an operator"
	case deployments.ReasonAllPinned:
		switch f["nodes"] {
		case "":
			return "all nodes of the unit are pinned"
		case "1":
			return "the unit's only node is pinned"
		}
		return "all " + f["nodes"] + " nodes of the unit are pinned"
	case deployments.ReasonNoLiveNodes:
		if f["known"] == "" || f["known"] == "0" {
			return "waits for a node: none is known"
		}
		return "no live node follows the rollout: " + plural(f["known"], "node is", "nodes are") + " gone"
	case deployments.ReasonReplacedTooOften:
		if f["paused"] != "" {
			return "too many releases came while the rollout was paused, so the newest waits: resume it first"
		}
		if f["stable"] == "none" {
			return "too many releases came before one was stable: the newest waits until the rollout ends, or nodes no longer " +
				"run the earlier ones"
		}
		return "too many releases came one after the other: all nodes go to stable first"
	case deployments.ReasonRollingBack:
		if f["order"] == "retry" {
			return "the release is being rolled back: retry when that is done"
		}
		return "the release is being rolled back: name another, in Git or by a pin, or retry when that is done"
	case deployments.ReasonRolledBack:
		if f["pin"] != "" {
			return "the release was rolled back before the pin, and the end of the pin does not retry it"
		}
		return "the release was rolled back: name another, in Git or by a pin, or retry"
	case deployments.ReasonPausedAlready:
		if f["order"] == "promote" {
			return "the rollout is paused: resume it first"
		}
		return "the rollout is paused already"
	}
	return ""
}

func failure(f deployments.Facts) string {
	switch cause, text := deployments.Reason(f["cause"]), f["error"]; {
	case cause == deployments.ReasonGone:
		return "gone before it converged"
	case cause == deployments.ReasonNotInTime:
		return "not converged in time, " + text
	case cause == deployments.ReasonUnhealthy && text == "":
		return "its health checks fail"
	default:
		return text
	}
}

func plural(n, one, many string) string {
	if n == "1" {
		return "1 " + one
	}
	return n + " " + many
}

// OneLine returns a text without line breaks, control characters and runs of blanks, fit for a terminal or a page.
func OneLine(s string) string {
	return strings.Join(strings.Fields(Clean(s)), " ")
}

// Clean replaces by a blank each character that would move a terminal's cursor, change its colours or reorder a line,
// and by ? what isn't UTF-8.
func Clean(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Noncharacter_Code_Point) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}
