package artifact

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// A virtualenv's links lead to the system's interpreter: symlinks: any takes them, from a publisher's tree and from
// a plain tar, and whatever lies there is neither read nor written.
func TestSymlinksThatLeadOut(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	treetest.WriteFile(t, filepath.Join(outside, "python3"), "system")
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	if err := os.Symlink(filepath.Join(outside, "python3"), filepath.Join(tree, "python")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("../../../elsewhere", filepath.Join(tree, "up")); err != nil {
		t.Fatal(err)
	}
	publish := func(version string, allowed deployments.Symlinks) (deployments.Pointer, error) {
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + t.TempDir(),
			Manifest: deployments.Manifest{Name: "app", Version: version, Dest: "/srv/app", Strategy: deployments.StrategyRelease, Symlinks: allowed}})
		return out.Pointer, err
	}
	if _, err := publish("1", deployments.SymlinksInside); err == nil || !strings.Contains(err.Error(), "symlinks: any") {
		t.Errorf("got %v", err)
	}
	p, err := publish("2", deployments.SymlinksAny)
	if err != nil {
		t.Fatal(err)
	}
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	rel := stageOne(t, releases, p)
	if err := releases.Switch(rel); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(releases.dest, "python")); err != nil || string(got) != "system" {
		t.Errorf("%q, %v", got, err)
	}
	if found, err := releases.Verify(t.Context(), rel, 0); err != nil || len(found) > 0 {
		t.Errorf("verify: %v, %v", found, err)
	}
	if err := os.Remove(filepath.Join(rel.Dir, "python")); err != nil {
		t.Fatal(err)
	}
	if err := releases.Heal(t.Context(), rel); err != nil {
		t.Fatal(err)
	}
	if target, err := os.Readlink(filepath.Join(releases.dest, "python")); err != nil || target != filepath.Join(outside, "python3") {
		t.Errorf("healed: %q, %v", target, err)
	}
	if got, err := os.ReadFile(filepath.Join(outside, "python3")); err != nil || string(got) != "system" {
		t.Errorf("what lies outside: %q, %v", got, err)
	}
}
