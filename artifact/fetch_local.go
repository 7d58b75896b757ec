package artifact

import (
	"cmp"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// source is a release on disk that files are taken from. Its index isn't trusted: all but known files are hashed first.
type source struct {
	top   *os.File
	index *archive.Index
	// known are the files that need no hashing; never nil.
	known *knownFiles
	// files maps the SHA-256 of a file's content to the first entry that has it. chunks maps the
	// SHA-256 of a large file's frame, decoded, to where that content lies.
	files  map[deployments.Digest]int
	chunks map[deployments.Digest]chunk
	// matches has, for each entry of the index that was passed to match, the entry of this release with the same content,
	// or -1.
	matches []int32
}

// chunk is where a frame of a large file lies: in an entry, at an offset in bytes.
type chunk struct {
	entry int
	at    int64
}

func openSource(b *base) (*source, error) {
	x, err := b.decode()
	if err != nil {
		return nil, err
	}
	top, err := safefs.OpenDir(b.dir)
	if err != nil {
		return nil, err
	}
	if b.known != nil && len(b.known.stats) != len(x.Entries) {
		b.known.stats = make([]fileStat, len(x.Entries)) // filled as files are hashed and hard-linked
	}
	s := &source{
		top:    top,
		index:  x,
		known:  cmp.Or(b.known, &knownFiles{}),
		files:  make(map[deployments.Digest]int, len(x.Entries)),
		chunks: map[deployments.Digest]chunk{},
	}
	for i := range x.Entries {
		e := &x.Entries[i]
		if e.Kind != archive.File {
			continue
		}
		if _, ok := s.files[e.Sum]; !ok {
			s.files[e.Sum] = i
		}
		from, to := x.FramesOf(e)
		for n := from; x.Archive && n < to; n++ {
			if f := &x.Frames[n]; !f.Content.IsZero() {
				s.chunks[f.Content] = chunk{i, f.Start - e.Offset}
			}
		}
	}
	return s, nil
}

func (s *source) close() { s.top.Close() }

// match sets matches, by entry of x, the index of the tree to make. It prefers the file at the same path: neighbours
// then lie in one directory, and files of equal content keep inodes of their own.
func (s *source) match(x *archive.Index) {
	s.matches = make([]int32, len(x.Entries))
	old := s.index.Entries
	for i := range x.Entries {
		e := &x.Entries[i]
		s.matches[i] = -1
		if e.Kind != archive.File || e.Size == 0 { // an empty file has no content
			continue
		}
		for len(old) > 0 && archive.ComparePaths(old[0].Path, e.Path) < 0 {
			old = old[1:]
		}
		n, known := len(s.index.Entries)-len(old), len(old) > 0 && old[0].Path == e.Path && old[0].Kind == archive.File
		if !known || old[0].Sum != e.Sum {
			n, known = s.files[e.Sum]
		}
		if known && s.index.Entries[n].Size == e.Size {
			s.matches[i] = int32(n)
		}
	}
}

// has reports whether, by its index, the release has the content of entry i of the index that was passed to match. A
// nil source has nothing.
func (s *source) has(i int) bool { return s != nil && s.matches[i] >= 0 }

// sourceReader opens files of a source. Each goroutine needs its own.
type sourceReader struct {
	*source
	dirs   safefs.Dirs
	buffer []byte
}

func (s *source) reader() *sourceReader {
	return &sourceReader{source: s, dirs: safefs.Dirs{Top: s.top}, buffer: make([]byte, 256<<10)}
}

func (r *sourceReader) close() { r.dirs.Close() }

// open opens an entry's file, which must be a regular file of the right size.
func (r *sourceReader) open(i int) (fd int, info unix.Stat_t, err error) {
	e := &r.index.Entries[i]
	// O_NONBLOCK, as opening a pipe would block for ever. O_NOATIME, as noting each time of access would write
	// each inode.
	fd, err = r.dirs.OpenFile(e.Path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOATIME, 0)
	if errors.Is(err, unix.EPERM) { // the file belongs to another user
		fd, err = r.dirs.OpenFile(e.Path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	}
	if err != nil {
		return -1, info, err
	}
	err = unix.Fstat(fd, &info)
	if err == nil && (info.Mode&unix.S_IFMT != unix.S_IFREG || info.Size != e.Size) {
		err = safefs.ErrChanging
	}
	if err != nil {
		unix.Close(fd)
		return -1, info, err
	}
	return fd, info, nil
}

// openFile is open with an os.File as result.
func (r *sourceReader) openFile(i int) (*os.File, error) {
	fd, _, err := r.open(i)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), r.index.Entries[i].Path), nil
}

