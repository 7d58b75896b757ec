package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"kedge/artifact/object"
	"kedge/deployments"
)

// testTree is a tree as a test thinks of it: what lies at each path.
type testTree map[string]testFile

type testFile struct {
	mode   fs.FileMode // with its type
	data   string
	target string // of a symbolic link
	same   string // the path that this is another name of
}

// write makes the tree in dir. Paths must come after their directories in order of comparePaths.
func (tree testTree) write(t testing.TB, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	paths := tree.paths()
	for _, p := range paths {
		f := tree[p]
		full := filepath.Join(dir, p)
		switch {
		case f.mode.IsDir():
			check(os.Mkdir(full, 0o700))
		case f.mode&fs.ModeSymlink != 0:
			check(os.Symlink(f.target, full))
		case f.same != "":
			check(os.Link(filepath.Join(dir, f.same), full))
		default:
			check(os.WriteFile(full, []byte(f.data), 0o600))
			check(os.Chmod(full, f.mode))
		}
	}
	for _, p := range paths {
		if f := tree[p]; f.mode.IsDir() {
			check(os.Chmod(filepath.Join(dir, p), f.mode))
		}
	}
}

func (tree testTree) paths() []string {
	x := &index{}
	for p := range tree {
		x.entries = append(x.entries, entry{path: p})
	}
	sortEntries(x.entries)
	var paths []string
	for _, e := range x.entries {
		paths = append(paths, e.path)
	}
	return paths
}

