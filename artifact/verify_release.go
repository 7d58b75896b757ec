package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// Verify compares a release's tree with its index (or, without one, with the list of hashes that was taken when it
// was staged), and names what differs: where that is damaged, it alone, as nothing else can be told. It reads every
// byte; limit, in bytes a second, keeps it out of the way (0: none). What the release's own commands made is compared
// with how they left it.
func (r *Releases) Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	found, err := r.differences(ctx, rel, verification{limit: limit})
	if err != nil {
		return nil, fmt.Errorf("verify %s: %w", rel.Dir, err)
	}
	return found, nil
}

// verification says how a release's tree is compared with its index.
type verification struct {
	limit int64 // bytes a second; 0: none
	// quick takes a file's content for unchanged if its inode, size and mtime are.
	quick bool
	// raw has what the release's commands made among the differences.
	raw bool
}

func (r *Releases) differences(ctx context.Context, rel *Release, how verification) ([]Difference, error) {
	r, leave, err := r.enter(false)
	if err != nil {
		return nil, err
	}
	defer leave()
	name, dir := filepath.Base(rel.Dir), r.dirOf(rel)
	rec, err := r.readRecord(name)
	if err != nil {
		return nil, err
	}
	index, err := r.readIndex(name, rec)
	if errors.Is(err, ErrDigest) || errors.Is(err, fs.ErrNotExist) || unreadable(err) {
		r.log.Warn("the release can't be compared with its index", "dir", rel.Dir, "error", err)
		return []Difference{{Path: ".", What: "index"}}, nil
	}
	if err != nil {
		return nil, err
	}
	x, err := decodeIndex(index)
	if err != nil {
		return nil, err
	}
	skip, err := mountsBelow(dir)
	if err != nil {
		return nil, err
	}
	v := newVerifier(x, how.limit, append(skip, rel.Manifest.Shared...))
	if how.quick {
		v.known = r.readStats(name, rec.Index, len(x.entries))
	}
	if err := v.verify(ctx, dir); err != nil {
		return nil, err
	}
	if !how.quick {
		r.noteVerified(name, rec, v)
	}
	found := v.found
	top, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if top.Mode()&dirBits != rel.Manifest.DestMode { // it has no entry in an index
		found = append([]Difference{{Path: ".", What: "mode"}}, found...)
	}
	owners, err := verifyOwner(ctx, dir, rel.Manifest.Owner, v.skip)
	if err != nil {
		return nil, err
	}
	found = append(found, owners...)
	if how.raw {
		return found, nil
	}
	return r.madeFiles(name).overlaid(dir, found)
}

// noteVerified records the inodes of the files that were right, or drops all of them if one's content was wrong.
func (r *Releases) noteVerified(name string, rec *record, v *verifier) {
	var err error
	if slices.ContainsFunc(v.found, func(d Difference) bool { return d.What == "content" }) {
		err = r.forgetStats()
	} else if !r.hashAlways {
		err = r.writeStats(name, rec.Index, v.stats)
	}
	if err != nil {
		r.log.Warn("could not note what the files of a release are", "release", name, "error", err)
	}
}
