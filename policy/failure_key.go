package policy

import (
	"fmt"

	"kedge/deployments"
)

// FailureKey names what asks for a record's releases, as the key under which a failure on a node is kept: while it
// stays the same (SameRequest), a release that failed on the node isn't tried again.
func FailureKey(r deployments.Record) string {
	if claim := ClaimOf(r); claim < 0 {
		return fmt.Sprintf("generation up to %d, retry %d", -claim, r.Retry)
	}
	return fmt.Sprintf("generation %d, retry %d", ClaimOf(r), r.Retry)
}

// SameRequest reports whether a release that failed under one key is asked for by the same commit, or pin, under
// another. A key whose generation was lost with the store's data stands for all that it may have been. Who asks later
// does it under a higher generation, or a higher retry.
func SameRequest(failed, asks string) bool {
	if failed == asks {
		return true
	}
	f, a := parseFailureKey(failed), parseFailureKey(asks)
	switch {
	case !f.known || !a.known:
		return false
	case a.lost: // its retries were lost, too: one that was ordered since is more than none
		return a.retry == 0 && f.generation <= a.generation
	case f.lost:
		return f.retry == 0 && a.generation <= f.generation
	}
	return a.generation <= f.generation && a.retry <= f.retry // as of a record that came back with a snapshot
}

// failureKey is a key of FailureKey.
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
