package artifact

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// mountXFS gives a directory on a file system of its own, one that can clone files.
func mountXFS(t testing.TB) string {
	t.Helper()
	tooltest.NeedRoot(t)
	dir := quickDir(t)
	image, mounted := filepath.Join(dir, "image"), filepath.Join(dir, "disk")
	if err := os.Mkdir(mounted, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"truncate", "-s", "320M", image}, // mkfs.xfs takes no less than 300
		{"/usr/sbin/mkfs.xfs", "-q", "-m", "reflink=1", image},
		{"mount", "-o", "loop", image, mounted},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mounted).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return mounted
}

// usedOf is how many bytes a file system holds, when all is written.
func usedOf(t testing.TB, dir string) int64 {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// Where the file system can clone, unchanged files share the old release's blocks, and are files of their own all
// the same. A file that isn't what it should be is not cloned.
func TestUnchangedFilesAreCloned(t *testing.T) {
	t.Parallel()
	disk := mountXFS(t)
	old, new := twoReleases(t)
	one, two, three := filepath.Join(disk, "1"), filepath.Join(disk, "2"), filepath.Join(disk, "3")
	for _, dir := range []string{one, two, three} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before := usedOf(t, disk)
	mustFetch(t, old.manifest, nil, one)
	cold := usedOf(t, disk) - before
	mustFetch(t, new.manifest, old.asBase(one), two)
	warm := usedOf(t, disk) - before - cold
	treetest.Same(t, two, new.dir)
	if server := size(t, filepath.Join(two, "bin/server")); warm > server+cold/10 { // which changed, so that it is written anew
		t.Errorf("the first release took %d bytes of disk, the second %d, of which only %d changed", cold, warm, server)
	}

	flip(t, filepath.Join(two, "lib/below"), 0)
	treetest.Same(t, one, old.dir)
	mustFetch(t, new.manifest, new.asBase(two), three)
	treetest.Same(t, three, new.dir)

	// One that has grown since it was opened is not taken with what came behind: a clone has all of a file.
	e := &archive.Entry{Path: "file", Size: 7, Sum: deployments.DigestOf([]byte("content"))}
	for content, want := range map[string]bool{"content": true, "content, and more": false} {
		from, err := os.Create(filepath.Join(disk, "from"))
		if err != nil {
			t.Fatal(err)
		}
		defer from.Close()
		to, err := os.Create(filepath.Join(disk, "to"))
		if err != nil {
			t.Fatal(err)
		}
		defer to.Close()
		if _, err := from.WriteString(content); err != nil {
			t.Fatal(err)
		}
		share := newSharing(new.manifest)
		right, err := copyContent(int(to.Fd()), oldFile{fd: int(from.Fd())}, e,
			&sourceReader{source: &source{known: &knownFiles{}}, buffer: make([]byte, 1<<10)}, share)
		if err != nil || right != want || share.noClone.Load() {
			t.Errorf("%q: cloned: %v, taken: %v, %v", content, !share.noClone.Load(), right, err)
		}
	}
}
