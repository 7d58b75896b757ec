package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/archive"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// twoReleases publishes a sample and its successor: two files edited, one added, one renamed, one removed. Each call
// writes trees and stores of its own; their bytes are made once.
func twoReleases(t testing.TB) (old, new *published) {
	t.Helper()
	oldTree, newTree := samples()
	oldDir, newDir := t.TempDir(), t.TempDir()
	oldTree.Write(t, oldDir)
	newTree.Write(t, newDir)
	packedSamples.Do(func() {
		old := publishTree(t, oldDir)
		packedOld, packedNew = old, publishTree(t, newDir, old)
		packedFiles = map[*published]map[string][]byte{}
		for _, p := range []*published{packedOld, packedNew} {
			packedFiles[p] = readFiles(t, p.store)
		}
	})
	return again(t, packedOld, oldDir), again(t, packedNew, newDir)
}

var (
	packedSamples        sync.Once
	packedOld, packedNew *published
	packedFiles          map[*published]map[string][]byte // of their stores
)

func readFiles(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		data, failed := os.ReadFile(filepath.Join(dir, e.Name()))
		files[e.Name()], err = data, errors.Join(err, failed)
	}
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// again puts what was published from an equal tree into a store of its own.
func again(t testing.TB, p *published, dir string) *published {
	t.Helper()
	if p == nil {
		t.Fatal("another test could not publish the samples")
	}
	store := t.TempDir()
	for name, data := range packedFiles[p] {
		if err := os.WriteFile(filepath.Join(store, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &published{dir: dir, store: store, manifest: p.at("file://" + store), index: p.index}
}

// samples returns the trees of twoReleases.
var samples = sync.OnceValues(func() (old, new treetest.Tree) {
	old = treetest.Sample(1)
	new = maps.Clone(old)
	server := new["bin/server"]
	server.Data = server.Data[:3<<20] + "one line more" + server.Data[3<<20:]
	new["bin/server"] = server
	edited := new["lib/deep/file200.txt"]
	edited.Data = strings.Replace(edited.Data, "anchor", "kedge", 1)
	new["lib/deep/file200.txt"] = edited
	new["lib/deep/new.txt"] = treetest.File{Mode: 0o644, Data: "new"}
	new["lib/renamed"] = new["lib/exact"]
	delete(new, "lib/exact")
	delete(new, "lib/deep/file100.txt")
	return old, new
})

func size(t testing.TB, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

func TestDeltaIsAllThatIsFetched(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	got := t.TempDir()
	requests, read := mustFetch(t, new.manifest, old.asBase(old.dir), got)
	treetest.Same(t, got, new.dir)
	if delta := new.manifest.Deltas[0].Size; requests != 1 || read != delta || delta > 20_000 {
		t.Errorf("it took %d requests and %d bytes for a delta of %d, of which 20,000 should do", requests, read, delta)
	}
}

func TestWithoutADeltaOnlyChangedFramesAreFetched(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	new.manifest.Deltas = nil
	got := t.TempDir()
	_, read := mustFetch(t, new.manifest, old.asBase(old.dir), got)
	treetest.Same(t, got, new.dir)
	// The server's first frame, 2 MiB that don't compress, is as it was.
	if whole := new.manifest.Size; read > whole/2 {
		t.Errorf("it took %d bytes of an archive of %d", read, whole)
	}
}

// A large file may be made of nothing but frames of the old one, in another order.
func TestALargeFileOfOldFrames(t *testing.T) {
	t.Parallel()
	oldDir, newDir, got := t.TempDir(), t.TempDir(), t.TempDir()
	one, two := treetest.Noise(1, archive.LargeFrame), treetest.Noise(2, archive.LargeFrame)
	treetest.Tree{"file": {Mode: 0o644, Data: one + two}}.Write(t, oldDir)
	treetest.Tree{"file": {Mode: 0o755, Data: two + one}}.Write(t, newDir)
	old, new := publishTree(t, oldDir), publishTree(t, newDir)
	_, read := mustFetch(t, new.manifest, old.asBase(oldDir), got)
	treetest.Same(t, got, newDir)
	if read > int64(len(new.index)) {
		t.Errorf("it took %d bytes, the index has %d", read, len(new.index))
	}
}

// What a cut fetch left and what the old release has may be all of a large file together.
func TestALargeFileOfLeftAndOldFrames(t *testing.T) {
	t.Parallel()
	oldDir, newDir, got := t.TempDir(), t.TempDir(), t.TempDir()
	left, kept, other := treetest.Noise(1, archive.LargeFrame), treetest.Noise(2, archive.LargeFrame), treetest.Noise(3,
		archive.LargeFrame)
	treetest.Tree{"file": {Mode: 0o644, Data: other + kept}}.Write(t, oldDir)
	treetest.Tree{"file": {Mode: 0o755, Data: left + kept}}.Write(t, newDir)
	old, new := publishTree(t, oldDir), publishTree(t, newDir)
	if err := os.WriteFile(filepath.Join(got, "file"), []byte(left), 0o600); err != nil {
		t.Fatal(err)
	}
	_, read := mustFetch(t, new.manifest, old.asBase(oldDir), got)
	treetest.Same(t, got, newDir)
	if read > int64(len(new.index)) {
		t.Errorf("it took %d bytes, the index has %d", read, len(new.index))
	}
}

// Hard links are made only where nobody can write through them into two releases.
func TestImmutableReleasesShareFiles(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	own, group := strconv.Itoa(os.Geteuid()), strconv.Itoa(os.Getegid())
	for owner, immutable := range map[string]bool{own: false, "": true, own + ":": true, ":" + group: true, own + ":" + group: true} {
		m := *new.manifest
		m.Immutable, m.Owner = immutable, owner
		got := t.TempDir()
		mustFetch(t, &m, old.asBase(old.dir), got)
		treetest.Same(t, got, new.dir)
		a, _ := os.Stat(filepath.Join(old.dir, "lib/below"))
		b, _ := os.Stat(filepath.Join(got, "lib/below"))
		if os.SameFile(a, b) != immutable {
			t.Errorf("immutable %v, of %q: the file is shared: %v", immutable, owner, !immutable)
		}
	}
}

// What can't be linked is copied: from another disk, or beyond as many links as a file may have.
func TestFilesOfAnotherDiskAreCopied(t *testing.T) {
	t.Parallel()
	dir, got := quickDir(t), t.TempDir()
	treetest.Tree{
		"file": {Mode: 0o644, Data: treetest.Noise(1, 400_000)}, "small": {Mode: 0o644, Data: "small"},
	}.Write(t, dir)
	p := publishTree(t, dir)
	p.manifest.Immutable = true
	if requests, _ := mustFetch(t, p.manifest, p.asBase(dir), got); requests > 0 {
		t.Errorf("it took %d requests", requests)
	}
	treetest.Same(t, got, dir)
}

// A file of a live release that has or will have anything other than the new one's is not shared with it.
func TestWhatMustNotBeLinked(t *testing.T) {
	t.Parallel()
	nothing := func(string) error { return nil }
	for name, c := range map[string]struct {
		owner  string
		change func(file string) error
	}{
		"an owner to be given": {"4321", nothing},
		"a group to be given":  {":1234", nothing},
		"another owner":        {"", func(file string) error { return os.Chown(file, 4321, 0) }},
		"a set-user-id mode":   {"", func(file string) error { return os.Chmod(file, 0o644|fs.ModeSetuid) }},
		"another mode":         {"", func(file string) error { return os.Chmod(file, 0o666) }},
		"another content":      {"", func(file string) error { flip(t, file, 5); return nil }},
		"a longer content":     {"", func(file string) error { return os.Truncate(file, 400_001) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if name == "another owner" {
				tooltest.NeedRoot(t)
			}
			dir, want, got := t.TempDir(), t.TempDir(), t.TempDir()
			tree := treetest.Tree{"file": {Mode: 0o644, Data: treetest.Noise(1, 400_000)}}
			tree.Write(t, dir)
			tree.Write(t, want)
			p := publishTree(t, dir)
			p.manifest.Immutable, p.manifest.Owner = true, c.owner
			if err := c.change(filepath.Join(dir, "file")); err != nil {
				t.Fatal(err)
			}
			mustFetch(t, p.manifest, p.asBase(dir), got)
			treetest.Same(t, got, want)
			a, _ := os.Stat(filepath.Join(dir, "file"))
			if b, err := os.Stat(filepath.Join(got, "file")); err != nil || os.SameFile(a, b) {
				t.Errorf("it is shared, or not there: %v", err)
			}
		})
	}
}

// An old release that isn't what it should be costs bytes, and nothing else.
func TestADamagedBaseIsHealed(t *testing.T) {
	t.Parallel()
	damages := map[string]func(t *testing.T, dir string){
		"a flipped byte in each file": func(t *testing.T, dir string) {
			filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if d.Type().IsRegular() && d.Name() != "server2" { // which is another name: flipped twice, it would be right again
					flip(t, p, 0)
				}
				return err
			})
		},
		"a shorter file":   func(t *testing.T, dir string) { os.Truncate(filepath.Join(dir, "bin/server"), 1<<20) },
		"a missing file":   func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "bin/server")) },
		"a directory gone": func(t *testing.T, dir string) { os.RemoveAll(filepath.Join(dir, "lib")) },
		"all of it gone":   func(t *testing.T, dir string) { os.RemoveAll(dir) },
		"a link for a file": func(t *testing.T, dir string) {
			treetest.Relink(t, filepath.Join(dir, "lib/below"), "/etc/passwd")
		},
		"a pipe for a file": func(t *testing.T, dir string) {
			path := filepath.Join(dir, "lib/below")
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
		"a link for a directory": func(t *testing.T, dir string) {
			os.RemoveAll(filepath.Join(dir, "lib"))
			treetest.Relink(t, filepath.Join(dir, "lib"), "/etc")
		},
	}
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, new := twoReleases(t)
			damage(t, old.dir)
			for _, deltas := range [][]deployments.Delta{new.manifest.Deltas, nil} {
				for _, immutable := range []bool{false, true} {
					m := *new.manifest
					m.Deltas, m.Immutable = deltas, immutable
					got := t.TempDir()
					mustFetch(t, &m, old.asBase(old.dir), got)
					treetest.Same(t, got, new.dir)
				}
			}
		})
	}
}

