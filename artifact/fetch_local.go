package artifact

import (
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"kedge/deployments"
)

// source is a release on disk that files are taken from. What it says is believed only after hashing.
type source struct {
	root  *os.Root
	index *index
	// files has the entry that holds some content, by its SHA-256, and chunks where a large file's frames lie.
	files  map[deployments.Digest]int
	chunks map[deployments.Digest]chunk
}

// chunk is a piece of a file.
type chunk struct {
	entry int
	at    int64
}

func openSource(b *base) (*source, error) {
	x, err := decodeIndex(b.index)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(b.dir)
	if err != nil {
		return nil, err
	}
	s := &source{root: root, index: x, files: make(map[deployments.Digest]int, len(x.entries)), chunks: map[deployments.Digest]chunk{}}
	for i := range x.entries {
		e := &x.entries[i]
		if e.kind != kindFile {
			continue
		}
		if _, ok := s.files[e.sum]; !ok {
			s.files[e.sum] = i
		}
		from, to := x.framesOf(e)
		for n := from; x.archive && n < to; n++ {
			if x.chunkOf(n, e) {
				s.chunks[x.frames[n].content] = chunk{i, x.frames[n].start - e.offset}
			}
		}
	}
	return s, nil
}

func (s *source) close() { s.root.Close() }

// has reports whether the release should hold e's content; an empty file has none.
func (s *source) has(e *entry) bool {
	if s == nil || e.size == 0 {
		return false
	}
	i, ok := s.files[e.sum]
	return ok && s.index.entries[i].size == e.size
}

// sourceReader opens files of a source; each goroutine has its own.
type sourceReader struct {
	*source
	dirs   dirs
	buffer []byte
}

func (s *source) reader() *sourceReader {
	return &sourceReader{source: s, dirs: dirs{root: s.root}, buffer: make([]byte, 256<<10)}
}

func (r *sourceReader) close() { r.dirs.close() }

// openFile opens an entry's file, which must be a plain one of the right size.
func (r *sourceReader) openFile(i int) (*os.File, os.FileInfo, error) {
	e := &r.index.entries[i]
	dir, name, err := r.dirs.at(e.path)
	if err != nil {
		return nil, nil, err
	}
	// Not blocking: were it a pipe by now, opening it would wait for ever.
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || info.Size() != e.size) {
		err = errChanging
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// sharing is how a new file may share what an old one holds.
type sharing struct {
	// link allows hard links to files of this owner.
	link     bool
	uid, gid int
	// noClone is set once the file system has refused to clone.
	noClone *atomic.Bool
}

// newSharing allows hard links where nothing writes into live trees. An inode has one owner, so that a file whose owner will be
// changed must not be linked: the live release would follow.
func newSharing(m *deployments.Manifest) sharing {
	s := sharing{link: m.Immutable, uid: os.Geteuid(), gid: -1, noClone: new(atomic.Bool)}
	name, groupName, _ := strings.Cut(m.Owner, ":")
	if name != "" {
		s.uid = -2
		if id, err := strconv.Atoi(name); err == nil {
			s.uid = id
		} else if u, err := user.Lookup(name); err == nil {
			s.uid, _ = strconv.Atoi(u.Uid)
		}
	}
	if groupName != "" {
		s.gid = -2
		if id, err := strconv.Atoi(groupName); err == nil {
			s.gid = id
		} else if g, err := user.LookupGroup(groupName); err == nil {
			s.gid, _ = strconv.Atoi(g.Gid)
		}
	}
	return s
}

func (s sharing) mayLink(info os.FileInfo, e *entry) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && s.link && int(st.Uid) == s.uid && (s.gid == -1 || int(st.Gid) == s.gid) &&
		info.Mode() == e.mode
}

// takeLocal makes entry i if it can without fetching. That the old release fails to give what it should is no error.
func (w *treeWorker) takeLocal(i int, old *sourceReader, share sharing) error {
	e := &w.index.entries[i]
	switch {
	case e.kind != kindFile:
	case e.size == 0:
		if !w.ready[i] && e.sum == emptyDigest {
			return w.writeFile(i, nil)
		}
	case old != nil && old.has(e) && !w.ready[i]: // ready comes last: only what old has is this goroutine's
		from, info, err := old.openFile(old.files[e.sum])
		if err != nil {
			return nil
		}
		defer from.Close()
		return w.copyFrom(i, from, info, old, share)
	}
	return nil
}

