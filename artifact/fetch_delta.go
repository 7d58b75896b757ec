package artifact

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/deployments"
)

// deltaInMem is the size in bytes beyond which a delta is stored in a file until its hash is verified.
const deltaInMem = 4 << 20

// openDelta fetches a delta of at most deltaInMem bytes, and verifies its hash before reading it. It returns the open
// delta, and the new index that it makes from oldIndex.
func (f *fetch) openDelta(ctx context.Context, blob deployments.Delta, oldIndex []byte) (*archive.Delta, []byte,
	error) {
	f.meter.Expect(blob.Size)
	data, err := f.objects.ReadPinned(ctx, blob.URL, blob.Size, func(data []byte) error {
		if deployments.DigestOf(data) != blob.SHA256 {
			return wrongDelta(blob)
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	f.meter.Add(int64(len(data)))
	return archive.ReadDelta(bytes.NewReader(data), io.NopCloser(nil), oldIndex)
}

func wrongDelta(blob deployments.Delta) error {
	return fmt.Errorf("%w: the delta %s is not the one that the manifest names", deployments.ErrDigest,
		deployments.ShownURL(blob.URL))
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

// openLargeDelta fetches the large delta to a file beside dir, and sets delta, if the disk has room
// for the delta and the tree. It resumes what an earlier call began. If the delta can't be used,
// that is no error, as the archive has everything. An error means that ctx has ended, or that a
// useless delta can't be removed.
func (f *fetch) openLargeDelta(ctx context.Context, base *base, dir string) error {
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
	for _, useless := range []error{deployments.ErrDigest, archive.ErrDelta, archive.ErrIndex, syscall.ENOSPC} {
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

// fetchLarge fetches a delta into the file at path, resuming an earlier download. It returns the delta, opened once
// its hash was verified, and the new index that it makes from oldIndex.
func (f *fetch) fetchLarge(
	ctx context.Context,
	blob deployments.Delta,
	oldIndex []byte,
	path string,
) (*archive.Delta, []byte, error) {
	var file *os.File
	err := f.objects.EachSource(ctx, blob.URL, func(s object.Source) (err error) {
		file, err = f.fetchLargeFrom(ctx, s, blob, path)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return archive.ReadDelta(bufio.NewReaderSize(file, 64<<10), file, oldIndex)
}

// fetchLargeFrom fetches a delta from one source, and returns its complete file, open at the start. It resumes even
// what another source sent. If the hash of a resumed delta is wrong, it fetches the whole
// delta, once.
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
		err = file.Truncate(had) // if it holds more than the delta
	}
	if err == nil {
		f.meter.Expect(blob.Size - had)
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

// copyRest copies a blob from an offset to its end. If the blob doesn't end at blob.Size, the error wraps
// deployments.ErrDigest.
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
		i, from, err := f.delta.Next(last, len(f.index.Entries), len(f.old.index.Entries))
		if err != nil {
			f.fallBack("only a part of the delta can be used", "error", err)
		}
		if err != nil || i < 0 {
			return nil
		}
		last = i
		if err := f.tree.await(ctx, i); err != nil {
			return err
		}
		e := &f.index.Entries[i]
		if e.Kind != archive.File || e.Size == 0 || f.old.has(i) {
			f.fallBack("only a part of the delta can be used",
				"error", "the delta has content for a path that needs none from it", "path", e.Path)
			return nil // damaged: the rest comes from the archive
		}
		whole, err := f.patch(w, old, i, from)
		if err != nil || !whole {
			return err
		}
	}
}

// patch makes entry i from entry from of the old release (-1: from nothing) by the delta's next
// patch. If the patch doesn't match, or entry i is made already, the patch is skipped. The result
// is false if no more of the delta can be read.
func (f *fetch) patch(w *treeWorker, old *sourceReader, i, from int) (bool, error) {
	e := &f.index.Entries[i]
	var src io.ReaderAt = bytes.NewReader(nil)
	var size int64
	if from >= 0 {
		file, err := old.openFile(from)
		if err == nil {
			defer file.Close()
			src, size = file, old.index.Entries[from].Size
		} // if it can't be opened, src stays empty: a patch that needs the old file doesn't match, and is skipped
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
		out.file = os.NewFile(uintptr(to), e.Path)
	}
	sum := sha256.New()
	broken := f.delta.Apply(src, size, io.MultiWriter(out, sum), e.Size)
	readOn := broken == nil || errors.Is(broken, archive.ErrNotApplied)
	if out.file == nil {
		return readOn, nil
	}
	err := errors.Join(out.err, out.file.Close())
	if err == nil && broken == nil && deployments.Digest(sum.Sum(nil)) == e.Sum {
		w.ready[i] = true
		w.back.wrote(e.Size)
		return true, nil
	}
	f.spoiled.add(e.Path)
	return readOn, errors.Join(err, w.dirs.Remove(e.Path))
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
