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
	// Generation grows by one with each new target, and where a rollout turns back or is tried again: what tells a
	// newer record from an older one, whatever Consul's indexes do, and by which a node's report says that it knows of
	// it. A bare pointer has generation 0.
	Generation int64 `json:"generation"`
	// Retry grows by one with each retry that an operator asked for by control/: an agent tries a release that failed
	// on its node once more when Generation or Retry differ from those that it failed under.
	Retry int64 `json:"retry,omitempty"`
	// Commit is the full hash of the Git commit that set Target.
	Commit string `json:"commit,omitempty"`
	// After and Drift are the unit file's, for agents, which don't read Git.
	After []string `json:"after,omitempty"`
	Drift Drift    `json:"drift,omitempty"`
	// Adopt is the unit file's, too.
	Adopt bool `json:"adopt,omitempty"`
	// Paced is set if the unit has a rollout. Its unit pins wait for the mirror, which rolls them out as Target,
	// unless they say at_once.
	Paced bool `json:"paced,omitempty"`
	// Joined bounds whom the record speaks to: nodes that joined later (Report.Joined), and run something else, were
	// away when it was written. They keep what they run until Joined is raised over them, as the budget has room. 0:
	// it speaks to all.
	Joined uint64 `json:"joined,omitempty,string"`
	// Claim is the generation that first asked for Target under its commit, or under a pin; 0: Generation. A negative
	// one was lost with the store's data: it is some generation up to -Claim. A release that failed on a node stays out
	// there while Claim and Retry stay the same.
	Claim int64 `json:"claim,omitempty"`
	// Nodes is how many nodes the unit was known to have when its rollout last moved: a shorter list has to stand for
	// a while.
	Nodes int `json:"nodes,omitempty"`
	// Orphaned is set if Git names the unit no longer, and pruning is off: nodes keep what they run, until a unit that
	// Git names takes its dest.
	Orphaned bool `json:"orphaned,omitempty"`
	// Pinned is set while Target is what a unit pin names.
	Pinned *Pinned `json:"pinned,omitempty"`
	// MinAgent is the FormatLevel that a reader needs to act on the record; 0: any.
	MinAgent int `json:"min_agent,omitempty"`
	// Rollout is nil when every node is admitted.
	Rollout *Progress `json:"rollout,omitempty"`
}

// Pinned is what Git's record was when a unit pin took its place: the record goes back there when the pin ends.
type Pinned struct {
	Target Pointer `json:"target,omitzero"`
	Stable Pointer `json:"stable,omitzero"`
	Claim  int64   `json:"claim,omitempty"`
	// Failed is the digest that was rolled back, or has to be.
	Failed Digest `json:"failed,omitzero"`
}

// Progress is how far a rollout is.
type Progress struct {
	Phase Phase `json:"phase"`
	// Cutoff admits the nodes whose rank is not above it; see policy.Rank. 0 admits none; math.MaxUint64 all.
	Cutoff uint64 `json:"cutoff,string"`
	// Early admits, by their rank as well, nodes that run one of Superseded: the canaries of a target that was
	// replaced go first.
	Early uint64 `json:"early,omitempty,string"`
	// Fast is set if it needs no gates: a pin, or a release that was stable before.
	Fast bool `json:"fast,omitempty"`
	// Unproven is set if Stable went out at once and never became good everywhere: nodes that it keeps out of service
	// take no room.
	Unproven bool `json:"unproven,omitempty"`
	// Serving is set once a node of a first release has said that something else serves there: it ends by its gates.
	Serving bool `json:"serving,omitempty"`
	// Since is when this phase, or the last step within it, began; the mirror's clock.
	Since time.Time `json:"since"`
	// Reason is why the rollout stands where it does, with its Facts. Message says it in words, for readers of the
	// version before; decisions never look at it.
	Reason  Reason `json:"reason,omitempty"`
	Facts   Facts  `json:"facts,omitempty"`
	Message string `json:"message,omitempty"`
	// Failed is the digest that was rolled back: it stays out until Git names another or an operator retries.
	Failed Digest `json:"failed,omitzero"`
	// Promoted is set once an operator, or the approval: auto default after the bake, let it go past its canary.
	Promoted bool `json:"promoted,omitempty"`
	// Forced is set where an operator let it start, or go on, within a freeze window.
	Forced bool `json:"forced,omitempty"`
	// HealthySince is since when the canaries, or all nodes where there are none, are converged: where the bake begins.
	HealthySince time.Time `json:"healthy_since,omitzero"`
	// Tolerated is how many failed nodes an operator has accepted by resume, on top of max_failures.
	Tolerated int `json:"tolerated_failures,omitempty"`
	// Superseded are targets whose rollouts this one replaced before they had ended, at most MaxSuperseded: nodes that run
	// one of them stay on it until their turn comes, so that replacing a rollout doesn't move all of them at once.
	Superseded []Superseded `json:"superseded,omitempty"`
}

// HeldUp reports whether a rollout that had begun waits for a freeze to end, or waited for one when the record was
// last written.
func (p *Progress) HeldUp() bool {
	return (p.Phase == PhaseCanary || p.Phase == PhaseRolling) && !p.Forced && p.Reason == ReasonFrozen
}

// Superseded is how far the rollout of an earlier target had come when another replaced it.
type Superseded struct {
	Digest Digest `json:"digest"`
	Cutoff uint64 `json:"cutoff,string"`
	// Generation is of the last record that let nodes begin it: a node on which it had failed earlier may have tried
	// it once more.
	Generation int64 `json:"generation,omitempty"`
	// Back is set if its nodes had been told to go back to stable, and may be on their way.
	Back bool `json:"back,omitempty"`
}

// MaxSuperseded bounds Progress.Superseded: a record stays small.
const MaxSuperseded = 3

// Phase is a rollout's state.
type Phase string

const (
	PhaseCanary          Phase = "canary"           // the canaries go, and bake
	PhasePendingApproval Phase = "pending-approval" // baked; waits for promote
	PhaseFrozen          Phase = "frozen"           // has yet to start: waits for a freeze window to end
	PhaseRolling         Phase = "rolling"          // the rest goes, max_unavailable at a time
	PhasePaused          Phase = "paused"           // by an operator, or by on_failure: pause
	// PhaseRollingBack goes back to Stable without gates: the cutoff shrinks from all to none. A node at or below it that
	// runs Target (or one of Superseded) stays there until it is its turn; every other runs Stable.
	PhaseRollingBack Phase = "rolling-back"
	PhaseRolledBack  Phase = "rolled-back" // done: stays on Stable until Git names another target
)

// Phases returns every phase.
func Phases() []Phase {
	return []Phase{
		PhaseCanary,
		PhasePendingApproval,
		PhaseFrozen,
		PhaseRolling,
		PhasePaused,
		PhaseRollingBack,
		PhaseRolledBack,
	}
}

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
	// AtOnce lets every node follow as soon as it sees the pin, whatever max_unavailable says.
	AtOnce bool `json:"at_once,omitempty"`
}

// Expired reports whether a pin has ended by itself. It stays in the store until somebody removes it, and counts
// for nothing.
func (p Pin) Expired(now time.Time) bool { return !p.Until.IsZero() && !now.Before(p.Until) }
