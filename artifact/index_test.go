package artifact

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"runtime"
	"slices"
	"strings"
	"testing"

	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/fuzzlimit"
)

// goodIndex is small, and valid.
func goodIndex() *index {
	sum := deployments.DigestOf([]byte("x"))
	return &index{archive: true,
		entries: []entry{
			{path: "d", kind: kindDir, mode: 0o755},
			{path: "d/f", mode: 0o644, size: 1, sum: sum, offset: 1024},
			{path: "d/l", kind: kindSymlink, mode: 0o777, target: "../d/f"},
			{path: "d.x", kind: kindHardlink, mode: 0o644, original: 1},
		},
		frames: []frame{{size: 60, length: 4096, sum: sum}},
	}
}

// hashedFrame gives frames, of which one has a hash of its content.
func hashedFrame(at, length int64) []frame {
	sum := deployments.DigestOf([]byte("x"))
	return []frame{{size: 60, length: at, sum: sum}, {size: 10, length: length, sum: sum, content: sum}, {size: 60, length: 4096, sum: sum}}
}

func TestIndexIsReadAsWritten(t *testing.T) {
	t.Parallel()
	data := goodIndex().encode()
	x, err := decodeIndex(data)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x.encode(), data) {
		t.Error("encoding what was decoded gives other bytes")
	}
}

