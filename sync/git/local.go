package git

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/storage/filesystem/dotgit"

	"github.com/go-git/go-billy/v5/osfs"

	"kedge/deployments/wait"
)

// scpLike is [USER@]HOST:PATH, as git takes it where there is no such file.
var scpLike = regexp.MustCompile(`^([A-Za-z0-9._-]+@)?[A-Za-z0-9.-]+:.+$`)

// localPath returns the path that a repository's address names on this machine, if it names one.
func localPath(address string) (path string, local bool) {
	if path, ok := strings.CutPrefix(address, "file://"); ok {
		return path, true
	}
	if strings.Contains(address, "://") {
		return "", false
	}
	if _, err := os.Stat(address); err != nil && scpLike.MatchString(address) {
		return "", false
	}
	return address, true
}

// localRepo is a Git directory on this machine.
type localRepo struct {
	path, branch string
	below        string // Config.Path
	every        time.Duration
	log          *slog.Logger
	// blind is set while the directory can't be watched (no inotify left, a network file system,
	// not there yet).
	blind atomic.Bool
}

func (r *localRepo) common() (string, error) {
	_, common, err := gitDir(r.path)
	return common, err
}

func (r *localRepo) Head(context.Context) (string, error) {
	dir, err := r.common()
	if err != nil {
		return "", err
	}
	if err := checkFormat(dir); err != nil {
		return "", err
	}
	return branchHead(dir, r.branch)
}

// branchHead reads a branch of the Git directory dir.
func branchHead(dir, branch string) (string, error) {
	refs := dotgit.New(osfs.New(dir))
	name := plumbing.NewBranchReferenceName(branch)
	for range 5 { // a branch may be a symbolic ref
		ref, err := refs.Ref(name)
		switch {
		case errors.Is(err, plumbing.ErrReferenceNotFound) || errors.Is(err, fs.ErrNotExist):
			return "", missing(branch, dir, branches(dir))
		case err != nil:
			return "", fmt.Errorf("branch %s of %s: %w", branch, dir, err)
		case ref.Type() == plumbing.HashReference:
			return ref.Hash().String(), nil
		}
		name = ref.Target()
	}
	return "", fmt.Errorf("branch %s of %s: symbolic refs without an end", branch, dir)
}

// branches lists the branches of the Git directory dir, as far as they can be read.
func branches(dir string) (names []string) {
	refs, _ := dotgit.New(osfs.New(dir)).Refs()
	for _, ref := range refs {
		if ref.Name().IsBranch() {
			names = append(names, ref.Name().String())
		}
	}
	return names
}

// maxBranches bounds the branches that an error names.
const maxBranches = 5

// missing returns an ErrNoBranch that names the branches that exist.
func missing(branch, where string, there []string) error {
	if len(there) == 0 {
		return fmt.Errorf("%w: %s in %s, which is empty: push to it", ErrNoBranch, branch, where)
	}
	slices.Sort(there)
	for i, name := range there {
		there[i] = strings.TrimPrefix(name, "refs/heads/")
	}
	more := ""
	if n := len(there) - maxBranches; n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	return fmt.Errorf("%w: %s in %s, which has %s%s (--branch names another)", ErrNoBranch, branch, where,
		bound(strings.Join(there[:min(len(there), maxBranches)], ", "), maxWords), more)
}

func (r *localRepo) Objects() (*Objects, error) {
	dir, err := r.common()
	if err != nil {
		return nil, err
	}
	in, err := OpenObjects(filepath.Join(dir, "objects"))
	if err != nil {
		return nil, err
	}
	in.below = r.below
	return in, nil
}

func (r *localRepo) Interval() time.Duration {
	if r.blind.Load() {
		return min(r.every, time.Second) // to read one small file
	}
	return r.every
}

func (r *localRepo) Distrust()            {}
func (r *localRepo) Close() error         { return nil }
func (r *localRepo) Pause() time.Duration { return 0 }

func (r *localRepo) Watch(ctx context.Context, changed func()) {
	for {
		err := r.watchOnce(ctx, changed)
		if ctx.Err() != nil {
			return
		}
		if !r.blind.Swap(true) {
			r.log.Warn("cannot watch the repository, it is polled instead", "repo", r.path, "error", err)
		}
		changed()
		if wait.For(ctx, time.Second) != nil {
			return
		}
	}
}

// watchOnce watches the directories in which Git renames a new ref into place: that of the branch,
// its parents (Git removes and makes directories of branches like a/b as it needs them), and the
// Git directory itself for packed-refs.
func (r *localRepo) watchOnce(ctx context.Context, changed func()) error {
	dir, err := r.common()
	if err != nil {
		return err
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer w.Close()
	add := func() error {
		if err := w.Add(dir); err != nil {
			return fmt.Errorf("watch %s: %w", dir, err)
		}
		parts := strings.Split("refs/heads/"+r.branch, "/")
		for i := 1; i < len(parts); i++ {
			sub := filepath.Join(dir, filepath.Join(parts[:i]...))
			if err := w.Add(sub); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("watch %s: %w", sub, err)
			}
		}
		return nil
	}
	if err := add(); err != nil {
		return err
	}
	if r.blind.Swap(false) {
		r.log.Info("the repository is watched again", "repo", r.path)
	}
	changed() // what happened before the watch stood
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-w.Errors:
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				changed()
				continue
			}
			return err
		case event, ok := <-w.Events:
			if !ok {
				return errors.New("the watch ended")
			}
			if strings.HasSuffix(event.Name, ".lock") {
				continue
			}
			if event.Name == dir && event.Has(fsnotify.Remove|fsnotify.Rename) {
				return fmt.Errorf("%s was moved away", dir)
			}
			if err := add(); err != nil {
				return err
			}
			changed()
		}
	}
}
