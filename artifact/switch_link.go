package artifact

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// linkSwitcher implements StrategyRelease: directories beside dest, and dest a link to one of them.
type linkSwitcher struct{ releases *Releases }

func (l linkSwitcher) Stage(ctx context.Context, rel *Release, opt StageOptions) error {
	_, err := l.releases.Stage(ctx, rel.Pointer, rel.Manifest, rel.Raw, opt)
	return err
}

func (l linkSwitcher) Switch(_ context.Context, rel *Release) error {
	r, leave, err := l.releases.enter(false)
	if err != nil {
		return fmt.Errorf("finding the release to switch to: %w", err)
	}
	defer leave()
	if err := removeAside(r.places.parent, rel); err != nil {
		return err
	}
	found, err := r.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release to switch to: %w", err)
	}
	return r.Switch(found)
}

func (l linkSwitcher) SwitchBack(ctx context.Context, rel, _ *Release, _ bool) error {
	if _, err := l.releases.Find(rel.Pointer.Digest); errors.Is(err, ErrNoRelease) {
		if err := l.Stage(ctx, rel, StageOptions{}); err != nil {
			return fmt.Errorf("staging again the release to go back to: %w", err)
		}
	}
	return l.Switch(ctx, rel)
}

// Keep does nothing: the first switch moves what is at dest to DEST.releases/.
func (l linkSwitcher) Keep(context.Context, *Release) error { return nil }

func (l linkSwitcher) Restore(context.Context, *Release) (bool, error) { return l.releases.restore() }

func (l linkSwitcher) IsLive(rel *Release) bool {
	dir := l.Dir(rel)
	if dir == "" {
		return false
	}
	got, err := filepath.EvalSymlinks(rel.Manifest.Dest)
	if err != nil {
		return false
	}
	want, err := filepath.EvalSymlinks(dir)
	return err == nil && got == want
}

func (l linkSwitcher) Dir(rel *Release) string {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return ""
	}
	return found.Dir
}

func (l linkSwitcher) Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if errors.Is(err, ErrNoRelease) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	if err != nil {
		return nil, err
	}
	return l.releases.Verify(ctx, found, limit)
}

// Heal makes dest lead to the release. A release that isn't complete, can't be compared, or differs in a way that
// staging mends, is first staged again, and its directory exchanged. left are the remaining differences.
func (l linkSwitcher) Heal(ctx context.Context, rel *Release) (left []Difference, err error) {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if errors.Is(err, ErrNoRelease) {
		found = rel.withDirIn(l.releases)
		if err := l.releases.Heal(ctx, found); err != nil {
			return nil, err
		}
		left, err = l.releases.Verify(ctx, found, 0)
		return left, errors.Join(err, l.Switch(ctx, rel))
	}
	if err != nil {
		return nil, err
	}
	left, err = l.releases.Verify(ctx, found, 0)
	if err != nil || len(left) > 0 && l.releases.stagingWouldMend(found, left) {
		if err := l.releases.Heal(ctx, found); err != nil {
			return nil, err
		}
		if left, err = l.releases.Verify(ctx, found, 0); err != nil {
			return nil, err
		}
	}
	return left, l.releases.Switch(found)
}

func (l linkSwitcher) RecordBefore(ctx context.Context, rel *Release) error {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release to record before its commands: %w", err)
	}
	return l.releases.RecordBefore(ctx, found)
}

func (l linkSwitcher) RecordAfter(ctx context.Context, rel *Release) error {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release whose commands ran: %w", err)
	}
	return l.releases.RecordAfter(ctx, found)
}

// Prune also removes what the strategies rsync and mv left beside dest, if the unit had one of them before.
func (l linkSwitcher) Prune(rel *Release, keep int, protect, drop []deployments.Digest) error {
	return errors.Join(l.releases.pruneBut(keep, protect, drop), l.pruneCopies(rel, protect))
}

func (l linkSwitcher) pruneCopies(rel *Release, protect []deployments.Digest) error {
	r, leave, err := l.releases.enter(false)
	if errors.Is(err, ErrNoRelease) {
		return nil
	}
	if err != nil {
		return err
	}
	defer leave()
	return pruneCopies(r.places.parent, rel, protect)
}

// Switch makes dest lead to rel by one rename, and syncs dest's parent directory. A directory, or
// another tool's link, at dest is exchanged for the new link in one system call (renameat2
// RENAME_EXCHANGE), and kept in DEST.releases/. Any other file at dest is an error. If rel's
// directory is gone, the error wraps ErrNoRelease. After another error dest may lead to rel already:
// Switch, called again, finishes.
func (r *Releases) Switch(rel *Release) error {
	if err := r.switchTo(rel); err != nil {
		return fmt.Errorf("switch %s to %s: %w", r.dest, filepath.Base(rel.Dir), err)
	}
	return nil
}

