package artifact

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
)

// Killed while it writes a record, it leaves a part of one: in its own directory, until the next Prune, and in no
// other.
func TestWhatAKillLeavesIsPruned(t *testing.T) {
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	pointers := publishVersions(t, t.TempDir(), "1", "2", "3")
	dest := filepath.Join(t.TempDir(), "app")
	for range 8 {
		runPlan(t, killPlan{Dest: dest, Pointers: pointers, KillAt: -1, Forever: true}, 20*time.Millisecond)
	}
	if left := treetest.List(t, tmp); len(left) > 0 {
		t.Errorf("it leaves %q among everybody's temporary files", left)
	}
	private := filepath.Join(dest+".releases", ".kedge")
	if err := os.MkdirAll(private, 0o700); err != nil {
		t.Fatal(err)
	}
	third := nameOf("3", pointers[2].Digest)
	for _, name := range []string{
		"." + third + recordSuffix + "123", "." + third + indexSuffix + "4", third + indexSuffix,
	} {
		if err := os.WriteFile(filepath.Join(private, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	runPlan(t, killPlan{Dest: dest, Pointers: pointers[:2], KillAt: -1}, 0)
	name := nameOf("2", pointers[1].Digest)
	if left, want := treetest.List(t, private), []string{name + indexSuffix, name + recordSuffix,
		name + statsSuffix}; !slices.Equal(left, want) {
		t.Errorf("after a prune there are %q, want %q", left, want)
	}
	if _, err := os.Stat(dest); err != nil {
		t.Error(err)
	}
}

// A version may be called as kedge's own files are.
func TestPruneKeepsAVersionThatIsCalledAsItsOwnFilesAre(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"staging", "staging-1", "trash", "heal-2", "link", "adopted-3"} {
		p := publishVersions(t, t.TempDir(), version)[0]
		releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
		if err := releases.Switch(stageOne(t, releases, p)); err != nil {
			t.Fatal(err)
		}
		if err := releases.Prune(1); err != nil {
			t.Fatal(err)
		}
		rel, err := releases.Current()
		if err != nil {
			t.Errorf("%s: %v", version, err)
			continue
		}
		if _, err := releases.Verify(t.Context(), rel, 0); err != nil {
			t.Errorf("%s: %v", version, err)
		}
	}
}
