package artifact

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"kedge/artifact/object"
	"kedge/deployments"
)

// ErrDelta means that a delta is malformed (see the package comment), or does not start from the release at hand.
var ErrDelta = errors.New("bad delta")

const (
	deltaMagic  = "kedgedl\x01"
	deltaWindow = 8 << 20
	deltaInMem  = 4 << 20 // a larger delta is stored in a file until its hash is verified
	sectionSize = 4 << 20 // bytes that one section of a patch produces
)

// delta is an open delta whose hash was verified, read up to its first file.
type delta struct {
	raw    io.Closer
	zstd   *zstd.Decoder
	stream *bufio.Reader
}

func (d *delta) Close() error {
	if d.zstd != nil {
		d.zstd.Close()
	}
	return d.raw.Close()
}

// readDelta opens a delta and applies its patch of the index. It closes raw on an error.
func readDelta(r io.Reader, raw io.Closer, oldIndex []byte) (_ *delta, newIndex []byte, err error) {
	d := &delta{raw: raw}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	header := make([]byte, len(deltaMagic)+64)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrDelta, err)
	}
	from := digestOf(oldIndex)
	if string(header[:len(deltaMagic)]) != deltaMagic || !bytes.Equal(header[len(deltaMagic):][:32], from[:]) {
		return nil, nil, fmt.Errorf("%w: it starts from another release than the one here", ErrDelta)
	}
	d.zstd, err = zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(deltaWindow))
	if err != nil {
		return nil, nil, err
	}
	d.stream = bufio.NewReaderSize(d.zstd, 64<<10)
	size, err := d.number(maxIndex)
	if err != nil {
		return nil, nil, err
	}
	var out bytes.Buffer // grows with the bytes that come, not with the size that is announced
	if err := d.apply(bytes.NewReader(oldIndex), int64(len(oldIndex)), &out, int64(size)); err != nil {
		return nil, nil, err
	}
	if sum := digestOf(out.Bytes()); !bytes.Equal(sum[:], header[len(deltaMagic)+32:]) {
		return nil, nil, fmt.Errorf("%w: its index has another hash than it says", ErrDelta)
	}
	return d, out.Bytes(), nil
}

// number reads a varint of at most max.
func (d *delta) number(max uint64) (uint64, error) {
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

// next returns the next file's entry in the new index, and the entry of the old index that it patches, or -1 for
// none. Both are -1 at the end.
func (d *delta) next(last, entries, old int) (entry, from int, err error) {
	gap, err := d.number(uint64(entries - 1 - last))
	if err != nil || gap == 0 {
		return -1, -1, err
	}
	n, err := d.number(uint64(old))
	return last + int(gap), int(n) - 1, err
}

// apply writes size bytes made from old and the next patch, one section at a time. If the patch does not match
// old, the error wraps errMisfit, and reading the delta can continue after the patch.
func (d *delta) apply(old io.ReaderAt, oldSize int64, w io.Writer, size int64) error {
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
			misfit = fmt.Errorf("%w: %w", errMisfit, err)
			continue
		}
		if _, err := w.Write(out); err != nil {
			return err
		}
	}
	return misfit
}

var errMisfit = errors.New("the patch does not match the old file")

// patchSection is one section, split into its four parts.
type patchSection struct {
	ops, runs cursor
	differ    []byte
	extra     cursor
}