// sharing says how a new file may share an old file's blocks: by a hard link, or by a clone.
type sharing struct {
	// link allows hard links to files that belong to uid and gid; -1 stands for any group.
	link     bool
	uid, gid int
	// noClone is set once the file system has refused to clone.
	noClone *atomic.Bool
}

// newSharing returns a sharing that allows hard links if m is immutable, as nothing writes into the live tree of such a
// release. Only files of m's owner are linked, or of this process's user if m names none: a change of owner would
// change the live release.
func newSharing(m *deployments.Manifest) sharing {
	uid, gid, err := safefs.LookupOwner(m.Owner)
	if uid == -1 {
		uid = os.Geteuid()
	}
	return sharing{link: m.Immutable && err == nil, uid: uid, gid: gid, noClone: new(atomic.Bool)}
}

func (s sharing) mayLink(info unix.Stat_t, e *archive.Entry) bool {
	return s.link && info.Mode&unix.S_IFMT == unix.S_IFREG && int(info.Uid) == s.uid &&
		(s.gid == -1 || int(info.Gid) == s.gid) &&
		info.Mode&0o7777 == archive.UnixMode(e.Mode)
}

// takeLocal makes entry i if that needs no fetching. If the old release lacks content that its index has, takeLocal
// makes nothing, and returns nil.
func (w *treeWorker) takeLocal(i int, old *sourceReader, share sharing) error {
	e := &w.index.Entries[i]
	switch {
	case e.Kind != archive.File:
	case e.Size == 0:
		if !w.ready[i] && e.Sum == archive.EmptyDigest {
			return w.writeFile(i, nil)
		}
	// ready is read last: if old has the content, no other goroutine uses ready[i]
	case old != nil && old.has(i) && !w.ready[i]:
		n := int(old.matches[i])
		if linked, err := w.linkKnown(i, n, old, share); linked || err != nil {
			return err
		}
		from, info, err := old.open(n)
		if err != nil {
			return nil
		}
		defer unix.Close(from)
		return w.copyFrom(i, oldFile{n, from, info}, old, share)
	}
	return nil
}

// takeChunks copies into the large file of entry i the frames that the old release has, too. If
// that makes the file whole, takeChunks sets ready[i].
func (w *treeWorker) takeChunks(i int, old *sourceReader) error {
	e := &w.index.Entries[i]
	var to *os.File
	from, end := w.index.FramesOf(e)
	missing := 0
	for n := from; n < end; n++ {
		fr := w.index.Frames[n]
		if w.chunks[n] {
			continue // an earlier call left it
		}
		piece, ok := old.chunks[fr.Content]
		if !ok {
			missing++
			continue
		}
		f, err := old.openFile(piece.entry)
		if err != nil {
			missing++
			continue
		}
		data := make([]byte, fr.Length)
		_, err = f.ReadAt(data, piece.at)
		f.Close()
		if err != nil || deployments.DigestOf(data) != fr.Content {
			missing++
			continue
		}
		if to == nil {
			fd, err := w.dirs.OpenFile(e.Path, unix.O_RDWR|unix.O_CREAT, 0o600)
			if err != nil {
				return err
			}
			to = os.NewFile(uintptr(fd), e.Path)
			defer to.Close()
		}
		if _, err := to.WriteAt(data, fr.Start-e.Offset); err != nil {
			return err
		}
		w.chunks[n] = true
		w.partial.Store(true)
	}
	if missing > 0 || to == nil {
		return nil
	}
	w.ready[i] = true
	return to.Chmod(e.Mode)
}

