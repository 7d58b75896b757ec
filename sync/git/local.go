package git

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"

	"kedge/deployments/wait"
)

// localRepo is a branch of a repository on this machine, which is read in place.
type localRepo struct {
	path, branch string
	subdir       string // Config.Path
	every        time.Duration
	log          *slog.Logger
	// blind is set while the directory can't be watched, as when the system has no inotify watch left, or the directory
	// doesn't exist. It isn't set on a network file system, where a watch sees no changes by other machines.
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

func (r *localRepo) Objects() (*Objects, error) {
	dir, err := r.common()
	if err != nil {
		return nil, err
	}
	in, err := OpenObjects(filepath.Join(dir, "objects"))
	if err != nil {
		return nil, err
	}
	in.subdir = r.subdir
	return in, nil
}

func (r *localRepo) Interval() time.Duration {
	if r.blind.Load() {
		return min(r.every, time.Second) // cheap: Head reads the config and the branch's reference
	}
	return r.every
}

func (r *localRepo) Distrust()            {}
func (r *localRepo) Close() error         { return nil }
func (r *localRepo) Pause() time.Duration { return 0 }

func (r *localRepo) Watch(ctx context.Context, changed func()) {
	for {
		err := r.watchUntilError(ctx, changed)
		if ctx.Err() != nil {
			return
		}
		if !r.blind.Swap(true) {
			r.log.Warn("could not watch the repository: polling it instead", "repo", r.path, "error", err)
		}
		changed()
		if wait.For(ctx, time.Second) != nil {
			return
		}
	}
}

// watchUntilError calls changed once, and then after each change in the directories in which Git
// puts a new ref into place. Changes of lock files don't count. The directories are that of the
// branch's ref, its parents, and the Git directory itself, for packed-refs. Git removes and makes
// directories of branches like a/b as needed, so watchUntilError adds watches after each change. It
// returns an error when the watch fails, the Git directory is moved or removed, or ctx ends.
func (r *localRepo) watchUntilError(ctx context.Context, changed func()) error {
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
		r.log.Info("watching the repository for pushes", "repo", r.path)
	}
	changed() // for changes before the watch began
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
				return fmt.Errorf("%s was moved or removed", dir)
			}
			if err := add(); err != nil {
				return err
			}
			changed()
		}
	}
}
