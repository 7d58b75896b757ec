// Package destwatch watches the places where releases are live.
package destwatch

import (
	"context"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"kedge/sync/deploy"
)

// linkSettle is waited after a change beside dest, so that a rename that replaces it isn't seen half done.
const linkSettle = 50 * time.Millisecond

// Watcher is told by the kernel of changes beside the dests of all units, where a link is removed or led
// elsewhere.
type Watcher struct {
	log *slog.Logger

	mu      sync.Mutex
	watcher *fsnotify.Watcher // nil: not yet, or not to be had
	opened  chan struct{}     // closed once it is clear whether there is one
	changed map[string]func() // by dest
}

// New returns a Watcher; Run has it work.
func New(log *slog.Logger) *Watcher {
	return &Watcher{log: log, opened: make(chan struct{}), changed: map[string]func(){}}
}

// open makes the watcher when it is first needed: the kernel gives a user 128 of them, for all that they run.
func (w *Watcher) open() {
	select {
	case <-w.opened:
		return
	default:
	}
	var err error
	if w.watcher, err = fsnotify.NewWatcher(); err != nil {
		w.log.Warn("changes of dest will be seen by the periodic check only", "error", err)
	}
	close(w.opened)
}

// Watch calls changed after an event at dest itself, or after kedge run deployed to it.
func (w *Watcher) Watch(dest string, changed func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changed[dest], w.changed[deploy.LockFile(dest)] = changed, changed
	if w.open(); w.watcher == nil {
		return
	}
	if err := w.watcher.Add(filepath.Dir(dest)); err != nil {
		w.log.Warn("changes of dest will be seen by the periodic check only", "dest", dest, "error", err)
	}
}

// Forget ends the watch of a dest.
func (w *Watcher) Forget(dest string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.changed, dest)
	delete(w.changed, deploy.LockFile(dest))
	for other := range w.changed {
		if filepath.Dir(other) == filepath.Dir(dest) {
			return
		}
	}
	if w.watcher != nil {
		_ = w.watcher.Remove(filepath.Dir(dest)) // its directory may be gone
	}
}

// Run waits for changes until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-w.opened:
	}
	if w.watcher == nil {
		return
	}
	defer w.watcher.Close()
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-w.watcher.Events:
			w.mu.Lock()
			changed := w.changed[e.Name]
			w.mu.Unlock()
			if changed != nil {
				time.AfterFunc(linkSettle, changed)
			}
		case err := <-w.watcher.Errors:
			w.log.Warn("watching dests", "error", err)
			w.mu.Lock()
			for _, changed := range w.changed { // some may have been missed
				time.AfterFunc(linkSettle, changed)
			}
			w.mu.Unlock()
		}
	}
}