// oldFile is an open file of the old release.
type oldFile struct {
	entry, fd int
	info      unix.Stat_t
}

// hasContent reports whether an open file has e's content. It hashes the file unless it is known to
// be unchanged.
func (r *sourceReader) hasContent(f oldFile, e *archive.Entry) bool {
	if r.known.isUnchanged(f.entry, &f.info) {
		return true
	}
	sum, err := r.hash(f.fd, e.Size)
	return err == nil && sum == e.Sum
}

// copyFrom makes entry i from the file in f, which should have the entry's content: by a hard link, a clone or a copy.
// If the content differs or can't be read, it makes nothing, and returns nil.
func (w *treeWorker) copyFrom(i int, f oldFile, old *sourceReader, share sharing) error {
	e, from := &w.index.Entries[i], f.fd
	if w.partly(i) {
		// The old file is hashed first: frames from an interrupted fetch are given up only for a file that is right.
		if !old.hasContent(f, e) {
			return nil
		}
		if err := w.discard(i); err != nil {
			return err
		}
	}
	if share.mayLink(f.info, e) {
		if !old.hasContent(f, e) {
			return nil
		}
		if w.link(from, e) == nil {
			var after unix.Stat_t
			if unix.Fstat(from, &after) == nil && statOf(&f.info).sameContent(statOf(&after)) {
				old.known.recordLink(f.entry, &after)
				w.stats[i] = statOf(&after)
			}
			w.ready[i] = true
			return nil
		}
	}
	if e.Size <= int64(len(old.buffer)) && share.noClone.Load() {
		data := old.buffer[:e.Size]
		if safefs.ReadAll(from, data, 0) != nil || deployments.DigestOf(data) != e.Sum {
			return nil
		}
		return w.writeFile(i, data)
	}
	to, err := w.create(e)
	if err != nil {
		return err
	}
	right, err := copyContent(to, f, e, old, share)
	if err = errors.Join(err, safefs.PathError("close", e.Path, unix.Close(to))); err != nil || !right {
		return errors.Join(err, w.dirs.Remove(e.Path))
	}
	w.ready[i] = true
	if share.noClone.Load() { // a clone shares blocks that are on the disk
		w.back.wrote(e.Size)
	}
	return nil
}

// copyContent clones or copies the old file f into to, and reports whether to has e's content then. It returns an error
// only if to can't be written. If f can't be read, or has other content, it returns false.
func copyContent(to int, f oldFile, e *archive.Entry, old *sourceReader, share sharing) (bool, error) {
	from := f.fd
	if !share.noClone.Load() {
		if unix.IoctlFileClone(to, from) == nil {
			// A service may have appended to the file since it was opened, and a clone copies all of it.
			var cloned unix.Stat_t
			if err := unix.Fstat(to, &cloned); err != nil || cloned.Size != e.Size {
				return false, nil
			}
			var after unix.Stat_t
			if old.known.isUnchanged(f.entry, &f.info) && unix.Fstat(from, &after) == nil && statOf(&after) == statOf(&f.info) {
				return true, nil
			}
			sum, err := old.hash(to, e.Size)
			return err == nil && sum == e.Sum, nil
		}
		share.noClone.Store(true)
	}
	h := sha256.New()
	var failure error
	err := old.read(from, e.Size, func(data []byte) bool {
		h.Write(data)
		failure = safefs.PathError("write", e.Path, safefs.WriteAll(to, data))
		return failure == nil
	})
	return err == nil && failure == nil && deployments.Digest(h.Sum(nil)) == e.Sum, failure
}

