package mirror

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// rebuildWait is how long nodes have to report before a record is made from what they say: after an outage of the store they
// come back one by one.
const rebuildWait = 5 * time.Second

// generationOf returns the newest generation that a node has acted on, as it reports.
func generationOf(u *deployments.UnitReport) int64 {
	generation := u.Generation
	if held, err := strconv.ParseInt(u.Facts["acted_on"], 10, 64); err == nil {
		generation = max(generation, held)
	}
	if generation >= absurd {
		return 0
	}
	return generation
}

// isLost reports whether nodes have acted on newer generations of a unit than the store knows: its data was removed, or restored
// from an older snapshot. It takes most of the nodes that run something, so that no single one can claim it.
func isLost(nodes []policy.Node, known int64) bool {
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

// rebuild returns the record that the nodes' reports stand for: what they run is stable, what they have in quarantine failed,
// and Git's release, unless all run it or it failed, is yet to be rolled out. Its generation is the highest that is known.
func rebuild(u deployments.Unit, commit string, nodes []policy.Node, known int64, now time.Time) deployments.Record {
	r := deployments.Record{Target: u.Release, Stable: u.Release, Generation: known, Commit: commit}
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
	var others []deployments.Pointer // that nodes run and that did not fail, the most common first
	for p := range count {
		if p.Digest != u.Release.Digest && !failed[p.Digest] {
			others = append(others, p)
		}
	}
	slices.SortFunc(others, func(a, b deployments.Pointer) int {
		return cmp.Or(cmp.Compare(count[b], count[a]), strings.Compare(a.URL, b.URL), slices.Compare(a.Digest[:], b.Digest[:]))
	})
	if len(others) == 0 {
		return r
	}
	r.Stable = others[0]
	if failed[u.Release.Digest] {
		r.Rollout = &deployments.Progress{Phase: deployments.PhaseRollingBack, Cutoff: math.MaxUint64, Failed: u.Release.Digest,
			Since: now.UTC().Truncate(time.Millisecond), Reason: deployments.ReasonRolledBack,
			Message: "it failed, as the nodes report, before the store lost its record"}
		return r
	}
	r.Target = r.Stable // from which Git's release is rolled out, by its gates
	return r
}

// lost returns the record to go on from if the store lost a unit's, and whether it did. until is when the nodes have had the time
// to report; known is the generation that the store knows.
func (in inputs) lost(u deployments.Unit, nodes []policy.Node, known int64) (r deployments.Record, until time.Time, ok bool) {
	if in.lostSince == nil || !isLost(nodes, known) {
		delete(in.lostSince, u.ID)
		return r, until, false
	}
	since, noted := in.lostSince[u.ID]
	if !noted {
		since = in.now
		in.lostSince[u.ID] = since
	}
	return rebuild(u, in.commit.Hash, nodes, known, in.now), since.Add(in.rebuildWait), true
}

// rebuiltNote says in the history where a rebuilt record comes from.
func rebuiltNote(nodes []policy.Node) string {
	return fmt.Sprintf("the store had lost the record, or held an older one: rebuilt from what %d nodes report", len(nodes))
}
