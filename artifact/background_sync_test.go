package artifact

import (
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kedge/artifact/archive"

	"golang.org/x/sys/unix"
)

// Files are written to the disk while others are fetched: every so many bytes, once at a time, and no error is lost.
func TestWriteback(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var synced atomic.Int32
		w := newBackgroundSync("tree", -1)
		w.sync = func() error { time.Sleep(time.Second); synced.Add(1); return nil }
		busy := func() bool {
			synctest.Wait()
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.busy
		}
		w.wrote(backgroundSyncStep - 1)
		if busy() {
			t.Error("it syncs before there is enough to write")
		}
		w.wrote(1)
		w.wrote(2 * backgroundSyncStep)
		if !busy() || synced.Load() != 0 {
			t.Error("it does not sync, or those who write wait for it")
		}
		time.Sleep(time.Second)
		if busy() || synced.Load() != 1 {
			t.Errorf("it synced %d times, want once", synced.Load())
		}
		w.wrote(1) // beside what was written meanwhile
		if err := w.wait(); err != nil || synced.Load() != 2 {
			t.Errorf("it synced %d times, %v", synced.Load(), err)
		}
		w.sync = func() error { return unix.EIO }
		w.wrote(backgroundSyncStep)
		if err := w.wait(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), "sync tree: ") {
			t.Errorf("a disk that fails: %v", err)
		}
	})
}

// A disk that fails while files are fetched fails the fetch.
func TestWritebackFailsTheFetch(t *testing.T) {
	t.Parallel()
	b, err := newBuilder(t.TempDir(), &archive.Index{Entries: []archive.Entry{{Path: "a", Mode: 0o644, Size: 3}}})
	if err != nil {
		t.Fatal(err)
	}
	b.back.step, b.back.sync = 3, func() error { return unix.EIO }
	w := b.worker()
	if err := w.writeFile(0, []byte("abc")); err != nil {
		t.Fatal(err)
	}
	w.close()
	if err := b.close(); !errors.Is(err, unix.EIO) {
		t.Errorf("%v", err)
	}
}
