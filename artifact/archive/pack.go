package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"hash/fnv"
	"io"
	"os"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/artifact/meter"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	LargeFile  = 1 << 20   // files from this size on have frames of their own
	LargeFrame = 2 << 20   // bytes of content in a large file's frame
	minGroup   = 768 << 10 // bytes from which on a frame of small files may end: see mayBeginFrame
	maxGroup   = 2 << 20   // most bytes in a frame of small files, without padding
	packWindow = 2 << 20   // the encoder's window: about the largest frame
)

// EmptyDigest is the SHA-256 of an empty file.
var EmptyDigest = deployments.DigestOf(nil)

var packedTime = time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)

// Packed describes an archive that Pack wrote, and contains its index.
type Packed struct {
	Size    int64 // of the archive, in bytes
	SHA256  deployments.Digest
	Index   []byte // as it is stored
	Entries int    // files, directories and links
	Files   int    // without a file's further names, which are hard links
	Tree    int64  // bytes of the tree
}

// Pack writes the tree in dir to w as an archive. What a release can't contain is an error, such as a symbolic link
// that symlinks doesn't allow. So is a file that changes while it is read. progress may be nil.
func Pack(
	ctx context.Context,
	dir string,
	symlinks deployments.Symlinks,
	compression Compression,
	w io.Writer,
	progress func(meter.Progress),
) (Packed, error) {
	top, err := safefs.OpenDir(dir)
	if err != nil {
		return Packed{}, fmt.Errorf("pack: %w", err)
	}
	defer top.Close()
	entries, err := Scan(ctx, top)
	if err != nil {
		return Packed{}, fmt.Errorf("pack %s: %w", dir, err)
	}
	x := &Index{Archive: true, Entries: entries}
	if err := x.CheckTargets(symlinks); err != nil {
		return Packed{}, fmt.Errorf("pack %s: %w", dir, err)
	}
	p := &packer{top: top, index: x, compression: compression, out: w, archive: sha256.New(),
		meter: meter.New("pack", x.TreeSize(), progress)}
	if err := p.run(ctx); err != nil {
		return Packed{}, fmt.Errorf("pack %s: %w", dir, err)
	}
	p.meter.Finish()
	result := Packed{
		Size:    x.ArchiveSize(),
		SHA256:  deployments.Digest(p.archive.Sum(nil)),
		Index:   x.Encode(),
		Entries: len(entries),
		Tree:    x.TreeSize(),
	}
	for i := range entries {
		if entries[i].Kind == File {
			result.Files++
		}
	}
	if _, err := DecodeIndex(result.Index); err != nil { // an index that no node would read must not be published
		return Packed{}, fmt.Errorf("pack %s: %w", dir, err)
	}
	return result, nil
}

// section is what goes into one frame.
type section struct {
	parts []part
	large bool // its one part is a piece of a large file
}

// part is a piece of a section. It is one of three: an entry's header; n bytes of an entry's content, with the padding
// after them if pad is set; the archive's end.
type part struct {
	entry   int
	header  bool
	from, n int64
	pad     bool // padding follows the n bytes; n may be 0
	end     bool // it is the archive's end
}

// sections yields the sections in the order of the archive. Their borders depend on the entries alone: on their paths,
// their sizes, and the targets of their links.
func (x *Index) sections(yield func(section) bool) {
	var group section
	var size int64
	flush := func() bool {
		s := group
		group, size = section{}, 0
		return len(s.parts) == 0 || yield(s)
	}
	for i := range x.Entries {
		e := &x.Entries[i]
		content := x.headerSize(e)
		if e.Size < LargeFile {
			content += e.Size
		}
		if (size >= minGroup && mayBeginFrame(e.Path) || size+content > maxGroup) && !flush() {
			return
		}
		group.parts = append(group.parts, part{entry: i, header: true})
		size += content
		switch {
		case e.Size == 0:
		case e.Size < LargeFile:
			group.parts = append(group.parts, part{entry: i, n: e.Size, pad: true})
		default:
			if !flush() {
				return
			}
			for from := int64(0); from < e.Size; from += LargeFrame {
				n := min(LargeFrame, e.Size-from)
				if !yield(section{parts: []part{{entry: i, from: from, n: n}}, large: true}) {
					return
				}
			}
			if e.Size%512 != 0 {
				group.parts = append(group.parts, part{entry: i, from: e.Size, pad: true})
			}
		}
	}
	group.parts = append(group.parts, part{end: true})
	flush()
}

