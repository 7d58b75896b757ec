package git

import (
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	temporaryPrefix = "kedge-mirror-"
	lockFile        = "lock"
)

// temporaryDir makes a directory in parent, which is ours until held is closed, and removes those
// that mirrors left which were killed.
func temporaryDir(parent string) (dir string, held io.Closer, err error) {
	left, _ := filepath.Glob(filepath.Join(parent, temporaryPrefix+"*"))
	for _, name := range left {
		removeAbandoned(name)
	}
	if dir, err = os.MkdirTemp(parent, temporaryPrefix); err != nil {
		return "", nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	return dir, f, err
}

// removeAbandoned removes a temporary directory that nobody holds. What can't be looked at, such as
// another user's, stays; so does a young one, which its mirror may be about to lock.
func removeAbandoned(dir string) {
	if info, err := os.Lstat(dir); err != nil || !info.IsDir() || time.Since(info.ModTime()) < time.Minute {
		return
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = os.RemoveAll(dir) // it may be another's all the same
	}
}
