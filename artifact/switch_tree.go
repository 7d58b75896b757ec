package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// treeSwitcher is what the strategies rsync and mv share. A release's tree is unpacked in SwitcherConfig.Trees, and has
// the name DIGEST only if it is complete.
type treeSwitcher struct{ c SwitcherConfig }

func (t treeSwitcher) Dir(r *Release) string { return r.Manifest.Dest }

func (t treeSwitcher) IsLive(r *Release) bool {
	info, err := os.Stat(r.Manifest.Dest)
	return err == nil && info.IsDir()
}

// partSuffix follows the name of a tree that isn't whole yet.
const partSuffix = ".part"

func (t treeSwitcher) tree(r *Release) string {
	return filepath.Join(t.c.Trees, r.Pointer.Digest.String())
}

// openParent opens the directory that r's dest lies in.
func (t treeSwitcher) openParent(r *Release) (*safefs.Place, error) {
	return safefs.OpenPlace(r.Manifest.Dest, safefs.PlaceOptions{Within: t.c.Within, Owner: r.Manifest.Owner})
}

func (t treeSwitcher) Stage(ctx context.Context, r *Release, opt StageOptions) error {
	// An unsafe place is reported before anything is fetched. A pre command may make a missing directory.
	switch place, err := t.openParent(r); {
	case err == nil:
		place.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	tree := t.tree(r)
	if safefs.Exists(tree) {
		return nil
	}
	part := tree + partSuffix
	if err := t.unpack(ctx, r, part, opt); err != nil {
		return err
	}
	return durable.Rename(part, tree)
}

// unpack removes dir, makes it again with r's tree in it, and syncs it.
func (t treeSwitcher) unpack(ctx context.Context, r *Release, dir string, opt StageOptions) error {
	if err := safefs.RemoveTree(dir); err != nil {
		return fmt.Errorf("removing what was left of an earlier tree: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making a directory to unpack into: %w", err)
	}
	opt.resumes = true
	if err := unpack(ctx, t.c.Objects, r.Manifest, dir, opt, t.c.CheckOwner); err != nil {
		return errors.Join(fmt.Errorf("unpacking %s: %w", deployments.ShownURL(r.Pointer.URL), err), safefs.RemoveTree(dir))
	}
	if err := os.Chmod(dir, r.Manifest.DestMode); err != nil {
		return fmt.Errorf("setting dest_mode: %w", err)
	}
	return durable.SyncFS(dir)
}

// hasReleaseLink reports whether the release strategy left a link at dest: writing through it would
// change a release.
func (t treeSwitcher) hasReleaseLink(parent *safefs.Place, r *Release) bool {
	target, err := linkTarget(parent.Path(filepath.Base(r.Manifest.Dest)), r.Manifest.Dest)
	return err == nil && filepath.Dir(target) == r.Manifest.Dest+".releases"
}

// removeReleaseLink removes a link that the release strategy left at dest.
func (t treeSwitcher) removeReleaseLink(parent *safefs.Place, r *Release) error {
	if !t.hasReleaseLink(parent, r) {
		return nil
	}
	return os.Remove(parent.Path(filepath.Base(r.Manifest.Dest)))
}

// Prune removes what interrupted copies left beside dest, except complete copies of r and of the
// releases in protect.
func (t treeSwitcher) Prune(r *Release, _ int, protect, _ []deployments.Digest) error {
	parent, err := t.openParent(r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	return pruneCopies(parent, r, protect)
}

// pruneCopies is treeSwitcher.Prune in dest's open parent directory.
func pruneCopies(parent *safefs.Place, r *Release, protect []deployments.Digest) error {
	entries, err := os.ReadDir(parent.Path(""))
	for _, e := range entries {
		short, isCopy := strings.CutPrefix(e.Name(), besidePrefix(r))
		if !isCopy || !copySuffix.MatchString(short) || short == r.Pointer.Digest.Short() ||
			slices.ContainsFunc(protect, func(d deployments.Digest) bool { return d.Short() == short }) {
			continue
		}
		err = errors.Join(err, safefs.RemoveTree(parent.Path(e.Name())))
	}
	return err
}

// RecordBefore does nothing: verify can't compare a tree that mv has moved, and rsync's switch
// leaves no differences.
func (t treeSwitcher) RecordBefore(context.Context, *Release) error { return nil }

// RecordAfter does nothing with mv, as verify can't compare a moved tree. rsyncSwitcher overrides it.
func (t treeSwitcher) RecordAfter(context.Context, *Release) error { return nil }

// besideName returns the name under which r's tree is copied beside dest, before it gets dest's name.
func besideName(r *Release) string { return besidePrefix(r) + r.Pointer.Digest.Short() }

func besidePrefix(r *Release) string { return "." + filepath.Base(r.Manifest.Dest) + ".kedge-" }

// copySuffix matches what follows besidePrefix in the name of a copy, whether or not that is complete.
var copySuffix = regexp.MustCompile(`^[0-9a-f]{12}(` + regexp.QuoteMeta(partSuffix) + `)?$`)

// tool runs a program that copies files. If the program fails, and its output names a full disk or
// quota, a read-only file system or an I/O error, the error wraps that errno: the exit status
// doesn't tell these from other errors.
func (t treeSwitcher) tool(ctx context.Context, name string, args ...string) error {
	output, err := t.c.Tool(ctx, nil, name, args...)
	for _, trouble := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO} {
		text := trouble.Error() // in the words of the C library, but for the first letter
		if err != nil && bytes.Contains(output, []byte(text[1:])) {
			return fmt.Errorf("%w: %w", trouble, err)
		}
	}
	return err
}
