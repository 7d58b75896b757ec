package artifact

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

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
	if err := releases.Heal(t.Context(), first); !errors.Is(err, safefs.ErrMounted) {
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
	if err := releases.Prune(0); !errors.Is(err, safefs.ErrMounted) {
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

// A mount on a directory that the release's commands made hides how they left it, and what they made in it.
func TestMountOnWhatCommandsMade(t *testing.T) {
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			w := deployWithCommands(t, strategy, treetest.Tree{"file": {Mode: 0o644, Data: "content"}},
				func(in func(p string) string) error {
					return errors.Join(os.MkdirAll(in("data/sub"), 0o755), os.Chmod(in("data"), 0o700),
						os.WriteFile(in("data/sub/small"), []byte("small"), 0o600))
				})
			w.wantDrift()
			treetest.BindMount(t, w.in("data"))
			if info, err := os.Stat(w.in("data")); err != nil || info.Mode().Perm() == 0o700 {
				t.Fatalf("the mount has the mode that the commands set: %v, %v", info, err)
			}
			w.wantDrift()
		})
	}
}

// A mount on a directory of the archive hides what lies there, and what commands do in it is not
// the release's.
func TestMountOnADirectoryOfTheArchive(t *testing.T) {
	for _, strategy := range []deployments.Strategy{deployments.StrategyRelease, deployments.StrategyRsync} {
		t.Run(string(strategy), func(t *testing.T) {
			dir, file := treetest.File{Mode: fs.ModeDir | 0o700}, treetest.File{Mode: 0o644, Data: "content"}
			const odd, like = `top/up l*\ads`, `top/up lo\ads`
			w := deployWithCommands(t, strategy,
				treetest.Tree{"data": dir, "data/file": file, "data/sub": dir, "data/sub/file": file,
					"single": file, "top": dir, odd: dir, odd + "/file": file, like: dir, like + "/file": file},
				func(in func(p string) string) error {
					precious := treetest.BindMount(t, in("data"))
					treetest.WriteFile(t, filepath.Join(filepath.Dir(precious), "file"), "theirs")
					return os.WriteFile(in("made"), []byte("made"), 0o644)
				})
			w.wantDrift()
			treetest.BindMount(t, w.in(odd))
			precious := treetest.BindMount(t, t.TempDir())
			if err := unix.Mount(precious, w.in("single"), "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			w.wantDrift()
			treetest.WriteFile(t, w.in(like+"/file"), "tampered")
			want := []Difference{{like + "/file", "content"}}
			w.wantDrift(want...)
			if strategy == deployments.StrategyRsync {
				if found, err := w.Compare(t.Context(), w.rel, 0); err != nil || !slices.Equal(found, want) {
					t.Errorf("compared: %v, %v", found, err)
				}
				for _, m := range readChanges(w.Switcher.(rsyncSwitcher).changeRecord(w.rel).made) {
					if m.Path != "made" {
						t.Errorf("recorded as the commands': %s", m.Path)
					}
				}
			}
		})
	}
}

// A file that is mounted on another one in dest, which the archive lacks, doesn't keep rsync from
// switching.
func TestRsyncBesideAMountedFile(t *testing.T) {
	w := deployWithCommands(t, deployments.StrategyRsync, treetest.Tree{"file": {Mode: 0o644, Data: "content"}},
		func(func(string) string) error { return nil })
	treetest.WriteFile(t, w.in("single"), "")
	precious := treetest.BindMount(t, t.TempDir())
	if err := unix.Mount(precious, w.in("single"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := w.Switch(t.Context(), w.rel); err != nil {
		t.Error(err)
	}
	w.wantFile("single", 0o644, "data")
	w.wantDrift()
}

// What was at dest before is put back even if something is mounted in the release that failed; a log may be missing.
func TestAMountDoesNotPreventARestore(t *testing.T) {
	aside := filepath.Join(t.TempDir(), "failed")
	if err := os.MkdirAll(filepath.Join(aside, "log"), 0o755); err != nil {
		t.Fatal(err)
	}
	treetest.BindMount(t, filepath.Join(aside, "log"))
	if err := (moveSwitcher{}).discard(aside); err != nil {
		t.Error(err)
	}
}

// A mount in a release that failed doesn't hide that other files of it can't be removed.
func TestAMountHidesNoOtherFailure(t *testing.T) {
	aside := filepath.Join(t.TempDir(), "failed")
	if err := os.MkdirAll(filepath.Join(aside, "log"), 0o755); err != nil {
		t.Fatal(err)
	}
	treetest.BindMount(t, filepath.Join(aside, "log"))
	for _, name := range []string{"a", "b", "c", "d"} {
		treetest.MakeImmutable(t, filepath.Join(aside, name))
	}
	if err := safefs.RemoveTree(aside); !errors.Is(err, safefs.ErrMounted) || !errors.Is(err, unix.EPERM) {
		t.Errorf("removing it: %v", err)
	}
	if err := (moveSwitcher{}).discard(aside); !errors.Is(err, unix.EPERM) || errors.Is(err, safefs.ErrMounted) {
		t.Errorf("discarding it: %v", err)
	}
}
