package policy

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/deployments"
)

// AbsurdGeneration is the lowest generation that is ignored as corrupt. Counting on from a generation near the upper
// bound of int64 would overflow to a negative generation, which every node refuses.
const AbsurdGeneration = 1 << 53

// Base is the record that a unit's next record is made from.
type Base struct {
	Record deployments.Record
	// Floor is the highest generation that is known to have been used.
	Floor int64
	// Restored is set if the mirror undoes another writer's change with its own record. Rebuilt is
	// set if Record was made from what the nodes report.
	Restored, Rebuilt bool
}

// joinedBeforeAny returns the Record.Joined for a record that the store had lost. Nobody knows how many nodes are
// changing, so the record applies to no node yet that serves something and reports a Joined. A node that reports none
// can't be held back.
func joinedBeforeAny() uint64 { return 1 }

// WithGeneration returns next, the record that follows the base, with a generation that no node
// takes for an older record's. It is at least the generation of stored, unless that is an
// AbsurdGeneration, and at least each generation that nodes have acted on. Claim and Retry are set
// to match. stored is the valid record in the store, or nil.
func (b Base) WithGeneration(next deployments.Record, stored *deployments.Record, nodes []Node) deployments.Record {
	if more := next.Generation - b.Record.Generation; more > 0 {
		next.Generation = b.Floor + more
	}
	if b.Rebuilt {
		next.Generation = max(next.Generation, b.Floor+1)
		next.Claim = -b.Floor
		if next.Pinned != nil {
			pinned := *next.Pinned
			pinned.Claim, pinned.StablePinned = -b.Floor, true
			next.Pinned = &pinned
		}
		if next.Rollout != nil {
			rollout := *next.Rollout
			rollout.StablePinned = true // nodes may run Stable by a pin
			next.Rollout = &rollout
		}
	}
	if stored != nil && stored.Generation >= next.Generation && stored.Generation < AbsurdGeneration &&
		!equal(*stored, next) {
		if next.Generation == b.Record.Generation { // next restores the record: nobody asks for its target anew
			next.Claim = next.RequestGeneration()
		}
		next.Generation = stored.Generation
		if b.Restored {
			next.Generation++
		}
	}
	// A node ignores a record of a lower generation than it has acted on, as after the restore of a snapshot. It would
	// take a record of the same generation for the record that was lost.
	if acted := actedOn(nodes); next.Generation < acted || next.Generation == acted && acted > b.Floor {
		was := b.Record
		if next.Claim = next.RequestGeneration(); next.Target != was.Target || next.Claim != was.RequestGeneration() {
			next.Claim, next.Retry = -acted, 0 // the store may have lost an earlier request for it
		}
		next.Generation = acted + 1
	}
	return next
}

func equal(a, b deployments.Record) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// actedOn returns the highest generation that a node reports to have acted on.
func actedOn(nodes []Node) (highest int64) {
	for i := range nodes {
		highest = max(highest, generationOf(&nodes[i].Report))
	}
	return highest
}

// generationOf returns the newest generation that a node reports to have acted on; 0 if that is an
// AbsurdGeneration or higher.
func generationOf(u *deployments.UnitReport) int64 {
	generation := u.Generation
	if held, err := strconv.ParseInt(u.Facts["acted_on"], 10, 64); err == nil {
		generation = max(generation, held)
	}
	if generation >= AbsurdGeneration {
		return 0
	}
	return generation
}

// IsLost reports whether the store has lost newer records of a unit: its data was removed, or restored from an older
// snapshot. That is so if more than half of the nodes that run a release report generations above known, the newest in
// the store. One node of several can't claim that alone.
func IsLost(nodes []Node, known int64) bool {
	reports, ahead := 0, 0
	for i := range nodes {
		if u := &nodes[i].Report; !u.Running.IsZero() {
			reports++
			if generationOf(u) > known {
				ahead++
			}
		}
	}
	return 2*ahead > reports
}

