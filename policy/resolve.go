package policy

import (
	"time"

	"kedge/deployments"
)

// Facts is all that decides what one node should run of one unit: plain data, read by the agent.
type Facts struct {
	Unit deployments.UnitID
	Node string
	Now  time.Time
	// Record, UnitPin and NodePin are what the keys hold.
	Record  Value[deployments.Record]
	UnitPin Value[deployments.Pin]
	NodePin Value[deployments.Pin]
	// Running is the release that is live; zero: none. Quarantined are digests that failed on this node.
	Running     deployments.Pointer
	Quarantined []deployments.Digest
	// Bounds are what this node's configuration allows.
	Bounds Bounds
}

// Value is a key's value after parsing: absent (the zero Value), good, or bad with Err.
type Value[T any] struct {
	Present bool
	Value   T
	Err     error
}

// Action is what an agent does with a unit.
type Action string

const (
	ActRun   Action = "run"   // converge to Target
	ActKeep  Action = "keep"  // change nothing: nothing is desired, or it can't be told, or it isn't allowed
	ActHold  Action = "hold"  // change nothing: a pin says so
	ActStage Action = "stage" // converge to Target (stable), and have Stage ready on disk for when this node is admitted
)

// Source is which key decided.
type Source string

const (
	FromNothing Source = "nothing"
	FromNodePin Source = "node pin"
	FromUnitPin Source = "unit pin"
	FromTarget  Source = "target"
	FromStable  Source = "stable"
)

// Decision is Resolve's answer, with its reason.
type Decision struct {
	Action Action
	// Target is what to run; zero for ActKeep and ActHold. Stage is what to have ready as well; mostly zero.
	Target, Stage deployments.Pointer
	Source        Source
	// Why says in one line, for a person, what decided: "unit pin by alice until 14:00 (incident 812)".
	Why string
	// Invalid is set where a value didn't parse or isn't allowed: what status shows as an error. It may come with any Action:
	// a bad node pin changes nothing on that node (ActKeep).
	Invalid error
	// Recheck is when time alone could change the answer (a pin's until); zero: never.
	Recheck time.Time
	// Trace is the whole chain, for kedge explain: each step that was looked at, and what it said.
	Trace []Step
}

// Step is one line of a Decision's chain.
type Step struct {
	What string // "node pin", "record", "admission", "quarantine", …
	Says string
	// Decides marks the step that decided; Unblock says what an operator can do about it, where there is something.
	Decides bool
	Unblock string
}

// Bounds are what a node's own configuration allows, whatever KV says. The zero value allows everything.
type Bounds struct {
	// Sources are URL prefixes (whole path segments) that a release may come from; empty: any.
	Sources []string
	// Dests are directories in or below which Dest may lie; empty: any.
	Dests []string
	// Users that commands may run as; empty: any. NoCommands forbids commands.
	Users      []string
	NoCommands bool
}

// Resolve answers what a node should run of a unit: node pin, else unit pin, else the record: target if the node
// is admitted, else stable. It has no side effects, and the same Facts give the same Decision.
//
// A value that is present but doesn't parse changes nothing (ActKeep with Invalid), even where a lower one is good: a typo in
// a pin must not silently mean "no pin". An absent record changes nothing. A quarantined digest is still the Target, with
// its step in the Trace: the agent doesn't run it, and says so.
func Resolve(f Facts) Decision { return resolve(f) }

// Rank is a node's place in the order in which a target's rollout admits nodes: a hash of the node's name and the target's
// digest, so that the canary is another node each time. It is never 0, so that a cutoff of 0 admits none.
func Rank(node string, target deployments.Digest) uint64 { return rank(node, target) }