// headerSize estimates how many bytes an entry's header takes in the tar stream. The estimate is never too low.
func (x *Index) headerSize(e *Entry) int64 {
	link := e.Target
	if e.Kind == Hardlink {
		link = x.Entries[e.Original].Path
	}
	size := int64(512)
	name := len(e.Path)
	if e.Kind == Dir {
		name++ // with a slash at its end
	}
	if name > 100 || len(link) > 100 || !isASCII(e.Path) || !isASCII(link) { // PAX
		size += 2048 + 2*int64(len(e.Path)+len(link))
	}
	return size
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= 0x80 {
			return false
		}
	}
	return true
}

// mayBeginFrame reports whether an entry's path lets it begin a frame before the frame is full: one in four does.
func mayBeginFrame(path string) bool {
	h := fnv.New32a()
	io.WriteString(h, path)
	return h.Sum32()%4 == 0
}

// packer compresses sections into frames on all cores, and writes them in order.
type packer struct {
	top         *os.File
	index       *Index
	compression Compression
	out         io.Writer
	archive     hash.Hash
	meter       *meter.Meter
	streamed    int64 // bytes of the tar stream so far
	// free has buffers of frames that were written, for reuse.
	free chan []byte
}

// packing is one section on its way through the packer.
type packing struct {
	section
	// before and after pass a large file's running hash from one of its sections to the next.
	before, after chan running
	done          chan struct{}

	data    []byte // the frame
	sum     deployments.Digest
	length  int64
	content deployments.Digest
	offsets []offset
}

// running is the hash of a large file so far, and the file's mtime when its first part was read.
type running struct {
	hash.Hash
	mtime unix.Timespec
}

// offset is where in a section a file's content begins.
type offset struct {
	entry int
	at    int64
}

