package artifact

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
)

// eachWrongOwner calls f for each path of root's tree ("." is its top) whose user isn't uid or
// whose group isn't gid; a negative number stands for any. It leaves out the paths in skip and what
// lies below them, but never ".". It also leaves out directories deeper than any release's.
func eachWrongOwner(ctx context.Context, root *os.Root, uid, gid int, skip []string, f func(p string) error) error {
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if p != "." && isBelow(p, skip) { // the top itself may be a mount
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() && strings.Count(p, "/") >= archive.MaxLevels {
			return fs.SkipDir // no release is so deep: the tree's owner made it
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || (uid < 0 || int(st.Uid) == uid) && (gid < 0 || int(st.Gid) == gid) {
			return nil
		}
		return f(p)
	})
}

// applyOwner changes the owner of all paths of the tree at dir to owner, which is USER, USER:GROUP or :GROUP; an empty
// owner changes nothing. Files hard-linked to a live release have that owner already, and aren't changed.
func applyOwner(ctx context.Context, dir, owner string) error {
	if owner == "" {
		return nil
	}
	uid, gid, err := safefs.LookupOwner(owner)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	err = eachWrongOwner(ctx, root, uid, gid, nil, func(p string) error { return root.Lchown(p, uid, gid) })
	if err != nil {
		return fmt.Errorf("owner %q: %w", owner, err)
	}
	return nil
}

// verifyOwner returns the paths of the tree at dir whose owner isn't owner, at most maxExtra. It skips
// the paths in skip and made, and what lies below them. An empty owner gives none.
func verifyOwner(ctx context.Context, dir, owner string, skip []string, made pathSet) (found []Difference, err error) {
	if owner == "" {
		return nil, nil
	}
	uid, gid, err := safefs.LookupOwner(owner)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	err = eachWrongOwner(ctx, root, uid, gid, skip, func(p string) error {
		if made.covers(p) {
			return nil
		}
		if len(found) == maxExtra {
			return fs.SkipAll
		}
		found = append(found, Difference{Path: p, What: "owner"})
		return nil
	})
	return found, err
}
