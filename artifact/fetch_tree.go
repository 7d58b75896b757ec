package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// builder makes an index's tree in a private directory.
type builder struct {
	root  *os.Root
	top   *os.File // the directory of root, as safefs.Dirs needs it
	index *archive.Index
	files []int // entries with content, in the order of the tar stream
	// withheld has the permission bits that a new file may lack, because of the umask or a default ACL; all if unknown.
	withheld uint32

	// ready says for each entry whether it is made and verified, or isn't wanted; for a directory, whether its mode is
	// final. The goroutine that makes an entry sets its element. Others may read the element after that goroutine ended.
	ready []bool
	// fetching says which entries writeFrame makes; selectMissingFrames sets it.
	fetching []bool
	// chunks says for each frame whether its content is already in its file. partial is set if any element of chunks was
	// set.
	chunks  []bool
	partial atomic.Bool
	// stats has, by entry, the stats of files that were hard-linked to verified ones, from after linking; zero: none.
	stats []fileStat
	// made has a channel for every gateWidth entries. The channel is closed when the directories among these entries, and
	// those above them, exist.
	made []chan struct{}

	// back syncs the file system in the background, after each backgroundSyncStep bytes that workers report as written.
	back *backgroundSync

	mu   sync.Mutex
	open map[int]*largeOpen
}

// largeOpen is a file that several workers write, frame by frame.
type largeOpen struct {
	file       *os.File
	framesLeft int // frames to write
}

const gateWidth = 256

func newBuilder(dir string, x *archive.Index) (*builder, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	top, err := root.Open(".")
	if err != nil {
		root.Close()
		return nil, err
	}
	b := &builder{root: root, top: top, index: x, ready: make([]bool, len(x.Entries)),
		fetching: make([]bool, len(x.Entries)), chunks: make([]bool, len(x.Frames)), open: map[int]*largeOpen{},
		stats: make([]fileStat, len(x.Entries)),
		back:  newBackgroundSync(root.Name(), int(top.Fd()))}
	for i := range x.Entries {
		if x.Entries[i].Kind == archive.File && x.Entries[i].Size > 0 {
			b.files = append(b.files, i)
		}
		if i%gateWidth == 0 {
			b.made = append(b.made, make(chan struct{}))
		}
	}
	return b, nil
}

func (b *builder) close() error {
	for _, l := range b.open {
		l.file.Close()
	}
	return errors.Join(b.back.wait(), b.top.Close(), b.root.Close())
}

