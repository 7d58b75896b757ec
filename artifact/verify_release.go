package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// Verify returns how a release's tree differs from its index or, if it was published without one,
// from the list of hashes taken when it was staged. If the index or list is missing or damaged, the
// only Difference is "index" at ".". Verify reads each file whose size is right, at most limit
// bytes a second (0: no bound). It skips shared paths and mounts. What the release's own commands
// made is compared with how they left it.
func (r *Releases) Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	found, _, err := r.differences(ctx, rel, verification{limit: limit})
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", rel.Dir, err)
	}
	return found, nil
}

// verification configures the comparison of a release's tree with its index.
type verification struct {
	limit int64 // bytes read in a second; 0: no bound
	// quick reads no files whose inode, size and mtime are unchanged.
	quick bool
	// raw includes in the differences what the release's commands made.
	raw bool
}

// differences compares a tree with its index. more counts paths that the index lacks beyond maxExtra, which aren't in
// found.
func (r *Releases) differences(ctx context.Context, rel *Release, how verification) (found []Difference, more int,
	err error) {
	r, leave, err := r.enter(false)
	if err != nil {
		return nil, 0, err
	}
	defer leave()
	name, dir := filepath.Base(rel.Dir), r.dirOf(rel)
	rec, err := r.readRecord(name)
	if err != nil {
		return nil, 0, err
	}
	index, err := r.readIndex(name, rec)
	if errors.Is(err, deployments.ErrDigest) || errors.Is(err, fs.ErrNotExist) || unreadable(err) {
		r.log.Warn("could not read the release's index: its tree can't be verified until the release is staged again",
			"dir", rel.Dir, "error", err)
		return []Difference{{Path: ".", What: "index"}}, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	x, err := archive.DecodeIndex(index)
	if err != nil {
		return nil, 0, err
	}
	mounts, err := safefs.MountsBelow(dir)
	if err != nil {
		return nil, 0, err
	}
	v := newVerifier(x, how.limit, slices.Concat(mounts, rel.Manifest.Shared))
	if how.quick {
		if known := r.readStats(name, rec.Index); len(known) == len(x.Entries) {
			v.known = known
		}
	}
	var made []commandChange
	if !how.raw {
		made = readChanges(r.changeRecord(name).made)
		v.made = wholePaths(made)
	}
	if err := v.verify(ctx, dir); err != nil {
		return nil, 0, err
	}
	found = v.found
	top, err := os.Lstat(dir)
	if err != nil {
		return nil, 0, err
	}
	if top.Mode()&dirBits != rel.Manifest.DestMode { // an index has no entry for the top directory
		found = append([]Difference{{Path: ".", What: "mode"}}, found...)
	}
	owners, err := verifyOwner(ctx, dir, rel.Manifest.Owner, v.skip, v.made)
	if err != nil {
		return nil, 0, err
	}
	found = append(found, owners...)
	if found, err = withoutChangesAt(dir, made, found, mounts); err != nil {
		return nil, 0, err
	}
	if !how.quick {
		r.updateStats(name, rec, v.stats, found)
	}
	return found, v.more, nil
}

// updateStats records the stats of the files that were right, unless hashAlways is set. If one file's content was
// wrong, and is not as the release's commands left it, it drops the stats of all releases of this dest.
func (r *Releases) updateStats(name string, rec *record, stats []fileStat, found []Difference) {
	var err error
	if slices.ContainsFunc(found, func(d Difference) bool { return d.What == "content" }) {
		err = r.forgetStats()
	} else if !r.hashAlways {
		err = r.writeFileStats(name, rec.Index, stats)
	}
	if err != nil {
		r.log.Warn("could not update the recorded sizes and times of a release's files", "dest", r.dest, "release", name,
			"error", err)
	}
}
