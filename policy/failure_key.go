package policy

import (
	"fmt"

	"kedge/deployments"
)

// FailureKey returns the key under which the failure of a record's release on a node is kept. While records have
// the same request (see SameRequest), a release that failed on the node isn't tried again.
func FailureKey(r deployments.Record) string {
	if claim := r.RequestGeneration(); claim < 0 {
		return fmt.Sprintf("generation up to %d, retry %d", -claim, r.Retry)
	}
	return fmt.Sprintf("generation %d, retry %d", r.RequestGeneration(), r.Retry)
}

// SameRequest reports whether asks, the key of a record, belongs to the same request as failed, or to an earlier one.
// failed is the key under which a release failed. Each commit and each pin is a request, and a later one has a higher
// generation or retry. A record of an earlier request comes back with a restored snapshot, and asks for nothing anew. A
// key whose generation was lost with the store's data counts as each generation that it may have had. Other text fits
// only itself.
func SameRequest(failed, asks string) bool {
	if failed == asks {
		return true
	}
	f, a := parseFailureKey(failed), parseFailureKey(asks)
	switch {
	case !f.known || !a.known:
		return false
	case a.lost: // the count of retries was lost, too, and began again at 0: more than 0 is a new request
		return a.retry == 0 && f.generation <= a.generation
	case f.lost:
		return f.retry == 0 && a.generation <= f.generation
	}
	return a.generation <= f.generation && a.retry <= f.retry // less: a record that came back with a snapshot
}

// failureKey is a parsed result of FailureKey. known is false if the text isn't such a key. If lost is set, generation
// is an upper bound.
type failureKey struct {
	known, lost       bool
	generation, retry int64
}

func parseFailureKey(key string) failureKey {
	var k failureKey
	if _, err := fmt.Sscanf(key, "generation up to %d, retry %d", &k.generation, &k.retry); err == nil {
		k.known, k.lost = true, true
		return k
	}
	_, err := fmt.Sscanf(key, "generation %d, retry %d", &k.generation, &k.retry)
	k.known = err == nil
	return k
}
