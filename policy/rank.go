package policy

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"kedge/deployments"
)

// Rank returns a node's place in the order in which a target's rollout admits nodes. It is a hash of the node's
// name and the target's digest, so that each target has other canaries. It is never 0, so that a cutoff of 0
// admits none.
func Rank(node string, target deployments.Digest) uint64 {
	var room [len(target) + 64]byte // enough for most names
	sum := sha256.Sum256(append(append(room[:0], target[:]...), node...))
	return max(1, binary.BigEndian.Uint64(sum[:]))
}

// Ranks caches the nodes' ranks for the targets of one unit's record, so that a step hashes only new names, and
// sorts only a fleet that has changed. It is emptied when no rollout is under way. The zero Ranks is empty and
// ready to use. It is not safe for concurrent use.
type Ranks struct {
	known []*ranking // most recently used first
}

// ranking is the order of a fleet's nodes for one target.
type ranking struct {
	target deployments.Digest
	names  []string
	ranks  []uint64 // of the nodes in names
	byRank []int32  // indices into names, lowest rank first
}

// of returns the order of the nodes for a target.
func (r *Ranks) of(target deployments.Digest, nodes []Node) *ranking {
	i := slices.IndexFunc(r.known, func(k *ranking) bool { return k.target == target })
	if i < 0 {
		i = 0
		// a target, those that it supersedes, and one more while a record changes
		if len(r.known) > deployments.MaxSuperseded+1 {
			r.known = r.known[:deployments.MaxSuperseded+1]
		}
		r.known = slices.Insert(r.known, 0, &ranking{target: target})
	}
	k := r.known[i]
	copy(r.known[1:i+1], r.known[:i])
	r.known[0] = k
	if !slices.EqualFunc(k.names, nodes, func(name string, n Node) bool { return name == n.Name }) {
		k.update(nodes)
	}
	return k
}

func (r *Ranks) forget() { r.known = nil }

// update recomputes the ranks after the list of nodes changed. Old and new names are mostly sorted; if not, a known
// name may be hashed once more.
func (k *ranking) update(nodes []Node) {
	names, ranks := make([]string, len(nodes)), make([]uint64, len(nodes))
	old := 0
	for i := range nodes {
		name := nodes[i].Name
		for old < len(k.names) && k.names[old] < name {
			old++
		}
		names[i] = name
		if old < len(k.names) && k.names[old] == name {
			ranks[i] = k.ranks[old]
			continue
		}
		ranks[i] = Rank(name, k.target)
	}
	byRank := make([]int32, len(nodes))
	for i := range byRank {
		byRank[i] = int32(i)
	}
	slices.SortFunc(
		byRank,
		func(a, b int32) int { return cmp.Or(cmp.Compare(ranks[a], ranks[b]), cmp.Compare(names[a], names[b])) },
	)
	k.names, k.ranks, k.byRank = names, ranks, byRank
}