// flip changes one byte of a file, counted from its end where at is negative.
func flip(t testing.TB, path string, at int64) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) == 0 {
		return
	}
	if at < 0 {
		at += int64(len(data))
	}
	data[at] ^= 0x40
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	// Only root could write to a file whose mode forbids it.
	err = errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, data, 0o600), os.Chmod(path, info.Mode()))
	if err != nil {
		t.Fatal(err)
	}
}

// A corrupt byte anywhere in what is stored is never deployed: a delta is done without, an archive or an index is
// an error.
func TestACorruptObjectIsCaught(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	for _, at := range []int64{0, 9, 100, -1, -100} {
		flip(t, filepath.Join(new.store, "delta0"), at)
		got := t.TempDir()
		mustFetch(t, new.manifest, old.asBase(old.dir), got)
		treetest.Same(t, got, new.dir)
		flip(t, filepath.Join(new.store, "delta0"), at)
	}
	for _, name := range []string{"index", "archive.tar.zst"} {
		for _, at := range []int64{5000, new.manifest.Index.Size - 1} {
			flip(t, filepath.Join(new.store, name), at)
			if _, _, err := fetchTree(t, t.Context(), new.manifest, nil, t.TempDir()); !errors.Is(err, deployments.ErrDigest) {
				t.Errorf("byte %d of the %s is wrong: %v, want deployments.ErrDigest", at, name, err)
			}
			flip(t, filepath.Join(new.store, name), at)
		}
	}
	os.Truncate(filepath.Join(new.store, "archive.tar.zst"), new.manifest.Size-1)
	if _, _, err := fetchTree(t, t.Context(), new.manifest, nil, t.TempDir()); !errors.Is(err, deployments.ErrDigest) {
		t.Errorf("the archive is cut: %v, want deployments.ErrDigest", err)
	}
}

