package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"runtime"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// builder makes an index's tree in a private directory.
type builder struct {
	root  *os.Root
	index *index
	files []int // entries with content, in the order of the tar stream

	// ready says of each entry that it is made and right; written by whoever made it, read when that has ended.
	ready []bool
	// fetching says which entries writeFrame is to make; set by missing.
	fetching []bool
	// chunks says of each frame that its content is already in its file.
	chunks []bool

	mu   sync.Mutex
	open map[int]*largeOpen
}

// largeOpen is a file that is written frame by frame, by several workers.
type largeOpen struct {
	file *os.File
	left int // frames to write
}

func newBuilder(dir string, x *index) (*builder, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	b := &builder{root: root, index: x, ready: make([]bool, len(x.entries)),
		fetching: make([]bool, len(x.entries)), chunks: make([]bool, len(x.frames)), open: map[int]*largeOpen{}}
	for i := range x.entries {
		if x.entries[i].kind == kindFile && x.entries[i].size > 0 {
			b.files = append(b.files, i)
		}
	}
	return b, nil
}

func (b *builder) close() error {
	for _, l := range b.open {
		l.file.Close()
	}
	return b.root.Close()
}

// prepare keeps what an earlier call made, removes the rest, and makes the directories, open to nobody else until finish.
func (b *builder) prepare(ctx context.Context) error {
	kept, err := b.sweep()
	if err != nil {
		return err
	}
	for i := range b.index.entries {
		e := &b.index.entries[i]
		if e.kind != kindDir {
			continue
		}
		if err := b.root.Mkdir(e.path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	if len(kept) == 0 {
		return nil
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, i := range kept {
		group.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			return b.examine(i)
		})
	}
	return group.Wait()
}

// sweep removes what can't belong to the tree, and returns the files that may be right.
func (b *builder) sweep() (kept []int, err error) {
	err = fs.WalkDir(b.root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		i := b.index.find(p)
		switch {
		case i >= 0 && d.IsDir() && b.index.entries[i].kind == kindDir:
			return b.root.Chmod(p, 0o700)
		case i >= 0 && d.Type().IsRegular() && b.index.entries[i].kind == kindFile:
			kept = append(kept, i)
			return nil
		}
		if err := b.root.RemoveAll(p); err != nil {
			return err
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	return kept, err
}

// examine marks a file that is right, and the frames of a large one that are, and removes what is of no use.
func (b *builder) examine(i int) error {
	e := &b.index.entries[i]
	f, err := b.root.Open(e.path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == e.size {
		if sum, err := hashFile(f); err == nil && sum == e.sum {
			b.ready[i] = true
			return f.Chmod(e.mode)
		}
	}
	useful := false
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 1 && info.Size() <= e.size { // else it may be a live release's
		from, to := b.index.framesOf(e)
		for n := from; n < to; n++ {
			if b.index.chunkOf(n, e) && hashesTo(f, b.index.frames[n].start-e.offset, b.index.frames[n]) {
				b.chunks[n] = true
				useful = true
			}
		}
	}
	if useful {
		return f.Chmod(0o600)
	}
	return b.root.Remove(e.path)
}

// chunkOf reports whether a frame holds nothing but content of e, and its hash is known.
func (x *index) chunkOf(n int, e *entry) bool {
	f := &x.frames[n]
	return !f.content.IsZero() && f.start >= e.offset && f.start+f.length <= e.offset+e.size
}

func hashesTo(f io.ReaderAt, at int64, want frame) bool {
	data := make([]byte, want.length)
	n, _ := f.ReadAt(data, at)
	return n == len(data) && digestOf(data) == want.content
}

// missing gives the frames that hold what is neither ready nor in old, and lets writeFrame make just that.
func (b *builder) missing(old *source) []bool {
	wanted := make([]bool, len(b.index.frames))
	for _, i := range b.files {
		e := &b.index.entries[i]
		if b.fetching[i] = !b.ready[i] && !old.has(e); !b.fetching[i] {
			continue
		}
		from, to := b.index.framesOf(e)
		for n := from; n < to; n++ {
			wanted[n] = wanted[n] || !b.chunks[n]
		}
	}
	return wanted
}

// finish makes links and gives directories their modes, when all files are there.
func (b *builder) finish() error {
	for i := range b.index.entries {
		e := &b.index.entries[i]
		var err error
		switch e.kind {
		case kindFile:
			if !b.ready[i] {
				err = fmt.Errorf("%w: the archive lacks a part of %q", ErrIndex, e.path)
			}
		case kindSymlink:
			err = b.root.Symlink(e.target, e.path)
		case kindHardlink:
			err = b.root.Link(b.index.entries[e.original].path, e.path)
		}
		if err != nil {
			return err
		}
	}
	for _, e := range slices.Backward(b.index.entries) {
		if e.kind == kindDir {
			if err := b.root.Chmod(e.path, e.mode); err != nil {
				return err
			}
		}
	}
	return nil
}

// treeWorker writes files; each goroutine has its own.
type treeWorker struct {
	*builder
	dirs dirs
}

func (b *builder) worker() *treeWorker { return &treeWorker{builder: b, dirs: dirs{root: b.root}} }

func (w *treeWorker) close() { w.dirs.close() }

// writeFrame writes what a frame decodes to into the files that still miss it.
func (w *treeWorker) writeFrame(n int, raw []byte) error {
	f := &w.index.frames[n]
	first, _ := slices.BinarySearchFunc(w.files, f.start, func(i int, start int64) int {
		if e := &w.index.entries[i]; e.offset+e.size <= start {
			return -1
		}
		return 1
	})
	for _, i := range w.files[first:] {
		e := &w.index.entries[i]
		if e.offset >= f.start+f.length {
			break
		}
		from, to := max(e.offset, f.start), min(e.offset+e.size, f.start+f.length)
		content := raw[from-f.start : to-f.start]
		var err error
		switch {
		case !w.fetching[i]:
		case int64(len(content)) < e.size:
			err = w.writeChunk(i, from-e.offset, content)
		default:
			err = w.writeFile(i, content)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeFile makes a whole file.
func (w *treeWorker) writeFile(i int, content []byte) error {
	e := &w.index.entries[i]
	f, err := w.create(e)
	if err != nil {
		return err
	}
	if len(content) > 0 {
		_, err = f.Write(content)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	w.ready[i] = true
	return nil
}

// create makes a file that isn't there, with its mode whatever the umask.
func (w *treeWorker) create(e *entry) (*os.File, error) {
	dir, name, err := w.dirs.at(e.path)
	if err != nil {
		return nil, err
	}
	f, err := dir.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, e.mode&0o700)
	if err != nil {
		return nil, err
	}
	if e.mode&^0o700 != 0 {
		if err := f.Chmod(e.mode); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// remove takes back a file that did not become right.
func (w *treeWorker) remove(e *entry) error {
	dir, name, err := w.dirs.at(e.path)
	if err != nil {
		return err
	}
	if err := dir.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// discard takes back the frames of a large file that prepare kept.
func (w *treeWorker) discard(i int) error {
	e := &w.index.entries[i]
	from, to := w.index.framesOf(e)
	for n := from; n < to; n++ {
		if w.chunks[n] && w.index.chunkOf(n, e) {
			w.chunks[n] = false
		}
	}
	return w.remove(e)
}

// writeChunk writes a part of a large file. The last one closes it.
func (w *treeWorker) writeChunk(i int, at int64, content []byte) error {
	l, err := w.openLarge(i)
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(content, at); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.left--; l.left > 0 {
		return nil
	}
	delete(w.open, i)
	w.ready[i] = true
	return errors.Join(l.file.Chmod(w.index.entries[i].mode), l.file.Close())
}

func (w *treeWorker) openLarge(i int) (*largeOpen, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l, ok := w.open[i]; ok {
		return l, nil
	}
	e := &w.index.entries[i]
	dir, name, err := w.dirs.at(e.path)
	if err != nil {
		return nil, err
	}
	f, err := dir.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(e.size); err != nil {
		f.Close()
		return nil, err
	}
	l := &largeOpen{file: f}
	from, to := w.index.framesOf(e)
	for n := from; n < to; n++ {
		if !w.chunks[n] {
			l.left++
		}
	}
	w.open[i] = l
	return l, nil
}

// dirs remembers the directory that was used last, since neighbours share it.
type dirs struct {
	root *os.Root
	path string
	last *os.Root // nil: the root itself, or nothing yet
	file *os.File // of last or root, for its descriptor
}

// at gives the directory that a path lies in, and the path's name there.
func (d *dirs) at(p string) (*os.Root, string, error) {
	parent := parentOf(p)
	if parent != d.path {
		d.close()
		if parent != "" {
			last, err := d.root.OpenRoot(parent)
			if err != nil {
				return nil, "", err
			}
			d.last = last
		}
		d.path = parent
	}
	if d.last == nil {
		return d.root, p, nil
	}
	return d.last, path.Base(p), nil
}

// descriptor gives the directory that at returned last as a file.
func (d *dirs) descriptor() (*os.File, error) {
	if d.file != nil {
		return d.file, nil
	}
	dir := d.root
	if d.last != nil {
		dir = d.last
	}
	var err error
	d.file, err = dir.Open(".")
	return d.file, err
}

func (d *dirs) close() {
	if d.file != nil {
		d.file.Close()
	}
	if d.last != nil {
		d.last.Close()
	}
	d.file, d.last, d.path = nil, nil, ""
}
