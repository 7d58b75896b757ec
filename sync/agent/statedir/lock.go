package statedir

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrLocked means that another agent uses the state directory; the error names its process, if that is known.
var ErrLocked = errors.New("another agent uses this state directory")

// lockPatience is how long to wait for the lock of a dead process. A process that was killed while it started a command
// leaves its lock to the command until exec.
const lockPatience = 3 * time.Second

// takeLock locks dir for this process, or returns ErrLocked if another process holds the lock. If
// the lock file names a process that is dead, it waits up to lockPatience for the lock. It writes
// the process id to the lock file, for people and for later calls. The kernel releases the lock
// however the process ends.
func takeLock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the state directory %s: %w", dir, err)
	}
	for end := time.Now().Add(lockPatience); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) || lives(holder(f)) || time.Now().After(end) {
			break
		}
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		defer f.Close()
		return nil, fmt.Errorf("%w: %s is held by process %s", ErrLocked, dir, holder(f))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("locking the state directory %s: %w", dir, err), f.Close())
	}
	if f.Truncate(0) == nil { // on a full disk the lock has no id, but holds
		_, _ = f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	}
	return f, nil
}

// dropLock releases the lock. Closing the file isn't enough while a child between fork and exec has it open.
func dropLock(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}

func lives(process string) bool {
	pid, err := strconv.Atoi(process)
	return err == nil && !errors.Is(unix.Kill(pid, 0), unix.ESRCH)
}

func holder(f *os.File) string {
	var b [20]byte
	n, _ := f.ReadAt(b[:], 0)
	if pid := strings.TrimSpace(string(b[:n])); pid != "" {
		return pid
	}
	return "(unknown)"
}
