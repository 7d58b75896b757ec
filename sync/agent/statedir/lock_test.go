package statedir

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A killed process releases its lock only once a command that it was starting has begun.
func TestLockOfTheDead(t *testing.T) {
	t.Parallel()
	dead := exec.Command("true")
	if err := dead.Run(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	left, err := os.Create(filepath.Join(dir, lockFile))
	if err != nil {
		t.Fatal(err)
	}
	defer left.Close()
	fmt.Fprintln(left, dead.Process.Pid)
	fd := int(left.Fd())
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { unix.Flock(fd, unix.LOCK_UN) })
	f, err := takeLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer dropLock(f)
	if _, err := takeLock(dir); !errors.Is(err, ErrLocked) {
		t.Errorf("of one that lives: %v", err)
	}
}
