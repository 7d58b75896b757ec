package archive

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
func goodIndex() *Index {
	sum := deployments.DigestOf([]byte("x"))
	return &Index{Archive: true,
		Entries: []Entry{
			{Path: "d", Kind: Dir, Mode: 0o755},
			{Path: "d/f", Mode: 0o644, Size: 1, Sum: sum, Offset: 1024},
			{Path: "d/l", Kind: Symlink, Mode: 0o777, Target: "../d/f"},
			{Path: "d.x", Kind: Hardlink, Mode: 0o644, Original: 1},
		},
		Frames: []Frame{{Size: 60, Length: 4096, Sum: sum}},
	}
}

// hashedFrame gives frames, of which one has a hash of its content.
func hashedFrame(at, length int64) []Frame {
	sum := deployments.DigestOf([]byte("x"))
	return []Frame{{Size: 60, Length: at, Sum: sum}, {Size: 10, Length: length, Sum: sum, Content: sum},
		{Size: 60, Length: 4096, Sum: sum}}
}

func TestIndexIsReadAsWritten(t *testing.T) {
	t.Parallel()
	data := goodIndex().Encode()
	x, err := DecodeIndex(data)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(x.Encode(), data) {
		t.Error("encoding what was decoded gives other bytes")
	}
}

// An index is refused before anything is made of it, whatever is wrong with it.
func TestHostileIndexes(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(x *Index){
		"a path above the tree":                func(x *Index) { x.Entries[1].Path = "d/.." },
		"an absolute path":                     func(x *Index) { x.Entries[0].Path = "/d" },
		"a path that is not clean":             func(x *Index) { x.Entries[1].Path = "d//f" },
		"a path with a zero byte":              func(x *Index) { x.Entries[1].Path = "d/\x00" },
		"a name that is too long":              func(x *Index) { x.Entries[1].Path = "d/" + strings.Repeat("f", 256) },
		"an empty path":                        func(x *Index) { x.Entries[0].Path = "" },
		"a path twice":                         func(x *Index) { x.Entries[2].Path = "d/f" },
		"paths out of order":                   func(x *Index) { x.Entries[3].Path = "a" },
		"a file in a file":                     func(x *Index) { x.Entries[2].Path = "d/f/g" },
		"a file in a link":                     func(x *Index) { x.Entries[3].Path = "d/l/f" },
		"a file in a directory that isn't one": func(x *Index) { x.Entries[3].Path = "e/f" },
		"an absolute link":                     func(x *Index) { x.Entries[2].Target = "/etc/passwd" },
		"a link above the tree":                func(x *Index) { x.Entries[2].Target = "../../etc" },
		"a link that might lead above it":      func(x *Index) { x.Entries[2].Target = "m/../../../etc" },
		"a link to nothing":                    func(x *Index) { x.Entries[2].Target = "" },
		"a link by a detour":                   func(x *Index) { x.Entries[2].Target = "m/../f" },
		"a link with a zero byte":              func(x *Index) { x.Entries[2].Target = "f\x00" },
		"a link that is too long":              func(x *Index) { x.Entries[2].Target = strings.Repeat("f/", maxPath/2) },
		"a path that is too long": func(x *Index) {
			x.Entries = nil
			for n := range 17 {
				x.Entries = append(x.Entries, Entry{Path: strings.Repeat("/"+treetest.Long("d", 250), n+1)[1:], Kind: Dir})
			}
		},
		"a hard link to a directory":     func(x *Index) { x.Entries[3].Original = 0 },
		"a sticky file":                  func(x *Index) { x.Entries[1].Mode |= fs.ModeSticky },
		"a setgid file":                  func(x *Index) { x.Entries[1].Mode |= fs.ModeSetgid },
		"a hard link to itself":          func(x *Index) { x.Entries[3].Original = 3 },
		"an unknown kind":                func(x *Index) { x.Entries[2].Kind = Hardlink + 1 },
		"a hard link to a symbolic link": func(x *Index) { x.Entries[3].Original = 2 },
		"content behind the last frame":  func(x *Index) { x.Entries[1].Size = 4096 - 1024 + 1 },
		"a frame that decodes to nothing": func(x *Index) {
			x.Frames = append(x.Frames,
				Frame{Size: 60, Sum: x.Frames[0].Sum})
		},
		"more content than can be": func(x *Index) { x.Entries[1].Size = maxTree + 1 },
		"more content than can be, together": func(x *Index) {
			x.Archive, x.Frames = false, nil
			x.Entries[1].Size = maxTree
			x.Entries[2] = Entry{Path: "d/g", Size: 1}
		},
		"a frame that decodes to too much":    func(x *Index) { x.Frames[0].Length = MaxFrame + 1 },
		"a frame without bytes":               func(x *Index) { x.Frames[0].Size = 0 },
		"a frame that grows on decoding less": func(x *Index) { x.Frames[0].Size = 1 << 30 },
		"frames without an archive":           func(x *Index) { x.Archive = false },
		"a hash of more than a file":          func(x *Index) { x.Frames[0].Content = x.Frames[0].Sum },
		"a hash that begins before a file":    func(x *Index) { x.Frames = hashedFrame(1023, 2) },
		"a hash that ends behind a file":      func(x *Index) { x.Frames = hashedFrame(1024, 2) },
		"a hash of what is behind all files":  func(x *Index) { x.Frames = hashedFrame(1025, 1) },
	} {
		x := goodIndex()
		spoil(x)
		decoded, err := DecodeIndex(x.Encode())
		if err == nil {
			if decoded.CheckTargets(deployments.SymlinksAny) != nil || !strings.Contains(name, "link") {
				t.Errorf("%s: accepted", name)
			}
			err = decoded.CheckTargets(deployments.SymlinksInside)
		} else if !errors.Is(err, ErrIndex) {
			t.Errorf("%s: %v, want ErrIndex", name, err)
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	good := goodIndex()
	good.Frames = hashedFrame(1024, 1)
	data := good.Encode()
	if _, err := DecodeIndex(data); err != nil {
		t.Errorf("with a hash of a file: %v", err)
	}
	for n := range data {
		if _, err := DecodeIndex(data[:n]); !errors.Is(err, ErrIndex) {
			t.Errorf("cut after %d bytes: %v, want ErrIndex", n, err)
		}
	}
	if _, err := DecodeIndex(append(data, 0)); !errors.Is(err, ErrIndex) {
		t.Error("a byte too many is accepted")
	}
	if _, err := DecodeIndex(bytes.Replace(data, []byte("\x01\x02/f"), []byte("\x00\x03d/f"), 1)); !errors.Is(err,
		ErrIndex) {
		t.Error("a path that is written out where it shares its beginning is accepted")
	}
	// What encode doesn't write: modes with set-user-id, and more.
	for _, mode := range []string{"\x80\x10", "\x80\x20", "\xff\xff\x03"} {
		// The file's entry, up to its mode.
		_, err := DecodeIndex(bytes.Replace(data, []byte("/f\xa4\x03"), []byte("/f"+mode), 1))
		if !errors.Is(err, ErrIndex) || !strings.Contains(err.Error(), "larger than allowed") {
			t.Errorf("the mode %x: %v", mode, err)
		}
	}
	// An empty file lies nowhere.
	empty := (&Index{Archive: true, Entries: []Entry{{Path: "e", Sum: EmptyDigest}}, Frames: goodIndex().Frames}).Encode()
	gap := bytes.Index(empty, EmptyDigest[:]) + len(EmptyDigest)
	if _, err := DecodeIndex(empty); err != nil {
		t.Error(err)
	}
	empty[gap] = 1
	if _, err := DecodeIndex(empty); !errors.Is(err, ErrIndex) {
		t.Error("an empty file that lies somewhere is accepted")
	}
	// A frame whose content has a hash has one.
	x := goodIndex()
	x.Frames[0].Content = deployments.DigestOf([]byte("content"))
	unknown := bytes.Replace(x.Encode(), x.Frames[0].Content[:], make([]byte, 32), 1)
	if _, err := DecodeIndex(unknown); !errors.Is(err, ErrIndex) {
		t.Error("a hash of zeros is accepted")
	}
	// Gaps that come to 2^64: where the files lie must not wrap around.
	x = &Index{Archive: true, Frames: goodIndex().Frames}
	var end int64
	for i := range 1 << 18 {
		x.Entries = append(x.Entries, Entry{Path: fmt.Sprintf("%06d", i), Size: 1, Offset: end + maxTree - 1})
		end += maxTree
	}
	if _, err := DecodeIndex(x.Encode()); end != 0 || !errors.Is(err, ErrIndex) {
		t.Errorf("offsets that wrap around to %d: %v", end, err)
	}
	// A number of more than 64 bits, where the number of entries should be.
	if _, err := DecodeIndex(slices.Concat([]byte(indexMagic+"\x01"), bytes.Repeat([]byte{0xff}, 10),
		data)); !errors.Is(err, ErrIndex) {
		t.Error("a number of eleven bytes is accepted")
	}
	// One number has one encoding.
	if _, err := DecodeIndex(bytes.Replace(data, []byte(indexMagic+"\x01\x04"), []byte(indexMagic+"\x01\x84\x00"),
		1)); !errors.Is(err, ErrIndex) {
		t.Error("a number that is longer than it need be is accepted")
	}
}

// An index is given memory for what it holds, not for what it promises.
func TestAnIndexTakesMemoryForItsLength(t *testing.T) {
	refused := func(name string, data []byte, most uint64) {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := DecodeIndex(data)
		runtime.ReadMemStats(&after)
		if took := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, ErrIndex) || took > most {
			t.Errorf("%s: an index of %d bytes took %d: %v", name, len(data), took, err)
		}
	}
	refused("four million entries", append([]byte(indexMagic), 1, 0xff, 0xff, 0xff, 0x01, 0), 1<<20)
	refused("two million frames", append([]byte(indexMagic), 1, 0, 0xff, 0xff, 0x7f), 1<<20)
	// Short entries can stand for long paths: an index of 400 kB for 230 MB of them.
	x := &Index{}
	p := ""
	for i := range 15 {
		if i > 0 {
			p += "/"
		}
		p += treetest.Long("d", 250)
		x.Entries = append(x.Entries, Entry{Path: p, Kind: Dir, Mode: 0o755})
	}
	for i := range 60_000 {
		x.Entries = append(x.Entries, Entry{Path: fmt.Sprintf("%s/%06d", p, i), Kind: Dir, Mode: 0o755})
	}
	refused("long paths", x.Encode(), 192<<20)
}

func FuzzIndex(f *testing.F) {
	f.Add(goodIndex().Encode())
	f.Add((&Index{}).Encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		var x *Index
		var err error
		fuzzlimit.Run(t, data, func() { x, err = DecodeIndex(data) })
		if err != nil {
			return
		}
		if !bytes.Equal(x.Encode(), data) {
			t.Error("an index has two encodings")
		}
		for i := range x.Entries {
			e := &x.Entries[i]
			from, to := x.FramesOf(e)
			if x.Archive && (from < 0 || to > len(x.Frames) || from > to) {
				t.Errorf("entry %d lies in frames %d to %d of %d", i, from, to, len(x.Frames))
			}
			if x.Find(e.Path) != i {
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
	return d.Apply(bytes.NewReader(old), int64(len(old)), w, int64(size))
}

func newPlainDelta(patch []byte) *Delta {
	return &Delta{stream: bufio.NewReader(bytes.NewReader(patch))}
}

// Where the directory of a path has been checked, its name is checked as CheckPath does the whole path.
func TestPathsBelowDirectories(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("d", 200)
	var parents []string
	for n := range MaxLevels + 1 {
		parents = append(parents, strings.Repeat("d/", n)+"d")
	}
	for n := range maxPath / len(long) {
		parents = append(parents, strings.Repeat(long+"/", n)+long)
	}
	names := []string{"f", ".f", "...", ".", "..", "", "/f", "f/", "f\x00", "g/f", strings.Repeat("f", maxName),
		strings.Repeat("f", maxName+1)}
	for _, parent := range parents {
		var entries []Entry
		for i, c := range parent {
			if c == '/' {
				entries = append(entries, Entry{Path: parent[:i], Kind: Dir, Mode: 0o755})
			}
		}
		entries = append(entries, Entry{Path: parent, Kind: Dir, Mode: 0o755})
		for _, name := range names {
			p := parent + "/" + name
			x := &Index{Entries: append(slices.Clone(entries), Entry{Path: p, Sum: EmptyDigest, Mode: 0o644})}
			want := CheckPath(p) == nil && CheckPath(parent) == nil && name != "g/f"
			if _, err := DecodeIndex(x.Encode()); (err == nil) != want {
				t.Errorf("%q in a directory %d levels and %d bytes deep: %v, want it allowed: %v", clip(name),
					strings.Count(p, "/"), len(parent), err, want)
			}
		}
	}
}
