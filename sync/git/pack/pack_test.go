package pack

import (
	"bytes"
	"compress/zlib"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"kedge/sync/git/gittest"
)

// packed returns an object as stored in a pack: kind 3 is a blob, 6 a delta to the object that begins back bytes
// before it.
func packed(kind byte, size, back uint64, content io.Reader) io.Reader {
	var head []byte
	first := kind<<4 | byte(size&15)
	for size >>= 4; size > 0; size >>= 7 {
		head = append(head, first|0x80)
		first = byte(size & 0x7f)
	}
	head = append(head, first)
	if kind == 6 {
		head = append(head, byte(back)) // fewer than 128
	}
	r, w := io.Pipe()
	go func() {
		z := zlib.NewWriter(w)
		_, err := io.Copy(z, content)
		w.CloseWithError(errors.Join(err, z.Close()))
	}()
	return io.MultiReader(bytes.NewReader(head), r)
}

func testPack(t *testing.T, count uint32, objects ...io.Reader) io.Reader {
	t.Helper()
	raw := binary.BigEndian.AppendUint32([]byte("PACK\x00\x00\x00\x02"), count)
	for _, o := range objects {
		data, err := io.ReadAll(o)
		if err != nil {
			t.Fatal(err)
		}
		raw = append(raw, data...)
	}
	sum := sha1.Sum(raw)
	return bytes.NewReader(append(raw, sum[:]...))
}

// objectsOf reads a pack with its own bounds, and returns the objects of the index.
func objectsOf(t *testing.T, r io.Reader, most int64, memory int) ([]indexed, error) {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	x := &indexer{maxObject: most, memory: memory, progress: io.Discard, file: file}
	err = x.read(t.Context(), r)
	return slices.DeleteFunc(x.objects, func(o indexed) bool { return o.hash.IsZero() || o.leftOut }), err
}