func (p *packer) run(ctx context.Context) error {
	cores := runtime.GOMAXPROCS(0)
	group, ctx := errgroup.WithContext(ctx)
	todo := make(chan *packing)
	order := make(chan *packing, 2*cores) // its capacity bounds what is in memory
	p.free = make(chan []byte, 4*cores)
	group.Go(func() error {
		defer close(todo)
		defer close(order)
		var last chan running
		for s := range p.index.sections {
			job := &packing{section: s, done: make(chan struct{})}
			if s.large {
				first := s.parts[0]
				if job.before = last; first.from == 0 {
					job.before = make(chan running, 1)
					job.before <- running{Hash: sha256.New()}
				}
				job.after = make(chan running, 1)
				last = job.after
			}
			for _, to := range []chan *packing{order, todo} {
				if err := wait.Send(ctx, to, job); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for range cores {
		group.Go(func() error {
			compressor, err := newCompressor(p.compression)
			if err != nil {
				return err
			}
			defer compressor.close()
			worker := &packWorker{packer: p, dirs: safefs.Dirs{Top: p.top}, compressor: compressor}
			defer worker.dirs.Close()
			for job := range todo {
				if err := worker.pack(ctx, job); err != nil {
					return err
				}
				close(job.done)
			}
			return nil
		})
	}
	group.Go(func() error {
		for job := range order {
			select {
			case <-job.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if err := p.write(job); err != nil {
				return err
			}
		}
		return nil
	})
	return group.Wait()
}

func (p *packer) write(job *packing) error {
	if _, err := p.out.Write(job.data); err != nil {
		return err
	}
	p.archive.Write(job.data)
	f := Frame{Offset: p.index.ArchiveSize(), Size: int64(len(job.data)), Start: p.streamed, Length: job.length,
		Sum: job.sum, Content: job.content}
	p.index.Frames = append(p.index.Frames, f)
	for _, o := range job.offsets {
		p.index.Entries[o.entry].Offset = p.streamed + o.at
	}
	p.streamed += job.length
	for _, part := range job.parts {
		p.meter.Add(part.n)
	}
	select {
	case p.free <- job.data:
	default:
	}
	return nil
}

type packWorker struct {
	*packer
	dirs       safefs.Dirs
	compressor *compressor
	raw        bytes.Buffer
}

func (w *packWorker) pack(ctx context.Context, job *packing) error {
	w.raw.Reset()
	for _, part := range job.parts {
		switch {
		case part.end:
			w.raw.Write(make([]byte, 1024))
		case part.header:
			if err := w.header(part.entry); err != nil {
				return err
			}
		default:
			if err := w.content(ctx, job, part); err != nil {
				return err
			}
		}
		if part.pad {
			if over := w.index.Entries[part.entry].Size % 512; over != 0 {
				w.raw.Write(make([]byte, 512-over))
			}
		}
	}
	job.length = int64(w.raw.Len())
	select {
	case job.data = <-w.free:
	default:
	}
	job.data = w.compressor.compress(w.raw.Bytes(), job.data[:0])
	job.sum = deployments.DigestOf(job.data)
	return nil
}

func (w *packWorker) header(i int) error {
	e := &w.index.Entries[i]
	h := &tar.Header{Name: e.Path, Mode: int64(UnixMode(e.Mode)), ModTime: packedTime}
	switch e.Kind {
	case File:
		h.Typeflag, h.Size = tar.TypeReg, e.Size
	case Dir:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
	case Symlink:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Target
	case Hardlink:
		h.Typeflag, h.Linkname = tar.TypeLink, w.index.Entries[e.Original].Path
	}
	return tar.NewWriter(&w.raw).WriteHeader(h)
}

// content reads a part of a file into raw, and hashes it. Parts of a large file are hashed in order.
func (w *packWorker) content(ctx context.Context, job *packing, part part) error {
	if part.n == 0 {
		return nil
	}
	e := &w.index.Entries[part.entry]
	begin := w.raw.Len()
	if part.from == 0 {
		job.offsets = append(job.offsets, offset{part.entry, int64(begin)})
	}
	mtime, err := w.read(e, part)
	if err != nil {
		return err
	}
	data := w.raw.Bytes()[begin:]
	if !job.large {
		e.Sum = deployments.DigestOf(data)
		return nil
	}
	job.content = deployments.DigestOf(data)
	select {
	case run := <-job.before:
		if part.from == 0 {
			run.mtime = mtime
		}
		if run.mtime != mtime {
			return safefs.PathError("read", e.Path, safefs.ErrChanging)
		}
		run.Write(data)
		if part.from+part.n == e.Size {
			e.Sum = deployments.Digest(run.Sum(nil))
		}
		job.after <- run
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read reads a part of a file into raw, and returns the file's mtime. The error wraps
// safefs.ErrChanging if the opened file isn't a regular one of the entry's size, or if it changes
// meanwhile.
func (w *packWorker) read(e *Entry, part part) (mtime unix.Timespec, err error) {
	fd, err := w.dirs.OpenFile(e.Path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return mtime, err
	}
	defer unix.Close(fd)
	var before, after unix.Stat_t
	if err := unix.Fstat(fd, &before); err != nil {
		return mtime, safefs.PathError("stat", e.Path, err)
	}
	if before.Mode&unix.S_IFMT != unix.S_IFREG || before.Size != e.Size {
		return mtime, safefs.PathError("read", e.Path, safefs.ErrChanging)
	}
	w.raw.Grow(int(part.n))
	data := w.raw.AvailableBuffer()[:part.n]
	if err := safefs.ReadAll(fd, data, part.from); err != nil {
		return mtime, safefs.PathError("read", e.Path, err)
	}
	if err := unix.Fstat(fd, &after); err != nil {
		return mtime, safefs.PathError("stat", e.Path, err)
	}
	if after.Size != before.Size || after.Mtim != before.Mtim {
		return mtime, safefs.PathError("read", e.Path, safefs.ErrChanging)
	}
	w.raw.Write(data) // no copy: it is the buffer's own memory
	return before.Mtim, nil
}