// An index that a manifest names and that doesn't fit its archive is an error, before or after files are made;
// never a panic.
func TestAnIndexThatLies(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.Tree{"empty": {Mode: 0o644}, "large": {Mode: 0o644, Data: treetest.Noise(1, archive.LargeFrame+1000)},
		"small": {Mode: 0o644, Data: "small"}}.Write(t, dir)
	p := publishTree(t, dir)
	last := func(x *archive.Index) *archive.Frame { return &x.Frames[len(x.Frames)-1] }
	for name, c := range map[string]struct {
		lie func(x *archive.Index, m *deployments.Manifest)
		// made says that fetching comes to make files.
		made bool
	}{
		"the truth":                    {func(*archive.Index, *deployments.Manifest) {}, true},
		"a frame that decodes to more": {func(x *archive.Index, _ *deployments.Manifest) { last(x).Length++ }, true},
		"a frame that decodes to less": {func(x *archive.Index, _ *deployments.Manifest) { last(x).Length-- }, true},
		"a frame that decodes to far less": {func(x *archive.Index, _ *deployments.Manifest) {
			x.Frames[0].Length /= 2
			last(x).Length = archive.MaxFrame
		}, true},
		"a frame that is left out": {func(x *archive.Index, _ *deployments.Manifest) {
			x.Frames = append(x.Frames[:1], x.Frames[2:]...)
			last(x).Length = archive.MaxFrame
		}, false},
		"an empty file with a content": {func(x *archive.Index,
			_ *deployments.Manifest) {
			x.Entries[0].Sum = deployments.DigestOf([]byte("x"))
		}, true},
		"a list of hashes": {func(x *archive.Index, m *deployments.Manifest) {
			x.Archive, x.Frames,
				m.Size = false, nil, 0
		}, false},
		"an archive of another size": {func(_ *archive.Index, m *deployments.Manifest) { m.Size++ }, false},
		"more than an index may have": {func(_ *archive.Index,
			m *deployments.Manifest) {
			m.Index.Size = archive.MaxIndex + 1
		}, false},
		"a file that begins before its content": {func(x *archive.Index, _ *deployments.Manifest) {
			x.Entries[1].Size += 512
			last(x).Length = archive.MaxFrame
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			x, err := archive.DecodeIndex(p.index)
			if err != nil {
				t.Fatal(err)
			}
			m, blob := *p.manifest, *p.manifest.Index
			m.Index = &blob
			c.lie(x, &m)
			path := filepath.Join(t.TempDir(), "index")
			if err := os.WriteFile(path, x.Encode(), 0o600); err != nil {
				t.Fatal(err)
			}
			blob.URL, blob.SHA256 = "file://"+path, deployments.DigestOf(x.Encode())
			if blob.Size <= archive.MaxIndex {
				blob.Size = size(t, path)
			}
			got := t.TempDir()
			_, _, err = fetchTree(t, t.Context(), &m, nil, got)
			if name == "the truth" {
				if err != nil {
					t.Fatal(err)
				}
				treetest.Same(t, got, dir)
				return
			}
			if !errors.Is(err, archive.ErrIndex) && !errors.Is(err, deployments.ErrDigest) {
				t.Errorf("%v", err)
			}
			if made := len(treetest.List(t, got)) > 0; made && !c.made {
				t.Errorf("it made %q", treetest.List(t, got))
			}
		})
	}
}

