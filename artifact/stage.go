package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// Stage makes the release of p complete, verified and synced in its own directory, and returns it. If it is complete
// already, Stage only sets its directory's mode. After a kill at any point the next Stage continues or starts again; it
// never takes a partial tree for a complete one. raw is the manifest's bytes: if their digest isn't p's, the error
// wraps deployments.ErrDigest. If sizes are known, a full disk is reported before the archive is fetched.
func (r *Releases) Stage(
	ctx context.Context,
	p deployments.Pointer,
	m *deployments.Manifest,
	raw []byte,
	opt StageOptions,
) (*Release, error) {
	rel, err := r.stage(ctx, p, m, raw, opt)
	if err != nil {
		return nil, fmt.Errorf("stage %s: %w", nameOf(m.Version, p.Digest), err)
	}
	return rel, nil
}

func (r *Releases) stage(
	ctx context.Context,
	p deployments.Pointer,
	m *deployments.Manifest,
	raw []byte,
	opt StageOptions,
) (*Release, error) {
	if opt.Log == nil {
		opt.Log = r.log
	}
	if deployments.DigestOf(raw) != p.Digest {
		return nil, fmt.Errorf("the manifest %s: %w", deployments.ShownURL(p.URL), deployments.ErrDigest)
	}
	if m.Src == "" {
		return nil, errors.New("the manifest has commands only, and no tree")
	}
	r, leave, err := r.enter(true)
	if err != nil {
		return nil, err
	}
	defer leave()
	if rel, err := r.Find(p.Digest); err == nil {
		return rel, r.setMode(rel) // the staging may have been killed before it set the mode
	} else if !errors.Is(err, ErrNoRelease) {
		return nil, err
	}
	if err := r.changeRecord(nameOf(m.Version, p.Digest)).remove(); err != nil { // it is about an earlier tree
		return nil, err
	}
	return r.stageAnew(ctx, p, m, raw, r.base(opt.Base), opt, false)
}

// Heal stages a release anew, including its index, and exchanges the directories, so that dest is whole all the time.
// It takes over only what the release's own commands made (see commandChange) and, without an owner in the manifest,
// the owners. Processes may still work in the old tree: it stays until the release is removed or healed again.
func (r *Releases) Heal(ctx context.Context, rel *Release) error {
	r, leave, err := r.enter(true)
	if err != nil {
		return fmt.Errorf("heal %s: %w", rel.Dir, err)
	}
	defer leave()
	if _, err := r.stageAnew(ctx, rel.Pointer, rel.Manifest, rel.Raw, nil, StageOptions{Log: r.log}, true); err != nil {
		return fmt.Errorf("heal %s: %w", rel.Dir, err)
	}
	return nil
}

// stageAnew stages a release, even if it is there already. If heals is set, it restores what the
// release's commands made.
func (r *Releases) stageAnew(
	ctx context.Context,
	p deployments.Pointer,
	m *deployments.Manifest,
	raw []byte,
	base *base,
	opt StageOptions,
	heals bool,
) (*Release, error) {
	staging := filepath.Join(r.private(), stagingPrefix+p.Digest.Short())
	if err := r.prepare(staging); err != nil {
		return nil, err
	}
	r.reachStep("fetch")
	opt.resumes = true
	tree, err := fetchInto(ctx, r.objects, m, base, staging, opt, r.checkOwner)
	if err != nil {
		return nil, errors.Join(err, removeIfUseless(err, m, staging))
	}
	r.reachStep("fetched")
	if err := r.linkShared(staging, m); err != nil {
		return nil, err
	}
	name := nameOf(m.Version, p.Digest)
	if err := os.Chmod(staging, m.DestMode|0o200); err != nil { // moving a directory needs write permission in it
		return nil, err
	}
	stats, err := r.syncTree(ctx, staging, tree)
	if err != nil {
		return nil, err
	}
	r.reachStep("synced")
	dir := filepath.Join(r.top(), name)
	var made []commandChange
	if heals {
		if err := safefs.NoMounts(dir); err != nil { // nothing can be taken from a tree with a mount
			return nil, err
		}
		made = readChanges(r.changeRecord(name).made)
		if err := r.restoreChanges(staging, dir, m, made); err != nil {
			return nil, err
		}
	}
	replaced, err := r.replace(staging, dir)
	if err != nil {
		return nil, err
	}
	if replaced && heals {
		if err := restoreLate(dir, r.displaced(staging), made); err != nil {
			r.log.Warn("could not carry over all that was written while the release was healed: the old tree still has it",
				"dir", dir, "old_tree", filepath.Join(r.shownTop(), privateName, filepath.Base(r.displaced(staging))), "error", err)
		}
	}
	sum := deployments.DigestOf(tree.index)
	rec, err := json.Marshal(record{Release: Release{Pointer: p, Manifest: m, Raw: raw}, Index: sum})
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(filepath.Join(r.private(), name+indexSuffix), tree.index, 0o600); err != nil {
		return nil, err
	}
	r.reachStep("index")
	if err := durable.WriteFile(filepath.Join(r.private(), name+recordSuffix), rec, 0o600); err != nil {
		return nil, err
	}
	r.reachStep("record")
	r.saveStagedStats(name, sum, stats, base)
	if !replaced {
		if err := os.Rename(staging, dir); err != nil {
			return nil, err
		}
	}
	r.reachStep("installed")
	rel := &Release{Pointer: p, Manifest: m, Raw: raw, Dir: filepath.Join(r.shownTop(), name)}
	if err := r.setMode(rel); err != nil {
		return nil, err
	}
	if err := errors.Join(durable.SyncDir(r.top()), durable.SyncDir(r.private())); err != nil {
		return nil, err
	}
	return rel, nil
}