// takeChunks puts into a large file that changed what the old release has of it, where a frame's content is there unchanged.
func (w *treeWorker) takeChunks(i int, old *sourceReader) error {
	e := &w.index.entries[i]
	var to *os.File
	from, end := w.index.framesOf(e)
	missing := 0
	for n := from; n < end; n++ {
		fr := w.index.frames[n]
		piece, ok := old.chunks[fr.content]
		if w.chunks[n] || !ok || !w.index.chunkOf(n, e) {
			missing++
			continue
		}
		f, _, err := old.openFile(piece.entry)
		if err != nil {
			missing++
			continue
		}
		data := make([]byte, fr.length)
		_, err = f.ReadAt(data, piece.at)
		f.Close()
		if err != nil || digestOf(data) != fr.content {
			missing++
			continue
		}
		if to == nil {
			if to, err = w.root.OpenFile(e.path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600); err != nil {
				return err
			}
			defer to.Close()
		}
		if _, err := to.WriteAt(data, fr.start-e.offset); err != nil {
			return err
		}
		w.chunks[n] = true
	}
	if missing > 0 || to == nil {
		return nil
	}
	w.ready[i] = true
	return to.Chmod(e.mode)
}

// copyFrom makes entry i of a file that should have its content. It is not made if the content is another.
func (w *treeWorker) copyFrom(i int, from *os.File, info os.FileInfo, old *sourceReader, share sharing) error {
	e := &w.index.entries[i]
	if share.mayLink(info, e) {
		sum, err := old.hash(from)
		if err != nil || sum != e.sum {
			return nil
		}
		if w.link(e, old) == nil {
			w.ready[i] = true
			return nil
		}
		if _, err := from.Seek(0, io.SeekStart); err != nil {
			return nil
		}
	}
	if e.size <= int64(len(old.buffer)) && share.noClone.Load() {
		data := old.buffer[:e.size]
		if _, err := io.ReadFull(from, data); err != nil || digestOf(data) != e.sum {
			return nil
		}
		return w.writeFile(i, data)
	}
	to, err := w.create(e)
	if err != nil {
		return err
	}
	right, err := copyContent(to, from, e, old, share)
	if err = errors.Join(err, to.Close()); err != nil || !right {
		return errors.Join(err, w.remove(e))
	}
	w.ready[i] = true
	return nil
}

// copyContent clones or copies, and reports whether the content is e's. Only a failure to write is an error.
func copyContent(to, from *os.File, e *entry, old *sourceReader, share sharing) (bool, error) {
	if !share.noClone.Load() {
		err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
		if err == nil {
			sum, err := old.hash(to)
			return err == nil && sum == e.sum, nil
		}
		share.noClone.Store(true)
	}
	h := sha256.New()
	for left := e.size; left > 0; {
		data := old.buffer[:min(left, int64(len(old.buffer)))]
		if _, err := io.ReadFull(from, data); err != nil {
			return false, nil
		}
		h.Write(data)
		if _, err := to.Write(data); err != nil {
			return false, err
		}
		left -= int64(len(data))
	}
	return deployments.Digest(h.Sum(nil)) == e.sum, nil
}

// link gives the file that was opened last another name, that of e.
func (w *treeWorker) link(e *entry, old *sourceReader) error {
	_, name, err := w.dirs.at(e.path)
	if err != nil {
		return err
	}
	to, err := w.dirs.descriptor()
	if err != nil {
		return err
	}
	from, err := old.dirs.descriptor()
	if err != nil {
		return err
	}
	_, oldName, err := old.dirs.at(old.index.entries[old.files[e.sum]].path)
	if err != nil {
		return err
	}
	return unix.Linkat(int(from.Fd()), oldName, int(to.Fd()), name, 0)
}

func (r *sourceReader) hash(f *os.File) (deployments.Digest, error) {
	h := sha256.New()
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, r.buffer)
	return deployments.Digest(h.Sum(nil)), err
}

func hashFile(f io.Reader) (deployments.Digest, error) {
	h := sha256.New()
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, make([]byte, 256<<10))
	return deployments.Digest(h.Sum(nil)), err
}
