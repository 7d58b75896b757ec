package deployments

import (
	"cmp"
	"time"
)

// Record is the JSON at desired/STAGE/ROLE/UNIT: what a unit should run, and how far the fleet may
// have gone there. The mirror that holds the lease writes it. If no mirror runs, a person or kedge
// bridge may write a bare pointer instead. A record mostly stays under 1 KB: 5,000 watchers take
// seconds to receive a large value (300 bytes: 0.2 s).
type Record struct {
	// Target is the release that Git, or a unit pin, names. Stable is what nodes that aren't admitted run: the
	// last target that finished its rollout; zero if none has yet.
	Target Pointer `json:"target"`
	Stable Pointer `json:"stable,omitzero"`
	// Generation grows with each new target, and each time that a rollout turns back or is tried
	// again. It mostly grows by one. It orders records, whatever Consul's indexes do. A node's
	// report names the generation that the node acts on. A bare pointer has generation 0.
	Generation int64 `json:"generation"`
	// Retry grows by one with each retry order that the mirror obeys. It may be 0 again after the
	// store has lost records. A larger Retry lets a release be tried once more on the nodes where
	// it failed: see Claim.
	Retry int64 `json:"retry,omitempty"`
	// Commit is the full hash of the Git commit that set Target. While Target is a pin's, it is the
	// commit of the target before the pin.
	Commit string `json:"commit,omitempty"`
	// After and Drift are copied from the unit file for agents, which don't read Git.
	After []string `json:"after,omitempty"`
	Drift Drift    `json:"drift,omitempty"`
	// Adopt is a copy of the unit file's adopt: nodes may take over the tree that is at dest if it equals the release.
	Adopt bool `json:"adopt,omitempty"`
	// Paced is set if the unit has a rollout and isn't orphaned, and the mirror reads pins. Agents
	// then ignore a unit pin unless it says hold or at_once: the mirror rolls it out as Target.
	Paced bool `json:"paced,omitempty"`
	// Joined bounds which nodes the record applies to: those whose Report.Joined is not higher, and
	// those on which nothing serves. A node's Report.Joined is higher after a restart or an absence.
	// The node then keeps what it runs, unless that is Target, Stable or one of Superseded, until the
	// budget has room and the mirror raises Joined. 0: the record applies to all nodes.
	Joined uint64 `json:"joined,omitempty,string"`
	// Claim is the generation that first asked for Target under its commit, or under a pin; 0: it equals Generation. A
	// release that failed on a node stays out there until Claim or Retry grows. A negative Claim means that the generation
	// was lost with the store's data: it is at most -Claim.
	Claim int64 `json:"claim,omitempty"`
	// Nodes is how many nodes the unit was known to have when its rollout last moved. If the list of nodes is
	// shorter later, the rollout waits a while for the rest.
	Nodes int `json:"nodes,omitempty"`
	// Orphaned is set if Git no longer names the unit, and pruning is off. The rollout stays where
	// it is. Nodes keep what they run until a pin says otherwise, or a unit that Git names takes
	// the dest.
	Orphaned bool `json:"orphaned,omitempty"`
	// Pinned is set while Target comes from a unit pin.
	Pinned *Pinned `json:"pinned,omitempty"`
	// MinAgent is the FormatLevel that a reader needs to act on the record; 0: any.
	MinAgent int `json:"min_agent,omitempty"`
	// Rollout is how far the rollout to Target is; nil: every node is admitted.
	Rollout *Progress `json:"rollout,omitempty"`
}

// RequestGeneration returns the generation that first asked for the record's target; see Claim.
func (r Record) RequestGeneration() int64 { return cmp.Or(r.Claim, r.Generation) }

// CanGoBack reports whether the record's rollout has something to go back to: a stable release
// other than the target or, for a first release, what served on some node before. If it has
// nothing, an abort only pauses the rollout.
func (r Record) CanGoBack() bool {
	if r.Stable.IsZero() {
		return r.Rollout != nil && r.Rollout.Serving
	}
	return r.Stable != r.Target
}

// Pinned is the record that Git asked for before a unit pin took its place. When the pin ends, what Git names then is
// rolled out: without gates if it is Stable here, not at all if it is Failed.
type Pinned struct {
	Target Pointer `json:"target,omitzero"`
	Stable Pointer `json:"stable,omitzero"`
	Claim  int64   `json:"claim,omitempty"`
	// StablePinned is Progress.StablePinned of Stable.
	StablePinned bool `json:"stable_pinned,omitempty"`
	// Failed is the digest that was rolled back, or has to be.
	Failed Digest `json:"failed,omitzero"`
}

