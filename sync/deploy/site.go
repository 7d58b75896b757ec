package deploy

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

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/sync/command"
)

// site is how one strategy brings a release to its dest. Every method may be called again after it was cut off at any point.
type site interface {
	// stage has the release ready on disk.
	stage(ctx context.Context, r *release, base deployments.Pointer, progress func(artifact.Progress)) error
	// forward makes it live. back makes it live again after failed, or a part of it; it stages it where its tree is gone.
	forward(ctx context.Context, r *release) error
	back(ctx context.Context, r, failed *release) error
	// live reports whether it is what dest holds, as far as a few system calls can tell.
	live(r *release) bool
	// dir is the directory that commands find in KEDGE_RELEASE.
	dir(r *release) string
	// verify compares the live tree with the release; heal makes it whole.
	verify(ctx context.Context, r *release, limit int64) ([]artifact.Difference, error)
	heal(ctx context.Context, r *release) error
	// prune removes what only releases that aren't in keep need.
	prune(r *release, keep []deployments.Digest) error
}

func (u *Unit) site(r *release) site {
	switch {
	case r.Manifest.Src == "":
		return nowhere{}
	case r.Manifest.Strategy == deployments.StrategyRelease:
		return linked{artifact.Open(r.Manifest.Dest, u.c.Objects, u.log)}
	case r.Manifest.Strategy == deployments.StrategyMv:
		return moved{trees{u}}
	default:
		return synced{trees{u}}
	}
}

// nowhere is for manifests that have commands only.
type nowhere struct{}

func (nowhere) stage(context.Context, *release, deployments.Pointer, func(artifact.Progress)) error {
	return nil
}
func (nowhere) forward(context.Context, *release) error     { return nil }
func (nowhere) back(_ context.Context, _, _ *release) error { return nil }
func (nowhere) live(*release) bool                          { return true }
func (nowhere) dir(*release) string                         { return "" }
func (nowhere) verify(context.Context, *release, int64) ([]artifact.Difference, error) {
	return nil, nil
}
func (nowhere) heal(context.Context, *release) error       { return nil }
func (nowhere) prune(*release, []deployments.Digest) error { return nil }

// linked is StrategyRelease: directories beside dest, and dest a link to one of them.
type linked struct{ releases *artifact.Releases }

func (l linked) stage(ctx context.Context, r *release, base deployments.Pointer, progress func(artifact.Progress)) error {
	_, err := l.releases.Stage(ctx, r.Pointer, r.Manifest, r.Raw, artifact.StageOptions{Base: base, Progress: progress})
	return err
}

func (l linked) forward(_ context.Context, r *release) error {
	found, err := l.releases.Find(r.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release to switch to: %w", err)
	}
	return l.releases.Switch(found)
}

func (l linked) back(ctx context.Context, r, _ *release) error {
	if _, err := l.releases.Find(r.Pointer.Digest); errors.Is(err, artifact.ErrNoRelease) {
		if err := l.stage(ctx, r, deployments.Pointer{}, nil); err != nil {
			return fmt.Errorf("staging anew the release to go back to: %w", err)
		}
	}
	return l.forward(ctx, r)
}

func (l linked) live(r *release) bool {
	dir := l.dir(r)
	if dir == "" {
		return false
	}
	got, err := filepath.EvalSymlinks(r.Manifest.Dest)
	if err != nil {
		return false
	}
	want, err := filepath.EvalSymlinks(dir)
	return err == nil && got == want
}

func (l linked) dir(r *release) string {
	found, err := l.releases.Find(r.Pointer.Digest)
	if err != nil {
		return ""
	}
	return found.Dir
}

func (l linked) verify(ctx context.Context, r *release, limit int64) ([]artifact.Difference, error) {
	found, err := l.releases.Find(r.Pointer.Digest)
	if errors.Is(err, artifact.ErrNoRelease) {
		return []artifact.Difference{{Path: ".", What: "missing"}}, nil
	}
	if err != nil {
		return nil, err
	}
	return l.releases.Verify(ctx, found, limit)
}

// heal exchanges the release's directory, where something in it differs or it is gone, for one that was staged anew, and leads dest
// back to it.
func (l linked) heal(ctx context.Context, r *release) error {
	found, err := l.releases.Find(r.Pointer.Digest)
	if errors.Is(err, artifact.ErrNoRelease) {
		return l.back(ctx, r, nil)
	}
	if err != nil {
		return err
	}
	if ds, err := l.releases.Verify(ctx, found, 0); err != nil || len(ds) > 0 {
		if err := l.releases.Heal(ctx, found); err != nil {
			return err
		}
	}
	return l.releases.Switch(found)
}

func (l linked) prune(r *release, keep []deployments.Digest) error {
	return l.releases.Prune(r.Manifest.Keep, keep...)
}

// trees are the unpacked trees of the strategies that don't keep releases beside dest: DIR/trees/DIGEST, complete once it has
// that name.
type trees struct{ u *Unit }

