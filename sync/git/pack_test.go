package git

import (
	"bytes"
	"compress/zlib"
	"crypto/sha1"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// packed is an object as a pack has it: kind 3 is a blob, 6 a delta to the object that lies back
// bytes before it.
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

func packOf(t *testing.T, count uint32, objects ...io.Reader) io.Reader {
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

func TestCheckPack(t *testing.T) {
	t.Parallel()
	const most = 1000
	blob := func(size int) io.Reader {
		return packed(3, uint64(size), 0, strings.NewReader(strings.Repeat("x", size)))
	}
	baseSize := func() uint64 {
		data, err := io.ReadAll(blob(10))
		if err != nil {
			t.Fatal(err)
		}
		return uint64(len(data))
	}()
	delta := func(target uint64, more int) io.Reader {
		d := binary.AppendUvarint(binary.AppendUvarint(nil, 10), target)
		d = append(d, bytes.Repeat([]byte{0x90, 10}, more)...)
		return packed(6, uint64(len(d)), baseSize, bytes.NewReader(d))
	}
	raw := func(d ...byte) io.Reader { return packed(6, uint64(len(d)), baseSize, bytes.NewReader(d)) }
	for name, c := range map[string]struct {
		pack io.Reader
		want int64 // the size that is too large; -1: another error
	}{
		"nothing":                        {packOf(t, 0), 0},
		"objects that fit":               {packOf(t, 3, blob(0), blob(most), blob(1)), 0},
		"one byte too many":              {packOf(t, 2, blob(1), blob(most+1)), most + 1},
		"a delta that fits":              {packOf(t, 2, blob(10), delta(most, 100)), 0},
		"a delta to what is too large":   {packOf(t, 2, blob(10), delta(most+1, 101)), most + 1},
		"a delta to what is far more":    {packOf(t, 2, blob(10), delta(1<<62, 1)), 1 << 62},
		"a delta that is itself too big": {packOf(t, 2, blob(10), delta(10, most)), 2*most + 2},
		"a delta without sizes":          {packOf(t, 2, blob(10), raw()), -1},
		"a delta without a target":       {packOf(t, 2, blob(10), raw(10)), -1},
		"a delta's endless size":         {packOf(t, 2, blob(10), raw(bytes.Repeat([]byte{0x80}, 50)...)), -1},
		"less than a delta says": {packOf(t, 2, blob(10), packed(6, 50, baseSize,
			strings.NewReader("\x0a\x0a\x90\x0a"))), -1},
		"fewer objects than it says": {packOf(t, 3, blob(1)), -1},
		"more than it says":          {packOf(t, 1, blob(1), blob(most+1)), -1},
		"more than an object says":   {packOf(t, 1, packed(3, 5, 0, strings.NewReader("0123456789"))), -1},
		"less than an object says":   {packOf(t, 1, packed(3, 50, 0, strings.NewReader("0123456789"))), -1},
		"an object that never comes": {io.MultiReader(
			strings.NewReader("PACK\x00\x00\x00\x02\x00\x00\x00\x01\xbf\x80\x80\x80\x80\x01"),
			iotest.ErrReader(errors.New("it was read"))), 15 + 1<<32},
		"no pack": {strings.NewReader("hello, this is no pack at all"), -1},
	} {
		// A connection gives what it likes.
		err := checkPack(iotest.OneByteReader(c.pack), most)
		var large *objectTooLarge
		switch {
		case c.want > 0 && (!errors.As(err, &large) || large.size != c.want):
			t.Errorf("%s: %v, want an object of %d bytes to be too large", name, err, c.want)
		case c.want == 0 && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want < 0 && (err == nil || errors.As(err, &large)):
			t.Errorf("%s: %v", name, err)
		}
	}
}