// A fetch that was killed anywhere is finished by the next one, which fetches only what is missing.
func TestACutFetchIsResumed(t *testing.T) {
	t.Parallel()
	_, new := twoReleases(t)
	got := t.TempDir()
	var served atomic.Int64
	const allowed = 3 << 20
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if served.Load() > allowed {
			http.Error(w, "gone", http.StatusNotFound)
			return
		}
		http.ServeFile(&countingWriter{w, &served, allowed}, r, filepath.Join(new.store, filepath.Base(r.URL.Path)))
	}))
	defer server.Close()
	if _, _, err := fetchTree(t, t.Context(), new.at(server.URL), nil, got); err == nil {
		t.Fatal("the fetch was not cut")
	}
	// What a crash leaves besides: a file of the right size without its bytes, a stray one, a wrong type.
	os.WriteFile(filepath.Join(got, "lib/below"), make([]byte, 1<<20-1), 0o600)
	os.WriteFile(filepath.Join(got, "stray"), nil, 0o600)
	os.RemoveAll(filepath.Join(got, "hollow"))
	os.Symlink("/etc", filepath.Join(got, "hollow"))
	os.RemoveAll(filepath.Join(got, "empty"))
	os.MkdirAll(filepath.Join(got, "empty/file"), 0o700)
	os.RemoveAll(filepath.Join(got, "bin.d"))
	os.WriteFile(filepath.Join(got, "bin.d"), nil, 0o600)
	os.RemoveAll(filepath.Join(got, "lib/exact"))
	os.Symlink("../empty", filepath.Join(got, "lib/exact"))
	_, read := mustFetch(t, new.manifest, nil, got)
	treetest.Same(t, got, new.dir)
	if whole := new.manifest.Size; read > whole*3/4 {
		t.Errorf("the second fetch took %d bytes of %d, after %d by the first", read, whole, served.Load())
	}
	os.Chmod(filepath.Join(got, "lib/deep/file001.txt"), 0o600)
	if _, read := mustFetch(t, new.manifest, nil, got); read > int64(len(new.index)) {
		t.Errorf("a third fetch took %d bytes, the index has %d", read, len(new.index))
	}
	treetest.Same(t, got, new.dir)
}

