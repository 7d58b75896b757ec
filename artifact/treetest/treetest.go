// Package treetest makes trees of files for tests, and describes and compares them.
package treetest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/deployments/tooltest"
)

// Tree describes a tree for a test: what lies at each path.
type Tree map[string]File

// File is what lies at one path: a file, unless Mode or Same says otherwise.
type File struct {
	Mode   fs.FileMode // with its type
	Data   string
	Target string // of a symbolic link
	Same   string // for a hard link: the path of the file that it links to
}

// Write makes the tree in dir. Directories of a path must be in the tree as well, and a hard link's file before it.
func (tree Tree) Write(t testing.TB, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	paths := tree.Paths()
	for _, p := range paths {
		f := tree[p]
		full := filepath.Join(dir, p)
		switch {
		case f.Mode.IsDir():
			check(os.Mkdir(full, 0o700))
		case f.Mode&fs.ModeSymlink != 0:
			check(os.Symlink(f.Target, full))
		case f.Same != "":
			check(os.Link(filepath.Join(dir, f.Same), full))
		default:
			check(os.WriteFile(full, []byte(f.Data), 0o600))
			check(os.Chmod(full, f.Mode))
		}
	}
	for _, p := range paths {
		if f := tree[p]; f.Mode.IsDir() {
			check(os.Chmod(filepath.Join(dir, p), f.Mode))
		}
	}
}

// Paths returns the paths in the order of a walk: a directory, then what is in it.
func (tree Tree) Paths() []string {
	parts := func(p string) []string { return strings.Split(p, "/") }
	paths := slices.Collect(maps.Keys(tree))
	slices.SortFunc(paths, func(a, b string) int { return slices.Compare(parts(a), parts(b)) })
	return paths
}

