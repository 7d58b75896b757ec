package artifact

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// An agent that isn't root may not write into directories that are read-only, not even to remove them or to move
// them. Killed at any step it comes to the same end all the same.
func TestKilledAtEveryStepWithoutPrivileges(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	home, err := os.MkdirTemp("", "kedge-unprivileged-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	treetest.MountTmpfs(t, home, "size=64m")
	const uid = 4321
	if err := os.Chown(home, uid, uid); err != nil {
		t.Fatal(err)
	}
	var pointers []deployments.Pointer
	for _, v := range []string{"1", "2"} {
		tree := t.TempDir()
		writeVersion(t, tree, v)
		for _, dir := range []string{"a", "b/c", "b"} {
			if err := os.Chmod(filepath.Join(tree, dir), 0o555); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(tree, "sealed"), []byte(v), 0); err != nil { // it can't even read this
			t.Fatal(err)
		}
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + home + "/store",
			Manifest: deployments.Manifest{Name: "app", Version: v, Dest: "/srv/app", DestMode: 0o555, Strategy: deployments.StrategyRelease}})
		if err != nil {
			t.Fatal(err)
		}
		pointers = append(pointers, out.Pointer)
	}
	for n := 0; ; n++ {
		dest := filepath.Join(home, "apps", strconv.Itoa(n))
		plan := killPlan{Dest: dest, Pointers: pointers, KillAt: n, UID: uid, Heal: true}
		killed := runPlan(t, plan, 0)
		left := filepath.Join(dest+".releases", ".kedge")
		for _, name := range []string{trashPrefix + "x", healPrefix + "x"} { // of a kill in the middle of their removal
			if err := os.MkdirAll(filepath.Join(left, name, "closed/in"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		err := filepath.WalkDir(left, func(p string, d fs.DirEntry, err error) error {
			if d.Name() == "closed" {
				err = errors.Join(err, os.Chmod(p, 0o555))
			}
			return errors.Join(err, os.Lchown(p, uid, uid))
		})
		if err := errors.Join(err, os.Lchown(filepath.Dir(left), uid, uid), os.Lchown(filepath.Dir(dest), uid, uid)); err != nil {
			t.Fatal(err)
		}
		plan.KillAt = -1
		runPlan(t, plan, 0)
		if err := whole(dest); err != nil {
			t.Errorf("killed at step %d: %v", n, err)
		}
		// what was healed stays for who works in it
		if top, private := treetest.List(t, dest+".releases"), treetest.List(t, left); len(top) != 2 || len(private) != 4 {
			t.Errorf("killed at step %d, it leaves %q and %q", n, top, private)
		}
		if !killed {
			return
		}
	}
}
