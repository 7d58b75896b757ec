package policy

import (
	"crypto/sha256"
	"encoding/binary"

	"kedge/deployments"
)

// Rank is a node's place in the order in which a target's rollout admits nodes: a hash of the node's name and the target's
// digest, so that the canary is another node each time. It is never 0, so that a cutoff of 0 admits none.
func Rank(node string, target deployments.Digest) uint64 {
	sum := sha256.Sum256(append(target[:], node...))
	return max(1, binary.BigEndian.Uint64(sum[:]))
}
