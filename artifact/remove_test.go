package artifact

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
)

func TestRemovingNeverCrossesAMount(t *testing.T) {
	for name, remove := range map[string]func(dir string) error{"removeTree": removeTree, "emptyDir": emptyDir} {
		dir := filepath.Join(t.TempDir(), "tree with spaces")
		if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
			t.Fatal(err)
		}
		precious := treetest.BindMount(t, filepath.Join(dir, "a/b/log"))
		treetest.WriteFile(t, filepath.Join(dir, "a/other"), "")
		if found, err := mountsBelow(dir); err != nil || !slices.Equal(found, []string{"a/b/log"}) {
			t.Errorf("mounts: %q, %v", found, err)
		}
		if err := remove(dir); !errors.Is(err, errMounted) || !strings.Contains(err.Error(), "a/b/log") {
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

func TestPruningAndHealingLeaveMountsAlone(t *testing.T) {
	pointers := publishVersions(t, t.TempDir(), "1", "2", "3")
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	first := stageOne(t, releases, pointers[0])
	precious := treetest.BindMount(t, filepath.Join(first.Dir, "log"))
	if err := releases.Switch(first); err != nil {
		t.Fatal(err)
	}
	if found, err := releases.Verify(t.Context(), first, 0); err != nil || len(found) > 0 {
		t.Errorf("a mount is no difference: %v, %v", found, err)
	}
	if err := releases.Heal(t.Context(), first); !errors.Is(err, errMounted) {
		t.Errorf("healing would move the mount: %v", err)
	}
	if live, err := os.ReadFile(filepath.Join(releases.dest, "log/precious")); err != nil || string(live) != "data" {
		t.Errorf("the live tree lost its mount: %q, %v", live, err)
	}
	for _, p := range pointers[1:] {
		if err := releases.Switch(stageOne(t, releases, p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := releases.Prune(0); !errors.Is(err, errMounted) {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("what was mounted is gone: %v", err)
	}
	if _, err := releases.Find(pointers[0].Digest); err != nil {
		t.Errorf("the release with the mount: %v", err)
	}
	if _, err := releases.Find(pointers[1].Digest); !errors.Is(err, ErrNoRelease) {
		t.Errorf("another one stays: %v", err)
	}
}

func TestMountPathsAreUnescaped(t *testing.T) {
	t.Parallel()
	if got := unescapeMount(`/a\040b\134c\011\9`); got != "/a b\\c\t\\9" {
		t.Errorf("got %q", got)
	}
}
