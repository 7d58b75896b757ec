package mirror

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/storage/filesystem/dotgit"

	"github.com/go-git/go-billy/v5/osfs"

	"kedge/deployments/wait"
)

// repo is where commits come from: a Git directory on this machine, read in place, or a remote one, read through a cache.
type repo interface {
	// head brings the branch's newest commit within reach of open, and names it. A *badCommit says that it can't be had, for good.
	head(ctx context.Context) (plumbing.Hash, error)
	// open gives the objects for one reading.
	open() (*objects, error)
	// distrust says that what open gave could not be read: a cache is made anew at the next head.
	distrust()
	// watch calls changed whenever the branch may have moved, until ctx ends; where nothing can be watched it only waits.
	watch(ctx context.Context, changed func())
	// interval is the time between two calls of head where nothing changes.
	interval() time.Duration
	// pause is the least time between two calls of head, however often they are asked for.
	pause() time.Duration
	close() error
}

// errNoBranch says that the repository is there, and the branch isn't: nothing was pushed yet, or its name is another.
var errNoBranch = errors.New("no such branch")

// scpLike is [USER@]HOST:PATH, as git takes it where there is no such file.
var scpLike = regexp.MustCompile(`^([A-Za-z0-9._-]+@)?[A-Za-z0-9.-]+:.+$`)

// localPath gives the path that a repository's address names on this machine, if it names one.
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
	every        time.Duration
	log          *slog.Logger
	// blind is set while the directory can't be watched (no inotify left, a network file system, not there yet).
	blind atomic.Bool
}

func (r *localRepo) common() (string, error) {
	_, common, err := gitDir(r.path)
	return common, err
}

func (r *localRepo) head(context.Context) (plumbing.Hash, error) {
	dir, err := r.common()
	if err != nil {
		return plumbing.ZeroHash, err
	}
	if err := checkFormat(dir); err != nil {
		return plumbing.ZeroHash, err
	}
	return branchHead(dir, r.branch)
}

// branchHead reads a branch of the Git directory dir.
func branchHead(dir, branch string) (plumbing.Hash, error) {
	refs := dotgit.New(osfs.New(dir))
	name := plumbing.NewBranchReferenceName(branch)
	for range 5 { // a branch may be a symbolic ref
		ref, err := refs.Ref(name)
		switch {
		case errors.Is(err, plumbing.ErrReferenceNotFound) || errors.Is(err, fs.ErrNotExist):
			return plumbing.ZeroHash, fmt.Errorf("%w: %s in %s", errNoBranch, branch, dir)
		case err != nil:
			return plumbing.ZeroHash, fmt.Errorf("branch %s of %s: %w", branch, dir, err)
		case ref.Type() == plumbing.HashReference:
			return ref.Hash(), nil
		}
		name = ref.Target()
	}
	return plumbing.ZeroHash, fmt.Errorf("branch %s of %s: symbolic refs without an end", branch, dir)
}

func (r *localRepo) open() (*objects, error) {
	dir, err := r.common()
	if err != nil {
		return nil, err
	}
	return openObjects(filepath.Join(dir, "objects"))
}

func (r *localRepo) interval() time.Duration {
	if r.blind.Load() {
		return min(r.every, time.Second) // to read one small file
	}
	return r.every
}

func (r *localRepo) distrust()            {}
func (r *localRepo) close() error         { return nil }
func (r *localRepo) pause() time.Duration { return 0 }

func (r *localRepo) watch(ctx context.Context, changed func()) {
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

// watchOnce watches the directories in which Git renames a new ref into place: that of the branch, its parents (Git removes
// and makes directories of branches like a/b as it needs them), and the Git directory itself for packed-refs.
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
	r.blind.Store(false)
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