// An index is refused before anything is made of it, whatever is wrong with it.
func TestHostileIndexes(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(x *index){
		"a path above the tree":                func(x *index) { x.entries[1].path = "d/.." },
		"an absolute path":                     func(x *index) { x.entries[0].path = "/d" },
		"a path that is not clean":             func(x *index) { x.entries[1].path = "d//f" },
		"a path with a zero byte":              func(x *index) { x.entries[1].path = "d/\x00" },
		"a name that is too long":              func(x *index) { x.entries[1].path = "d/" + strings.Repeat("f", 256) },
		"an empty path":                        func(x *index) { x.entries[0].path = "" },
		"a path twice":                         func(x *index) { x.entries[2].path = "d/f" },
		"paths out of order":                   func(x *index) { x.entries[3].path = "a" },
		"a file in a file":                     func(x *index) { x.entries[2].path = "d/f/g" },
		"a file in a link":                     func(x *index) { x.entries[3].path = "d/l/f" },
		"a file in a directory that isn't one": func(x *index) { x.entries[3].path = "e/f" },
		"an absolute link":                     func(x *index) { x.entries[2].target = "/etc/passwd" },
		"a link above the tree":                func(x *index) { x.entries[2].target = "../../etc" },
		"a link that might lead above it":      func(x *index) { x.entries[2].target = "m/../../../etc" },
		"a link to nothing":                    func(x *index) { x.entries[2].target = "" },
		"a link by a detour":                   func(x *index) { x.entries[2].target = "m/../f" },
		"a link with a zero byte":              func(x *index) { x.entries[2].target = "f\x00" },
		"a link that is too long":              func(x *index) { x.entries[2].target = strings.Repeat("f/", maxPath/2) },
		"a path that is too long": func(x *index) {
			x.entries = nil
			for n := range 17 {
				x.entries = append(x.entries, entry{path: strings.Repeat("/"+treetest.Long("d", 250), n+1)[1:], kind: kindDir})
			}
		},
		"a hard link to a directory":      func(x *index) { x.entries[3].original = 0 },
		"a sticky file":                   func(x *index) { x.entries[1].mode |= fs.ModeSticky },
		"a setgid file":                   func(x *index) { x.entries[1].mode |= fs.ModeSetgid },
		"a hard link to itself":           func(x *index) { x.entries[3].original = 3 },
		"an unknown kind":                 func(x *index) { x.entries[2].kind = kindHardlink + 1 },
		"a hard link to a symbolic link":  func(x *index) { x.entries[3].original = 2 },
		"content behind the last frame":   func(x *index) { x.entries[1].size = 4096 - 1024 + 1 },
		"a frame that decodes to nothing": func(x *index) { x.frames = append(x.frames, frame{size: 60, sum: x.frames[0].sum}) },
		"more content than can be":        func(x *index) { x.entries[1].size = maxTree + 1 },
		"more content than can be, together": func(x *index) {
			x.archive, x.frames = false, nil
			x.entries[1].size = maxTree
			x.entries[2] = entry{path: "d/g", size: 1}
		},
		"a frame that decodes to too much":    func(x *index) { x.frames[0].length = maxFrame + 1 },
		"a frame without bytes":               func(x *index) { x.frames[0].size = 0 },
		"a frame that grows on decoding less": func(x *index) { x.frames[0].size = 1 << 30 },
		"frames without an archive":           func(x *index) { x.archive = false },
		"a hash of more than a file":          func(x *index) { x.frames[0].content = x.frames[0].sum },
		"a hash that begins before a file":    func(x *index) { x.frames = hashedFrame(1023, 2) },
		"a hash that ends behind a file":      func(x *index) { x.frames = hashedFrame(1024, 2) },
		"a hash of what is behind all files":  func(x *index) { x.frames = hashedFrame(1025, 1) },
	} {
		x := goodIndex()
		spoil(x)
		decoded, err := decodeIndex(x.encode())
		if err == nil {
			if decoded.checkTargets(deployments.SymlinksAny) != nil || !strings.Contains(name, "link") {
				t.Errorf("%s: accepted", name)
			}
			err = decoded.checkTargets(deployments.SymlinksInside)
		} else if !errors.Is(err, ErrIndex) {
			t.Errorf("%s: %v, want ErrIndex", name, err)
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	good := goodIndex()
	good.frames = hashedFrame(1024, 1)
	data := good.encode()
	if _, err := decodeIndex(data); err != nil {
		t.Errorf("with a hash of a file: %v", err)
	}
	for n := range data {
		if _, err := decodeIndex(data[:n]); !errors.Is(err, ErrIndex) {
			t.Errorf("cut after %d bytes: %v, want ErrIndex", n, err)
		}
	}
	if _, err := decodeIndex(append(data, 0)); !errors.Is(err, ErrIndex) {
		t.Error("a byte too many is accepted")
	}
	if _, err := decodeIndex(bytes.Replace(data, []byte("\x01\x02/f"), []byte("\x00\x03d/f"), 1)); !errors.Is(err, ErrIndex) {
		t.Error("a path that is written out where it shares its beginning is accepted")
	}
	// What encode doesn't write: modes with set-user-id, and more.
	for _, mode := range []string{"\x80\x10", "\x80\x20", "\xff\xff\x03"} {
		// The file's entry, up to its mode.
		_, err := decodeIndex(bytes.Replace(data, []byte("/f\xa4\x03"), []byte("/f"+mode), 1))
		if !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), "larger than allowed") {
			t.Errorf("the mode %x: %v", mode, err)
		}
	}
	// An empty file lies nowhere.
	empty := (&index{archive: true, entries: []entry{{path: "e", sum: emptyDigest}}, frames: goodIndex().frames}).encode()
	gap := bytes.Index(empty, emptyDigest[:]) + len(emptyDigest)
	if _, err := decodeIndex(empty); err != nil {
		t.Error(err)
	}
	empty[gap] = 1
	if _, err := decodeIndex(empty); !errors.Is(err, ErrIndex) {
		t.Error("an empty file that lies somewhere is accepted")
	}
	// A frame whose content has a hash has one.
	x := goodIndex()
	x.frames[0].content = deployments.DigestOf([]byte("content"))
	unknown := bytes.Replace(x.encode(), x.frames[0].content[:], make([]byte, 32), 1)
	if _, err := decodeIndex(unknown); !errors.Is(err, ErrIndex) {
		t.Error("a hash of zeros is accepted")
	}
	// Gaps that come to 2^64: where the files lie must not wrap around.
	x = &index{archive: true, frames: goodIndex().frames}
	var end int64
	for i := range 1 << 18 {
		x.entries = append(x.entries, entry{path: fmt.Sprintf("%06d", i), size: 1, offset: end + maxTree - 1})
		end += maxTree
	}
	if _, err := decodeIndex(x.encode()); end != 0 || !errors.Is(err, ErrIndex) {
		t.Errorf("offsets that wrap around to %d: %v", end, err)
	}
	// A number of more than 64 bits, where the number of entries should be.
	if _, err := decodeIndex(slices.Concat([]byte(indexMagic+"\x01"), bytes.Repeat([]byte{0xff}, 10), data)); !errors.Is(err, ErrIndex) {
		t.Error("a number of eleven bytes is accepted")
	}
	// One number has one encoding.
	if _, err := decodeIndex(bytes.Replace(data, []byte(indexMagic+"\x01\x04"), []byte(indexMagic+"\x01\x84\x00"), 1)); !errors.Is(err, ErrIndex) {
		t.Error("a number that is longer than it need be is accepted")
	}
}