// Rebuild returns a record made from the nodes' reports, for a unit whose record the store has lost. Stable is the most
// common release that nodes run, apart from Git's release and those that a node has in quarantine. If there is no such
// release, but a node can go back to what served before the first release, Stable is zero. If no node can, Target and
// Stable are Git's release.
//
// If Stable isn't Git's release, the record rolls Git's release back if a node has that release in quarantine. If no
// node has, Target is Stable, and Next begins the rollout to Git's release. Generation is the highest of known and what
// nodes report.
func Rebuild(u deployments.Unit, commit string, nodes []Node, known int64, now time.Time) deployments.Record {
	r := deployments.Record{Target: u.Release, Stable: u.Release, Generation: known, Commit: commit,
		Joined: joinedBeforeAny()}
	count := map[deployments.Pointer]int{}
	failed := map[deployments.Digest]bool{}
	for i := range nodes {
		report := &nodes[i].Report
		r.Generation = max(r.Generation, generationOf(report))
		for _, digest := range report.Quarantined {
			failed[digest] = true
		}
		if !report.Running.IsZero() {
			count[report.Running]++
		}
	}
	var others []deployments.Pointer // releases but Git's that nodes run and that did not fail, the most common first
	for p := range count {
		if p.Digest != u.Release.Digest && !failed[p.Digest] {
			others = append(others, p)
		}
	}
	slices.SortFunc(others, func(a, b deployments.Pointer) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), strings.Compare(a.URL, b.URL),
			slices.Compare(a.Digest[:], b.Digest[:]))
	})
	// As long as nodes can go back to what served before the first release, that release is not stable yet.
	first := slices.ContainsFunc(nodes, func(n Node) bool { return n.Report.Leavable })
	switch {
	case len(others) > 0:
		r.Stable = others[0]
	case first:
		r.Stable = deployments.Pointer{}
	default:
		return r
	}
	if failed[u.Release.Digest] {
		r.Rollout = &deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: everyRank, Failed: u.Release.Digest,
			Since: now.UTC().Truncate(time.Millisecond), Reason: deployments.ReasonRolledBack,
			Message: "nodes report that the release had failed before the store lost the record"}
		return r
	}
	r.Target = r.Stable // from there Git's release is rolled out, through its gates
	return r
}

// FromHistory returns the record of the generation that h describes, for a unit whose record the store has lost. The
// history doesn't tell how far that generation's rollout had come. A rollback begins anew, with all nodes. Any other
// rollout goes on after its canaries, within max_unavailable, and Next ends it if every node is converged. The record
// has no rollout if the release was stable already. For a unit without rollouts, a first release that hasn't failed has
// none either.
func FromHistory(u deployments.Unit, h deployments.History, now time.Time) deployments.Record {
	r := deployments.Record{Target: h.Release, Stable: h.Stable, Generation: h.Generation, Commit: h.Commit,
		Retry: h.Retry, Claim: cmp.Or(h.Claim, -h.Generation), Joined: joinedBeforeAny(), Pinned: h.Pinned}
	p := &deployments.Progress{Since: now.UTC().Truncate(time.Millisecond), StablePinned: true}
	switch {
	case h.Stable == h.Release:
		return r
	case h.Failed == h.Release.Digest: // even if there is no release to go back to
		p.Phase, p.Cutoff, p.Failed, p.Message = deployments.PhaseRollingBack, math.MaxUint64, h.Failed, h.Note
	case h.Stable.IsZero() && u.Rollout == nil: // nothing was rolled out
		return r
	default:
		p.Phase, p.Promoted = deployments.PhaseRolling, true
	}
	r.Rollout = p
	return r
}

// RebuildNote returns the History.Note of a generation that begins with a rebuilt record.
func RebuildNote(nodes []Node) string {
	report := fmt.Sprintf("%d nodes report", len(nodes))
	if len(nodes) == 1 {
		report = "1 node reports"
	}
	return "the store had lost the record, or held an older one: rebuilt from what " + report
}
