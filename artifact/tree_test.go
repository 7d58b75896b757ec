package artifact

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

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
	result, err := archive.Pack(t.Context(), dir, deployments.SymlinksInside, archive.CompressionDefault, f, nil)
	if err != nil {
		t.Fatal(err)
	}
	p.index = result.Index
	url := func(name string) string { return "file://" + filepath.Join(store, name) }
	write := func(name string, data []byte) deployments.Blob {
		if err := os.WriteFile(filepath.Join(store, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
		return deployments.Blob{URL: url(name), Size: int64(len(data)), SHA256: deployments.DigestOf(data)}
	}
	blob := write("index", result.Index)
	p.manifest = &deployments.Manifest{Src: url("archive.tar.zst"), Size: result.Size, Index: &blob, Checksum: result.SHA256.String()}
	for i, from := range earlier {
		var out bytes.Buffer
		if err := archive.MakeDelta(t.Context(), from.dir, from.index, dir, result.Index, &out, nil); err != nil {
			t.Fatal(err)
		}
		p.manifest.Deltas = append(p.manifest.Deltas,
			deployments.Delta{From: deployments.DigestOf(from.index), Blob: write(fmt.Sprintf("delta%d", i), out.Bytes())})
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
	return &base{dir: dir, index: p.index, digest: deployments.DigestOf(p.index)}
}

func fetchTree(t testing.TB, ctx context.Context, m *deployments.Manifest, base *base, dir string) (requests, read int64, err error) {
	t.Helper()
	objects := object.New(object.Config{})
	tree, err := fetchIndexed(ctx, objects, m, base, dir, StageOptions{})
	requests, read = objects.Requests()
	if err == nil && deployments.DigestOf(tree.index) != m.Index.SHA256 {
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

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.Sample(1).Write(t, dir)
	p := publishTree(t, dir)

	t.Run("through tar and zstd", func(t *testing.T) {
		t.Parallel()
		got := t.TempDir()
		treetest.Untar(t, filepath.Join(p.store, "archive.tar.zst"), got)
		treetest.Same(t, got, dir)
	})
	t.Run("cold", func(t *testing.T) {
		t.Parallel()
		got := t.TempDir()
		mustFetch(t, p.manifest, nil, got)
		treetest.Same(t, got, dir)
		if found, _, err := verifyTree(t.Context(), got, p.index, 0); err != nil || len(found) > 0 {
			t.Errorf("verifyTree finds %v, %v", found, err)
		}
	})
}

// drawTree draws trees with shapes that are rare by hand: nested empty directories, names that sort oddly, links
// everywhere.
func drawTree(t *rapid.T) treetest.Tree {
	tree := treetest.Tree{}
	dirs := []string{""}
	names := rapid.SampledFrom([]string{"a", "a.b", "a-b", "b", "c d", "é", "Z", "..a", "-", "~", "x\x01", "0",
		treetest.Long("long", 160)})
	for range rapid.IntRange(0, 25).Draw(t, "entries") {
		p := rapid.SampledFrom(dirs).Draw(t, "dir") + names.Draw(t, "name")
		if _, ok := tree[p]; ok {
			continue
		}
		mode := rapid.SampledFrom([]fs.FileMode{0o644, 0o755, 0o600, 0o444, 0o777, 0o400}).Draw(t, "mode")
		switch rapid.IntRange(0, 5).Draw(t, "kind") {
		case 0:
			bits := []fs.FileMode{0, 0, fs.ModeSetgid, fs.ModeSticky, fs.ModeSetgid | fs.ModeSticky}
			special := rapid.SampledFrom(bits).Draw(t, "special")
			tree[p] = treetest.File{Mode: fs.ModeDir | special | mode | 0o700}
			dirs = append(dirs, p+"/")
		case 1:
			target := names.Draw(t, "target")
			if strings.Contains(p, "/") && rapid.Bool().Draw(t, "up") {
				target = "../" + target
			}
			tree[p] = treetest.File{Mode: fs.ModeSymlink, Target: target}
		default:
			size := rapid.SampledFrom([]int{0, 1, 511, 512, 513, 70_000, 400_000, 1<<20 - 1, 1 << 20, 2<<20 + 1}).Draw(t, "size")
			tree[p] = treetest.File{Mode: mode, Data: treetest.Prose(uint64(rapid.IntRange(0, 5).Draw(t, "seed")), size)}
		}
	}
	return tree
}

// Whatever two trees are, and whatever way the second is reached, it is what was published.
func TestAnyTreeByAnyWay(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		oldDir, newDir := t.TempDir(), t.TempDir()
		defer os.RemoveAll(oldDir)
		defer os.RemoveAll(newDir)
		drawTree(rt).Write(t, oldDir)
		drawTree(rt).Write(t, newDir)
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
			treetest.Same(t, got, newDir)
			os.RemoveAll(got)
		}
		got := t.TempDir()
		treetest.Untar(t, filepath.Join(new.store, "archive.tar.zst"), got)
		treetest.Same(t, got, newDir)
		os.RemoveAll(got)
		os.RemoveAll(old.store)
		os.RemoveAll(new.store)
	})
}
