package artifact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kedge/artifact/archive"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// closed counts how often it was.
type closed int

func (c *closed) Close() error { *c++; return nil }

// A delta that is not from this index, or to the one it says, or that is cut, is none; what it was read from is closed.
func TestDeltaThatDoesNotBeginAsItShould(t *testing.T) {
	t.Parallel()
	one, two := t.TempDir(), t.TempDir()
	writeVersion(t, one, "1")
	writeVersion(t, two, "2")
	old, new := publishTree(t, one), publishTree(t, two)
	var out bytes.Buffer
	if err := archive.MakeDelta(t.Context(), one, old.index, two, new.index, &out, nil); err != nil {
		t.Fatal(err)
	}
	good := out.Bytes()
	flipped := func(at int) []byte {
		data := slices.Clone(good)
		data[at] ^= 1
		return data
	}
	for name, c := range map[string]struct {
		data []byte
		ok   bool
	}{
		"as it was made": {good, true}, "nothing": {nil, false}, "a cut header": {good[:71], false}, "a header alone": {good[:72], false},
		"a cut index": {good[:100], false}, "another magic": {flipped(3), false}, "from another": {flipped(8), false}, "to another": {flipped(71), false},
	} {
		var raw closed
		d, index, err := archive.ReadDelta(bytes.NewReader(c.data), &raw, old.index)
		if c.ok {
			if err != nil || raw != 0 || !bytes.Equal(index, new.index) {
				t.Errorf("%s: %v", name, err)
			}
			d.Close()
		} else if !errors.Is(err, archive.ErrDelta) {
			t.Errorf("%s: %v", name, err)
		}
		if raw != 1 {
			t.Errorf("%s: closed %d times", name, raw)
		}
		// A manifest may name it all the same: the archive has everything.
		blob := deployments.Blob{URL: "file://" + filepath.Join(t.TempDir(), "delta"), Size: int64(len(c.data)),
			SHA256: deployments.DigestOf(c.data)}
		if err := os.WriteFile(strings.TrimPrefix(blob.URL, "file://"), c.data, 0o600); err != nil {
			t.Fatal(err)
		}
		new.manifest.Deltas = []deployments.Delta{{From: deployments.DigestOf(old.index), Blob: blob}}
		got := t.TempDir()
		if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); (requests == 1) != c.ok {
			t.Errorf("%s: it took %d requests", name, requests)
		}
		treetest.Same(t, got, two)
	}
}

// A delta of more than a few MiB is kept in a file, and fetched after the index: then it is known whether there is
// room. It is trusted no sooner than a small one.
func TestALargeDelta(t *testing.T) {
	t.Parallel()
	old, new := largeDelta(t)
	one, two := old.dir, new.dir
	got := t.TempDir()
	if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); requests != 2 {
		t.Errorf("it took %d requests", requests)
	}
	treetest.Same(t, got, two)
	file := filepath.Join(new.store, "delta0")
	for name, damage := range map[string]func(){
		"changed": func() { flip(t, file, -1) },
		"cut":     func() { os.Truncate(file, deltaInMem) },
	} {
		damage()
		got := t.TempDir()
		if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); requests == 2 {
			t.Errorf("%s: it was used", name)
		}
		treetest.Same(t, got, two)
	}
}

