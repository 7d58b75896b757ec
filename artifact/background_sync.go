package artifact

import (
	"errors"
	"sync"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
)

// backgroundSyncStep is the least number of bytes written between the starts of two background syncs.
const backgroundSyncStep = 64 << 20

// backgroundSync syncs written files to the disk while others are fetched. It guarantees nothing, but shortens the
// final sync. With 561 MB in 44,567 files, the final sync took 0.4 s instead of 6.6 s. When the files came at 50 MB/s,
// it took 1.2 s instead of 4.1 s (medians of four runs on a busy machine). The whole file system is synced, as in the
// final sync: with sync_file_range each small file was a disk request of its own. That slowed the fetch by more than
// the final sync gained.
type backgroundSync struct {
	name string
	step int64
	sync func() error

	mu      sync.Mutex
	written int64 // bytes written since the last sync started
	busy    bool
	running sync.WaitGroup
	errs    []error
}

// newBackgroundSync returns the backgroundSync for the file system of an open directory, which errors call name.
func newBackgroundSync(name string, dir int) *backgroundSync {
	return &backgroundSync{name: name, step: backgroundSyncStep, sync: func() error { return unix.Syncfs(dir) }}
}

// wrote counts n bytes as written. Whenever step bytes have been written since the last sync started, it starts
// another, unless a sync is still running.
func (w *backgroundSync) wrote(n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.written += n; w.written < w.step || w.busy {
		return
	}
	w.written, w.busy = 0, true
	w.running.Go(func() {
		err := w.sync()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.busy = false
		if err != nil {
			w.errs = append(w.errs, safefs.PathError("sync", w.name, err))
		}
	})
}

// wait waits until no sync is running, and returns the errors of all syncs. The caller must not drop them: if the
// kernel can't write a page, it reports that only once, and the final sync would succeed.
func (w *backgroundSync) wait() error {
	w.running.Wait()
	return errors.Join(w.errs...)
}