func (t trees) dir(r *release) string { return r.Manifest.Dest }

func (t trees) tree(r *release) string {
	return filepath.Join(t.u.c.Dir, treesDir, r.Pointer.Digest.String())
}

func (t trees) stage(ctx context.Context, r *release, _ deployments.Pointer, progress func(artifact.Progress)) error {
	tree := t.tree(r)
	if exists(tree) {
		return nil
	}
	part := tree + ".part"
	if err := unpack(ctx, t.u.c.Objects, r, part, progress); err != nil {
		return err
	}
	return rename(part, tree)
}

// unpack puts r's tree into dir, which it makes anew, and syncs it.
func unpack(ctx context.Context, objects *object.Client, r *release, dir string, progress func(artifact.Progress)) error {
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing what was left of an earlier tree: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making a directory to unpack into: %w", err)
	}
	if err := artifact.Unpack(ctx, objects, r.Manifest, dir, artifact.StageOptions{Progress: progress}); err != nil {
		return errors.Join(fmt.Errorf("unpacking %s: %w", r.Pointer.URL, err), os.RemoveAll(dir))
	}
	if err := os.Chmod(dir, r.Manifest.DestMode); err != nil {
		return fmt.Errorf("setting dest_mode: %w", err)
	}
	return syncFS(dir)
}

// clear removes a link that the release strategy left at dest: what is written through it would change a release.
func (t trees) clear(r *release) error {
	target, err := os.Readlink(r.Manifest.Dest)
	if err != nil {
		return nil // absent, or a directory
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(r.Manifest.Dest), target)
	}
	if filepath.Dir(target) != r.Manifest.Dest+".releases" {
		return nil
	}
	return os.Remove(r.Manifest.Dest)
}

func (t trees) prune(r *release, _ []deployments.Digest) error {
	return os.RemoveAll(t.beside(r) + ".part")
}

// pruneTrees removes the trees of all releases but keep, and what was left half unpacked.
func (u *Unit) pruneTrees(keep []deployments.Digest) error {
	return removeBut(filepath.Join(u.c.Dir, treesDir), "", keep)
}

// removeBut removes all of dir but DIGEST+suffix of keep.
func removeBut(dir, suffix string, keep []deployments.Digest) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !slices.ContainsFunc(keep, func(d deployments.Digest) bool { return d.String()+suffix == e.Name() }) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// synced is StrategyRsync.
type synced struct{ trees }

func (s synced) forward(ctx context.Context, r *release) error {
	if err := s.clear(r); err != nil {
		return fmt.Errorf("removing the link at dest: %w", err)
	}
	if parent := filepath.Dir(r.Manifest.Dest); !exists(parent) {
		return fmt.Errorf("dest's directory %s does not exist: make it before, or in a pre command", parent)
	}
	if err := s.u.tool(ctx, "rsync", append(s.args(r), "-v", s.tree(r)+"/", r.Manifest.Dest+"/")...); err != nil {
		return err
	}
	return syncFS(r.Manifest.Dest)
}

func (s synced) args(r *release) []string {
	// By content: archives with normalised times, as kedge publish makes them, look unchanged by size and time.
	args := []string{"-a", "--delete", "--checksum"}
	if from := r.Manifest.ExcludeFrom; from != "" {
		args = append(args, "--exclude-from", filepath.Join(s.tree(r), from))
	}
	for _, e := range r.Manifest.Excludes {
		args = append(args, "--exclude", e)
	}
	return args
}

func (s synced) back(ctx context.Context, r, _ *release) error {
	if err := s.stage(ctx, r, deployments.Pointer{}, nil); err != nil {
		return fmt.Errorf("unpacking anew the release to go back to: %w", err)
	}
	return s.forward(ctx, r)
}

func (s synced) live(r *release) bool { return exists(r.Manifest.Dest) }

// verify asks rsync what it would change. It can't bound its own reading, so limit is not kept.
func (s synced) verify(ctx context.Context, r *release, _ int64) ([]artifact.Difference, error) {
	if !exists(s.tree(r)) {
		return nil, nil
	}
	result, err := command.Tool(ctx, quiet(), "rsync", append(s.args(r), "--dry-run", "--itemize-changes", s.tree(r)+"/", r.Manifest.Dest+"/")...)
	if err != nil {
		return nil, err
	}
	return itemized(string(result.Output)), nil
}

func (s synced) heal(ctx context.Context, r *release) error { return s.back(ctx, r, nil) }

