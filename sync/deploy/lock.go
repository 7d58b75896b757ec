package deploy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/wait"
)

// destLock lets one process at a time deploy to a dest: agents, whatever their state directory, and
// kedge run. It is a lock on the file .NAME.kedge-lock beside dest, which stays, as removing it
// would let two hold it. The file holds the digest of the release that was deployed there last.
type destLock struct {
	dest string
	file *os.File // nil: there is nothing to lock, as nothing can be written beside dest
	// waited says that another process held it first, and last what that one deployed; empty: it did not succeed.
	waited bool
	last   string
}

func lockFile(dest string) string {
	return filepath.Join(filepath.Dir(dest), "."+filepath.Base(dest)+".kedge-lock")
}

// hold takes the lock of r's dest until release is called; it does nothing if this unit holds it already.
func (u *Unit) hold(ctx context.Context, r *artifact.Release) (release func(), err error) {
	dest := r.Manifest.Dest
	if r.Manifest.Src == "" || u.lock != nil {
		return func() {}, nil
	}
	if r.Manifest.Strategy == deployments.StrategyRelease { // which makes it anyway
		if err := os.MkdirAll(filepath.Dir(dest), 0o755); err != nil && !errors.Is(err, syscall.EROFS) {
			return nil, fmt.Errorf("making the directory of dest: %w", err)
		}
	}
	l := &destLock{dest: dest}
	l.file, err = os.OpenFile(lockFile(dest), os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	unwritable := errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS)
	if err != nil && !unwritable {
		return nil, fmt.Errorf("locking dest: %w", err)
	}
	if err == nil {
		if err := u.await(ctx, l); err != nil {
			l.file.Close()
			return nil, fmt.Errorf("waiting for another deployment to %s to end: %w", dest, err)
		}
	}
	u.lock = l
	return func() {
		u.lock = nil
		if l.file != nil {
			// A child that another goroutine is about to start may still have the file.
			_ = unix.Flock(int(l.file.Fd()), unix.LOCK_UN)
			l.file.Close()
		}
	}, nil
}

// await takes the lock as soon as whoever holds it lets it go.
func (u *Unit) await(ctx context.Context, l *destLock) error {
	retry := wait.NewBackoff(20*time.Millisecond, time.Second)
	for {
		err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil:
			text, err := io.ReadAll(io.LimitReader(l.file, 1<<10))
			l.last = strings.TrimSpace(string(text))
			return err
		case !errors.Is(err, unix.EWOULDBLOCK):
			return err
		}
		if !l.waited {
			u.log.Warn("something else deploys to dest: waits until it is done", "dest", l.dest)
			l.waited = true
		}
		if err := retry.Wait(ctx); err != nil {
			return err
		}
	}
}

// begun and done note in the lock's file that dest is between releases, and what it holds.
func (l *destLock) begun() { l.note("") }

func (l *destLock) done(p deployments.Pointer) { l.note(p.Digest.String() + "\n") }

// note is best effort: it saves a process that waited from deploying the same again.
func (l *destLock) note(text string) {
	if l == nil || l.file == nil {
		return
	}
	// The lock itself is open for reading, so that the file system can be made read-only meanwhile.
	f, err := os.OpenFile(lockFile(l.dest), os.O_WRONLY|os.O_TRUNC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	_, _ = f.WriteString(text)
	_ = f.Close()
}
