package deployments

import "time"

// Record is the JSON at desired/STAGE/ROLE/UNIT: what a unit should run, and how far the fleet may have gone
// there. Written by the mirror that holds the lease; where no mirror runs, a person may write a bare pointer
// instead. It stays under 1 KB: 5,000 watchers of a large value take seconds to wake (one of 300 bytes: 0.2 s).
type Record struct {
	// Target is what Git names. Stable is what nodes that aren't admitted run: the last target that finished
	// its rollout; zero before the first one has.
	Target Pointer `json:"target"`
	Stable Pointer `json:"stable,omitzero"`
	// Generation grows by one with each new target, and where a rollout turns back or is tried again: what tells a newer record
	// from an older one, whatever Consul's indexes do, and by which a node's report says that it knows of it. A bare pointer has generation 0.
	Generation int64 `json:"generation"`
	// Retry grows by one with each retry that an operator asked for by control/: an agent tries a release that failed on its node
	// once more when Generation or Retry differ from those that it failed under.
	Retry int64 `json:"retry,omitempty"`
	// Commit is the full hash of the Git commit that set Target.
	Commit string `json:"commit,omitempty"`
	// After and Drift are the unit file's, for agents, which don't read Git.
	After []string `json:"after,omitempty"`
	Drift Drift    `json:"drift,omitempty"`
	// MinAgent is the FormatLevel that a reader needs to act on the record; 0: any.
	MinAgent int `json:"min_agent,omitempty"`
	// Rollout is nil when every node is admitted.
	Rollout *Progress `json:"rollout,omitempty"`
}

// Progress is how far a rollout is.
type Progress struct {
	Phase Phase `json:"phase"`
	// Cutoff admits the nodes whose rank is not above it; see policy.Rank. 0 admits none; math.MaxUint64 all.
	Cutoff uint64 `json:"cutoff,string"`
	// Since is when this phase, or the last step within it, began; the mirror's clock.
	Since time.Time `json:"since"`
	// Reason says, in words for an operator, why the rollout stands where it does. Package policy knows by its beginning one that a
	// freeze holds, and one whose unit is gone from Git: agents of before refuse a record with a field that they don't know.
	Reason string `json:"reason,omitempty"`
	// Bad is the digest that was rolled back: it stays out until Git names another or an operator retries.
	Bad Digest `json:"bad,omitzero"`
	// Promoted is set once an operator, or the approval: auto default after the bake, let it go past its canary.
	Promoted bool `json:"promoted,omitempty"`
	// Forced is set where an operator let it start, or go on, within a freeze window.
	Forced bool `json:"forced,omitempty"`
	// Healthy is since when the canaries, or all nodes where there are none, are converged: where the bake begins.
	Healthy time.Time `json:"healthy,omitzero"`
	// Borne is how many failed nodes an operator has accepted by resume, on top of max_failures.
	Borne int `json:"borne,omitempty"`
	// Over are targets whose rollouts this one replaced before they had ended, at most MaxOver: nodes that run one of them stay
	// on it until their turn comes, so that replacing a rollout doesn't move all of them at once.
	Over []Replaced `json:"over,omitempty"`
}

// Replaced is how far the rollout of an earlier target had come.
type Replaced struct {
	Digest Digest `json:"digest"`
	Cutoff uint64 `json:"cutoff,string"`
	// Generation is of the last record that let nodes begin it: a node on which it had failed earlier may have tried it once more.
	Generation int64 `json:"generation,omitempty"`
	// Back is set where its nodes had been told to go back to stable, and may be on their way.
	Back bool `json:"back,omitempty"`
}

// MaxOver bounds Progress.Over: a record stays small.
const MaxOver = 3

// Phase is a rollout's state.
type Phase string

const (
	PhaseCanary  Phase = "canary"  // the canaries go, and bake
	PhaseWaiting Phase = "waiting" // baked; waits for promote, or for a freeze window to end
	PhaseRolling Phase = "rolling" // the rest goes, max_unavailable at a time
	PhasePaused  Phase = "paused"  // by an operator, or by on_failure: pause
	// PhaseBack rolls back to Stable without gates: the cutoff shrinks from all to none. A node at or below it that runs Target
	// (or one of Over) stays there until it is its turn; every other runs Stable.
	PhaseBack   Phase = "back"
	PhaseHalted Phase = "halted" // rolled back and done: stays on Stable until Git names another target
)

// Pin is an operator's override of a record, for all nodes of a unit or for one.
type Pin struct {
	// Hold keeps what runs, whatever it is. Release is zero then.
	Hold    bool    `json:"hold,omitempty"`
	Release Pointer `json:"release,omitzero"`
	// Reason and By are shown wherever the pin is.
	Reason string `json:"reason,omitempty"`
	By     string `json:"by,omitempty"`
	// Until ends the pin by itself; zero: never.
	Until time.Time `json:"until,omitzero"`
}

// Over reports whether a pin has ended by itself. It stays in the store until somebody removes it, and counts for nothing.
func (p Pin) Over(now time.Time) bool { return !p.Until.IsZero() && !now.Before(p.Until) }