// Snapshot describes a tree on disk, one line a path, without times and owners, so that two can be compared.
func Snapshot(t testing.TB, dir string) string {
	t.Helper()
	var b strings.Builder
	first := map[uint64]string{}
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, p)
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			ino := InodeOf(info)
			if first[ino] == "" {
				first[ino] = name
			}
			fmt.Fprintf(&b, "%q %s %d %x of %q\n", name, info.Mode(), len(data), sha256.Sum256(data), first[ino])
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(p)
			fmt.Fprintf(&b, "%q -> %q\n", name, target)
		default:
			fmt.Fprintf(&b, "%q %s\n", name, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Same fails the test if the Snapshots of two trees on disk differ.
func Same(t testing.TB, got, want string) {
	t.Helper()
	g, w := Snapshot(t, got), Snapshot(t, want)
	if g == w {
		return
	}
	gl, wl := strings.Split(g, "\n"), strings.Split(w, "\n")
	for i := range max(len(gl), len(wl)) {
		var a, b string
		if i < len(gl) {
			a = gl[i]
		}
		if i < len(wl) {
			b = wl[i]
		}
		if a != b {
			t.Fatalf("the trees differ:\n got %s\nwant %s", a, b)
		}
	}
}

// InodeOf returns a file's inode number.
func InodeOf(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

// Sample returns a tree with each kind of entry, files of each size that is packed in its own way, and odd names.
func Sample(seed uint64) Tree {
	tree := Tree{
		"empty":                 {Mode: 0o644},
		"bin":                   {Mode: fs.ModeDir | 0o755},
		"bin/server":            {Mode: 0o755, Data: Noise(seed, 2<<20) + Prose(seed, 2<<20) + Noise(seed+1, 777)},
		"bin/alias":             {Mode: fs.ModeSymlink, Target: "server"},
		"bin/server2":           {Same: "bin/server"},
		"bin.d":                 {Mode: fs.ModeDir | 0o755},
		"hollow":                {Mode: fs.ModeDir | 0o755},
		"lib":                   {Mode: fs.ModeDir | 0o755},
		"lib/deep":              {Mode: fs.ModeDir | 0o755},
		"lib/deep/up":           {Mode: fs.ModeSymlink, Target: "../../bin/server"},
		"lib/exact":             {Mode: 0o444, Data: Noise(seed, 1<<20)},
		"lib/below":             {Mode: 0o600, Data: Noise(seed+3, 1<<20-1)},
		"lib/" + Long("n", 200): {Mode: 0o644, Data: "long"},
		"lib/" + Long("d", 120): {Mode: fs.ModeDir | 0o755},
		"lib/" + Long("d", 120) + "/" + Long("é", 120): {Mode: 0o644, Data: "longer"},
		"lib/latin\xe9": {Mode: 0o644, Data: "not UTF-8"},
		"lib/new\nline": {Mode: 0o644, Data: "odd"},
	}
	for i := range 300 {
		tree[fmt.Sprintf("lib/deep/file%03d.txt", i)] = File{Mode: 0o644, Data: Prose(seed+uint64(i), i*37)}
	}
	return tree
}

// Noise returns n bytes that depend on the low byte of seed alone, and don't compress.
func Noise(seed uint64, n int) string {
	return string(Random(byte(seed), n))
}

// Random returns n bytes that depend on seed alone, and don't compress.
func Random(seed byte, n int) []byte {
	data := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(data)
	return data
}

// proseTexts has the longest text that Prose has made of each seed, as making a text is slow under the race detector.
var proseTexts sync.Map

// Prose returns n bytes that compress well, as text does. A shorter text of a seed is the beginning of a longer one.
func Prose(seed uint64, n int) string {
	if text, _ := proseTexts.Load(seed); text != nil && len(text.(string)) >= n {
		return text.(string)[:n]
	}
	r := rand.New(rand.NewPCG(seed, 2))
	words := strings.Fields("the anchor was dropped where the ship should go " +
		"and every node hauls itself to it by the rope")
	var b strings.Builder
	for b.Len() < n {
		b.WriteString(words[r.IntN(len(words))])
		b.WriteByte(" \n"[r.IntN(2)])
	}
	proseTexts.Store(seed, b.String())
	return b.String()[:n]
}

// Long repeats s as often as fits into n bytes.
func Long(s string, n int) string { return strings.Repeat(s, n/len(s)) }

// Untar unpacks an archive in zstd with the system's tar. It fails the test if tar fails or prints anything.
func Untar(t testing.TB, archive, dir string) {
	t.Helper()
	out, err := exec.Command("tar", "--zstd", "-xpf", archive, "-C", dir).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("tar: %v\n%s", err, out)
	}
}

// List returns the names in a directory, sorted.
func List(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// Relink makes a symbolic link to target at path, in the place of a file, link or empty directory there.
func Relink(t testing.TB, path, target string) {
	t.Helper()
	os.Remove(path)
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

// WriteFile writes a file.
func WriteFile(t *testing.T, file, data string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(data), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Mkdir makes a directory, and those above it, and gives it to a user and the group of the same number.
func Mkdir(t *testing.T, path string, uid int) string {
	t.Helper()
	if err := errors.Join(os.MkdirAll(path, 0o755), os.Chown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
	return path
}

// MakeDeep makes directories called d below top, each in the one before: as many as levels says.
func MakeDeep(t *testing.T, top string, levels int) {
	t.Helper()
	fd, err := unix.Openat(unix.AT_FDCWD, top, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	for range levels {
		if err != nil {
			t.Fatal(err)
		}
		next := -1
		if err = unix.Mkdirat(fd, "d", 0o755); err == nil {
			next, err = unix.Openat(fd, "d", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
}

// TempDir is t.TempDir for trees with directories whose modes keep all but root from emptying them.
func TempDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
			if d != nil && d.IsDir() && err == nil {
				os.Chmod(p, 0o700)
			}
			return nil
		})
	})
	return dir
}

// OpenHome makes a directory that everybody may enter, removed with the test. It needs root.
func OpenHome(t *testing.T) string {
	t.Helper()
	tooltest.NeedRoot(t)
	home, err := os.MkdirTemp("", "kedge-place-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	if err := os.Chmod(home, 0o755); err != nil {
		t.Fatal(err)
	}
	return home
}

// MountTmpfs mounts a file system in memory on dir, for the time of the test. It needs root.
func MountTmpfs(t testing.TB, dir, options string) {
	t.Helper()
	tooltest.NeedRoot(t)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		t.Fatalf("mounting a small file system: %v", err)
	}
	t.Cleanup(func() {
		// A detached mount ends when nothing uses it any more. A plain unmount would fail: the kernel releases an image on
		// dir only some time after the image's own unmount, and not while a machine that another test boots has copies of
		// all mounts.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// BindMount makes a directory at path, mounts on it another directory that holds one file, and
// returns that file. It needs root.
func BindMount(t *testing.T, path string) (file string) {
	t.Helper()
	tooltest.NeedRoot(t)
	data := t.TempDir()
	file = filepath.Join(data, "precious")
	WriteFile(t, file, "data")
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(data, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	root, err := filepath.EvalSymlinks(filepath.Dir(data)) // of all temporary directories of the test
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // finds the mount even if the test has moved the directory
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Error(err)
		}
		for line := range strings.Lines(string(mounts)) {
			at := strings.NewReplacer(`\040`, " ", `\134`, `\`).Replace(strings.Fields(line)[4])
			if !strings.HasPrefix(at, root+"/") {
				continue
			}
			if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
	})
	return file
}

// MakeImmutable makes a file that not even root can remove until the test ends. It needs root,
// and skips the test if the file system has no such files.
func MakeImmutable(t *testing.T, file string) {
	t.Helper()
	tooltest.NeedRoot(t)
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	const immutable = unix.STATX_ATTR_IMMUTABLE // the same bit as FS_IMMUTABLE_FL
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|immutable)
	}
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EOPNOTSUPP) {
		f.Close()
		t.Skip("the file system has no immutable files")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Error(err)
		}
	})
}