// A large file that a fetch was cut in is of no use where it is too long, or may be a live release's too: it is
// made anew. A release may have a file of the name that a fetch tries modes with.
func TestACutFetchLeavesAFile(t *testing.T) {
	t.Parallel()
	tree := treetest.Tree{"large": {Mode: 0o644, Data: treetest.Noise(1, 2*archive.LargeFrame)},
		".kedge-mode": {Mode: 0o600, Data: "x"}}
	dir := t.TempDir()
	tree.Write(t, dir)
	p := publishTree(t, dir)
	for name, left := range map[string]func(file string) error{
		"nothing": os.Remove,
		"all":     func(string) error { return nil },
		"a half":  func(file string) error { return os.Truncate(file, archive.LargeFrame) },
		"more":    func(file string) error { return os.Truncate(file, 3*archive.LargeFrame) },
		"another's": func(file string) error {
			return errors.Join(os.Truncate(file, archive.LargeFrame),
				os.Link(file, filepath.Join(filepath.Dir(filepath.Dir(file)), "live")))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := filepath.Join(t.TempDir(), "got")
			if err := os.Mkdir(got, 0o700); err != nil {
				t.Fatal(err)
			}
			tree.Write(t, got)
			if err := left(filepath.Join(got, "large")); err != nil {
				t.Fatal(err)
			}
			mustFetch(t, p.manifest, nil, got)
			treetest.Same(t, got, dir)
			if live := filepath.Join(filepath.Dir(got), "live"); name == "another's" && size(t, live) != archive.LargeFrame {
				t.Error("the live release's file was written to")
			}
		})
	}
}

// What a cut fetch left of a large file gives way to the whole one that a release on disk has by the time of the
// next; not to one that is damaged.
func TestACutFetchIsFinishedFromTheOldRelease(t *testing.T) {
	t.Parallel()
	tree := treetest.Sample(1)
	server := tree["bin/server"].Data
	for name, c := range map[string]struct{ immutable, damaged bool }{
		"copied": {}, "linked": {immutable: true}, "damaged": {damaged: true}, "damaged, immutable": {immutable: true, damaged: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, got := t.TempDir(), t.TempDir()
			tree.Write(t, dir)
			p := publishTree(t, dir)
			p.manifest.Immutable = c.immutable
			want := t.TempDir()
			tree.Write(t, want)
			if c.damaged {
				flip(t, filepath.Join(dir, "bin/server"), 100)
			}
			if err := os.Mkdir(filepath.Join(got, "bin"), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(got, "bin/server"),
				[]byte(server[:archive.LargeFrame]+treetest.Noise(9, archive.LargeFrame)),
				0o600); err != nil {
				t.Fatal(err)
			}
			_, read := mustFetch(t, p.manifest, p.asBase(dir), got)
			treetest.Same(t, got, want)
			if !c.damaged && read > 0 || read > 1<<20 {
				t.Errorf("it took %d bytes, and had the first %d, which don't compress", read, archive.LargeFrame)
			}
		})
	}
}