// Progress is how far a rollout has come, and why it stands there.
type Progress struct {
	Phase Phase `json:"phase"`
	// Cutoff admits the nodes whose rank is not above it; see policy.Rank. 0 admits none,
	// math.MaxUint64 all. While a rollout is rolled back, these are the nodes that stay for now.
	Cutoff uint64 `json:"cutoff,string"`
	// SupersededCutoff is a second cutoff, for nodes that run one of Superseded: a replaced target's canaries go first.
	SupersededCutoff uint64 `json:"early,omitempty,string"`
	// SkipsGates is set if the rollout needs no gates, as its target is a pin's or was stable
	// before.
	SkipsGates bool `json:"fast,omitempty"`
	// Unproven is set if Stable was released to all nodes at once and never became healthy everywhere. Nodes that
	// are unhealthy because of Stable don't count against the budget.
	Unproven bool `json:"unproven,omitempty"`
	// StablePinned is set if Stable is the release of a unit pin, or may be one because the store
	// had lost the record. A pin is temporary: Stable then doesn't raise the nodes' version floors.
	StablePinned bool `json:"stable_pinned,omitempty"`
	// Serving is set once a node of a first release has reported that something else serves there: the rollout
	// then goes through its gates.
	Serving bool `json:"serving,omitempty"`
	// Since is when this phase, or the last step within it, began, by the mirror's clock.
	Since time.Time `json:"since"`
	// Reason is why the rollout is in its phase, with its Facts. Message is the same in words, for readers of the previous
	// version; decisions never look at it.
	Reason  Reason `json:"reason,omitempty"`
	Facts   Facts  `json:"facts,omitempty"`
	Message string `json:"message,omitempty"`
	// Failed is the digest that was rolled back. It stays out until Git names another or an operator retries.
	Failed Digest `json:"failed,omitzero"`
	// Next is the release that Git names while a rollback goes on first: a freeze would hold up its rollout before the
	// first node. Zero: none waits.
	Next Pointer `json:"next,omitzero"`
	// Promoted is set once the rollout is past its canary, if any: by an operator, or after the bake if approval is auto.
	Promoted bool `json:"promoted,omitempty"`
	// NoCanary is set if the unit's file asked for no canaries when the rollout began: it then has no bake, either.
	NoCanary bool `json:"no_canary,omitempty"`
	// Forced is set if the rollout may go on within a freeze window, by an operator's order or after the end of a pin.
	Forced bool `json:"forced,omitempty"`
	// HealthySince is when the bake, or a wait, began: since then the admitted nodes are converged, or tolerated.
	HealthySince time.Time `json:"healthy_since,omitzero"`
	// Tolerated is how many failed nodes are accepted beyond max_failures: by resume, or left by an earlier rollout.
	Tolerated int `json:"tolerated_failures,omitempty"`
	// Superseded are targets that this one replaced before their rollouts had ended, at most MaxSuperseded. Nodes
	// that run one of them keep it until their turn comes, so that replacing a rollout doesn't move all of them at
	// once.
	Superseded []Superseded `json:"superseded,omitempty"`
}

// HeldUp reports whether a rollout that has begun waits for a freeze to end, or did when the record was last
// written.
func (p *Progress) HeldUp() bool {
	return (p.Phase == PhaseCanary || p.Phase == PhaseRolling) && !p.Forced && p.Reason == ReasonFrozen
}

// WaitsForRollback reports whether the rollout of Next begins once this rollback, or a freeze, has ended. A promote
// begins it at once.
func (p *Progress) WaitsForRollback() bool {
	return p != nil && p.Phase == PhaseRollingBack && !p.Next.IsZero()
}

// Superseded is how far the rollout of a replaced target had come.
type Superseded struct {
	Digest Digest `json:"digest"`
	Cutoff uint64 `json:"cutoff,string"`
	// Generation is the generation of the last record by which nodes could begin to deploy the replaced target.
	Generation int64 `json:"generation,omitempty"`
	// RollingBack is set if the target's nodes had been told to go back to stable, and may be on their way.
	RollingBack bool `json:"back,omitempty"`
}

// MaxSuperseded bounds Progress.Superseded, so that a record stays small.
const MaxSuperseded = 3

// Phase is a rollout's state.
type Phase string

const (
	PhaseCanary          Phase = "canary"           // the canaries go first, and bake
	PhasePendingApproval Phase = "pending-approval" // baked; waits for promote
	PhaseFrozen          Phase = "frozen"           // has yet to start: waits for a freeze window to end
	PhaseRolling         Phase = "rolling"          // the other nodes follow, within max_unavailable
	PhasePaused          Phase = "paused"           // by an operator, or after failures, if it isn't rolled back
	// PhaseRollingBack goes back to Stable, or to what served before a first release, without gates: the cutoff shrinks
	// to none. A node at or below it that runs Target, or one of Superseded, keeps that until its turn.
	PhaseRollingBack Phase = "rolling-back"
	PhaseRolledBack  Phase = "rolled-back" // done: nodes stay on what they went back to, until a retry or another target
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

// Pin overrides a record, for all nodes of a unit or for one node. Operators and kedge bridge write pins.
type Pin struct {
	// Hold makes nodes keep what they run, whatever it is. Release is then zero.
	Hold    bool    `json:"hold,omitempty"`
	Release Pointer `json:"release,omitzero"`
	// Reason and By are shown wherever the pin is shown.
	Reason string `json:"reason,omitempty"`
	By     string `json:"by,omitempty"`
	// Until is when the pin ends by itself; zero: never.
	Until time.Time `json:"until,omitzero"`
	// AtOnce lets every node follow as soon as it sees the pin, whatever max_unavailable says.
	AtOnce bool `json:"at_once,omitempty"`
}

// Expired reports whether the pin has ended by itself. An expired pin stays in the store until somebody removes it, but
// has no effect.
func (p Pin) Expired(now time.Time) bool { return !p.Until.IsZero() && !now.Before(p.Until) }
