package artifact

import (
	"os"
	"path/filepath"
	"testing"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// Shared paths stay across releases: linked in, begun with what the first archive has there, passed over by verify
// and heal, and left alone when old releases go.
func TestSharedPathsStay(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	stage := func(version string, immutable bool) *Release {
		t.Helper()
		dir := t.TempDir()
		writeVersion(t, dir, version)
		if err := os.MkdirAll(filepath.Join(dir, "public/uploads/old"), 0o755); err != nil {
			t.Fatal(err)
		}
		treetest.WriteFile(t, filepath.Join(dir, "public/uploads/old/seed"), "the same in all")
		treetest.WriteFile(t, filepath.Join(dir, "public/index"), "the same in all")
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: dir, To: "file://" + store,
			Manifest: deployments.Manifest{Name: "app", Version: version, Dest: "/srv/app", Strategy: deployments.StrategyRelease,
				Shared: []string{"log", "public/uploads"}, Immutable: immutable}})
		if err != nil {
			t.Fatal(err)
		}
		rel := stageOne(t, releases, out.Pointer)
		if err := releases.Switch(rel); err != nil {
			t.Fatal(err)
		}
		return rel
	}
	live := func(p string) string { return filepath.Join(releases.dest, p) }
	stage("1", false)
	treetest.WriteFile(t, live("log/today"), "logged")
	treetest.WriteFile(t, live("public/uploads/picture"), "uploaded")
	if err := os.Remove(live("public/uploads/old/seed")); err != nil {
		t.Fatal(err)
	}
	two := stage("2", true)
	three := stage("3", true)
	for p, want := range map[string]string{"log/today": "logged", "public/uploads/picture": "uploaded", "public/index": "the same in all", parts[0]: "3"} {
		if got, err := os.ReadFile(live(p)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", p, got, err)
		}
	}
	if _, err := os.Lstat(live("public/uploads/old/seed")); err == nil {
		t.Error("what was removed from a shared path is back with the next release")
	}
	if found, err := releases.Verify(t.Context(), three, 0); err != nil || len(found) > 0 {
		t.Errorf("shared paths are no difference: %v, %v", found, err)
	}
	treetest.WriteFile(t, live(parts[0]), "broken")
	if err := releases.Heal(t.Context(), three); err != nil {
		t.Fatal(err)
	}
	if found, err := releases.Verify(t.Context(), three, 0); err != nil || len(found) > 0 {
		t.Errorf("healed: %v, %v", found, err)
	}
	if err := releases.Prune(0); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(two.Dir); err == nil {
		t.Error("the release before stays")
	}
	for p, want := range map[string]string{"log/today": "logged", "public/uploads/picture": "uploaded"} {
		if got, err := os.ReadFile(live(p)); err != nil || string(got) != want {
			t.Errorf("after healing and pruning, %s: %q, %v", p, got, err)
		}
	}
	// Staging that was cut off behind a link goes on.
	if err := safefs.RemoveTree(three.Dir); err != nil {
		t.Fatal(err)
	}
	staging := filepath.Join(releases.private(), stagingPrefix+three.Pointer.Digest.Short())
	for _, err := range []error{os.MkdirAll(filepath.Join(staging, "public"), 0o700), os.Symlink("../../../app.shared/public/uploads", filepath.Join(staging, "public/uploads"))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if again := stageOne(t, releases, three.Pointer); again.Dir != three.Dir {
		t.Errorf("staged again: %s", again.Dir)
	}
	if got, err := os.ReadFile(live("public/uploads/picture")); err != nil || string(got) != "uploaded" {
		t.Errorf("after staging again: %q, %v", got, err)
	}
}
