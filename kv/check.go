package kv

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
)

// maxCommitBytes bounds the keys and values of one Commit as Consul counts them: a transaction takes 512 KiB of JSON,
// with the values in base64.
const maxCommitBytes = 500 << 10

// checkKey accepts what names one key in both stores.
func checkKey(key string) error {
	for s := range strings.SplitSeq(key, "/") {
		if err := deployments.CheckSegment("a part of the key", s); err != nil {
			return fmt.Errorf("bad key %q: %w", key, err)
		}
	}
	return nil
}

// checkPrefix accepts "" and what ends in "/".
func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	folder, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf(`bad prefix %q: want one that ends in "/"`, prefix)
	}
	return checkKey(folder)
}

// checkCommit accepts what both stores can apply at once.
func checkCommit(ops []Op) error {
	seen := make(map[string]bool, len(ops))
	cost, size := 0, 0
	for _, op := range ops {
		if err := checkKey(op.Key); err != nil {
			return fmt.Errorf("commit: %w", err)
		}
		if seen[op.Key] {
			return fmt.Errorf("commit: the key %s is there twice", op.Key)
		}
		seen[op.Key] = true
		switch op.Kind {
		case OpPut, OpCreate, OpDelete:
		case OpReplace, OpDeleteIf, OpCheck:
			if op.Version == 0 {
				// To Consul a version of 0 would mean "absent".
				return fmt.Errorf("commit %s: the version is 0, which no key has: %w", op.Key, ErrConflict)
			}
		default:
			return fmt.Errorf("commit %s: unknown operation %d", op.Key, op.Kind)
		}
		cost += op.Cost()
		size += 128 + len(op.Key) + (len(op.Value)+2)/3*4
	}
	if cost > MaxOps {
		return fmt.Errorf("commit %d operations, of which %d are allowed: %w", cost, MaxOps, ErrTooLarge)
	}
	if size > maxCommitBytes {
		return fmt.Errorf("commit %d KiB, of which %d are allowed: %w", size>>10, maxCommitBytes>>10, ErrTooLarge)
	}
	return nil
}

func sortEntries(entries []Entry) {
	slices.SortFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Key, b.Key) })
}

// errForeignLease is a programmer's mistake, caught before it makes an unfenced write.
var errForeignLease = errors.New("commit: the lease belongs to another store")
