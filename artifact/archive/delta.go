package archive

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"kedge/deployments"

	"github.com/klauspost/compress/zstd"
)

// ErrDelta means that a delta is malformed, can't be read to its end, or does not start from the release at hand.
var ErrDelta = errors.New("bad delta")

const (
	deltaMagic  = "kedgedl\x01"
	deltaWindow = 8 << 20
	sectionSize = 4 << 20 // bytes that one section of a patch produces, but for the last
)

// Delta is an open delta. ReadDelta has read it up to its first file.
type Delta struct {
	raw    io.Closer
	zstd   *zstd.Decoder
	stream *bufio.Reader
}

// Close frees the decoder, and closes what the delta is read from.
func (d *Delta) Close() error {
	if d.zstd != nil {
		d.zstd.Close()
	}
	return d.raw.Close()
}

// ReadDelta opens the delta that r reads. The caller must have verified the delta's hash. ReadDelta returns the delta,
// and the new index, which the delta's first patch makes from oldIndex. Delta.Close closes raw; if ReadDelta fails, it
// closes raw itself. The error wraps ErrDelta, or ErrNotApplied if the first patch does not match oldIndex.
func ReadDelta(r io.Reader, raw io.Closer, oldIndex []byte) (_ *Delta, newIndex []byte, err error) {
	d := &Delta{raw: raw}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	header := make([]byte, len(deltaMagic)+64)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrDelta, err)
	}
	from := deployments.DigestOf(oldIndex)
	if string(header[:len(deltaMagic)]) != deltaMagic {
		return nil, nil, fmt.Errorf("%w: it does not begin with the magic number of a delta", ErrDelta)
	}
	if !bytes.Equal(header[len(deltaMagic):][:32], from[:]) {
		return nil, nil, fmt.Errorf("%w: it starts from another release than the one on this disk", ErrDelta)
	}
	d.zstd, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(deltaWindow))
	if err != nil {
		return nil, nil, err
	}
	d.stream = bufio.NewReaderSize(d.zstd, 64<<10)
	size, err := d.number(MaxIndex)
	if err != nil {
		return nil, nil, err
	}
	var out bytes.Buffer // grows with the bytes that come, not with the size that is announced
	if err := d.Apply(bytes.NewReader(oldIndex), int64(len(oldIndex)), &out, int64(size)); err != nil {
		return nil, nil, err
	}
	if sum := deployments.DigestOf(out.Bytes()); !bytes.Equal(sum[:], header[len(deltaMagic)+32:]) {
		return nil, nil, fmt.Errorf("%w: the index decoded from it does not match the hash in its header", ErrDelta)
	}
	return d, out.Bytes(), nil
}

// number reads a varint of at most max.
func (d *Delta) number(max uint64) (uint64, error) {
	n, err := binary.ReadUvarint(d.stream)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrDelta, noEOF(err))
	}
	if n > max {
		return 0, fmt.Errorf("%w: a number is larger than allowed: at most %d", ErrDelta, max)
	}
	return n, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Next returns the entry of the new index that the next patch makes, and the entry of the old index that it patches
// (-1: none). Both are -1 at the end. The caller must apply that patch before it calls Next again. last is the entry
// that the previous call returned, and -1 in the first call. entries and old are the numbers of entries in the new and
// the old index.
func (d *Delta) Next(last, entries, old int) (entry, from int, err error) {
	gap, err := d.number(uint64(entries - 1 - last))
	if err != nil || gap == 0 {
		return -1, -1, err
	}
	n, err := d.number(uint64(old))
	return last + int(gap), int(n) - 1, err
}

// Apply writes size bytes made from old and the next patch, one section at a time. If the patch does not match old, or
// old can't be read, the error wraps ErrNotApplied. The caller can then go on with the next patch. With any error,
// some sections may have been written. If the delta is damaged, the error wraps ErrDelta; an error of w is returned as
// it is.
func (d *Delta) Apply(old io.ReaderAt, oldSize int64, w io.Writer, size int64) error {
	src := &window{from: old, size: oldSize}
	var out []byte
	var misfit error
	for size > 0 {
		n := min(size, sectionSize)
		size -= n
		s, err := d.section(int(n))
		if err != nil {
			return err
		}
		if misfit != nil {
			continue
		}
		if out, err = s.apply(src, out[:0], int(n)); err != nil {
			misfit = fmt.Errorf("%w: %w", ErrNotApplied, err)
			continue
		}
		if _, err := w.Write(out); err != nil {
			return err
		}
	}
	return misfit
}