// section reads the next section, which must produce n bytes.
func (d *delta) section(n int) (*patchSection, error) {
	// The sections that kedge makes stay below these bounds: an op produces more bytes than it takes, a run at
	// least one byte for two.
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

// apply appends the section's n bytes to out.
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
	// Nothing may remain: otherwise many patches would give the same result.
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
	begin int64
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

// openDelta fetches a delta of a few MiB, and checks its hash before it reads it.
func (f *fetch) openDelta(ctx context.Context, blob deployments.Delta, oldIndex []byte) (*delta, []byte, error) {
	f.meter.expect(blob.Size)
	data, err := f.objects.ReadPinned(ctx, blob.URL, blob.Size, func(data []byte) error {
		if digestOf(data) != blob.SHA256 {
			return wrongDelta(blob)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	f.meter.add(int64(len(data)))
	return readDelta(bytes.NewReader(data), io.NopCloser(nil), oldIndex)
}

func wrongDelta(blob deployments.Delta) error {
	return fmt.Errorf("%w: the delta %s is not the one that the manifest names", ErrDigest, deployments.ShownURL(blob.URL))
}

// deltaSuffix, followed by a part of the delta's digest, is appended to a directory's name to name the large delta
// fetched for it.
const deltaSuffix = ".delta-"

func deltaFile(dir string, blob deployments.Delta) string {
	return dir + deltaSuffix + blob.SHA256.Short()
}

// dropDeltas removes the large deltas that were fetched for dir, except keep.
func dropDeltas(dir, keep string) error {
	found, err := filepath.Glob(globLiteral.Replace(dir) + deltaSuffix + "*")
	for _, file := range found {
		if file != keep {
			err = errors.Join(err, os.Remove(file))
		}
	}
	return err
}

// openLarge fetches the large delta to a file beside dir, if the disk has room for it and the tree. It resumes
// what an earlier call began. Its only error is the context's end: without a delta, the archive has everything.
func (f *fetch) openLarge(ctx context.Context, base *base, dir string) error {
	file := deltaFile(dir, *f.large)
	err := dropDeltas(dir, file)
	if err == nil {
		err = f.checkSpace(dir, f.large.Size-sizeOf(file))
	}
	var index []byte
	if err == nil {
		f.delta, index, err = f.fetchLarge(ctx, *f.large, base.index, file)
	}
	if err == nil {
		if _, err = f.decode(index); err != nil {
			f.delta.Close()
			f.delta = nil
		}
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return err
	}
	f.fallBack("the delta can't be used", "error", err)
	for _, useless := range []error{ErrDigest, ErrDelta, ErrIndex, syscall.ENOSPC} {
		if errors.Is(err, useless) {
			return dropDeltas(dir, "")
		}
	}
	return nil // if the archive can't be read either, the next call resumes the delta
}

func sizeOf(file string) int64 {
	info, err := os.Stat(file)
	if err != nil {
		return 0
	}
	return info.Size()
}

// fetchLarge resumes the download of a delta, and opens it once its hash is verified.
func (f *fetch) fetchLarge(
	ctx context.Context,
	blob deployments.Delta,
	oldIndex []byte,
	path string,
) (*delta, []byte, error) {
	var file *os.File
	err := f.objects.EachSource(ctx, blob.URL, func(s object.Source) (err error) {
		file, err = f.fetchLargeFrom(ctx, s, blob, path)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return readDelta(bufio.NewReaderSize(file, 64<<10), file, oldIndex)
}

// fetchLargeFrom is fetchLarge from one source. It resumes even what another source sent, and starts again if the
// hash is wrong then.
func (f *fetch) fetchLargeFrom(
	ctx context.Context,
	from object.Source,
	blob deployments.Delta,
	path string,
) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	had, err := io.Copy(sum, io.LimitReader(file, blob.Size))
	if err == nil {
		err = file.Truncate(had) // it holds more than the delta's size
	}
	if err == nil {
		f.meter.expect(blob.Size - had)
		err = f.copyRest(ctx, from, blob, had, io.MultiWriter(file, sum, f.meter))
	}
	if err == nil && deployments.Digest(sum.Sum(nil)) != blob.SHA256 {
		if err = wrongDelta(blob); had > 0 { // the earlier bytes may be another source's, or damaged by a power cut
			file.Close()
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			return f.fetchLargeFrom(ctx, from, blob, path)
		}
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// copyRest copies a blob from an offset to its end.
func (f *fetch) copyRest(ctx context.Context, s object.Source, blob deployments.Delta, from int64, to io.Writer) error {
	if from == blob.Size {
		return nil
	}
	body, err := s.Read(ctx, object.Object{URL: s.URL, Size: blob.Size, Ranges: true}, from)
	if err != nil {
		return err
	}
	defer body.Close()
	n, err := io.Copy(to, io.LimitReader(body, blob.Size-from+1))
	if err == nil && from+n != blob.Size {
		err = wrongDelta(blob)
	}
	return err
}

// applyDelta makes the files that the delta has patches for. If a patch does not match, its file comes from the
// archive; if the delta is damaged, so do all later files.
func (f *fetch) applyDelta(ctx context.Context) error {
	w, old := f.tree.worker(), f.old.reader()
	defer w.close()
	defer old.close()
	last := -1
	for {
		i, from, err := f.delta.next(last, len(f.index.entries), len(f.old.index.entries))
		if err != nil {
			f.fallBack("the delta can't be used to its end", "error", err)
		}
		if err != nil || i < 0 {
			return nil
		}
		last = i
		if err := f.tree.await(ctx, i); err != nil {
			return err
		}
		e := &f.index.entries[i]
		if e.kind != kindFile || e.size == 0 || f.old.has(i) {
			f.fallBack("the delta can't be used to its end", "error", "it has what the old release has")
			return nil // damaged: the rest comes from the archive
		}
		whole, err := f.patch(w, old, i, from)
		if err != nil || !whole {
			return err
		}
	}
}

// patch makes one file. It reports whether reading the delta can continue.
func (f *fetch) patch(w *treeWorker, old *sourceReader, i, from int) (bool, error) {
	e := &f.index.entries[i]
	var src io.ReaderAt = bytes.NewReader(nil)
	var size int64
	if from >= 0 {
		file, err := old.openFile(from)
		if err == nil {
			defer file.Close()
			src, size = file, old.index.entries[from].size
		} // otherwise nothing is read from the old file, and the patch is skipped below
	}
	out := &patched{}
	if !w.ready[i] {
		if err := w.discard(i); err != nil {
			return false, err
		}
		to, err := w.create(e)
		if err != nil {
			return false, err
		}
		out.file = os.NewFile(uintptr(to), e.path)
	}
	sum := sha256.New()
	broken := f.delta.apply(src, size, io.MultiWriter(out, sum), e.size)
	readOn := broken == nil || errors.Is(broken, errMisfit)
	if out.file == nil {
		return readOn, nil
	}
	err := errors.Join(out.err, out.file.Close())
	if err == nil && broken == nil && deployments.Digest(sum.Sum(nil)) == e.sum {
		w.ready[i] = true
		w.back.wrote(e.size)
		return true, nil
	}
	f.spoiled.add(e.path)
	return readOn, errors.Join(err, w.dirs.Remove(e.path))
}

// patched is the writer of a patch's output. It records whether an error came from writing, not from the patch.
type patched struct {
	file *os.File // nil: the output is discarded
	err  error
}

func (p *patched) Write(data []byte) (n int, err error) {
	if p.file == nil {
		return len(data), nil
	}
	n, p.err = p.file.Write(data)
	return n, p.err
}