// linkKnown makes entry i a hard link to the old release's file n, and reports whether it did. It
// does so only if share allows it, and file n is known to be unchanged. It opens neither file,
// which halves the system calls.
func (w *treeWorker) linkKnown(i, n int, old *sourceReader, share sharing) (bool, error) {
	if !share.link || w.partly(i) {
		return false, nil
	}
	e := &w.index.Entries[i]
	from, oldName, err := old.dirs.At(old.index.Entries[n].Path)
	if err != nil {
		return false, nil
	}
	var before unix.Stat_t
	if unix.Fstatat(from, oldName, &before, unix.AT_SYMLINK_NOFOLLOW) != nil || !share.mayLink(before, e) ||
		before.Size != e.Size || !old.known.isUnchanged(n, &before) {
		return false, nil
	}
	after, err := w.linkNamed(e, from, oldName, &before, share)
	if after == nil {
		return false, err
	}
	old.known.recordLink(n, after)
	w.stats[i] = statOf(after)
	w.ready[i] = true
	return true, nil
}

// linkNamed makes entry e a hard link to the file oldName in the open directory from, and returns the file's stat from
// afterwards. before is the stat of the file as it was checked. If the file was replaced or changed since, or can't be
// linked, linkNamed leaves no link and returns nil.
func (w *treeWorker) linkNamed(e *archive.Entry, from int, oldName string, before *unix.Stat_t,
	share sharing) (*unix.Stat_t, error) {
	dir, name, err := w.dirs.At(e.Path)
	if err != nil {
		return nil, err
	}
	if unix.Linkat(from, oldName, dir, name, 0) != nil {
		return nil, nil // the caller tries again with an open file, and learns the reason
	}
	var after unix.Stat_t
	err = unix.Fstatat(dir, name, &after, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil || !share.mayLink(after, e) || after.Size != e.Size || !statOf(before).sameContent(statOf(&after)) {
		return nil, w.dirs.Remove(e.Path)
	}
	return &after, nil
}

// link makes e a hard link to the open file from, whose content was hashed.
func (w *treeWorker) link(from int, e *archive.Entry) error {
	dir, name, err := w.dirs.At(e.Path)
	if err != nil {
		return err
	}
	// This links the descriptor, not the old name, where another file may lie by now. AT_EMPTY_PATH needs
	// CAP_DAC_READ_SEARCH or, since Linux 6.10, that this process opened the file. Linking by /proc always works.
	if err := unix.Linkat(from, "", dir, name, unix.AT_EMPTY_PATH); err == nil {
		return nil
	}
	return unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(from), dir, name, unix.AT_SYMLINK_FOLLOW)
}

// read passes a file of known size to each, piece by piece, until the end or until each returns false. The pieces share
// one buffer: each must not keep them.
func (r *sourceReader) read(fd int, size int64, each func([]byte) bool) error {
	for at := int64(0); at < size; {
		data := r.buffer[:min(size-at, int64(len(r.buffer)))]
		if err := safefs.ReadAll(fd, data, at); err != nil {
			return err
		}
		if !each(data) {
			return nil
		}
		at += int64(len(data))
	}
	return nil
}

func (r *sourceReader) hash(fd int, size int64) (deployments.Digest, error) {
	if size <= int64(len(r.buffer)) {
		data := r.buffer[:size]
		err := safefs.ReadAll(fd, data, 0)
		return deployments.DigestOf(data), err
	}
	h := sha256.New()
	err := r.read(fd, size, func(data []byte) bool { h.Write(data); return true })
	return deployments.Digest(h.Sum(nil)), err
}

func hashFile(f io.Reader) (deployments.Digest, error) {
	h := sha256.New()
	_, err := io.CopyBuffer(struct{ io.Writer }{h}, struct{ io.Reader }{f}, make([]byte, 256<<10))
	return deployments.Digest(h.Sum(nil)), err
}
