package artifact

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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
	if err := makeDelta(t.Context(), one, old.index, two, new.index, &out, nil); err != nil {
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
		d, index, err := readDelta(bytes.NewReader(c.data), &raw, old.index)
		if c.ok {
			if err != nil || raw != 0 || !bytes.Equal(index, new.index) {
				t.Errorf("%s: %v", name, err)
			}
			d.Close()
		} else if !errors.Is(err, ErrDelta) {
			t.Errorf("%s: %v", name, err)
		}
		if raw != 1 {
			t.Errorf("%s: closed %d times", name, raw)
		}
		// A manifest may name it all the same: the archive has everything.
		blob := deployments.Blob{URL: "file://" + filepath.Join(t.TempDir(), "delta"), Size: int64(len(c.data)), SHA256: deployments.DigestOf(c.data)}
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

// opsOf gives ops: seek, add and extra of each.
func opsOf(ops ...int64) (out []byte) {
	for i, n := range ops {
		if i%3 == 0 {
			out = binary.AppendVarint(out, n)
		} else {
			out = binary.AppendUvarint(out, uint64(n))
		}
	}
	return out
}

// A patch that does not fit is passed over; one that isn't whole is the delta's end. Neither makes anything.
func TestHostilePatches(t *testing.T) {
	t.Parallel()
	old := []byte("0123456789")
	three := []byte{3, 0}
	type patch struct {
		ops, runs, differ, extra []byte
		makes                    string
		err                      error
	}
	for name, c := range map[string]patch{
		"old bytes":                  {opsOf(2, 3, 0), three, nil, nil, "234", nil},
		"to the end":                 {opsOf(7, 3, 0), three, nil, nil, "789", nil},
		"back again":                 {opsOf(1, 2, 0, -3, 1, 0), three, nil, nil, "120", nil},
		"changed bytes":              {opsOf(0, 3, 0), []byte{1, 1, 1, 0}, []byte{1}, nil, "022", nil},
		"new bytes":                  {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("ab"), "0ab", nil},
		"before the file":            {opsOf(-1, 3, 0), three, nil, nil, "", errMisfit},
		"behind the file":            {opsOf(8, 3, 0), three, nil, nil, "", errMisfit},
		"far behind":                 {opsOf(math.MaxInt64, 3, 0), three, nil, nil, "", errMisfit},
		"far before":                 {opsOf(math.MinInt64, 3, 0), three, nil, nil, "", errMisfit},
		"far behind what was read":   {opsOf(1, 2, 0, math.MaxInt64, 1, 0), three, nil, nil, "", errMisfit},
		"an op of nothing":           {opsOf(0, 0, 0, 0, 3, 0), three, nil, nil, "", errMisfit},
		"an op of too much":          {opsOf(0, 4, 0), []byte{4, 0}, nil, nil, "", errMisfit},
		"an op of too much new":      {opsOf(0, 2, 2), []byte{2, 0}, nil, []byte("ab"), "", errMisfit},
		"no op":                      {nil, three, nil, nil, "", errMisfit},
		"half an op":                 {opsOf(0, 3, 0)[:2], three, nil, nil, "", errMisfit},
		"an op too many":             {opsOf(0, 3, 0, 0, 1, 0), three, nil, nil, "", errMisfit},
		"a run of nothing":           {opsOf(0, 3, 0), []byte{0, 0, 3, 0}, nil, nil, "", errMisfit},
		"no run":                     {opsOf(0, 3, 0), nil, nil, nil, "", errMisfit},
		"a run of too much":          {opsOf(0, 3, 0), []byte{4, 0}, nil, nil, "", errMisfit},
		"a run too many":             {opsOf(0, 3, 0), []byte{3, 0, 1, 0}, nil, nil, "", errMisfit},
		"too few changes":            {opsOf(0, 3, 0), []byte{0, 3}, []byte{1, 1}, nil, "", errMisfit},
		"too many changes":           {opsOf(0, 3, 0), []byte{2, 1}, []byte{1, 1}, nil, "", errMisfit},
		"too few new":                {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("a"), "", errMisfit},
		"too many new":               {opsOf(0, 1, 2), []byte{1, 0}, nil, []byte("abc"), "", errMisfit},
		"more new than the file has": {opsOf(0, 3, 0), three, nil, []byte("abcd"), "", ErrDelta},
		"more changes than that":     {opsOf(0, 3, 0), three, []byte("abcd"), nil, "", ErrDelta},
		"more ops than may be":       {make([]byte, 36), three, nil, nil, "", ErrDelta},
		"more runs than may be":      {opsOf(0, 3, 0), make([]byte, 39), nil, nil, "", ErrDelta},
	} {
		var data []byte
		for _, part := range [][]byte{c.ops, c.runs, c.differ, c.extra} {
			data = binary.AppendUvarint(data, uint64(len(part)))
		}
		data = slices.Concat(data, c.ops, c.runs, c.differ, c.extra)
		d := newPlainDelta(append(data, "rest"...))
		var out bytes.Buffer
		if err := d.apply(bytes.NewReader(old), int64(len(old)), &out, 3); !errors.Is(err, c.err) || out.String() != c.makes {
			t.Errorf("%s: it makes %q, %v", name, out.String(), err)
		}
		if rest, _ := io.ReadAll(d.stream); c.err != ErrDelta && string(rest) != "rest" {
			t.Errorf("%s: %q is left to read", name, rest)
		}
		for n := range data {
			out.Reset()
			if err := newPlainDelta(data[:n]).apply(bytes.NewReader(old), int64(len(old)), &out, 3); !errors.Is(err, ErrDelta) || out.Len() > 0 {
				t.Errorf("%s, cut at %d: it makes %q, %v", name, n, out.String(), err)
			}
		}
	}
}

// A file that is shorter than it was said to be is one that a patch does not fit.
func TestPatchOfAShorterFile(t *testing.T) {
	t.Parallel()
	old := treetest.Random(1, 1<<20)
	new := slices.Concat(old[700_000:], old[:700_000]) // forwards and back
	patch := appendPatch(nil, newMatcher(old), old, new)
	for _, left := range []int{len(old), len(old) - 1, 300_000, 0} {
		var out bytes.Buffer
		err := newPlainDelta(patch).apply(bytes.NewReader(old[:left]), int64(len(old)), &out, int64(len(new)))
		if whole := left == len(old); whole && (err != nil || !bytes.Equal(out.Bytes(), new)) || !whole && !errors.Is(err, errMisfit) {
			t.Errorf("with %d bytes of %d: %v", left, len(old), err)
		}
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
		if err := makeDelta(t.Context(), one, old.index, two, new.index, io.Discard, nil); !errors.Is(err, deployments.ErrDigest) {
			t.Errorf("the %s one: %v", changed, err)
		}
	}
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
		raw = appendPatch(raw, newMatcher(old.index), old.index, new.index)
		last := -1
		for _, i := range c.files {
			raw = binary.AppendUvarint(raw, uint64(i-last))
			raw = append(raw, 0) // of no old file
			raw = appendPatch(raw, newMatcher(nil), nil, []byte(contents[i]))
			last = i
		}
		data := slices.Concat([]byte(deltaMagic), digestSlice(old.index), digestSlice(new.index), zst(t, append(raw, 0)))
		path := filepath.Join(t.TempDir(), "delta")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		blob := deployments.Blob{URL: "file://" + path, Size: int64(len(data)), SHA256: deployments.DigestOf(data)}
		new.manifest.Deltas = []deployments.Delta{{From: deployments.DigestOf(old.index), Blob: blob}}
		got := t.TempDir()
		if requests, _ := mustFetch(t, new.manifest, old.asBase(one), got); (requests == 1) != c.ok {
			t.Errorf("%s: it took %d requests", name, requests)
		}
		treetest.Same(t, got, two)
	}
}
