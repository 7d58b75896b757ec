package deployments

import "maps"

// Reason is a code that says why a decision, a rollout, a report or a refusal is as it is. Code branches on it; package
// message (in sync/fleet) makes words for people from it and its Facts. Codes are CamelCase, as the reasons of
// Kubernetes' conditions, and never change their meaning.
type Reason string

// Facts are a Reason's parameters, by name, such as unit, node and until: data, or the words of an error or a person.
type Facts map[string]string

// With returns a copy of the facts in which the fact name has the value. It never changes f, which may be nil.
func (f Facts) With(name, value string) Facts {
	all := maps.Clone(f)
	if all == nil {
		all = Facts{}
	}
	all[name] = value
	return all
}

// Reasons of a rollout. Here and in the groups below, a reason's comment gives its meaning and, after
// a colon, its main facts. Some comments give only one of the two.
const (
	ReasonFrozen           Reason = "Frozen"           // a freeze window holds it: window, until or opens (never), reason
	ReasonOrphaned         Reason = "Orphaned"         // its unit was removed from Git
	ReasonCanary           Reason = "Canary"           // canaries go first: admitted, of
	ReasonBaking           Reason = "Baking"           // healthy, and watched until the bake ends: who, until
	ReasonAwaitingApproval Reason = "AwaitingApproval" // baked, and waits for promote
	ReasonRolling          Reason = "Rolling"          // admitted, of
	ReasonPaused           Reason = "Paused"           // by an operator
	ReasonAborted          Reason = "Aborted"          // by an operator
	ReasonTooManyFailed    Reason = "TooManyFailed"    // failed, of, node, cause, limit
	ReasonRetried          Reason = "Retried"          // by an operator
	ReasonConverged        Reason = "Converged"        // the rollout has ended on the target
	ReasonNoLiveNodes      Reason = "NoLiveNodes"      // waits for nodes: known
	ReasonAllPinned        Reason = "AllPinned"        // pins decide for every node: nodes
	ReasonNothingToGoBack  Reason = "NothingToGoBackTo"
	ReasonForced           Reason = "Forced"          // an operator lets it go on within a freeze
	ReasonFreezeEnded      Reason = "FreezeEnded"     // goes on after a freeze
	ReasonPromoted         Reason = "Promoted"        // by an operator
	ReasonResumed          Reason = "Resumed"         // by an operator
	ReasonBakingAgain      Reason = "BakingAgain"     // a node was not healthy: the bake begins anew
	ReasonAwaitingReports  Reason = "AwaitingReports" // baked; nodes have yet to report since the store was away
	ReasonNodesMissing     Reason = "NodesMissing"    // known nodes are away, or the list of nodes is short: live, known
	ReasonUnheard          Reason = "Unheard"         // a node has yet to report on a first release: node
	ReasonUnaware          Reason = "Unaware"         // a node has yet to notice that it was admitted: node
	// The record has no room for more replaced targets, so the rollout waits or goes back: stable, paused.
	ReasonReplacedTooOften Reason = "ReplacedTooOften"
	ReasonEveryNode        Reason = "EveryNode"    // no rollout: every node at once
	ReasonFirstRelease     Reason = "FirstRelease" // every node at once
	ReasonRunsAlready      Reason = "RunsAlready"  // every node runs the target, or did when it last reported
)

// Reasons for which an order changes nothing.
const (
	ReasonUnknownOrder    Reason = "UnknownOrder"
	ReasonNotSeenYet      Reason = "NotSeenYet" // the rollout that the order was given for was replaced
	ReasonRollingBack     Reason = "RollingBack"
	ReasonNothingUnderWay Reason = "NothingUnderWay"
	ReasonPausedAlready   Reason = "PausedAlready"
	ReasonNotPaused       Reason = "NotPaused"
	ReasonRollingAlready  Reason = "RollingAlready"
)

// Reasons for which a node runs, or does not run, a release.
const (
	ReasonNoRecord           Reason = "NoRecord"
	ReasonInvalidRecord      Reason = "InvalidRecord" // error
	ReasonInvalidPin         Reason = "InvalidPin"    // key, error
	ReasonPinned             Reason = "Pinned"        // by, until, reason
	ReasonHeld               Reason = "Held"          // by, until, reason
	ReasonTarget             Reason = "Target"        // commit, generation
	ReasonStable             Reason = "Stable"        // not admitted to the target yet
	ReasonStableFirst        Reason = "StableFirst"   // admitted, but goes to stable first: release, target
	ReasonNotAdmitted        Reason = "NotAdmitted"
	ReasonAdmitted           Reason = "Admitted"
	ReasonRunsTarget         Reason = "RunsTarget"        // not admitted, and runs the target already
	ReasonRejoined           Reason = "Rejoined"          // was away: keeps what it runs until its turn
	ReasonAwaitingRollback   Reason = "AwaitingRollback"  // its turn to go back has yet to come
	ReasonLeaving            Reason = "Leaving"           // goes back to what was at dest before kedge
	ReasonRestored           Reason = "Restored"          // dest holds again what was there before the first release
	ReasonStableQuarantined  Reason = "StableQuarantined" // the stable release failed here: release, target
	ReasonPinPaced           Reason = "PinPaced"          // the mirror rolls the pin out: release, by, until, reason
	ReasonExpired            Reason = "Expired"           // the pin's until has passed
	ReasonOutranked          Reason = "Outranked"         // another key takes precedence: outranked_by
	ReasonRolledBack         Reason = "RolledBack"
	ReasonSuperseded         Reason = "Superseded"       // stays on a release whose rollout was replaced
	ReasonSourceNotAllowed   Reason = "SourceNotAllowed" // url
	ReasonUnsigned           Reason = "Unsigned"
	ReasonDigestMismatch     Reason = "DigestMismatch"
	ReasonOlderThanFloor     Reason = "OlderThanFloor"     // made before the node's version floor: created, floor
	ReasonCreatedAhead       Reason = "CreatedAhead"       // made later than the node's clock shows: created, floor
	ReasonAgentTooOld        Reason = "AgentTooOld"        // the record needs a newer kedge: error
	ReasonOldGeneration      Reason = "OldGeneration"      // older than the record acted on last: generation, acted_on
	ReasonQuarantined        Reason = "Quarantined"        // failed on this node: step, error
	ReasonUnhealthy          Reason = "Unhealthy"          // check, error
	ReasonStorageUnavailable Reason = "StorageUnavailable" // error
	ReasonSecretUnavailable  Reason = "SecretUnavailable"  // error
	ReasonDiskFull           Reason = "DiskFull"
	ReasonObserving          Reason = "Observing"  // the node only observes the unit, by its configuration: differs
	ReasonDependency         Reason = "Dependency" // waits for another unit: unit
	// Another unit has the dest of a unit, or a path above or below it: dest, unit
	// (STAGE/ROLE/UNIT), error.
	ReasonDestInUse Reason = "DestInUse"
	// Something else, such as stretcher or kedge run, deployed to the dest of a unit: dest, found.
	ReasonForeignDeployment Reason = "ForeignDeployment"
	ReasonTooManyUnits      Reason = "TooManyUnits" // the node leaves out units of its role: limit, left_out
	ReasonGone              Reason = "Gone"         // the node's agent is away
	ReasonNotInTime         Reason = "NotInTime"    // the node has not converged before its deadline
)