// syncTree syncs a staged tree to the disk, and collects its files' stats meanwhile. With hashAlways there are no
// stats.
func (r *Releases) syncTree(ctx context.Context, staging string, tree fetchedTree) (stats []fileStat, err error) {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return durable.SyncFS(staging) })
	if !r.hashAlways {
		group.Go(func() error {
			x := tree.decoded
			if x == nil {
				var err error
				if x, err = archive.DecodeIndex(tree.index); err != nil {
					return err
				}
			}
			if stats = tree.stats; stats == nil {
				stats = make([]fileStat, len(x.Entries))
			}
			return addStats(ctx, staging, x, stats)
		})
	}
	err = group.Wait() // only after this is stats set
	return stats, err
}

// saveStagedStats records the stats of a staged release, unless hashAlways is set. If files of base
// were hard-linked, which changes their ctimes, it records those of base again. A failure is only
// logged: the files are hashed the next time.
func (r *Releases) saveStagedStats(name string, index deployments.Digest, stats []fileStat, base *base) {
	if r.hashAlways {
		return
	}
	err := r.writeFileStats(name, index, stats)
	if base != nil && base.known != nil && base.known.changed {
		err = errors.Join(err, r.writeFileStats(base.name, base.digest, base.known.stats))
	}
	if err != nil {
		r.log.Warn("could not record the sizes and times of a release's files: they are hashed again before they are reused",
			"dest", r.dest, "release", name, "error", err)
	}
}

// setMode sets the mode of a release's directory to its manifest's DestMode. It is called after the directory was
// renamed, since the rename needs write permission in the directory.
func (r *Releases) setMode(rel *Release) error {
	dir := r.dirOf(rel)
	info, err := os.Stat(dir)
	if err != nil || info.Mode().Perm() == rel.Manifest.DestMode.Perm() {
		return err
	}
	return os.Chmod(dir, rel.Manifest.DestMode)
}

// prepare makes the staging directory if it is missing, and closes it and the private directory to
// other users.
func (r *Releases) prepare(staging string) error {
	for _, dir := range []string{r.private(), staging} {
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return err
		}
	}
	return durable.SyncDir(r.parent())
}

// replace exchanges the staged tree for the directory at dir, and reports whether dir existed. Such a directory is a
// release to heal, or has no valid record. Without a record it can't be trusted, and must be gone before the record is
// written. The exchange is one system call, as dest may lead to dir. Processes may still work in the old directory,
// which is kept until the release is removed or healed again.
func (r *Releases) replace(staging, dir string) (bool, error) {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if err := safefs.NoMounts(dir); err != nil {
		return false, err
	}
	if err := makeMovable(dir); err != nil {
		return false, err
	}
	if err := unix.Renameat2(unix.AT_FDCWD, staging, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
		return false, fmt.Errorf("%s is there already, and can't be exchanged (%w): move it away, and try again", dir, err)
	}
	r.reachStep("replaced")
	old := r.displaced(staging)
	if err := safefs.RemoveTree(old); err != nil {
		return false, err
	}
	if err := os.Rename(staging, old); err != nil {
		return false, err
	}
	return true, errors.Join(durable.SyncDir(r.top()), durable.SyncDir(r.private()))
}

// displaced returns the path at which replace keeps the directory that it exchanged for the tree staged at staging.
func (r *Releases) displaced(staging string) string {
	return filepath.Join(r.private(), healPrefix+strings.TrimPrefix(filepath.Base(staging), stagingPrefix))
}

