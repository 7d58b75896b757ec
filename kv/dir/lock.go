package dir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments/wait"
	"kedge/kv"
)

// withWriteLock runs f under the exclusive lock, after completing a commit in which a process was
// killed or failed.
func (d *Store) withWriteLock(ctx context.Context, f func() error) error {
	unlock, err := d.lock(ctx, unix.LOCK_EX)
	if err != nil {
		return d.classify(ctx, err)
	}
	defer unlock()
	if err := d.finishJournal(); err != nil {
		return d.classify(ctx, err)
	}
	return d.classify(ctx, f())
}

// withReadLock runs f under the shared lock, so that no commit runs meanwhile. It first completes
// an interrupted commit, as withWriteLock does.
func (d *Store) withReadLock(ctx context.Context, f func() error) error {
	for {
		unlock, err := d.lock(ctx, unix.LOCK_SH)
		if err != nil {
			return d.classify(ctx, err)
		}
		_, err = os.Lstat(d.path(journalFile))
		if errors.Is(err, fs.ErrNotExist) {
			err = f()
			unlock()
			return d.classify(ctx, err)
		}
		unlock()
		if err != nil {
			return d.classify(ctx, err)
		}
		if err := d.withWriteLock(ctx, func() error { return nil }); err != nil {
			return err
		}
	}
}

// lockTimeout is how long a commit or read waits for a process that holds the lock.
const lockTimeout = 15 * time.Second

// lock takes the store's lock; how is LOCK_SH or LOCK_EX. The kernel frees the lock when the process dies. If other
// processes, such as a suspended one, hold it for lockTimeout, the error is ErrUnavailable.
func (d *Store) lock(ctx context.Context, how int) (unlock func(), err error) {
	pause := time.Millisecond
	for began := time.Now(); ; {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		f, err := os.OpenFile(d.path(lockFile), os.O_RDONLY|os.O_CREATE, 0o644)
		if errors.Is(err, fs.ErrNotExist) && d.exists() {
			// Somebody removed .kedge, not the store's directory.
			if err := d.makeMeta(); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil && sameFile(f, d.path(lockFile)) {
			// A cleaner of old files may have removed empty directories below .kedge.
			if err := d.makeMeta(); err != nil {
				f.Close()
				return nil, err
			}
			return func() { f.Close() }, nil
		}
		f.Close()
		if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock %s: %w", d.path(lockFile), err)
		}
		if time.Since(began) > lockTimeout {
			return nil, fmt.Errorf(
				"lock the store: other processes have held %s for %v: if one of them is suspended, continue or kill it: %w",
				d.path(lockFile),
				lockTimeout,
				kv.ErrUnavailable,
			)
		}
		if wait.For(ctx, pause) != nil {
			return nil, ctx.Err()
		}
		pause = min(2*pause, 20*time.Millisecond)
	}
}

// sameFile reports whether path still names the open file.
func sameFile(f *os.File, path string) bool {
	a, err := f.Stat()
	if err != nil {
		return false
	}
	b, err := os.Stat(path)
	return err == nil && os.SameFile(a, b)
}

// classify wraps an error of the file system in the kv error that callers branch on. The end of ctx
// stays unwrapped.
func (d *Store) classify(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return err
	}
	for _, known := range []error{kv.ErrNotFound, kv.ErrConflict, kv.ErrDenied, kv.ErrLeaseLost, kv.ErrUnavailable, kv.ErrTooLarge} {
		if errors.Is(err, known) {
			return err
		}
	}
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: %w", kv.ErrDenied, err)
	default:
		return fmt.Errorf("%w: %w", kv.ErrUnavailable, err)
	}
}
