package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/deployments/durable"
)

// treeSwitcher is what the strategies rsync and mv share: trees unpacked at TREES/DIGEST, complete if that name
// exists.
type treeSwitcher struct{ c SwitcherConfig }

func (t treeSwitcher) Dir(r *Release) string { return r.Manifest.Dest }

// partSuffix follows the name of a tree that isn't whole yet.
const partSuffix = ".part"

func (t treeSwitcher) tree(r *Release) string {
	return filepath.Join(t.c.Trees, r.Pointer.Digest.String())
}

// place opens the directory of r's dest.
func (t treeSwitcher) place(r *Release) (*Place, error) {
	return OpenPlace(r.Manifest.Dest, PlaceOptions{Within: t.c.Within, Owner: r.Manifest.Owner})
}

func (t treeSwitcher) Stage(ctx context.Context, r *Release, opt StageOptions) error {
	// An unsafe place is reported before anything is fetched. A pre command may make a missing directory.
	switch place, err := t.place(r); {
	case err == nil:
		place.Close()
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	tree := t.tree(r)
	if exists(tree) {
		return nil
	}
	part := tree + partSuffix
	if err := t.unpack(ctx, r, part, opt); err != nil {
		return err
	}
	return moveDurably(part, tree)
}

// unpack makes dir anew with r's tree, and syncs it.
func (t treeSwitcher) unpack(ctx context.Context, r *Release, dir string, opt StageOptions) error {
	if err := removeTree(dir); err != nil {
		return fmt.Errorf("removing what was left of an earlier tree: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making a directory to unpack into: %w", err)
	}
	opt.resumes = true
	if err := unpack(ctx, t.c.Objects, r.Manifest, dir, opt, t.c.Owners); err != nil {
		return errors.Join(fmt.Errorf("unpacking %s: %w", r.Pointer.URL, err), removeTree(dir))
	}
	if err := os.Chmod(dir, r.Manifest.DestMode); err != nil {
		return fmt.Errorf("setting dest_mode: %w", err)
	}
	return syncFS(dir)
}

// linked reports whether the release strategy left a link at dest: writing through it would change a release.
func (t treeSwitcher) linked(parent *Place, r *Release) bool {
	target, err := os.Readlink(parent.Path(filepath.Base(r.Manifest.Dest)))
	if err != nil {
		return false // absent, or a directory
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(r.Manifest.Dest), target)
	}
	return filepath.Dir(target) == r.Manifest.Dest+".releases"
}

// clear removes a link that the release strategy left at dest.
func (t treeSwitcher) clear(parent *Place, r *Release) error {
	if !t.linked(parent, r) {
		return nil
	}
	return os.Remove(parent.Path(filepath.Base(r.Manifest.Dest)))
}