// itemized reads rsync's --itemize-changes: YXcstpoguax PATH, or *deleting PATH.
func itemized(out string) []artifact.Difference {
	var ds []artifact.Difference
	for line := range strings.Lines(out) {
		flags, path, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		path = strings.TrimSuffix(strings.TrimLeft(path, " "), "/")
		switch {
		case !ok || path == "":
		case flags == "*deleting":
			ds = append(ds, artifact.Difference{Path: path, What: "extra"})
		case len(flags) < 8:
		case strings.Trim(flags[2:], "+") == "":
			ds = append(ds, artifact.Difference{Path: path, What: "missing"})
		case strings.ContainsAny(flags[2:4], "cs"):
			ds = append(ds, artifact.Difference{Path: path, What: map[bool]string{true: "link", false: "content"}[flags[1] == 'L']})
		case flags[5] == 'p':
			ds = append(ds, artifact.Difference{Path: path, What: "mode"})
		case flags[6] == 'o' || flags[7] == 'g':
			ds = append(ds, artifact.Difference{Path: path, What: "owner"})
		}
	}
	return ds
}

// moved is StrategyMv: the tree is renamed to dest, which mustn't exist.
type moved struct{ trees }

// beside is where a tree is copied that lies on another file system than dest, aside where a failed one goes.
func (t trees) beside(r *release) string {
	dest := r.Manifest.Dest
	return filepath.Join(filepath.Dir(dest), "."+filepath.Base(dest)+".kedge-"+r.Pointer.Digest.Short())
}

func (t trees) aside(r *release) string {
	dest := r.Manifest.Dest
	return filepath.Join(filepath.Dir(dest), "."+filepath.Base(dest)+".kedge-failed")
}

func (m moved) forward(ctx context.Context, r *release) error {
	dest, tree, beside := r.Manifest.Dest, m.tree(r), m.beside(r)
	if err := m.clear(r); err != nil {
		return fmt.Errorf("removing the link at dest: %w", err)
	}
	if exists(dest) && !m.staged(r) {
		return nil // it was cut off after the rename
	}
	if exists(dest) {
		return fmt.Errorf("%w: %s exists, and sync_strategy mv needs a pre command that moves it away", errUntouched, dest)
	}
	if !exists(beside) {
		err := rename(tree, dest)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
		if err := os.RemoveAll(beside + ".part"); err != nil {
			return fmt.Errorf("copying the tree beside dest: %w", err)
		}
		if err := m.u.tool(ctx, "cp", "-a", tree, beside+".part"); err != nil {
			return errors.Join(fmt.Errorf("copying the tree beside dest: %w", err), os.RemoveAll(beside+".part"))
		}
		if err := syncFS(beside + ".part"); err != nil {
			return err
		}
		if err := rename(beside+".part", beside); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(tree); err != nil {
		return fmt.Errorf("removing the tree that was copied beside dest: %w", err)
	}
	return rename(beside, dest)
}

func (m moved) back(ctx context.Context, r, failed *release) error {
	dest, aside := r.Manifest.Dest, m.aside(r)
	staged := m.staged(r)
	elsewhere := failed.Manifest.Src == "" || failed.Manifest.Dest != dest
	unmoved := elsewhere || failed.Manifest.Strategy == deployments.StrategyMv && m.staged(failed)
	if unmoved && !m.u.j.Deployment.Over && exists(dest) && !exists(aside) {
		return nil // the failed one was never moved to dest
	}
	if exists(aside) && exists(dest) && !staged {
		return os.RemoveAll(aside) // it was cut off after the last rename
	}
	if !staged {
		if err := m.stage(ctx, r, deployments.Pointer{}, nil); err != nil {
			return fmt.Errorf("unpacking anew the release to go back to: %w", err)
		}
	}
	if exists(dest) && !exists(aside) {
		if err := rename(dest, aside); err != nil {
			return err
		}
	}
	if err := m.forward(ctx, r); err != nil {
		return err
	}
	return os.RemoveAll(aside)
}

func (m moved) staged(r *release) bool { return exists(m.tree(r)) || exists(m.beside(r)) }

func (m moved) live(r *release) bool { return exists(r.Manifest.Dest) }

// verify has nothing to compare with: the tree was moved, and what runs may write into it.
func (m moved) verify(context.Context, *release, int64) ([]artifact.Difference, error) {
	return nil, nil
}

// heal brings back a tree that is gone, as it was published.
func (m moved) heal(ctx context.Context, r *release) error {
	if exists(r.Manifest.Dest) {
		return nil
	}
	if err := m.stage(ctx, r, deployments.Pointer{}, nil); err != nil {
		return fmt.Errorf("unpacking anew the release that is gone: %w", err)
	}
	return m.forward(ctx, r)
}

// tool runs a program that copies. A full disk is told from its output: its exit status doesn't say.
func (u *Unit) tool(ctx context.Context, name string, args ...string) error {
	result, err := command.Tool(ctx, u.log, name, args...)
	if err != nil && bytes.Contains(result.Output, []byte("No space left on device")) {
		return fmt.Errorf("%w: %w", syscall.ENOSPC, err)
	}
	return err
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// rename renames within one file system, durable once it returns.
func rename(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return err
	}
	return errors.Join(syncDir(filepath.Dir(to)), syncDir(filepath.Dir(from)))
}

// syncFS writes back the file system that holds path: fsync of each file takes twenty times as long.
func syncFS(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("syncing %s: %w", path, err)
	}
	return nil
}
