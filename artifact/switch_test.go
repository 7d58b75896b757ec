package artifact

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// What was at dest before kedge is put back, and no release whose version is called as that is.
func TestRestoreOfWhatWasThereBefore(t *testing.T) {
	t.Parallel()
	p := publishVersions(t, t.TempDir(), "adopted-x")[0]
	dest := filepath.Join(t.TempDir(), "app")
	writeVersion(t, dest, "before")
	releases := Open(dest, object.New(object.Config{}), nil)
	if err := releases.Switch(stageOne(t, releases, p)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again: it may have been killed before it was known
		if done, err := releases.restore(); err != nil || !done {
			t.Fatalf("%v, %v", done, err)
		}
		if version, err := os.ReadFile(filepath.Join(dest, "VERSION")); err != nil || string(version) != "before" {
			t.Errorf("dest has %q, %v", version, err)
		}
		if _, err := releases.Find(p.Digest); err != nil {
			t.Error(err)
		}
	}
}

// A switch that says that dest was not touched has not made it either.
func TestRsyncWithoutItsExcludeFrom(t *testing.T) {
	t.Parallel()
	home := t.TempDir()
	dest := filepath.Join(home, "app")
	rel := &Release{Manifest: &deployments.Manifest{Src: "file:///x.tar", Dest: dest, DestMode: 0o755, ExcludeFrom: "none",
		Strategy: deployments.StrategyRsync}}
	treetest.Mkdir(t, filepath.Join(home, "trees"), os.Getuid())
	treetest.Mkdir(t, filepath.Join(home, "trees", rel.Pointer.Digest.String()), os.Getuid())
	switcher := NewSwitcher(rel.Manifest, SwitcherConfig{Trees: filepath.Join(home, "trees"), Tool: runTool})
	if err := switcher.Switch(t.Context(), rel); !errors.Is(err, ErrUntouched) {
		t.Errorf("got %v", err)
	}
	if safefs.Exists(dest) {
		t.Error("it has made dest")
	}
}

// What interrupted copies leave beside dest goes, also once the unit has another strategy, and nothing else that lies
// there.
func TestPruneRemovesInterruptedCopies(t *testing.T) {
	t.Parallel()
	live, other := deployments.DigestOf([]byte("1")), deployments.DigestOf([]byte("2"))
	kept := deployments.DigestOf([]byte("3"))
	stay := []string{".app.kedge-" + live.Short(), ".app.kedge-" + kept.Short(), ".app.kedge-failed", ".app.kedge-mine",
		".app.kedge-x.kedge-" + other.Short(), ".web.kedge-" + other.Short(), "app", "app.old",
		"app.releases"}
	slices.Sort(stay)
	for _, strategy := range []deployments.Strategy{deployments.StrategyMv, deployments.StrategyRsync,
		deployments.StrategyRelease} {
		home := t.TempDir()
		rel := &Release{Pointer: deployments.Pointer{Digest: live}, Manifest: &deployments.Manifest{Src: "file:///x.tar",
			Dest: filepath.Join(home, "app"), Strategy: strategy}}
		for _, name := range append(slices.Clone(stay), ".app.kedge-"+other.Short(),
			".app.kedge-"+other.Short()+partSuffix, ".app.kedge-"+live.Short()+partSuffix,
			".app.kedge-"+kept.Short()+partSuffix, "app.releases/"+privateName) {
			if err := os.MkdirAll(filepath.Join(home, name, "dir"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		switcher := NewSwitcher(rel.Manifest, SwitcherConfig{})
		if err := switcher.Prune(rel, 0, []deployments.Digest{kept}, nil); err != nil {
			t.Errorf("%s: %v", strategy, err)
		}
		if left := treetest.List(t, home); !slices.Equal(left, stay) {
			t.Errorf("%s: left:\n%q, want\n%q", strategy, left, stay)
		}
	}
}
