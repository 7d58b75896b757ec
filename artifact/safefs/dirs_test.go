package safefs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/artifact/treetest"
)

// No path of a tree leads through a symbolic link; one that can't be reached spoils none after it.
func TestDirsFollowNoLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.Tree{
		"a": {Mode: fs.ModeDir | 0o755}, "a/b": {Mode: fs.ModeDir | 0o755}, "a/b/file": {Mode: 0o644, Data: "b"},
		"a.b": {Mode: fs.ModeDir | 0o755}, "a.b/file": {Mode: 0o644, Data: "."}, "file": {Mode: 0o644, Data: "top"},
		"a/link": {Mode: fs.ModeSymlink, Target: "b"}, "a/to": {Mode: fs.ModeSymlink, Target: "b/file"},
	}.Write(t, dir)
	top, err := OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	d := &Dirs{Top: top}
	defer d.Close()
	open := func(p string) string {
		fd, err := d.OpenFile(p, unix.O_RDONLY, 0)
		if err != nil {
			return ""
		}
		defer unix.Close(fd)
		data := make([]byte, 3)
		n, _ := unix.Read(fd, data)
		return string(data[:n])
	}
	for range 2 {
		for _, c := range []struct{ path, holds string }{
			{"a/b/file", "b"}, {"a/link/file", ""}, {"a/b/file", "b"}, {"a/to", ""}, {"a.b/file", "."},
			{"a/none/x/y", ""}, {"none/b/file", ""}, {"file", "top"},
			{"a/b/file/x", ""}, {"a/b/file", "b"}, {"file", "top"}, {"b/file", ""},
		} {
			if got := open(c.path); got != c.holds {
				t.Errorf("%s holds %q, want %q", c.path, got, c.holds)
			}
		}
	}
	for name, err := range map[string]error{
		"mkdir": d.Mkdir("a/link/x", 0o755), "symlink": d.Symlink("file", "a/link/y"),
		"chmod": d.Chmod("a/link/file", 0o600), "remove": d.Remove("a/link/file"),
	} {
		if err == nil {
			t.Errorf("%s goes through a link", name)
		}
	}
	if got := treetest.List(t, filepath.Join(dir, "a/b")); len(got) != 1 {
		t.Errorf("behind the link there are %q", got)
	}
}

// A file that has become shorter is one that changes, not an end to wait for.
func TestReadOfAShorterFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, 4)
	if err := ReadAll(int(f.Fd()), data, 3); err != nil || string(data) != "tent" {
		t.Errorf("%q, %v", data, err)
	}
	if err := ReadAll(int(f.Fd()), data, 4); !errors.Is(err, ErrChanging) {
		t.Errorf("beyond its end: %v", err)
	}
}
