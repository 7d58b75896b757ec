package deployments

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Report is the JSON at status/STAGE/ROLE/NODE: what one node reports of itself in one role. Only that node's
// agent writes it, when something changed, never as a heartbeat. The node's Consul session holds it.
type Report struct {
	Node string `json:"node"`
	// Agent is the agent's version. Started is when the agent started, by the node's clock. An agent that restarts
	// before it had converged keeps the first time, unless the machine was booted in between.
	Agent   string    `json:"agent,omitempty"`
	Started time.Time `json:"started"`
	// Joined is a number that grows each time that the store takes the node's report anew. It does
	// so at each start of the agent, and each time that the report was lost because the node was
	// cut off (see kv.Presence). 0: the first report, which has no number yet.
	Joined uint64 `json:"joined,omitempty,string"`
	// Ready is the answer of /ready. Since the agent started, every unit of the node must have had
	// a healthy release in service, and none may be unhealthy or drained now. A node without units
	// is ready only if allow_empty is set.
	Ready bool `json:"ready"`
	// Reason, with its Facts, says what is wrong with the node's role as a whole, such as
	// ReasonTooManyUnits. It is mostly empty.
	Reason Reason                `json:"reason,omitempty"`
	Facts  Facts                 `json:"facts,omitempty"`
	Units  map[string]UnitReport `json:"units"`
}

// UnitReport is the state of one unit on one node.
type UnitReport struct {
	State State `json:"state"`
	// Running is the release that is live, and Version its manifest's version; empty: none is.
	Running Pointer `json:"running,omitzero"`
	Version string  `json:"version,omitempty"`
	// Want is the release that policy.Resolve last answered, and Message why, in words, or what the unit waits for.
	Want    Pointer `json:"want,omitzero"`
	Message string  `json:"message,omitempty"`
	// Generation is the highest generation of the record that the node knows of. A converged node that
	// has nothing to do for a newer record reports that record's generation only with the node's next
	// change. It reports the generation at once if the record's rollout has Superseded targets.
	Generation int64 `json:"generation,omitempty"`
	// Staged is the digest of a release that lies ready on disk, mostly for when the node is admitted to it.
	Staged Digest `json:"staged,omitzero"`
	// Quarantined are the digests that failed on this node once they were staged, and stay out until retried.
	Quarantined []Digest `json:"quarantined,omitempty"`
	// Failed is the digest of Want if that release failed here and isn't tried again. It is set until what the node went
	// back to is in service. Until then State is StateSwitching or StateUnhealthy.
	Failed Digest `json:"failed,omitzero"`
	// RollingBack is set while the node goes back from a release that failed here, until what it goes back to is in
	// service. Meanwhile Want may name the release that failed or the one that the node goes back to.
	RollingBack bool `json:"rolling_back,omitempty"`
	// Reason is why State is what it is, with its Facts; empty if State needs no reason.
	Reason Reason `json:"reason,omitempty"`
	Facts  Facts  `json:"facts,omitempty"`
	// OtherServes is set if no release of the unit runs, but something else lies at dest, or
	// another unit deploys there.
	OtherServes bool `json:"serves,omitempty"`
	// Leavable is set as long as what was at dest before the unit's first release can be put back.
	Leavable bool `json:"leavable,omitempty"`
	// Pinned is set if a pin decided, not the record.
	Pinned bool `json:"pinned,omitempty"`
	// Error is what is wrong now, in one line of at most 300 bytes, without secrets; empty: nothing is.
	Error string `json:"error,omitempty"`
	// Errors are the newest error lines of the unit's log since the agent started, the newest first: at most
	// MaxLoggedErrors. A new line alone is no reason to write the report.
	Errors []LoggedError `json:"errors,omitempty"`
	// Since is when State was entered, by the node's clock.
	Since time.Time `json:"since"`
	// Drift lists at most five paths that differ from the release: dest itself, or paths in its
	// tree.
	Drift []string `json:"drift,omitempty"`
	// Compared is how the tree at dest differs from a release; nil: nothing was compared. A node
	// that only observes compares now and then. With adopt, any other node compares before the
	// unit's first release goes live.
	Compared *Compared `json:"compared,omitempty"`
	// Fetched and Total are bytes of a download, while State is StateFetching.
	Fetched int64 `json:"fetched,omitempty"`
	Total   int64 `json:"total,omitempty"`
}

// MaxLoggedErrors bounds UnitReport.Errors, and MaxErrorText the text of each, in bytes.
const (
	MaxLoggedErrors = 3
	MaxErrorText    = 240
)

// LoggedError is an error line of an agent's log.
type LoggedError struct {
	At   time.Time `json:"at"`   // when it was logged last, by the node's clock, in whole seconds
	Text string    `json:"text"` // in one line, without secrets
}

// Compared is the result of comparing a release with the tree at dest, whoever put it there.
type Compared struct {
	Release Digest `json:"release"`
	Dest    string `json:"dest,omitempty"` // empty: the release has commands only
	// Differs is how many paths differ, and Paths are the first of them. Missing is set if there is nothing at
	// dest.
	Differs int      `json:"differs"`
	Paths   []string `json:"paths,omitempty"`
	Missing bool     `json:"missing,omitempty"`
	// Adopted is set if the tree was taken over unchanged.
	Adopted bool `json:"adopted,omitempty"`
}

// State is the state of a unit on a node.
type State string

const (
	StateConverged   State = "converged"   // runs what it should, and is healthy
	StateWaiting     State = "waiting"     // waits for another unit, or has no release to run yet, or none any more
	StateFetching    State = "fetching"    // fetching and verifying
	StateSwitching   State = "switching"   // from drain to the end of the health checks, and on the way back
	StateRetrying    State = "retrying"    // a transient error (network, S3, disk): the node tries again by itself
	StateQuarantined State = "quarantined" // the target failed here, and the node went back if it could
	StateHeld        State = "held"        // a pin says hold, or the node only observes
	StateUnhealthy   State = "unhealthy"   // the health checks of what it runs, or went back to, fail
	StateInvalid     State = "invalid"     // the record, a pin or the manifest is wrong or not allowed: nothing changed
)

// States returns every state.
func States() []State {
	return []State{StateConverged, StateWaiting, StateFetching, StateSwitching, StateRetrying, StateQuarantined, StateHeld,
		StateUnhealthy, StateInvalid}
}

// Known reports whether s is one of States. A report may contain any text.
func (s State) Known() bool { return slices.Contains(States(), s) }

const (
	// MaxReport bounds a report, in bytes. If a node has very many units, its report leaves out details of some units, or
	// whole units.
	MaxReport = 256 << 10
	// MaxRoleUnits bounds the units of one role that a node manages, and so the units in a report.
	MaxRoleUnits = 100
)

// ParseReport parses a report. Unknown fields are ignored, as two versions of kedge run side by side.
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
	if bytes.Contains(value, []byte(`"why":`)) {
		r.readWhy(value)
	}
	return r, nil
}

// readWhy reads each unit's Message under the JSON name that the previous version used.
func (r *Report) readWhy(value []byte) {
	var old struct {
		Units map[string]struct {
			Why string `json:"why"`
		} `json:"units"`
	}
	if json.Unmarshal(value, &old) != nil {
		return // "why" is something else
	}
	for name, u := range r.Units {
		u.Message = cmp.Or(u.Message, old.Units[name].Why)
		r.Units[name] = u
	}
}