// Large files, and deltas to them, are left out; an invalid pack is refused.
func TestPacks(t *testing.T) {
	t.Parallel()
	const most = 1000
	blob := func(size int) io.Reader {
		return packed(3, uint64(size), 0, strings.NewReader(strings.Repeat("x", size)))
	}
	sizeOf := func(r io.Reader) uint64 {
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		return uint64(len(data))
	}
	// of returns a delta that copies the first ten bytes of a base, more times, into an object of target bytes.
	of := func(base, target uint64, more int, back uint64) io.Reader {
		d := binary.AppendUvarint(binary.AppendUvarint(nil, base), target)
		d = append(d, bytes.Repeat([]byte{0x90, 10}, more)...)
		return packed(6, uint64(len(d)), back, bytes.NewReader(d))
	}
	small, large := sizeOf(blob(10)), sizeOf(blob(most+1))
	delta := func(target uint64, more int) io.Reader { return of(10, target, more, small) }
	raw := func(d ...byte) io.Reader { return packed(6, uint64(len(d)), small, bytes.NewReader(d)) }
	tooLarge := &ObjectTooLarge{}
	for name, c := range map[string]struct {
		pack io.Reader
		want int // objects of the index; -1: an error
	}{
		"nothing":                        {testPack(t, 0), 0},
		"objects that fit":               {testPack(t, 3, blob(0), blob(most), blob(1)), 3},
		"one byte too many":              {testPack(t, 2, blob(1), blob(most+1)), 1},
		"a delta that fits":              {testPack(t, 2, blob(10), delta(most, 100)), 2},
		"a delta to what is too large":   {testPack(t, 2, blob(10), delta(most+10, 101)), 1},
		"a delta to what is far more":    {testPack(t, 2, blob(10), delta(1<<62, 1)), 1},
		"a delta that is itself too big": {testPack(t, 2, blob(10), delta(10, most)), 1},
		"a small file of a large one":    {testPack(t, 2, blob(most+1), of(most+1, 10, 1, large)), 0},
		"a delta of a delta left out": {testPack(t, 3, blob(10), delta(most+10, 101),
			of(most+10, 10, 1, sizeOf(delta(most+10, 101)))), 1},
		"a directory that is too large":   {testPack(t, 1, packed(2, most+1, 0, strings.NewReader(strings.Repeat("x", most+1)))), -2},
		"a delta to such a directory":     {testPack(t, 2, packed(2, 10, 0, strings.NewReader("xxxxxxxxxx")), delta(most+10, 101)), -2},
		"a delta without sizes":           {testPack(t, 2, blob(10), raw()), -1},
		"a delta without a target":        {testPack(t, 2, blob(10), raw(10)), -1},
		"a delta's endless size":          {testPack(t, 2, blob(10), raw(bytes.Repeat([]byte{0x80}, 50)...)), -1},
		"a delta that makes less":         {testPack(t, 2, blob(10), delta(most, 99)), -1},
		"a delta to nothing":              {testPack(t, 2, blob(10), of(10, 10, 1, small-1)), -1},
		"a kind that there isn't":         {testPack(t, 1, packed(5, 1, 0, strings.NewReader("x"))), -1},
		"less than a delta says":          {testPack(t, 2, blob(10), packed(6, 50, small, strings.NewReader("\x0a\x0a\x90\x0a"))), -1},
		"fewer objects than it says":      {testPack(t, 3, blob(1)), -1},
		"more than it says":               {testPack(t, 1, blob(1), blob(most+1)), -1},
		"more than an object says":        {testPack(t, 1, packed(3, 5, 0, strings.NewReader("0123456789"))), -1},
		"less than an object says":        {testPack(t, 1, packed(3, 50, 0, strings.NewReader("0123456789"))), -1},
		"more objects than anybody would": {strings.NewReader("PACK\x00\x00\x00\x02\xff\xff\xff\xff"), -1},
		"no pack":                         {strings.NewReader("hello, this is no pack at all"), -1},
	} {
		// A connection may deliver any number of bytes at a time.
		got, err := objectsOf(t, iotest.OneByteReader(c.pack), most, most)
		switch {
		case c.want >= 0 && (err != nil || len(got) != c.want):
			t.Errorf("%s: %d objects, %v; want %d", name, len(got), err, c.want)
		case c.want == -1 && (err == nil || errors.As(err, &tooLarge)):
			t.Errorf("%s: %v", name, err)
		case c.want == -2 && !errors.As(err, &tooLarge):
			t.Errorf("%s: %v, want it to be too large", name, err)
		}
	}
}

// The index is the one that git(1) makes, however objects are stored, and however little memory there is.
func TestIndexIsGits(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	text := strings.Repeat("a line of a file that grows\n", 200)
	for i := range 30 { // long chains of deltas, and commits and directories that are deltas as well
		text = fmt.Sprintf("%d\n%s%d\n", i, text, i*i)
		files := map[string]string{"grows": text, "b/other": text[:len(text)/2]}
		for j := range 30 {
			files[fmt.Sprintf("dir/%d", j)] = fmt.Sprint(j * (i / 10))
		}
		o.Commit(files)
	}
	for what, how := range map[string][]string{
		"bases by offset": {"--delta-base-offset"},
		"bases by hash":   {},
		"no deltas":       {"--depth=0"},
	} {
		base := filepath.Join(t.TempDir(), "pack")
		args := append([]string{"pack-objects", "-q", "--revs", "--window=50"}, how...)
		base += "-" + o.Write("HEAD\n", append(args, base)...)
		want := strings.Split(o.Write(readFile(t, base+".idx"), "show-index"), "\n")
		slices.Sort(want)
		for _, memory := range []int{0, 20_000, math.MaxInt} {
			objects, err := objectsOf(t, strings.NewReader(readFile(t, base+".pack")), 1<<20, memory)
			var got []string
			for _, o := range objects {
				got = append(got, fmt.Sprintf("%d %s (%08x)", o.offset, o.hash, o.crc))
			}
			if slices.Sort(got); err != nil || !slices.Equal(got, want) {
				t.Errorf("%s, %d bytes of memory: %d objects of %d, %v", what, memory, len(got), len(want), err)
			}
		}
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
