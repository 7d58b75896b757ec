// Package destwatch watches the dests of releases, the paths at which they are live, for changes.
package destwatch

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"kedge/deployments"
	"kedge/sync/deploy"
)

// eventDelay is the pause between an event and the call for it, so that a rename that replaces dest isn't seen half
// done.
const eventDelay = 50 * time.Millisecond

// Watcher watches the directories of the units' dests, and calls functions when a dest may have
// changed: see Watch.
type Watcher struct {
	log *slog.Logger

	mu      sync.Mutex
	watcher *fsnotify.Watcher // nil: not opened yet, or unavailable
	opened  chan struct{}     // closed once opening has been tried
	// callbacks has the functions of the units at a dest, by the path of the dest or of its lock
	// file.
	callbacks map[string]map[deployments.UnitID]func()
}

// New returns a Watcher. Events are handled by Run.
func New(log *slog.Logger) *Watcher {
	return &Watcher{log: log, opened: make(chan struct{}), callbacks: map[string]map[deployments.UnitID]func(){}}
}

// open opens the fsnotify watcher, unless an earlier call has tried. Watch calls it, and not New,
// because by default the kernel allows each user only 128 inotify instances. If opening fails, open
// logs a warning, and w.watcher stays nil. w.mu is held.
func (w *Watcher) open() {
	select {
	case <-w.opened:
		return
	default:
	}
	var err error
	if w.watcher, err = fsnotify.NewWatcher(); err != nil {
		w.log.Warn("could not open inotify: only the check at verify_every, if that is set, finds changes of dest by others",
			"error", err)
	}
	close(w.opened)
}

// Watch makes Run call changed after an event at a unit's dest or at its lock file, which each
// deployment to dest writes. Run also calls it when events may have been lost. A later call for the
// same dest and unit replaces changed. Without inotify, changed is never called.
func (w *Watcher) Watch(dest string, unit deployments.UnitID, changed func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, path := range []string{dest, deploy.LockFile(dest)} {
		if w.callbacks[path] == nil {
			w.callbacks[path] = map[deployments.UnitID]func(){}
		}
		w.callbacks[path][unit] = changed
	}
	if w.open(); w.watcher == nil {
		return
	}
	err := w.watcher.Add(filepath.Dir(dest))
	if err != nil && !errors.Is(err, fsnotify.ErrClosed) { // closed: the agent is ending
		w.log.Warn("could not watch dest: only the check at verify_every, if that is set, finds changes by others",
			"dest", dest, "error", err)
	}
}

// Forget ends a unit's watch of a dest; that of another unit goes on. A call that is due after
// eventDelay is still made.
func (w *Watcher) Forget(dest string, unit deployments.UnitID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, path := range []string{dest, deploy.LockFile(dest)} {
		if delete(w.callbacks[path], unit); len(w.callbacks[path]) == 0 {
			delete(w.callbacks, path)
		}
	}
	for other := range w.callbacks {
		if filepath.Dir(other) == filepath.Dir(dest) {
			return
		}
	}
	if w.watcher != nil {
		_ = w.watcher.Remove(filepath.Dir(dest)) // the directory may be gone
	}
}

func (w *Watcher) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	select {
	case <-w.opened:
	default:
		close(w.opened) // Watch may yet be called, and must not open what nobody would close
	}
	if w.watcher != nil {
		w.watcher.Close()
	}
}

// Run handles events until ctx ends, or until the first Watch finds that inotify is unavailable.
func (w *Watcher) Run(ctx context.Context) {
	defer w.close()
	select {
	case <-ctx.Done():
		return
	case <-w.opened:
	}
	if w.watcher == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-w.watcher.Events:
			w.mu.Lock()
			for _, changed := range w.callbacks[e.Name] {
				time.AfterFunc(eventDelay, changed)
			}
			w.mu.Unlock()
		case err := <-w.watcher.Errors:
			w.log.Warn("events about dests may have been lost: looking at every dest now", "error", err)
			w.mu.Lock()
			for _, units := range w.callbacks { // events may have been missed
				for _, changed := range units {
					time.AfterFunc(eventDelay, changed)
				}
			}
			w.mu.Unlock()
		}
	}
}
