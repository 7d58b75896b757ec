// Package backend holds what all implementations of kv.Store share: the checks of arguments, the bound of a list, and
// the view of a watch.
package backend

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
)

// maxCommitBytes bounds the keys and values of one Commit by Consul's count: a transaction takes 512 KiB of JSON,
// with the values in base64.
const maxCommitBytes = 500 << 10

// CheckKey returns an error unless a key is valid in Consul and in a directory.
func CheckKey(key string) error {
	for s := range strings.SplitSeq(key, "/") {
		if err := deployments.CheckSegment("its part", s); err != nil {
			return fmt.Errorf("bad key %q: %w", key, err)
		}
	}
	return nil
}

// CheckPrefix returns an error unless a prefix is empty, or a valid key and "/".
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	folder, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf(`bad prefix %q: want one that ends in "/"`, prefix)
	}
	return CheckKey(folder)
}

// CheckCommit returns an error unless Consul and a directory can both apply the operations in one commit. The error
// wraps kv.ErrTooLarge beyond kv.MaxOps or maxCommitBytes, and kv.ErrConflict for version 0, which no key has.
func CheckCommit(ops []kv.Op) error {
	seen := make(map[string]bool, len(ops))
	cost, size := 0, 0
	for _, op := range ops {
		if err := CheckKey(op.Key); err != nil {
			return fmt.Errorf("commit: %w", err)
		}
		if seen[op.Key] {
			return fmt.Errorf("commit: two operations have the key %s", op.Key)
		}
		seen[op.Key] = true
		switch op.Kind {
		case kv.OpPut, kv.OpCreate, kv.OpDelete:
		case kv.OpReplace, kv.OpDeleteIf:
			if op.Version == 0 {
				// To Consul a version of 0 would mean "absent".
				return fmt.Errorf("commit %s: the version is 0, which no key has: %w", op.Key, kv.ErrConflict)
			}
		default:
			return fmt.Errorf("commit %s: unknown operation %d", op.Key, op.Kind)
		}
		cost += op.Cost()
		size += 128 + len(op.Key) + (len(op.Value)+2)/3*4
	}
	if cost > kv.MaxOps {
		return fmt.Errorf("commit of %d operations, at most %d are allowed: %w", cost, kv.MaxOps, kv.ErrTooLarge)
	}
	if size > maxCommitBytes {
		return fmt.Errorf("commit of %d KiB, at most %d are allowed: %w", size>>10, maxCommitBytes>>10, kv.ErrTooLarge)
	}
	return nil
}

// SortEntries sorts entries by key.
func SortEntries(entries []kv.Entry) {
	slices.SortFunc(entries, func(a, b kv.Entry) int { return cmp.Compare(a.Key, b.Key) })
}

// ErrForeignLease means that a caller passed a lease of another kind of store or directory, which would not fence.
var ErrForeignLease = errors.New("commit: the lease belongs to another store")

// ErrPresenceClosed means that a caller used a presence after Close.
var ErrPresenceClosed = errors.New("the presence is closed")