func (t treeSwitcher) Prune(r *Release, _ int, _, _ []deployments.Digest) error {
	parent, err := t.place(r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	return removeTree(parent.Path(besideName(r) + ".part"))
}

// RecordBefore and RecordAfter do nothing: verify can't compare a tree that was moved. rsyncSwitcher has its own.
func (t treeSwitcher) RecordBefore(context.Context, *Release) error { return nil }
func (t treeSwitcher) RecordAfter(context.Context, *Release) error  { return nil }

// rsyncSwitcher implements StrategyRsync: rsync writes into dest itself.
type rsyncSwitcher struct{ treeSwitcher }

func (s rsyncSwitcher) Switch(ctx context.Context, r *Release) error {
	parent, err := s.place(r)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf(
			"dest's directory %s does not exist: make it before, or in a pre command",
			filepath.Dir(r.Manifest.Dest),
		)
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := removeAside(parent, r); err != nil {
		return err
	}
	if err := s.replaceLink(ctx, parent, r); err != nil {
		return fmt.Errorf("replacing the link at dest: %w", err)
	}
	if s.c.Changes != "" {
		if err := s.changeFiles(r).forget(); err != nil { // rsync removes what they made
			return err
		}
	}
	dest, err := s.dest(parent, r, true)
	if err != nil {
		return err
	}
	defer dest.Close()
	return s.copy(ctx, r, dest)
}

// copy has rsync make dest equal to r's tree. Excluded files stay as they are.
func (s rsyncSwitcher) copy(ctx context.Context, r *Release, dest *Place, exclude ...string) error {
	args, err := s.args(r, dest)
	if err != nil {
		return err
	}
	verbose := s.c.RsyncVerbose
	if verbose == nil {
		verbose = []string{"-v"}
	}
	args = append(slices.Concat(exclude, args, verbose), s.tree(r)+"/", dest.PathForTool("")+"/")
	if err := s.tool(ctx, "rsync", args...); err != nil {
		return err
	}
	return syncFS(dest.Path(""))
}

// replaceLink replaces a link that the release strategy left at dest by a whole tree, in one exchange, as
// something is served from there.
func (s rsyncSwitcher) replaceLink(ctx context.Context, parent *Place, r *Release) error {
	if !s.linked(parent, r) {
		return nil
	}
	part := besideName(r) + ".part"
	private, err := parent.makePrivate(part)
	if err != nil {
		return err
	}
	defer private.Close()
	tree, err := private.open("tree", true)
	if err != nil {
		return err
	}
	defer tree.Close()
	args, err := s.args(r, tree)
	if err != nil {
		return err
	}
	if err := s.tool(ctx, "rsync", append(args, s.tree(r)+"/", tree.PathForTool("")+"/")...); err != nil {
		return errors.Join(err, removeTree(parent.Path(part)))
	}
	if err := syncFS(tree.Path("")); err != nil {
		return err
	}
	dest := parent.Path(filepath.Base(r.Manifest.Dest))
	if err := unix.Renameat2(unix.AT_FDCWD, private.Path("tree"), unix.AT_FDCWD, dest, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return errors.Join(durable.SyncDir(parent.Path("")), removeTree(parent.Path(part)))
}

// dest opens dest itself. A link to a directory is followed if only trusted users can have made it.
func (s rsyncSwitcher) dest(parent *Place, r *Release, create bool) (*Place, error) {
	dest, err := parent.walk(filepath.Base(r.Manifest.Dest), nil, create)
	if err != nil || len(s.c.Within) == 0 {
		return dest, err
	}
	bounds, err := realDirs(s.c.Within)
	if err == nil && !isWithin(dest.real, bounds) {
		err = fmt.Errorf(
			"dest %s leads to %s, outside of %s: %w",
			r.Manifest.Dest,
			dest.real,
			strings.Join(s.c.Within, ", "),
			ErrUnsafe,
		)
	}
	if err != nil {
		dest.Close()
		return nil, err
	}
	return dest, nil
}

func (s rsyncSwitcher) args(r *Release, dest *Place) ([]string, error) {
	// By content, as archives with normalised times, like kedge publish's, look unchanged by size and time.
	args := []string{"-a", "--delete", "--checksum"}
	if from := r.Manifest.ExcludeFrom; from != "" {
		// rsync's exit status would be that of a failing disk, which is tried again for ever.
		if !exists(filepath.Join(s.tree(r), from)) {
			return nil, fmt.Errorf("%w: exclude_from: the archive has no file %s", ErrUntouched, from)
		}
		args = append(args, "--exclude-from", filepath.Join(s.tree(r), from))
	}
	for _, e := range r.Manifest.Excludes {
		args = append(args, "--exclude", e)
	}
	mounts, err := mountsBelow(dest.Path(""))
	if err != nil {
		return nil, fmt.Errorf("looking for mounts in dest: %w", err)
	}
	for _, m := range mounts {
		if m != "." {
			args = append(args, "--filter", "P /"+rsyncLiteral.Replace(m)+"/***") // what lies there is not deleted
		}
	}
	return args, nil
}

// rsyncLiteral escapes a path to an rsync pattern that matches it alone. A backslash is special only beside a
// wildcard.
var rsyncLiteral = strings.NewReplacer("*", "[*]", "?", "[?]", "[", "[[]")

func (s rsyncSwitcher) SwitchBack(ctx context.Context, r, _ *Release, _ bool) error {
	if exists(s.tree(r)) {
		if ds, err := s.Verify(ctx, r, 0); err == nil && len(ds) == 0 {
			return nil // dest may be read-only by now
		}
	}
	if err := s.Stage(ctx, r, StageOptions{}); err != nil {
		return fmt.Errorf("unpacking again the release to go back to: %w", err)
	}
	return s.Switch(ctx, r)
}

func (s rsyncSwitcher) Live(r *Release) bool { return exists(r.Manifest.Dest) }

// Verify asks rsync what it would change. rsync can't bound its reading speed, so limit is ignored.
func (s rsyncSwitcher) Verify(ctx context.Context, r *Release, _ int64) ([]Difference, error) {
	if !exists(s.tree(r)) {
		return nil, nil
	}
	dest, err := s.open(r, false)
	if errors.Is(err, fs.ErrNotExist) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer dest.Close()
	found, err := s.differences(ctx, r, dest, false)
	if err != nil {
		return nil, err
	}
	return s.changeFiles(r).overlaid(dest.Path(""), found)
}

// open opens dest itself. It must exist, unless create is set.
func (s rsyncSwitcher) open(r *Release, create bool) (*Place, error) {
	parent, err := s.place(r)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	return s.dest(parent, r, create)
}

func (s rsyncSwitcher) changeFiles(r *Release) changeFiles {
	name := filepath.Join(s.c.Changes, r.Pointer.Digest.String())
	return changeFiles{name + changesSuffix, name + beforeSuffix}
}

// Record lists what the release's commands changed in dest: rsync compares it with the tree that it copied there, by
// size and time.
func (s rsyncSwitcher) RecordAfter(ctx context.Context, r *Release) error {
	if s.c.Changes == "" || !exists(s.tree(r)) {
		return nil
	}
	dest, err := s.open(r, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dest.Close()
	found, err := s.differences(ctx, r, dest, true)
	if err != nil {
		return fmt.Errorf("recording what the commands of %s made: %w", r.Pointer, err)
	}
	if err := os.MkdirAll(s.c.Changes, 0o700); err != nil {
		return err
	}
	left, err := s.changeFiles(r).recordAfter(dest.Path(""), found)
	if left > 0 && s.c.Log != nil {
		s.c.Log.Warn("the release's commands made more paths than are recorded: the rest counts as drift",
			"remembered", maxChanges, "left_out", left)
	}
	return err
}

// differences asks rsync what it would change. quick makes it compare by size and time.
func (s rsyncSwitcher) differences(ctx context.Context, r *Release, dest *Place, quick bool) ([]Difference, error) {
	args, err := s.args(r, dest)
	if err != nil {
		return nil, err
	}
	if quick {
		args = slices.DeleteFunc(args, func(a string) bool { return a == "--checksum" })
	}
	args = append(args, "--dry-run", "--itemize-changes", s.tree(r)+"/", dest.PathForTool("")+"/")
	output, err := s.c.Tool(ctx, true, "rsync", args...)
	if err != nil {
		return nil, err
	}
	return itemized(string(output)), nil
}

// Heal leaves alone what r's commands made, and restores what it can of that.
func (s rsyncSwitcher) Heal(ctx context.Context, r *Release) (left []Difference, err error) {
	made := readChanges(s.changeFiles(r).made)
	if len(made) == 0 {
		return nil, s.SwitchBack(ctx, r, nil, false)
	}
	if exists(s.tree(r)) {
		left, err := s.Verify(ctx, r, 0)
		if gone := unrestorable(
			made,
			left,
		); err == nil &&
			!slices.ContainsFunc(left, func(d Difference) bool { return !gone[d.Path] }) {
			return left, nil
		}
	}
	if err := s.Stage(ctx, r, StageOptions{}); err != nil {
		return nil, fmt.Errorf("unpacking again the release to heal: %w", err)
	}
	dest, err := s.open(r, true)
	if err != nil {
		return nil, err
	}
	defer dest.Close()
	exclude, err := s.excludeChanges(r, dest, made)
	if err != nil {
		return nil, err
	}
	if err := s.copy(ctx, r, dest, "--exclude-from", exclude); err != nil {
		return nil, errors.Join(err, os.Remove(exclude))
	}
	if err := os.Remove(exclude); err != nil {
		return nil, err
	}
	if err := restoreChanges(dest.Path(""), dest.Path(""), made); err != nil {
		return nil, err
	}
	if err := syncFS(dest.Path("")); err != nil {
		return nil, err
	}
	return s.Verify(ctx, r, 0)
}

// excludeChanges writes rsync patterns for what commands made to a file.
func (s rsyncSwitcher) excludeChanges(r *Release, dest *Place, made []commandChange) (file string, err error) {
	live, err := openRestorer(dest.Path(""), dest.Path(""))
	if err != nil {
		return "", err
	}
	defer live.close()
	var patterns strings.Builder
	for i := range made {
		m := &made[i]
		if !m.whole() && (m.Sum == nil || !m.Kept && !live.asLeft(m)) {
			continue // rsync corrects it first
		}
		patterns.WriteString("/" + rsyncLiteral.Replace(m.Path) + "\n")
	}
	file = filepath.Join(s.c.Changes, r.Pointer.Digest.String()+".exclude")
	return file, os.WriteFile(file, []byte(patterns.String()), 0o600)
}

// itemized parses rsync's --itemize-changes: YXcstpoguax PATH, or *deleting PATH.
func itemized(out string) []Difference {
	var ds []Difference
	for line := range strings.Lines(out) {
		flags, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		path = strings.TrimSuffix(strings.TrimLeft(path, " "), "/")
		switch {
		case !ok || path == "":
		case flags == "*deleting":
			ds = append(ds, Difference{Path: path, What: "extra"})
		case len(flags) < 8:
		case strings.Trim(flags[2:], "+") == "":
			ds = append(ds, Difference{Path: path, What: "missing"})
		case strings.ContainsAny(flags[2:4], "cs"):
			ds = append(ds, Difference{Path: path, What: map[bool]string{true: "link", false: "content"}[flags[1] == 'L']})
		case flags[5] == 'p':
			ds = append(ds, Difference{Path: path, What: "mode"})
		case flags[6] == 'o' || flags[7] == 'g':
			ds = append(ds, Difference{Path: path, What: "owner"})
		}
	}
	return ds
}

// moveSwitcher implements StrategyMv: the tree is renamed to dest, which must not exist.
type moveSwitcher struct{ treeSwitcher }

// besideName returns the name, beside dest, under which a tree is copied from another file system.
func besideName(r *Release) string {
	return "." + filepath.Base(r.Manifest.Dest) + ".kedge-" + r.Pointer.Digest.Short()
}

func (m moveSwitcher) Switch(ctx context.Context, r *Release) error {
	parent, err := m.place(r)
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := removeAside(parent, r); err != nil {
		return err
	}
	return m.put(ctx, parent, r)
}

// put moves r's tree to dest.
func (m moveSwitcher) put(ctx context.Context, parent *Place, r *Release) error {
	dest, tree, beside := parent.Path(filepath.Base(r.Manifest.Dest)), m.tree(r), parent.Path(besideName(r))
	if err := m.clear(parent, r); err != nil {
		return fmt.Errorf("removing the link at dest: %w", err)
	}
	staged := exists(tree) || exists(beside)
	if exists(dest) && !staged {
		return nil // an earlier call was cut off after the rename
	}
	if exists(dest) {
		return fmt.Errorf(
			"%w: %s exists, and sync_strategy mv needs a pre command that moves it away",
			ErrUntouched,
			r.Manifest.Dest,
		)
	}
	if !exists(beside) {
		err := moveDurably(tree, dest)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
		if err := m.copyBeside(ctx, parent, r); err != nil {
			return fmt.Errorf("copying the tree beside dest: %w", err)
		}
	}
	if err := removeTree(tree); err != nil {
		return fmt.Errorf("removing the tree that was copied beside dest: %w", err)
	}
	return moveDurably(beside, dest)
}

// copyBeside copies r's tree beside dest. Until it is complete, it lies in a private directory, which others may
// move but not enter.
func (m moveSwitcher) copyBeside(ctx context.Context, parent *Place, r *Release) error {
	part := besideName(r) + ".part"
	private, err := parent.makePrivate(part)
	if err != nil {
		return err
	}
	defer private.Close()
	if err := m.tool(ctx, "cp", "-a", m.tree(r), private.PathForTool("tree")); err != nil {
		return errors.Join(err, removeTree(parent.Path(part)))
	}
	if err := syncFS(private.Path("tree")); err != nil {
		return err
	}
	if err := moveDurably(private.Path("tree"), parent.Path(besideName(r))); err != nil {
		return err
	}
	return removeTree(parent.Path(part))
}

func (m moveSwitcher) SwitchBack(ctx context.Context, r, failed *Release, dirty bool) error {
	parent, err := m.place(r)
	if err != nil {
		return err
	}
	defer parent.Close()
	dest, aside := parent.Path(filepath.Base(r.Manifest.Dest)), parent.Path(asideName(r))
	staged := exists(m.tree(r)) || exists(parent.Path(besideName(r)))
	elsewhere := failed.Manifest.Src == "" || failed.Manifest.Dest != r.Manifest.Dest
	unmoved := elsewhere ||
		failed.Manifest.Strategy == deployments.StrategyMv &&
			(exists(m.tree(failed)) || exists(parent.Path(besideName(failed))))
	if unmoved && !dirty && exists(dest) && !exists(aside) {
		return nil // the failed release was never moved to dest
	}
	if exists(aside) && exists(dest) && !staged {
		return m.discard(aside) // an earlier call was cut off after the last rename
	}
	if !staged {
		if err := m.Stage(ctx, r, StageOptions{}); err != nil {
			return fmt.Errorf("unpacking again the release to go back to: %w", err)
		}
	}
	if exists(dest) && !exists(aside) {
		if err := moveDurably(dest, aside); err != nil {
			return err
		}
	}
	if err := m.put(ctx, parent, r); err != nil {
		return err
	}
	return m.discard(aside)
}

func (m moveSwitcher) Live(r *Release) bool { return exists(r.Manifest.Dest) }

// Verify returns nothing: the tree was moved, and the running release may write into it.
func (m moveSwitcher) Verify(context.Context, *Release, int64) ([]Difference, error) {
	return nil, nil
}

// Heal unpacks a missing tree again, as it was published.
func (m moveSwitcher) Heal(ctx context.Context, r *Release) ([]Difference, error) {
	if exists(r.Manifest.Dest) {
		return nil, nil
	}
	if err := m.Stage(ctx, r, StageOptions{}); err != nil {
		return nil, fmt.Errorf("unpacking again the release that is gone: %w", err)
	}
	return nil, m.Switch(ctx, r)
}

// tool runs a program that copies. It detects disk errors by the output, as the exit status doesn't tell.
func (t treeSwitcher) tool(ctx context.Context, name string, args ...string) error {
	output, err := t.c.Tool(ctx, false, name, args...)
	for _, trouble := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO} {
		text := trouble.Error() // in the words of the C library, but for the first letter
		if err != nil && bytes.Contains(output, []byte(text[1:])) {
			return fmt.Errorf("%w: %w", trouble, err)
		}
	}
	return err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// moveDurably renames within one file system. The rename is durable when it returns.
func moveDurably(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return errors.Join(durable.SyncDir(filepath.Dir(to)), durable.SyncDir(filepath.Dir(from)))
}