// snapshot describes a tree on disk, one line a path, so that two can be compared.
func snapshot(t testing.TB, dir string) string {
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
			ino := inodeOf(info)
			if first[ino] == "" {
				first[ino] = name
			}
			fmt.Fprintf(&b, "%q %s %d %x of %q\n", name, info.Mode(), len(data), digestOf(data), first[ino])
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

// published is a release as publish would put it somewhere, in files.
type published struct {
	dir      string // the tree
	store    string
	manifest *deployments.Manifest
	index    []byte
}

// publishTree packs dir, with deltas from earlier releases.
func publishTree(t testing.TB, dir string, earlier ...*published) *published {
	t.Helper()
	store := t.TempDir()
	p := &published{dir: dir, store: store}
	f, err := os.Create(filepath.Join(store, "archive.tar.zst"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	result, err := pack(t.Context(), dir, deployments.SymlinksInside, CompressionDefault, f, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.index = result.Index
	url := func(name string) string { return "file://" + filepath.Join(store, name) }
	write := func(name string, data []byte) deployments.Blob {
		if err := os.WriteFile(filepath.Join(store, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return deployments.Blob{URL: url(name), Size: int64(len(data)), SHA256: digestOf(data)}
	}
	blob := write("index", result.Index)
	p.manifest = &deployments.Manifest{Src: url("archive.tar.zst"), Size: result.Size, Index: &blob, Checksum: result.SHA256.String()}
	for i, from := range earlier {
		var out bytes.Buffer
		if err := makeDelta(t.Context(), from.dir, from.index, dir, result.Index, &out, nil); err != nil {
			t.Fatal(err)
		}
		p.manifest.Deltas = append(p.manifest.Deltas,
			deployments.Delta{From: digestOf(from.index), Blob: write(fmt.Sprintf("delta%d", i), out.Bytes())})
	}
	return p
}

// at gives the manifest with its objects at another URL prefix.
func (p *published) at(prefix string) *deployments.Manifest {
	m := *p.manifest
	move := func(url string) string { return prefix + "/" + filepath.Base(url) }
	index := *m.Index
	index.URL = move(index.URL)
	m.Src, m.Index, m.Deltas = move(m.Src), &index, nil
	for _, d := range p.manifest.Deltas {
		d.URL = move(d.URL)
		m.Deltas = append(m.Deltas, d)
	}
	return &m
}

func (p *published) asBase(dir string) *base {
	return &base{dir: dir, index: p.index, digest: digestOf(p.index)}
}

func fetchTree(t testing.TB, ctx context.Context, m *deployments.Manifest, base *base, dir string) (requests, read int64, err error) {
	t.Helper()
	objects := object.New(object.Config{})
	tree, err := fetchIndexed(ctx, objects, m, base, dir, StageOptions{})
	requests, read = objects.Requests()
	if err == nil && digestOf(tree.index) != m.Index.SHA256 {
		t.Fatal("fetchIndexed returned another index than the manifest's")
	}
	return requests, read, err
}

func mustFetch(t testing.TB, m *deployments.Manifest, base *base, dir string) (requests, read int64) {
	t.Helper()
	requests, read, err := fetchTree(t, t.Context(), m, base, dir)
	if err != nil {
		t.Fatal(err)
	}
	return requests, read
}

// sameTree fails the test where the two trees differ.
func sameTree(t testing.TB, got, want string) {
	t.Helper()
	g, w := snapshot(t, got), snapshot(t, want)
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

// noise gives bytes that don't compress.
func noise(seed uint64, n int) string {
	return string(random(byte(seed), n))
}

// proseTexts are the longest texts that prose has made, by seed: under the race detector it is slow.
var proseTexts sync.Map

// prose gives bytes that do. A shorter text of a seed is the beginning of a longer one.
func prose(seed uint64, n int) string {
	if text, _ := proseTexts.Load(seed); text != nil && len(text.(string)) >= n {
		return text.(string)[:n]
	}
	r := rand.New(rand.NewPCG(seed, 2))
	words := strings.Fields("the anchor was dropped where the ship should go and every node hauls itself to it by the rope")
	var b strings.Builder
	for b.Len() < n {
		b.WriteString(words[r.IntN(len(words))])
		b.WriteByte(" \n"[r.IntN(2)])
	}
	proseTexts.Store(seed, b.String())
	return b.String()[:n]
}

// sample is a tree with one of everything.
func sample(seed uint64) testTree {
	tree := testTree{
		"empty":                 {mode: 0o644},
		"bin":                   {mode: fs.ModeDir | 0o755},
		"bin/server":            {mode: 0o755, data: noise(seed, 2<<20) + prose(seed, 2<<20) + noise(seed+1, 777)},
		"bin/alias":             {mode: fs.ModeSymlink, target: "server"},
		"bin/server2":           {same: "bin/server"},
		"bin.d":                 {mode: fs.ModeDir | 0o755},
		"hollow":                {mode: fs.ModeDir | 0o755},
		"lib":                   {mode: fs.ModeDir | 0o755},
		"lib/deep":              {mode: fs.ModeDir | 0o755},
		"lib/deep/up":           {mode: fs.ModeSymlink, target: "../../bin/server"},
		"lib/exact":             {mode: 0o444, data: noise(seed, 1<<20)},
		"lib/below":             {mode: 0o600, data: noise(seed+3, 1<<20-1)},
		"lib/" + long("n", 200): {mode: 0o644, data: "long"},
		"lib/" + long("d", 120): {mode: fs.ModeDir | 0o755},
		"lib/" + long("d", 120) + "/" + long("é", 120): {mode: 0o644, data: "longer"},
		"lib/latin\xe9": {mode: 0o644, data: "not UTF-8"},
		"lib/new\nline": {mode: 0o644, data: "odd"},
	}
	for i := range 300 {
		tree[fmt.Sprintf("lib/deep/file%03d.txt", i)] = testFile{mode: 0o644, data: prose(seed+uint64(i), i*37)}
	}
	return tree
}

func inodeOf(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }

func sortEntries(entries []entry) {
	slices.SortFunc(entries, func(a, b entry) int { return comparePaths(a.path, b.path) })
}

func long(s string, n int) string { return strings.Repeat(s, n/len(s)) }

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	sample(1).write(t, dir)
	p := publishTree(t, dir)

	t.Run("through tar and zstd", func(t *testing.T) {
		t.Parallel()
		got := t.TempDir()
		untar(t, filepath.Join(p.store, "archive.tar.zst"), got)
		sameTree(t, got, dir)
	})
	t.Run("cold", func(t *testing.T) {
		t.Parallel()
		got := t.TempDir()
		mustFetch(t, p.manifest, nil, got)
		sameTree(t, got, dir)
		if found, _, err := verifyTree(t.Context(), got, p.index, 0); err != nil || len(found) > 0 {
			t.Errorf("verifyTree finds %v, %v", found, err)
		}
	})
}

func untar(t testing.TB, archive, dir string) {
	t.Helper()
	out, err := exec.Command("tar", "--zstd", "-xpf", archive, "-C", dir).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Fatalf("tar: %v\n%s", err, out)
	}
}

// The same tree gives the same bytes, whatever the number of cores and the times of the files.
func TestPackIsDeterministic(t *testing.T) {
	first := make([][]byte, len(compressions))
	for _, cores := range []int{1, 7} {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
		dir := t.TempDir()
		sample(1).write(t, dir)
		for c := range first {
			var out bytes.Buffer
			if _, err := pack(t.Context(), dir, deployments.SymlinksInside, Compression(c), &out, nil); err != nil {
				t.Fatal(err)
			}
			if first[c] == nil {
				first[c] = out.Bytes()
			} else if !bytes.Equal(first[c], out.Bytes()) {
				t.Errorf("with %d cores the archive (%s) has other bytes than with one", cores, Compression(c))
			}
		}
	}
}

// drawTree draws trees with shapes that are rare by hand: nested empty directories, names that sort oddly, links
// everywhere.
func drawTree(t *rapid.T) testTree {
	tree := testTree{}
	dirs := []string{""}
	names := rapid.SampledFrom([]string{"a", "a.b", "a-b", "b", "c d", "é", "Z", "..a", "-", "~", "x\x01", "0", long("long", 160)})
	for range rapid.IntRange(0, 25).Draw(t, "entries") {
		p := rapid.SampledFrom(dirs).Draw(t, "dir") + names.Draw(t, "name")
		if _, ok := tree[p]; ok {
			continue
		}
		mode := rapid.SampledFrom([]fs.FileMode{0o644, 0o755, 0o600, 0o444, 0o777, 0o400}).Draw(t, "mode")
		switch rapid.IntRange(0, 5).Draw(t, "kind") {
		case 0:
			special := rapid.SampledFrom([]fs.FileMode{0, 0, fs.ModeSetgid, fs.ModeSticky, dirOnly}).Draw(t, "special")
			tree[p] = testFile{mode: fs.ModeDir | special | mode | 0o700}
			dirs = append(dirs, p+"/")
		case 1:
			target := names.Draw(t, "target")
			if strings.Contains(p, "/") && rapid.Bool().Draw(t, "up") {
				target = "../" + target
			}
			tree[p] = testFile{mode: fs.ModeSymlink, target: target}
		default:
			size := rapid.SampledFrom([]int{0, 1, 511, 512, 513, 70_000, 400_000, 1<<20 - 1, 1 << 20, 2<<20 + 1}).Draw(t, "size")
			tree[p] = testFile{mode: mode, data: prose(uint64(rapid.IntRange(0, 5).Draw(t, "seed")), size)}
		}
	}
	return tree
}

// A large file is read in parts: half of one program and half of the next are never published, though both have one
// size.
func TestPackRefusesAFileThatIsRewritten(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "server")
	if err := os.WriteFile(path, random(1, 64<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	done := false
	change := writerFunc(func(data []byte) (int, error) {
		if !done {
			done = true
			if err := os.WriteFile(path, random(2, 64<<20), 0o644); err != nil {
				t.Error(err)
			}
		}
		return len(data), nil
	})
	_, err := pack(t.Context(), dir, deployments.SymlinksInside, CompressionDefault, change, nil)
	if !errors.Is(err, errChanging) {
		t.Errorf("%v", err)
	}
}

// Whatever two trees are, and whatever way the second is reached, it is what was published.
func TestAnyTreeByAnyWay(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		oldDir, newDir := t.TempDir(), t.TempDir()
		defer os.RemoveAll(oldDir)
		defer os.RemoveAll(newDir)
		drawTree(rt).write(t, oldDir)
		drawTree(rt).write(t, newDir)
		old := publishTree(t, oldDir)
		new := publishTree(t, newDir, old)
		noDelta := *new.manifest
		noDelta.Deltas = nil
		immutable := *new.manifest
		immutable.Immutable = true
		for _, way := range []struct {
			name string
			m    *deployments.Manifest
			base *base
		}{
			{"cold", new.manifest, nil},
			{"delta", new.manifest, old.asBase(oldDir)},
			{"hard links", &immutable, old.asBase(oldDir)},
			{"ranges", &noDelta, old.asBase(oldDir)},
		} {
			got := t.TempDir()
			mustFetch(t, way.m, way.base, got)
			sameTree(t, got, newDir)
			os.RemoveAll(got)
		}
		got := t.TempDir()
		untar(t, filepath.Join(new.store, "archive.tar.zst"), got)
		sameTree(t, got, newDir)
		os.RemoveAll(got)
		os.RemoveAll(old.store)
		os.RemoveAll(new.store)
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(data []byte) (int, error) { return f(data) }
