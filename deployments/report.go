package deployments

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Report is the JSON at status/STAGE/ROLE/NODE: what one node says of itself in one role. Written by that
// node's agent alone, when something changed, never as a heartbeat; held by the node's session.
type Report struct {
	Node string `json:"node"`
	// Agent is the agent's version, Started when it started; one that starts again before it had converged, without a
	// boot in between, keeps the first time. The node's clock.
	Agent   string    `json:"agent,omitempty"`
	Started time.Time `json:"started"`
	// Joined is since when the store has held the node's entries without a gap, as kv.Presence tells it: larger after each
	// restart, and each time that it was cut off. 0: an agent that doesn't tell.
	Joined uint64 `json:"joined,omitempty,string"`
	// Ready is what /ready says: every unit of every role converged and healthy.
	Ready bool `json:"ready"`
	// Reason is what is wrong with the node's role as a whole, with its Facts: ReasonTooManyUnits. Mostly empty.
	Reason Reason                `json:"reason,omitempty"`
	Facts  Facts                 `json:"facts,omitempty"`
	Units  map[string]UnitReport `json:"units"`
}

// UnitReport is where one unit stands on one node.
type UnitReport struct {
	State State `json:"state"`
	// Running is the release that dest resolves to; Version is its manifest's.
	Running Pointer `json:"running,omitzero"`
	Version string  `json:"version,omitempty"`
	// Want is what policy.Resolve last answered, and Why its reason in words.
	Want Pointer `json:"want,omitzero"`
	Why  string  `json:"why,omitempty"`
	// Generation is the record's that Want was resolved from. A node that has converged, and has nothing to do for a
	// newer one, tells of that with its next report.
	Generation int64 `json:"generation,omitempty"`
	// Staged is the digest of a target that lies ready on disk, before the node is admitted.
	Staged Digest `json:"staged,omitzero"`
	// Quarantined are digests that failed after the switch on this node, and stay out until retried.
	Quarantined []Digest `json:"quarantined,omitempty"`
	// Reason is why State is what it is, with its Facts; empty if State says it all.
	Reason Reason `json:"reason,omitempty"`
	Facts  Facts  `json:"facts,omitempty"`
	// Serves is set where something that kedge did not deploy lies at dest, while no release of the unit runs.
	Serves bool `json:"serves,omitempty"`
	// Leavable is set while what was at dest before the unit's first release can be put back.
	Leavable bool `json:"leavable,omitempty"`
	// Pinned is set where a pin, not the record, decided.
	Pinned bool `json:"pinned,omitempty"`
	// Error is the newest trouble, one line, at most 300 bytes, without secrets; empty when all is well.
	Error string `json:"error,omitempty"`
	// Since is when State was entered; the node's clock.
	Since time.Time `json:"since"`
	// Drift lists paths of the live tree that differ from the index, at most five.
	Drift []string `json:"drift,omitempty"`
	// Compared is how something else's tree at dest stood to a release: when the first release came or, on a node that
	// only observes, when it was looked at last.
	Compared *Compared `json:"compared,omitempty"`
	// Fetched and Total are bytes, while State is StateFetching.
	Fetched int64 `json:"fetched,omitempty"`
	Total   int64 `json:"total,omitempty"`
}

// Compared is the result of comparing the tree at dest, whoever put it there, with a release.
type Compared struct {
	Release Digest `json:"release"`
	Dest    string `json:"dest,omitempty"` // empty: the release has commands only
	// Differs is how many paths differ, and Paths are the first of them. Missing: there is nothing at dest.
	Differs int      `json:"differs"`
	Paths   []string `json:"paths,omitempty"`
	Missing bool     `json:"missing,omitempty"`
	// Adopted is set if the tree was taken over as it was.
	Adopted bool `json:"adopted,omitempty"`
}

// State is where a unit stands on a node.
type State string

const (
	StateConverged   State = "converged"   // runs what it should, healthy
	StateWaiting     State = "waiting"     // another unit of After first, or nothing desired yet
	StateFetching    State = "fetching"    // fetching and verifying
	StateSwitching   State = "switching"   // from drain to the end of the health checks
	StateRetrying    State = "retrying"    // transient trouble (network, S3, disk): tries again by itself
	StateQuarantined State = "quarantined" // the target failed here, and the node went back
	StateHeld        State = "held"        // a pin says hold, or the node only observes
	StateUnhealthy   State = "unhealthy"   // runs what it should, and its health checks fail
	StateInvalid     State = "invalid"     // the record or a pin doesn't parse, or policy forbids it: nothing changed
)

// States returns every state.
func States() []State {
	return []State{StateConverged, StateWaiting, StateFetching, StateSwitching, StateRetrying, StateQuarantined, StateHeld,
		StateUnhealthy, StateInvalid}
}

// Known reports whether s is one of the states above: a report's is its node's own word.
func (s State) Known() bool { return slices.Contains(States(), s) }

const (
	// MaxReport bounds a report, in bytes: many units on one node.
	MaxReport = 256 << 10
	// MaxRoleUnits bounds the units of one role that a node looks after, and those of a report.
	MaxRoleUnits = 100
)

// ParseReport reads a report. Fields that it doesn't know are passed over: agents of two versions run side by side.
func ParseReport(value []byte) (Report, error) {
	var r Report
	if len(value) > MaxReport {
		return r, fmt.Errorf("the report has %d bytes, at most %d are allowed", len(value), MaxReport)
	}
	if err := json.Unmarshal(value, &r); err != nil {
		return Report{}, fmt.Errorf("the report: %w", err)
	}
	if n := len(r.Units); n > MaxRoleUnits {
		return Report{}, fmt.Errorf("the report names %d units, at most %d are allowed", n, MaxRoleUnits)
	}
	return r, nil
}