// ErrNotApplied means that a patch does not match the file that it is applied to, or that this file can't be read.
var ErrNotApplied = errors.New("the patch does not match the old file")

// patchSection is one section, split into its four parts.
type patchSection struct {
	ops, runs cursor
	differ    []byte
	extra     cursor
}

// section reads the next section, which must produce n bytes.
func (d *Delta) section(n int) (*patchSection, error) {
	// The sections that kedge makes stay below these bounds: an op takes fewer bytes than it produces, and a run of
	// two bytes produces at least one.
	bounds := [4]int{n + 32, 2*n + 32, n, n}
	var lengths [4]uint64
	for i, max := range bounds {
		var err error
		if lengths[i], err = d.number(uint64(max)); err != nil {
			return nil, err
		}
	}
	var parts [4][]byte
	for i, length := range lengths {
		var buf bytes.Buffer // grows with the bytes that come, not with the size that is announced
		if _, err := io.CopyN(&buf, d.stream, int64(length)); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDelta, noEOF(err))
		}
		parts[i] = buf.Bytes()
	}
	return &patchSection{cursor{rest: parts[0]}, cursor{rest: parts[1]}, parts[2], cursor{rest: parts[3]}}, nil
}

// apply makes the section's n bytes from src, the old file, and appends them to out, which is
// empty.
func (s *patchSection) apply(src *window, out []byte, n int) ([]byte, error) {
	ops, runs, differ, extra := &s.ops, &s.runs, s.differ, &s.extra
	src.at = 0
	var same, other uint64 // what remains of the current run
	for len(out) < n {
		seek, size := binary.Varint(ops.rest)
		if size <= 0 {
			return nil, errShort
		}
		ops.rest = ops.rest[size:]
		left := uint64(n - len(out))
		add := ops.number(left)
		more := ops.number(left - add)
		if ops.err != nil {
			return nil, ops.err
		}
		if add+more == 0 {
			return nil, errors.New("an op of 0 bytes")
		}
		begin := len(out)
		var err error
		if out, err = src.append(out, seek, int(add)); err != nil {
			return nil, err
		}
		for added := out[begin:]; len(added) > 0; {
			if same+other == 0 {
				same, other = runs.number(sectionSize), runs.number(sectionSize)
				if runs.err != nil {
					return nil, runs.err
				}
				if same+other == 0 {
					return nil, errors.New("a run of 0 bytes")
				}
			}
			skip := min(same, uint64(len(added)))
			added, same = added[skip:], same-skip
			change := min(other, uint64(len(added)))
			if same > 0 || change == 0 {
				continue
			}
			if change > uint64(len(differ)) {
				return nil, errShort
			}
			for i, b := range differ[:change] {
				added[i] += b
			}
			added, differ, other = added[change:], differ[change:], other-change
		}
		out = append(out, extra.bytes(more)...)
		if extra.err != nil {
			return nil, extra.err
		}
	}
	// Nothing may remain: if unused bytes were allowed, many patches would give the same result.
	if len(ops.rest)+len(runs.rest)+len(differ)+len(extra.rest) > 0 || same+other > 0 {
		return nil, errors.New("a section has unused bytes")
	}
	return out, nil
}

// window reads a file at the places that a patch seeks to, which are mostly consecutive.
type window struct {
	from  io.ReaderAt
	size  int64
	at    int64 // where the last op stopped; 0 at the start of a section
	begin int64 // where data begins in the file
	data  []byte
}

func (w *window) append(out []byte, seek int64, n int) ([]byte, error) {
	at := w.at + seek
	if seek > w.size || at < 0 || at+int64(n) > w.size {
		return nil, errors.New("it reads outside of the old file")
	}
	w.at = at + int64(n)
	for n > 0 {
		if at < w.begin || at >= w.begin+int64(len(w.data)) {
			if w.data == nil {
				w.data = make([]byte, min(w.size, 256<<10))
			}
			w.data = w.data[:cap(w.data)]
			w.begin = max(0, at-at%4096)
			got, err := w.from.ReadAt(w.data, w.begin)
			if w.data = w.data[:got]; at >= w.begin+int64(got) {
				if err == nil {
					err = io.ErrUnexpectedEOF
				}
				return nil, err
			}
		}
		piece := w.data[at-w.begin:]
		piece = piece[:min(n, len(piece))]
		out = append(out, piece...)
		at += int64(len(piece))
		n -= len(piece)
	}
	return out, nil
}