func (r *Releases) switchTo(rel *Release) error {
	r, leave, err := r.enter(false)
	if err != nil {
		return err
	}
	defer leave()
	name := filepath.Base(rel.Dir)
	if info, err := os.Lstat(r.dirOf(rel)); err != nil || !info.IsDir() || filepath.Dir(rel.Dir) != r.shownTop() {
		return ErrNoRelease
	}
	target := filepath.Join(filepath.Base(r.shownTop()), name)
	now := time.Now()
	if err := os.Chtimes(filepath.Join(r.private(), name+recordSuffix), now, now); err != nil {
		// Only Prune uses this time: the release may be pruned a little early.
		r.log.Warn("could not record when the release was switched to: it may be pruned early", "dir", rel.Dir, "error", err)
	}
	if there, err := os.Readlink(r.link()); err == nil && there == target {
		if err := r.adopt(); err != nil {
			r.log.Warn("could not move what was at dest before kedge to its own place beside dest: trying again at the next "+
				"switch", "dest", r.dest, "error", err)
		}
		return durable.SyncDir(r.parent())
	}
	if err := r.adopt(); err != nil {
		return err
	}
	link := filepath.Join(r.private(), linkName)
	r.reachStep("link")
	if err := os.Symlink(target, link); err != nil {
		return err
	}
	info, err := os.Lstat(r.link())
	r.reachStep("switch")
	switch {
	case err != nil && !errors.Is(err, fs.ErrNotExist):
	case err == nil && (info.IsDir() || info.Mode().Type() == fs.ModeSymlink && !r.leadsHere(r.link())):
		err = unix.Renameat2(unix.AT_FDCWD, link, unix.AT_FDCWD, r.link(), unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("dest can't be exchanged for a link (%w): stop what uses it, move it away, and try again",
				err)
		}
	case err == nil && info.Mode()&fs.ModeSymlink == 0:
		err = errors.New("dest is neither a directory nor a symbolic link: move it away first")
	default:
		err = os.Rename(link, r.link())
	}
	if err != nil {
		return errors.Join(err, os.Remove(link))
	}
	r.reachStep("switched")
	if err := durable.SyncDir(r.parent()); err != nil {
		return err
	}
	return r.adopt()
}

// leadsHere reports whether a path is a link to an entry of DEST.releases, as dest is under kedge.
func (r *Releases) leadsHere(path string) bool {
	target, err := linkTarget(path, r.dest)
	return err == nil && filepath.Dir(target) == r.shownTop()
}

// linkTarget returns the absolute path that link leads to. A relative target is resolved as if link lay beside dest.
func linkTarget(link, dest string) (string, error) {
	target, err := os.Readlink(link)
	if err == nil && !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(dest), target)
	}
	return target, err
}

// adopt renames what was at dest before kedge, a tree or a link, to its permanent name in
// DEST.releases. A switch, which exchanges dest for kedge's new link, leaves that tree or link at
// the new link's temporary name. A link of kedge's that is still there was not used, and is
// removed. If nothing is there, adopt does nothing.
func (r *Releases) adopt() error {
	link := filepath.Join(r.private(), linkName)
	if _, err := os.Lstat(link); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if r.leadsHere(link) {
		return os.Remove(link)
	}
	kept := filepath.Join(r.top(), adoptedPrefix+time.Now().UTC().Format(adoptedTime))
	if err := os.Rename(link, kept); err != nil {
		return err
	}
	r.log.Info("kept what was at dest before kedge", "dest", r.dest,
		"dir", filepath.Join(r.shownTop(), filepath.Base(kept)))
	return errors.Join(durable.SyncDir(r.top()), durable.SyncDir(r.private()))
}

// restore puts back what was at dest before kedge, and reports whether dest holds that now. If dest is a link of
// kedge's, restore exchanges it for the tree or link that was kept last, and returns false if none was kept. If dest is
// no link of kedge's, restore leaves it as it is, and reports whether anything lies there.
func (r *Releases) restore() (bool, error) {
	r, leave, err := r.enter(false)
	if errors.Is(err, ErrNoRelease) {
		return safefs.Exists(r.dest), nil // nothing was moved away
	}
	if err != nil {
		return false, err
	}
	defer leave()
	if err := r.adopt(); err != nil { // the last switch may have been killed before it did this
		return false, err
	}
	kept, err := filepath.Glob(globLiteral.Replace(filepath.Join(r.top(), adoptedPrefix)) + "*")
	if err != nil {
		return false, err
	}
	// A version may begin with the prefix, too, but its release's name doesn't end in a time.
	kept = slices.DeleteFunc(kept, func(k string) bool {
		_, err := time.Parse(adoptedPrefix+adoptedTime, filepath.Base(k))
		return err != nil
	})
	slices.Sort(kept)
	if !r.leadsHere(r.link()) {
		// A restore that was killed after the exchange left kedge's link under the kept name.
		for _, k := range kept {
			if r.leadsHere(k) {
				err = errors.Join(err, os.Remove(k))
			}
		}
		return safefs.Exists(r.link()), err
	}
	if len(kept) == 0 {
		return false, nil
	}
	last := kept[len(kept)-1]
	r.reachStep("restore")
	if err := unix.Renameat2(unix.AT_FDCWD, last, unix.AT_FDCWD, r.link(), unix.RENAME_EXCHANGE); err != nil {
		return false, fmt.Errorf("putting back what was at %s before kedge: %w", r.dest, err)
	}
	r.reachStep("restored")
	r.log.Info("put back what was at dest before kedge", "dest", r.dest)
	return true, errors.Join(durable.SyncDir(r.parent()), os.Remove(last), durable.SyncDir(r.top()))
}
