// Package policy decides, without I/O or clocks: what a node runs (Resolve), what becomes of a rollout (Next), when
// rollouts may not start (FreezeAt), what releases may do (Bounds), and whose signatures count (Signers, Keyring).
//
// # Phases
//
// A record without a rollout admits every node. In a record with a rollout, advance (rollout.go) runs the step of the
// rollout's phase each time that the mirror calls Next:
//
//	phase             ends when                                    next
//	frozen            the freeze window ends, or promote           canary, or rolling if no gates are to be passed
//	canary            canaries converged and baked, or promote     pending-approval, or rolling
//	pending-approval  promote, or approval becomes auto            rolling; canary, if one becomes unhealthy
//	rolling           every known node has converged               no rollout: the target is stable
//	paused            resume, or retry                             frozen, canary or rolling
//	rolling-back      every node is back on stable                 rolled-back, or the target that waits for this
//	rolled-back       retry                                        frozen, canary or rolling
//
// In rolling, a rollout doesn't wait for tolerated failed nodes, for nodes with a pin to another release, or for nodes
// that have been away for a deadline. In rolling-back, it doesn't wait for nodes past their deadline. A first release
// leaves canary, pending-approval and rolling at once if nothing else serves on any live node: the rollout ends, and
// all nodes take the release.
//
// In canary, pending-approval and rolling, more failed nodes than max_failures lead to rolling-back. With on_failure:
// pause, or under a unit pin, they lead to paused. Abort leads to rolling-back, pause to paused. If there is nothing to
// go back to, a rollout is paused instead of rolled back. Another target, from Git or a pin, begins a rollout of its
// own in any phase, unless nodes may still run more than deployments.MaxSuperseded of the targets before it. If a
// freeze would hold it up before its first node, it waits for a rollback under way, unless promote starts it: nodes
// don't stay on a failed release because of a freeze.
//
// # Threat model
//
// What each credential allows, also to whoever steals it:
//
//   - A token that writes desired/ or pins/ names any release to any node. A node whose Bounds name sources keeps what
//     it runs if the release, or what its manifest fetches, lies elsewhere (TestResolve, TestBoundsOnSources;
//     TestBounds in sync/deploy). A node with signers uses nothing of a manifest that none of them signed
//     (TestVerifyManifest). Without sources and signers, such a token is as good as root on the whole fleet.
//   - A token that writes pins/ and control/ can fill them with junk. Nodes, the mirror and whoever looks at status
//     spend time in proportion to it, and show a bounded part (TestJunkPins in sync/agent, TestFloodOfPins,
//     TestFloodOfOrders and TestJunkOrders in sync/mirror, TestAssembleBoundsPinsAndOrders in sync/fleet).
//   - Such a token, the storage and a name server could make an agent send requests to services that trust its machine,
//     such as the Consul agent or the cloud's metadata service. An agent connects to its machine's own and to
//     link-local addresses only by URLs that its sources name, unless local_sources allows all. Other spellings of an
//     address, names and redirects don't get around that (TestLocalSources; TestNothingIsFetchedFromThisMachine,
//     TestRedirectsByNameStayOutside and TestRedirectsOfS3 in artifact/object).
//   - Whoever may fire an event that kedge bridge follows chooses, among the manifests that --sources allows, which one
//     becomes a record or a pin (TestBridge in sync/migrate).
//   - A key that writes the object storage replaces objects. A pointer names the manifest's digest, and the manifest
//     names the digests of all other objects, so that nodes refuse a replaced object. Against such a key together with
//     a token that writes pointers, only Signers and Bounds help.
//   - The same key replaces the snapshot that first boots use while Consul is away. The snapshot must be signed in a
//     namespace of its own, name the URL that it lies at, and be young; the pointers in it are checked as any others
//     are. An old snapshot brings back what was desired at most snapshot_max_age ago (TestSnapshot,
//     TestFirstBootWithoutConsul in cmd/kedge).
//   - A node's token, which anything that runs as root on the node has, writes that node's report and ends sessions of
//     its Consul node. It chooses nothing that a node runs (TestThefts; TestDocs in cmd/kedge logs a node in by a JWT,
//     and has the keys of others refused). What it writes is bounded before it is believed (TestFloodOfReports,
//     TestFloodOfNodesThatLeft and TestReportsBeyondTheRolesBound in sync/mirror, TestJunkReports in
//     sync/fleet/reports, FuzzReport, FuzzNext), and before people are told of it (TestHealthThatComesAndGoes and
//     TestHostileTexts in sync/notify, TestPagesOfHostileReports in sync/web).
//   - Whoever writes keys can write more than is read of a prefix (kv.MaxList): then nodes, mirror or dashboard don't
//     see what changes below it. They go on with what they know, in bounded memory, and the error names the prefix
//     (TestConformance and TestEndlessAnswers in kv/consul).
//   - The mirror's token writes desired/ and mirror/. On a node with signers, it can run no more than the tokens above.
//     A mirror with signers that finds a commit named in mirror/ whose signature doesn't count takes no release, no
//     setting of a record and no removal from that commit, and signs no snapshot. What the mirror writes meanwhile gets
//     into a later snapshot only if a signed commit asks for it (TestSignerIsTakenOutAndNothingIsRemembered and
//     TestSnapshotsLeaveOutWhatNobodySigned in sync/mirror). If another mirror wrote a record, the record's target,
//     after, drift and adopt are compared with the commit. The progress of its rollout gets into the snapshot as it
//     stands.
//   - A Git push without a signing key reaches no node if the mirror has signers: the commit is refused, and the
//     records stay as they are (TestVerifyCommit; TestCommitsSignedByOpenPGP and TestOnlySignedCommitsAreTaken in
//     sync/mirror, which also plays a good signature on another commit, and an old signed commit brought back by force;
//     TestMovedSignatures plays good ones in other places of a commit). With or without a key, what such a push holds
//     is refused once and for all, in bounded time (TestCommitsThatAreAtFault). Such a push can still hold up the
//     mirror: a remote repo is fetched before its commit can be judged, and the largest object in it must fit the
//     mirror's memory.
//   - A Git push that the mirror takes names any release. For a stage that kedge.yaml bounds by dests, users or
//     commands, the mirror takes only a release whose manifest keeps to these bounds. The same push may change the
//     bounds: who reviews changes decides who may change kedge.yaml (TestReleasesBeyondTheirStagesBounds in
//     sync/mirror, TestBoundsNeedManifest). Pins don't come from Git: only the nodes' own bounds limit them.
//   - A signing key for manifests signs no commits, and the other way around: the namespace is part of what is signed
//     (TestVerifyManifest, TestVerifyCommit). An allowed_signers line can bind a key to one of them, and to a time.
//   - A signed manifest of an older release stays good, but a node with signers refuses what was made before its
//     version floor, unless its own configuration lets a pin name it (TestNothingOlderThanTheFloor in sync/deploy). The
//     floor holds for a release's name and for its dest, whichever unit names the release (TestOldCodeUnderANewName). A
//     release that only pins brought raises no floor, so the release before it may follow (TestStableOfAPin). A release
//     that claims to be made ahead of the node's clock counts as made when it rolled out (TestMadeAheadOfTheClock). A
//     kill in the middle loses no floor (TestKilledWhileItRaisesFloors). Until a release that says when it was made has
//     rolled out on a node, and after the node lost its state, only a key's valid-before limits how old a release may
//     be.
//   - TestThefts in cmd/kedge plays these with real parts: records and pins to unsigned, wrongly signed and old
//     releases, objects that were overwritten, and a node's own token used on the keys of others.
//   - A manifest, once admitted, runs its commands as the users that it names: Bounds say which users are allowed, or
//     that commands are not.
//   - Status reports are a node's own word. A node that lies can hold up, or halt, a rollout of its unit; it can't let
//     one go further than max_unavailable, counted by what the others say. Whoever can delete status keys makes the
//     list of nodes short. A rollout ends by such a list only after 2 minutes (or a shorter deadline), or after an hour
//     if most nodes are missing (TestAShortListIsNotTheFleet). Nodes that the record knew of and that have left the
//     list take room in the budget for as long as they may take to put their keys back, 2 minutes at most
//     (TestWhoIsNotListedTakesRoom, TestSimulation).
//
// # Budget
//
// TestSimulation plays fleets through seeded histories, and checks after every event that no more nodes are in flight
// than max_unavailable, and that no node goes to a release that is neither its pin, nor stable, nor a target that
// admits it. Nodes that come back after they were gone, unit pins and their ends, and nodes that left in mid-switch are
// counted: an agent begins a switch only once the store holds its report of the switch, so that no node can die
// unnoticed in the first steps (TestASwitchIsSaidBeforeItBegins in sync/agent). A node on which a release failed counts
// until what it went back to is healthy, or until its deadline has passed, whatever it should run by then.
//
// Not counted are nodes that run nothing yet, pins of one node, pins with at_once, units without a rollout, and nodes
// past their deadline, if max_failures tolerates these. A node whose agent doesn't tell when it joined (Report.Joined)
// follows the record as soon as it is back.
//
// A node that came back with a release that the record doesn't name goes to stable first, unless stable failed there.
// If the target then fails, the node is back on stable, which later records name, and waits for its turn as others do.
package policy
