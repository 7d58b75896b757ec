package mirror

import (
	"time"

	"kedge/deployments"
	"kedge/policy"
)

// rebuildWait is how long nodes have to report before a record is made from what they say: after an outage of the
// store they come back one by one.
const rebuildWait = 5 * time.Second

// lost returns the record to go on from if the store lost a unit's, and whether it did. until is when the nodes
// have had the time to report; known is the generation that the store knows.
func (in inputs) lost(
	u deployments.Unit,
	nodes []policy.Node,
	known int64,
) (r deployments.Record, until time.Time, ok bool) {
	if in.lostSince == nil || !policy.IsLost(nodes, known) {
		delete(in.lostSince, u.ID)
		return r, until, false
	}
	since, noted := in.lostSince[u.ID]
	if !noted {
		since = in.now
		in.lostSince[u.ID] = since
	}
	return policy.Rebuild(u, in.commit.Hash, nodes, known, in.now), since.Add(in.rebuildWait), true
}