// So it gives way to what a delta makes of the old one, and is fetched again where that comes to nothing.
func TestACutFetchIsFinishedByADelta(t *testing.T) {
	t.Parallel()
	for name, damaged := range map[string]bool{"whole": false, "damaged": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, new := twoReleases(t)
			left, err := os.ReadFile(filepath.Join(new.dir, "bin/server"))
			if err != nil {
				t.Fatal(err)
			}
			got := t.TempDir()
			if err := errors.Join(os.Mkdir(filepath.Join(got, "bin"), 0o700),
				os.WriteFile(filepath.Join(got, "bin/server"), left[:archive.LargeFrame], 0o600)); err != nil {
				t.Fatal(err)
			}
			if damaged {
				flip(t, filepath.Join(old.dir, "bin/server"), 100)
			}
			requests, _ := mustFetch(t, new.manifest, old.asBase(old.dir), got)
			treetest.Same(t, got, new.dir)
			if (requests > 1) != damaged {
				t.Errorf("it took %d requests", requests)
			}
		})
	}
}

// countingWriter hangs up when it has written what is allowed.
type countingWriter struct {
	http.ResponseWriter
	n       *atomic.Int64
	allowed int64
}

func (w *countingWriter) Write(data []byte) (int, error) {
	if w.n.Add(int64(len(data))) > w.allowed {
		panic(http.ErrAbortHandler)
	}
	return w.ResponseWriter.Write(data)
}

func TestServersThatMisbehave(t *testing.T) {
	t.Parallel()
	_, new := twoReleases(t)
	file := func(r *http.Request) string { return filepath.Join(new.store, filepath.Base(r.URL.Path)) }
	var hits atomic.Int64
	servers := map[string]http.HandlerFunc{
		"ignores Range": func(w http.ResponseWriter, r *http.Request) {
			data, _ := os.ReadFile(file(r))
			w.Header().Set("Content-Length", fmt.Sprint(len(data)))
			w.Write(data)
		},
		"gives a wrong byte now and then": func(w http.ResponseWriter, r *http.Request) {
			data, _ := os.ReadFile(file(r))
			if strings.HasSuffix(r.URL.Path, ".zst") && hits.Add(1)%3 == 2 {
				data[len(data)/2] ^= 1
			}
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
		},
	}
	for name, serve := range servers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(serve)
			defer server.Close()
			got := t.TempDir()
			mustFetch(t, new.at(server.URL), nil, got)
			treetest.Same(t, got, new.dir)
		})
	}
}

// A stalled server does not hold a fetch that is cancelled.
func TestFetchEndsWithItsContext(t *testing.T) {
	t.Parallel()
	_, new := twoReleases(t)
	ctx, cancel := context.WithCancel(t.Context())
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".zst") && r.Method == http.MethodGet {
			cancel()
			<-r.Context().Done()
			return
		}
		http.ServeFile(w, r, filepath.Join(new.store, filepath.Base(r.URL.Path)))
	}))
	defer server.Close()
	if _, _, err := fetchTree(t, ctx, new.at(server.URL), nil, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("fetch ended with %v", err)
	}
}