// An index is given memory for what it holds, not for what it promises.
func TestAnIndexTakesMemoryForItsLength(t *testing.T) {
	refused := func(name string, data []byte, most uint64) {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := decodeIndex(data)
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ErrIndex) || took > most {
			t.Errorf("%s: an index of %d bytes took %d: %v", name, len(data), took, err)
		}
	}
	refused("four million entries", append([]byte(indexMagic), 1, 0xff, 0xff, 0xff, 0x01, 0), 1<<20)
	refused("two million frames", append([]byte(indexMagic), 1, 0, 0xff, 0xff, 0x7f), 1<<20)
	// Short entries can stand for long paths: an index of 400 kB for 230 MB of them.
	x := &index{}
	p := ""
	for i := range 15 {
		if i > 0 {
			p += "/"
		}
		p += treetest.Long("d", 250)
		x.entries = append(x.entries, entry{path: p, kind: kindDir, mode: 0o755})
	}
	for i := range 60_000 {
		x.entries = append(x.entries, entry{path: fmt.Sprintf("%s/%06d", p, i), kind: kindDir, mode: 0o755})
	}
	refused("long paths", x.encode(), 192<<20)
}

func FuzzIndex(f *testing.F) {
	f.Add(goodIndex().encode())
	f.Add((&index{}).encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		var x *index
		var err error
		fuzzlimit.Run(t, data, func() { x, err = decodeIndex(data) })
		if err != nil {
			return
		}
		if !bytes.Equal(x.encode(), data) {
			t.Error("an index has two encodings")
		}
		for i := range x.entries {
			e := &x.entries[i]
			from, to := x.framesOf(e)
			if x.archive && (from < 0 || to > len(x.frames) || from > to) {
				t.Errorf("entry %d lies in frames %d to %d of %d", i, from, to, len(x.frames))
			}
			if x.find(e.path) != i {
				t.Errorf("entry %d is not found", i)
			}
		}
	})
}

// FuzzDelta reads hostile deltas: they fail or make something, in bounded memory, and never panic.
func FuzzDelta(f *testing.F) {
	old := []byte(treetest.Prose(1, 3000))
	new := append(old[:1000:1000], treetest.Prose(2, 500)...)
	new = append(new, old[1200:]...)
	patch := appendPatch(nil, newMatcher(old), old, new)
	f.Add(old, patch, len(new))
	f.Add([]byte{}, []byte{}, 0)
	f.Fuzz(func(t *testing.T, old, patch []byte, size int) {
		if size < 0 || size > 1<<20 {
			return
		}
		var out bytes.Buffer
		var err error
		fuzzlimit.Run(t, patch, func() { err = applyPatch(patch, old, &out, size) })
		if err == nil && out.Len() != size {
			t.Errorf("a patch made %d bytes of %d", out.Len(), size)
		}
	})
}

// FuzzPatch checks that a patch of any two files makes the one of the other.
func FuzzPatch(f *testing.F) {
	f.Add([]byte("a"), []byte("b"))
	f.Add([]byte(treetest.Prose(1, 5000)), []byte(treetest.Prose(1, 2000)+"x"+treetest.Prose(1, 5000)))
	f.Fuzz(func(t *testing.T, old, new []byte) {
		var out bytes.Buffer
		var err error
		fuzzlimit.Run(t, new, func() {
			err = applyPatch(appendPatch(nil, newMatcher(old), old, new), old, &out, len(new))
		})
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(out.Bytes(), new) {
			t.Error("the patch makes another file")
		}
	})
}

func applyPatch(patch, old []byte, w io.Writer, size int) error {
	d := newPlainDelta(patch)
	return d.apply(bytes.NewReader(old), int64(len(old)), w, int64(size))
}

func newPlainDelta(patch []byte) *delta {
	return &delta{stream: bufio.NewReader(bytes.NewReader(patch))}
}

// Where the directory of a path has been checked, its name is checked as checkPath does the whole path.
func TestPathsBelowDirectories(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("d", 200)
	var parents []string
	for n := range maxLevels + 1 {
		parents = append(parents, strings.Repeat("d/", n)+"d")
	}
	for n := range maxPath / len(long) {
		parents = append(parents, strings.Repeat(long+"/", n)+long)
	}
	names := []string{"f", ".f", "...", ".", "..", "", "/f", "f/", "f\x00", "g/f", strings.Repeat("f", maxName),
		strings.Repeat("f", maxName+1)}
	for _, parent := range parents {
		var entries []entry
		for i, c := range parent {
			if c == '/' {
				entries = append(entries, entry{path: parent[:i], kind: kindDir, mode: 0o755})
			}
		}
		entries = append(entries, entry{path: parent, kind: kindDir, mode: 0o755})
		for _, name := range names {
			p := parent + "/" + name
			x := &index{entries: append(slices.Clone(entries), entry{path: p, sum: emptyDigest, mode: 0o644})}
			want := checkPath(p) == nil && checkPath(parent) == nil && name != "g/f"
			if _, err := decodeIndex(x.encode()); (err == nil) != want {
				t.Errorf("%q in a directory %d levels and %d bytes deep: %v, want it allowed: %v", clip(name),
					strings.Count(p, "/"), len(parent), err, want)
			}
		}
	}
}