// What was no plain file of the old release is not what a file of the new one is patched from.
func TestDeltaWhereKindsChange(t *testing.T) {
	t.Parallel()
	one, two, got := t.TempDir(), t.TempDir(), t.TempDir()
	data := treetest.Noise(1, 20_000)
	treetest.Tree{
		"a": {Mode: 0o644, Data: data}, "dir": {Mode: fs.ModeDir | 0o755}, "dir/file": {Mode: 0o644, Data: data + "1"},
		"hard": {Same: "a"}, "link": {Mode: fs.ModeSymlink, Target: "a"}, "none": {Mode: 0o644}, "plain": {Mode: 0o644,
			Data: "p"},
	}.Write(t, one)
	treetest.Tree{
		"a": {Mode: 0o644, Data: data + "2"}, "dir": {Mode: 0o644, Data: data + "3"}, "hard": {Mode: 0o644, Data: data + "4"},
		"link": {Mode: 0o644, Data: data + "5"}, "none": {Mode: 0o644, Data: data + "6"}, "plain": {Mode: fs.ModeSymlink,
			Target: "a"},
	}.Write(t, two)
	old := publishTree(t, one)
	new := publishTree(t, two, old)
	if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); requests != 1 {
		t.Errorf("it took %d requests", requests)
	}
	treetest.Same(t, got, two)
}

// A tree that isn't what its index says, before or after, is no tree to make a delta of.
func TestDeltaOfATreeThatChanged(t *testing.T) {
	t.Parallel()
	for _, changed := range []string{"old", "new"} {
		one, two := t.TempDir(), t.TempDir()
		writeVersion(t, one, "1")
		writeVersion(t, two, "2")
		old, new := publishTree(t, one), publishTree(t, two)
		flip(t, filepath.Join(map[string]string{"old": one, "new": two}[changed], "VERSION"), 0)
		if err := archive.MakeDelta(t.Context(), one, old.index, two, new.index, io.Discard, nil); !errors.Is(err,
			deployments.ErrDigest) {
			t.Errorf("the %s one: %v", changed, err)
		}
	}
}

// wholePatch is a patch that makes data, of at most 4 MiB, of nothing old.
func wholePatch(data []byte) (patch []byte) {
	if len(data) == 0 {
		return nil
	}
	ops := binary.AppendUvarint([]byte{0, 0}, uint64(len(data))) // seek 0, add 0, then the bytes
	for _, length := range []int{len(ops), 0, 0, len(data)} {
		patch = binary.AppendUvarint(patch, uint64(length))
	}
	return slices.Concat(patch, ops, data)
}

// A delta that makes what the old release has, or an empty file, is none of ours: two would write one file.
func TestDeltaOfWhatIsThere(t *testing.T) {
	t.Parallel()
	one, two := t.TempDir(), t.TempDir()
	treetest.Tree{"a": {Mode: 0o644, Data: "same"}, "b": {Mode: 0o644, Data: "1"}, "c": {Mode: 0o644}}.Write(t, one)
	treetest.Tree{"a": {Mode: 0o644, Data: "same"}, "b": {Mode: 0o644, Data: "2"}, "c": {Mode: 0o644}}.Write(t, two)
	old, new := publishTree(t, one), publishTree(t, two)
	contents := []string{"same", "2", ""}
	for name, c := range map[string]struct {
		files []int
		ok    bool
	}{
		"what changed": {[]int{1}, true}, "what the old release has": {[]int{0, 1}, false}, "all but what changed, which is empty": {[]int{2}, false},
	} {
		raw := binary.AppendUvarint(nil, uint64(len(new.index)))
		raw = append(raw, wholePatch(new.index)...)
		last := -1
		for _, i := range c.files {
			raw = binary.AppendUvarint(raw, uint64(i-last))
			raw = append(raw, 0) // of no old file
			raw = append(raw, wholePatch([]byte(contents[i]))...)
			last = i
		}
		from, to := deployments.DigestOf(old.index), deployments.DigestOf(new.index)
		data := slices.Concat([]byte("kedgedl\x01"), from[:], to[:], zst(t, append(raw, 0)))
		path := filepath.Join(t.TempDir(), "delta")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		blob := deployments.Blob{URL: "file://" + path, Size: int64(len(data)), SHA256: deployments.DigestOf(data)}
		new.manifest.Deltas = []deployments.Delta{{From: from, Blob: blob}}
		got := t.TempDir()
		if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); (requests == 1) != c.ok {
			t.Errorf("%s: it took %d requests", name, requests)
		}
		treetest.Same(t, got, two)
	}
}