func TestVerifyNamesWhatDiffers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	treetest.Sample(1).Write(t, dir)
	index, err := indexOfTree(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if found, _, err := verifyTree(t.Context(), dir, index, 1<<30); err != nil || len(found) > 0 {
		t.Fatalf("an untouched tree differs: %v, %v", found, err)
	}
	at := func(p string) string { return filepath.Join(dir, p) }
	flip(t, at("lib/below"), 1000)
	for p, mode := range map[string]fs.FileMode{"lib/exact": 0o640, "lib/deep/file002.txt": 0o644 | fs.ModeSetuid, "lib/deep/file003.txt": 0o644 | fs.ModeSetgid,
		"bin.d": 0o755 | fs.ModeSticky, "hollow": 0o755 | fs.ModeSetuid, "lib/deep": 0o755 | fs.ModeSetgid} {
		if err := os.Chmod(at(p), mode); err != nil {
			t.Fatal(err)
		}
	}
	treetest.Relink(t, at("bin/alias"), "server2")
	os.Remove(at("empty"))
	os.Mkdir(at("empty"), 0o755)
	os.Remove(at("lib/deep/file001.txt"))
	os.WriteFile(at("stray"), nil, 0o600)
	os.Remove(at("bin/server2"))
	data, _ := os.ReadFile(at("bin/server"))
	os.WriteFile(at("bin/server2"), data, 0o755)
	found, _, err := verifyTree(t.Context(), dir, index, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := "[{bin/alias link} {bin/server2 link} {bin.d mode} {empty type} {hollow mode} {lib/below content} {lib/deep/file001.txt missing} " +
		"{lib/deep/file002.txt mode} {lib/deep/file003.txt mode} {lib/exact mode} {stray extra}]"
	if got := fmt.Sprint(found); got != want {
		t.Errorf("found %s\n want %s", got, want)
	}
}

// What a file becomes while a tree is verified can't hold that up, nor be taken for the file.
func TestVerifyOfAFileThatChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	e := &archive.Entry{Path: "file", Size: 7, Sum: deployments.DigestOf([]byte("content"))}
	for name, c := range map[string]struct {
		change func() error
		right  bool
	}{
		"untouched": {func() error { return os.WriteFile(path, []byte("content"), 0o600) }, true},
		"a pipe":    {func() error { return syscall.Mkfifo(path, 0o600) }, false},
		"a device":  {func() error { return os.Symlink("/dev/zero", path) }, false},
		"without end": {func() error {
			if err := os.WriteFile(path, []byte("content"), 0o600); err != nil {
				return err
			}
			return os.Truncate(path, 1<<43) // in place of one that is written all the while
		}, false},
	} {
		if err := errors.Join(os.Remove(path), c.change()); err != nil {
			t.Fatal(err)
		}
		v := &verifier{root: root, index: &archive.Index{Entries: []archive.Entry{*e}}, stats: make([]fileStat, 1),
			buffer: make([]byte, 64<<10)}
		sum, err := v.hash(ctx, 0, info)
		if (err == nil && sum == e.Sum) != c.right || ctx.Err() != nil {
			t.Errorf("%s: %v, %v", name, sum, err)
		}
	}
}

// A tree that came without an archive of kedge's serves as a base as well.
func TestAListOfHashesIsABase(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	list, err := indexOfTree(t.Context(), old.dir)
	if err != nil {
		t.Fatal(err)
	}
	got := t.TempDir()
	_, read := mustFetch(t, new.manifest, &base{dir: old.dir, index: list, digest: deployments.DigestOf(list)}, got)
	treetest.Same(t, got, new.dir)
	if read > new.manifest.Size*9/10 {
		t.Errorf("it took %d bytes of %d", read, new.manifest.Size)
	}
}

func TestPackRefuses(t *testing.T) {
	t.Parallel()
	for name, make := range map[string]func(dir string) error{
		"a link out of the tree":       func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "x")) },
		"a link above the tree":        func(dir string) error { return os.Symlink("../x", filepath.Join(dir, "x")) },
		"a link that might lead out":   func(dir string) error { return os.Symlink("a/../../x", filepath.Join(dir, "x")) },
		"a setuid file":                func(dir string) error { return setuid(filepath.Join(dir, "x")) },
		"a directory that isn't there": os.RemoveAll,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := make(dir); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			_, err := archive.Pack(t.Context(), dir, deployments.SymlinksInside, archive.CompressionDefault, &out, nil)
			if err == nil || !strings.Contains(err.Error(), dir) {
				t.Errorf("pack says %v", err)
			}
		})
	}
}

func setuid(path string) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	return os.Chmod(path, 0o755|fs.ModeSetuid)
}

func TestProgressEndsAtItsTotal(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	var last meter.Progress
	opt := StageOptions{Progress: func(p meter.Progress) { last = p }}
	if _, err := fetchIndexed(t.Context(), object.New(object.Config{}), new.manifest, old.asBase(old.dir), t.TempDir(), opt); err != nil {
		t.Fatal(err)
	}
	size := new.manifest.Deltas[0].Size
	if want := (meter.Progress{Phase: "fetch", Done: size, Total: size}); last != want {
		t.Errorf("the last report was %v, want %v", last, want)
	}
	if err := archive.MakeDelta(t.Context(), old.dir, old.index, new.dir, new.index, io.Discard,
		opt.Progress); err != nil {
		t.Fatal(err)
	}
	if last.Phase != "delta" || last.Done != last.Total || last.Total <= int64(len(new.index)) {
		t.Errorf("making a delta, the last report was %v", last)
	}
}
