package artifact

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

var manyModes = treetest.Tree{
	"a":             {Mode: fs.ModeDir | 0o755},
	"a/group":       {Mode: 0o664, Data: "group"},
	"a/plain":       {Mode: 0o644, Data: "plain"},
	"a/program":     {Mode: 0o755, Data: "program"},
	"open":          {Mode: fs.ModeDir | 0o777},
	"open/readonly": {Mode: 0o444, Data: "readonly"},
	"own":           {Mode: fs.ModeDir | 0o700},
	"own/empty":     {Mode: 0o666},
	"shut":          {Mode: fs.ModeDir | 0o555},
	"sticky":        {Mode: fs.ModeDir | fs.ModeSticky | 0o777},
	"team":          {Mode: fs.ModeDir | fs.ModeSetgid | 0o775},
	"team/both":     {Mode: fs.ModeDir | fs.ModeSetgid | fs.ModeSticky | 0o770},
	"team/none":     {Mode: fs.ModeDir | 0o755}, // though it is made in one that gives its bit on
}

// A tree has its modes whatever the umask of whoever makes it.
func TestModesWhateverTheUmask(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	manyModes.Write(t, tree)
	out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + t.TempDir(),
		Manifest: deployments.Manifest{Name: "app", Version: "1", Dest: "/srv/app", Strategy: deployments.StrategyRelease}})
	if err != nil {
		t.Fatal(err)
	}
	for _, umask := range []string{"000", "022", "077", "777"} {
		t.Run(umask, func(t *testing.T) {
			t.Parallel()
			if umask == "777" { // with which only root can go on in a directory that it has made
				tooltest.NeedRoot(t)
			}
			dest := filepath.Join(treetest.TempDir(t), "app")
			plan, err := json.Marshal(benchPlan{Dest: dest, Pointer: out.Pointer})
			if err != nil {
				t.Fatal(err)
			}
			// The umask is the process's: it takes one of its own.
			child := exec.Command("sh", "-c", `umask "$1"; exec "$0"`, os.Args[0], umask)
			child.Env = append(os.Environ(), benchEnv+"="+string(plan))
			if out, err := child.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			live, err := filepath.EvalSymlinks(dest)
			if err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, live, tree)
		})
	}
}

// A directory gives its set-group-id bit to those that are made in it: a release's have it only if they had it when
// they were published.
func TestModesInASetgidDirectory(t *testing.T) {
	t.Parallel()
	tree, got := t.TempDir(), t.TempDir()
	manyModes.Write(t, tree)
	if err := os.Chmod(got, 0o755|fs.ModeSetgid); err != nil {
		t.Fatal(err)
	}
	p := publishTree(t, tree)
	mustFetch(t, p.manifest, nil, got)
	treetest.Same(t, got, tree)
	untarred := t.TempDir()
	treetest.Untar(t, filepath.Join(p.store, "archive.tar.zst"), untarred)
	treetest.Same(t, untarred, tree)

	// What has the bit besides may have it from above; what lacks it differs.
	for path, mode := range map[string]fs.FileMode{
		"own": fs.ModeSetgid | 0o700, "team": 0o775, "team/both": fs.ModeSetgid | 0o770,
	} {
		if err := os.Chmod(filepath.Join(got, path), mode); err != nil {
			t.Fatal(err)
		}
	}
	found, _, err := verifyTree(t.Context(), got, p.index, 0)
	if want := []Difference{{"team", "mode"}, {"team/both", "mode"}}; err != nil || !slices.Equal(found, want) {
		t.Errorf("it finds %v, %v, want %v", found, err, want)
	}
}

// withoutPrivileges runs f as root without a root's rights.
func withoutPrivileges(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread, which alone loses its privileges, ends with the goroutine
		header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData // the kernel reads both
		if err := unix.Capset(&header, &none[0]); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// Of another's file no access can go unnoted, which is no reason not to read it.
func TestAnothersFileIsTaken(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	dir := t.TempDir()
	treetest.Tree{"file": {Mode: 0o644, Data: "content"}}.Write(t, dir)
	p := publishTree(t, dir)
	if err := os.Lchown(filepath.Join(dir, "file"), 4321, 4321); err != nil {
		t.Fatal(err)
	}
	old, err := openSource(p.asBase(dir))
	if err != nil {
		t.Fatal(err)
	}
	defer old.close()
	r := old.reader()
	defer r.close()
	err = withoutPrivileges(func() error {
		f, err := r.openFile(0)
		if err != nil {
			return err
		}
		return f.Close()
	})
	if err != nil {
		t.Error(err)
	}
}

// Files are linked also for an agent that may not read every directory, for which the kernel has the way through
// /proc alone.
func TestLinksWithoutPrivileges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "old"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	top, err := safefs.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	w := &treeWorker{dirs: safefs.Dirs{Top: top}}
	defer w.close()
	from, err := w.dirs.OpenFile("old", unix.O_RDONLY, 0) // beforehand: since Linux 6.10 who opened a file may link it
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(from)
	if err := withoutPrivileges(func() error { return w.link(from, &archive.Entry{Path: "new"}) }); err != nil {
		t.Fatal(err)
	}
	old, _ := os.Stat(filepath.Join(dir, "old"))
	linked, err := os.Stat(filepath.Join(dir, "new"))
	if err != nil || !os.SameFile(old, linked) {
		t.Errorf("it isn't linked: %v", err)
	}
}

// What can't be read differs: else one bad block, or a chmod, would end the check of all the rest, and healing with it.
func TestVerifyNamesWhatCannotBeRead(t *testing.T) {
	t.Parallel()
	dir := treetest.TempDir(t)
	writeVersion(t, dir, "1")
	index, err := indexOfTree(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"a/one", "b/c"} {
		if err := os.Chmod(filepath.Join(dir, p), 0); err != nil {
			t.Fatal(err)
		}
	}
	var found []Difference
	err = withoutPrivileges(func() error {
		found, _, err = verifyTree(t.Context(), dir, index, 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []Difference{{"a/one", "content"}, {"a/one", "mode"}, {"b/c", "mode"}, {"b/c/three", "missing"}}
	if !slices.Equal(found, want) {
		t.Errorf("it finds %v, want %v", found, want)
	}
}
