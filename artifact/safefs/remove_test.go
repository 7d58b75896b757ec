package safefs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/artifact/treetest"
)

func TestRemovingNeverCrossesAMount(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{"removeTree": RemoveTree, "emptyDir": EmptyDir} {
		dir := filepath.Join(t.TempDir(), "tree with spaces")
		if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
			t.Fatal(err)
		}
		precious := treetest.BindMount(t, filepath.Join(dir, "a/b/log"))
		treetest.WriteFile(t, filepath.Join(dir, "a/other"), "")
		if found, err := MountsBelow(dir); err != nil || !slices.Equal(found, []string{"a/b/log"}) {
			t.Errorf("mounts: %q, %v", found, err)
		}
		if err := remove(dir); !errors.Is(err, ErrMounted) || !strings.Contains(err.Error(), "a/b/log") {
			t.Errorf("%s: got %v", name, err)
		}
		if _, err := os.Stat(precious); err != nil {
			t.Errorf("%s: what was mounted is gone: %v", name, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, "a/other")); err == nil {
			t.Errorf("%s: the rest stays", name)
		}
		if err := unix.Unmount(filepath.Join(dir, "a/b/log"), 0); err != nil {
			t.Fatal(err)
		}
		if err := remove(dir); err != nil {
			t.Errorf("%s: without the mount: %v", name, err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: %v stays", name, entries)
		}
	}
}

// More failures than the error tells of must not keep a directory from being given up.
func TestRemovingEndsAfterManyFailures(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{"removeTree": RemoveTree, "emptyDir": EmptyDir} {
		dir := t.TempDir()
		for _, at := range []string{"a", "b", "c", "d", "e"} {
			treetest.BindMount(t, filepath.Join(dir, at, "log"))
		}
		ended := make(chan error, 1)
		go func() { ended <- remove(dir) }()
		select {
		case err := <-ended:
			if !errors.Is(err, ErrMounted) {
				t.Errorf("%s: got %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s does not end", name)
		}
	}
}

// The error wraps ErrMounted, and the other failures can be told from it, whichever come first and
// however many.
func TestMountsAndOtherFailuresAreBothTold(t *testing.T) {
	t.Parallel()
	other := errors.New("other")
	for _, mountsFirst := range []bool{false, true} {
		var r remover
		for i := range 10 {
			err := other
			if (i < 5) == mountsFirst {
				err = ErrMounted
			}
			r.addError(strconv.Itoa(i), err)
		}
		err := errors.Join(r.errs...)
		if !errors.Is(err, ErrMounted) || !errors.Is(err, other) {
			t.Errorf("mounts first %v: got %v", mountsFirst, err)
		}
		if left := ExceptMounts(err); errors.Is(left, ErrMounted) || !errors.Is(left, other) {
			t.Errorf("mounts first %v: without the mounts: %v", mountsFirst, left)
		}
	}
	if err := ExceptMounts(other); !errors.Is(err, other) {
		t.Errorf("got %v", err)
	}
	if err := errors.Join(ExceptMounts(nil), ExceptMounts(ErrMounted)); err != nil {
		t.Errorf("got %v", err)
	}
}

// The error of an immutable file says that, and nothing of what was tried next.
func TestRemovingAnImmutableFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.MakeImmutable(t, filepath.Join(dir, "file"))
	if err := RemoveTree(dir); !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v", err)
	}
}

// Only what is missing counts as removed: any other reason why it can't be seen is an error.
func TestWhatCanNotBeSeenIsNotRemoved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.Relink(t, filepath.Join(dir, "loop"), "loop")
	treetest.WriteFile(t, filepath.Join(dir, "file"), "")
	for path, want := range map[string]error{
		"loop/tree": unix.ELOOP, "missing/tree": nil, "file/tree": nil, strings.Repeat("x", 256): nil,
	} {
		if err := RemoveTree(filepath.Join(dir, path)); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", path, err, want)
		}
	}
}

func TestMountPathsAreUnescaped(t *testing.T) {
	t.Parallel()
	if got := unescapeMount(`/a\040b\134c\011\9`); got != "/a b\\c\t\\9" {
		t.Errorf("got %q", got)
	}
}