// restoreChanges restores in a staged tree what the release's commands made. If m names no owner, it also gives all
// paths the owners that they have in the live tree.
func (r *Releases) restoreChanges(staging, live string, m *deployments.Manifest, made []commandChange) error {
	if !safefs.Exists(live) && len(made) == 0 {
		return nil
	}
	if err := restoreChanges(staging, live, made); err != nil {
		return err
	}
	if m.Owner == "" && safefs.Exists(live) {
		if err := keepOwners(staging, live); err != nil {
			return fmt.Errorf("keeping the owners of the live tree: %w", err)
		}
	}
	r.reachStep("made")
	return durable.SyncFS(staging)
}

// base returns the release of p, or the current one if p is zero, to take files from. If that release is missing, or
// its index can't be read, base returns nil.
func (r *Releases) base(p deployments.Pointer) *base {
	var rel *Release
	var rec *record
	var err error
	if p.IsZero() {
		rel, rec, err = r.current()
	} else {
		rel, rec, err = r.find(p.Digest)
	}
	if err != nil {
		return nil
	}
	index, err := r.readIndex(filepath.Base(rel.Dir), rec)
	if err != nil {
		r.log.Warn("the old release can't be used, so that more is fetched", "dir", rel.Dir, "error", err)
		return nil
	}
	name := filepath.Base(rel.Dir)
	b := &base{dir: r.dirOf(rel), index: index, digest: rec.Index, name: name}
	if !r.hashAlways {
		b.known = &knownFiles{stats: r.readStats(name, rec.Index)}
	}
	return b
}

// Unpack puts a manifest's tree into the empty directory dir, verified and synced. After an error,
// dir may hold a part of the tree.
func Unpack(ctx context.Context, objects *object.Client, m *deployments.Manifest, dir string, opt StageOptions) error {
	return unpack(ctx, objects, m, dir, opt, nil)
}

// unpack is Unpack with a check of owners, for the strategies rsync and mv: see
// SwitcherConfig.CheckOwner.
func unpack(
	ctx context.Context,
	objects *object.Client,
	m *deployments.Manifest,
	dir string,
	opt StageOptions,
	checkOwner func(uid, gid int) error,
) error {
	if m.Src == "" {
		return errors.New("unpack: the manifest has commands only, and no tree")
	}
	if _, err := fetchInto(ctx, objects, m, nil, dir, opt, checkOwner); err != nil {
		return fmt.Errorf("unpack into %s: %w", dir, err)
	}
	return durable.SyncFS(dir)
}

// fetchInto puts m's tree into dir, and sets its owner. The tree isn't synced yet.
func fetchInto(
	ctx context.Context,
	objects *object.Client,
	m *deployments.Manifest,
	base *base,
	dir string,
	opt StageOptions,
	checkOwner func(uid, gid int) error,
) (tree fetchedTree, err error) {
	if _, _, err := safefs.LookupOwner(m.Owner); err != nil { // checked before fetching, as an unknown owner is an error
		return tree, err
	}
	if m.Index != nil {
		tree, err = fetchIndexed(ctx, objects, m, base, dir, opt)
	} else {
		if err = extractFrom(ctx, objects, m, dir, opt, checkOwner); err == nil {
			tree.index, err = indexOfTree(ctx, dir)
		}
	}
	if err != nil {
		return tree, err
	}
	return tree, applyOwner(ctx, dir, m.Owner) // which changes no linked file: each has that owner already
}

// removeIfUseless removes a staged tree, and what was fetched of its deltas, if the next try can't
// use them. That is so if m has no index, the disk is full, or the release is wrong, missing or
// changed. Otherwise the verified parts of the tree are kept.
func removeIfUseless(err error, m *deployments.Manifest, staging string) error {
	useless := func(is error) bool { return errors.Is(err, is) }
	if m.Index == nil ||
		slices.ContainsFunc([]error{
			syscall.ENOSPC, deployments.ErrDigest, archive.ErrIndex, object.ErrNotFound, object.ErrChanged,
		}, useless) {
		return errors.Join(safefs.RemoveTree(staging), dropDeltas(staging, ""))
	}
	return nil
}

// checkFree returns an error that wraps ENOSPC if the disk of dir has less than need bytes free. The text what names
// the thing that takes these bytes.
func checkFree(dir, what string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; need > free {
		return fmt.Errorf("%s has %s, %s has %s left: %w", what, sizeText(need), dir, sizeText(free),
			syscall.ENOSPC)
	}
	return nil
}

// sizeText returns n bytes as text, in kB below 10 MB and in MB from there on.
func sizeText(n int64) string {
	if n < 10_000_000 {
		return fmt.Sprintf("%d kB", n/1000)
	}
	return fmt.Sprintf("%d MB", n/1_000_000)
}

// makeMovable gives a directory's owner write permission in it, without which only root can move it to another
// directory. A missing directory is no error.
func makeMovable(dir string) error {
	info, err := os.Lstat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || !info.IsDir() || info.Mode()&0o200 != 0 {
		return err
	}
	return os.Chmod(dir, info.Mode()|0o200)
}