// prepare keeps the files and frames that an earlier call made, if their hashes are right, and removes everything else
// but directories of the tree. Kept directories are writable until finish.
func (b *builder) prepare(ctx context.Context) error {
	kept, err := b.sweep()
	if err != nil {
		return err
	}
	if err := b.probeWithheld(); err != nil {
		return err
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

// makeDirs makes the directories, which their owner can write into until finish. It runs in parallel with the
// workers that fill them: alone it took a tenth of the time for a tree of links.
func (b *builder) makeDirs(ctx context.Context) error {
	dirs := &safefs.Dirs{Top: b.top}
	defer dirs.Close()
	for i := range b.index.Entries {
		if i%gateWidth == 0 && i > 0 {
			close(b.made[i/gateWidth-1])
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		e := &b.index.Entries[i]
		if e.Kind != archive.Dir {
			continue
		}
		err := dirs.Mkdir(e.Path, uint32(e.Mode.Perm()|0o700))
		if errors.Is(err, fs.ErrExist) {
			b.ready[i] = false
			continue
		}
		if err != nil {
			return err
		}
		b.ready[i] = e.Mode == e.Mode.Perm()|0o700 && b.getsAllBits(e.Mode)
	}
	if n := len(b.made); n > 0 {
		close(b.made[n-1])
	}
	return nil
}

// await waits until the directory of entry i exists. An error means that ctx has ended.
func (b *builder) await(ctx context.Context, i int) error {
	select {
	case <-b.made[i/gateWidth]:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dirMade reports whether the directory of entry i is known to exist: await wouldn't wait.
func (b *builder) dirMade(i int) bool {
	select {
	case <-b.made[i/gateWidth]:
		return true
	default:
		return false
	}
}

// probeWithheld sets withheld, by making a directory. Mostly nothing is withheld, which saves a chmod of each new file
// and directory.
func (b *builder) probeWithheld() error {
	const name = ".kedge-mode"
	b.withheld = 0o777
	err := b.root.Mkdir(name, 0o777)
	if errors.Is(err, fs.ErrExist) { // the release has a path of this name, which was kept
		return nil
	}
	if err != nil {
		return err
	}
	info, err := b.root.Lstat(name)
	if err = errors.Join(err, b.root.Remove(name)); err != nil {
		return err
	}
	if info.Mode()&fs.ModeSetgid == 0 { // with set-group-id inherited, each new directory needs a chmod to remove the bit
		b.withheld = 0o777 &^ uint32(info.Mode().Perm())
	}
	return nil
}

// getsAllBits reports whether a new file or directory surely gets all permission bits of mode.
func (b *builder) getsAllBits(mode fs.FileMode) bool { return uint32(mode)&b.withheld == 0 }

// sweep removes everything but the directories and regular files that the index has at the same paths. It returns the
// entries of these files, and gives these directories the mode 0700.
func (b *builder) sweep() (kept []int, err error) {
	err = fs.WalkDir(b.root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		i := b.index.Find(p)
		switch {
		case i >= 0 && d.IsDir() && b.index.Entries[i].Kind == archive.Dir:
			return b.root.Chmod(p, 0o700)
		case i >= 0 && d.Type().IsRegular() && b.index.Entries[i].Kind == archive.File:
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

// examine hashes the file of entry i. It keeps the file if its content is right. It also keeps a file without other
// hard links of which at least one frame is right. It removes any other file, and a file that can't be read.
func (b *builder) examine(i int) error {
	e := &b.index.Entries[i]
	f, err := b.root.Open(e.Path)
	if errors.Is(err, fs.ErrPermission) { // its owner may not read it by its mode
		return b.root.Remove(e.Path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() == e.Size {
		if sum, err := hashFile(f); err == nil && sum == e.Sum {
			b.ready[i] = true
			return f.Chmod(e.Mode)
		}
	}
	useful := false
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 1 && // a file with more links may be a live release's
		info.Size() <= e.Size {
		from, to := b.index.FramesOf(e)
		for n := from; n < to; n++ {
			if hashesTo(f, b.index.Frames[n].Start-e.Offset, b.index.Frames[n]) {
				b.chunks[n] = true
				b.partial.Store(true)
				useful = true
			}
		}
	}
	if useful {
		return f.Chmod(0o600)
	}
	return b.root.Remove(e.Path)
}

// hashesTo reports whether a file has a frame's content at offset at. It returns false if the index has no hash of
// that content.
func hashesTo(f io.ReaderAt, at int64, want archive.Frame) bool {
	if want.Content.IsZero() {
		return false
	}
	data := make([]byte, want.Length)
	n, _ := f.ReadAt(data, at)
	return n == len(data) && deployments.DigestOf(data) == want.Content
}

// selectMissingFrames returns which frames have content that neither the tree nor old has. It also
// sets fetching, so that writeFrame writes only the files with such content.
func (b *builder) selectMissingFrames(old *source) []bool {
	wanted := make([]bool, len(b.index.Frames))
	for _, i := range b.files {
		e := &b.index.Entries[i]
		if b.fetching[i] = !b.ready[i] && !old.has(i); !b.fetching[i] {
			continue
		}
		from, to := b.index.FramesOf(e)
		for n := from; n < to; n++ {
			wanted[n] = !b.chunks[n]
		}
	}
	return wanted
}

// finish makes links and sets directories' modes once all files are made. If a file is missing, the error wraps
// archive.ErrIndex.
func (b *builder) finish() error {
	dirs := &safefs.Dirs{Top: b.top}
	defer dirs.Close()
	for i := range b.index.Entries {
		e := &b.index.Entries[i]
		var err error
		switch e.Kind {
		case archive.File:
			if !b.ready[i] {
				err = fmt.Errorf("%w: the archive lacks a part of %q", archive.ErrIndex, e.Path)
			}
		case archive.Symlink:
			err = dirs.Symlink(e.Target, e.Path)
		case archive.Hardlink:
			err = b.root.Link(b.index.Entries[e.Original].Path, e.Path)
			b.stats[e.Original] = fileStat{} // its ctime has changed
		}
		if err != nil {
			return err
		}
	}
	for i, e := range slices.Backward(b.index.Entries) {
		if e.Kind == archive.Dir && !b.ready[i] {
			if err := dirs.Chmod(e.Path, archive.UnixMode(e.Mode)); err != nil {
				return err
			}
		}
	}
	return nil
}

// treeWorker writes files. Each goroutine needs its own.
type treeWorker struct {
	*builder
	dirs safefs.Dirs
}

func (b *builder) worker() *treeWorker { return &treeWorker{builder: b, dirs: safefs.Dirs{Top: b.top}} }

func (w *treeWorker) close() { w.dirs.Close() }

// writeFrame writes raw, the decoded content of frame n, to the files that still lack it.
func (w *treeWorker) writeFrame(ctx context.Context, n int, raw []byte) error {
	f := &w.index.Frames[n]
	first, _ := slices.BinarySearchFunc(w.files, f.Start, func(i int, start int64) int {
		if e := &w.index.Entries[i]; e.Offset+e.Size <= start {
			return -1
		}
		return 1
	})
	for _, i := range w.files[first:] {
		e := &w.index.Entries[i]
		if e.Offset >= f.Start+f.Length {
			break
		}
		from, to := max(e.Offset, f.Start), min(e.Offset+e.Size, f.Start+f.Length)
		content := raw[from-f.Start : to-f.Start]
		if !w.fetching[i] {
			continue
		}
		// If content can be written at once, ctx is ignored: what was fetched need not be fetched again because another
		// request failed.
		var err error
		if !w.dirMade(i) {
			err = w.await(ctx, i)
		}
		switch {
		case err != nil:
		case int64(len(content)) < e.Size:
			err = w.writeChunk(i, from-e.Offset, content)
		default:
			err = w.writeFile(i, content)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeFile makes a file from its whole content.
func (w *treeWorker) writeFile(i int, content []byte) error {
	e := &w.index.Entries[i]
	fd, err := w.create(e)
	if err != nil {
		return err
	}
	err = safefs.PathError("write", e.Path, safefs.WriteAll(fd, content))
	if err := errors.Join(err, safefs.PathError("close", e.Path, unix.Close(fd))); err != nil {
		return err
	}
	w.ready[i] = true
	w.back.wrote(e.Size)
	return nil
}

// create creates the file of e, which must not exist, with e's mode whatever the umask.
func (w *treeWorker) create(e *archive.Entry) (fd int, err error) {
	fd, err = w.dirs.OpenFile(e.Path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, uint32(e.Mode.Perm()))
	if err != nil || w.getsAllBits(e.Mode) {
		return fd, err
	}
	if err := unix.Fchmod(fd, archive.UnixMode(e.Mode)); err != nil {
		unix.Close(fd)
		return -1, safefs.PathError("chmod", e.Path, err)
	}
	return fd, nil
}

// partly reports whether some frames of a large file are already in the file at its path.
func (b *builder) partly(i int) bool {
	if !b.partial.Load() {
		return false
	}
	e := &b.index.Entries[i]
	from, to := b.index.FramesOf(e)
	return slices.Contains(b.chunks[from:to], true)
}

// discard removes the file of entry i, if it exists, and notes that the frames it had are missing again.
func (w *treeWorker) discard(i int) error {
	e := &w.index.Entries[i]
	from, to := w.index.FramesOf(e)
	for n := from; n < to; n++ {
		if w.chunks[n] { // a false element isn't written: its frame may hold several files, whose goroutines read it
			w.chunks[n] = false
		}
	}
	return w.dirs.Remove(e.Path)
}

// writeChunk writes a part of a large file at an offset. After the last part it sets the file's mode, and closes it.
func (w *treeWorker) writeChunk(i int, at int64, content []byte) error {
	l, err := w.openLargeFile(i)
	if err != nil {
		return err
	}
	if _, err := l.file.WriteAt(content, at); err != nil {
		return err
	}
	w.back.wrote(int64(len(content)))
	w.mu.Lock()
	defer w.mu.Unlock()
	if l.framesLeft--; l.framesLeft > 0 {
		return nil
	}
	delete(w.open, i)
	w.ready[i] = true
	return errors.Join(l.file.Chmod(w.index.Entries[i].Mode), l.file.Close())
}

// openLargeFile returns the large file of entry i. The first worker that needs the file opens it, for all workers.
func (w *treeWorker) openLargeFile(i int) (*largeOpen, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if l, ok := w.open[i]; ok {
		return l, nil
	}
	e := &w.index.Entries[i]
	fd, err := w.dirs.OpenFile(e.Path, unix.O_RDWR|unix.O_CREAT, 0o600)
	if err != nil {
		return nil, err
	}
	l := &largeOpen{file: os.NewFile(uintptr(fd), e.Path)}
	from, to := w.index.FramesOf(e)
	for n := from; n < to; n++ {
		if !w.chunks[n] {
			l.framesLeft++
		}
	}
	w.open[i] = l
	return l, nil
}
