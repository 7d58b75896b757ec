package archive

import (
	"cmp"
	"encoding/binary"
	"errors"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"

	"kedge/deployments"
)

// ErrIndex means that an index is malformed, or does not match the archive or manifest that names it.
var ErrIndex = errors.New("bad index")

const (
	indexMagic = "kedgeix\x01"

	MaxIndex   = 512 << 20 // bytes of an index
	maxEntries = 4 << 20
	maxPath    = 4096 // bytes
	maxName    = 255  // bytes
	MaxLevels  = 128  // directories above a path, the top included; also in an archive without an index
	// All paths together may have maxPaths bytes, plus pathGrowth bytes for each byte of the index. An entry stores
	// only what its path doesn't share with the path before, so that six bytes can stand for a path of 4,096.
	maxPaths   = 64 << 20
	pathGrowth = 32
	maxTree    = 1 << 46 // bytes of a tree; keeps sums of sizes far from overflow
	MaxFrame   = 4 << 20 // bytes that one frame decodes to
)

// maxEncoded returns the largest size in the archive of a frame that decodes to raw bytes: zstd stores what it can't
// compress.
func maxEncoded(raw int64) int64 { return raw + raw>>7 + 1024 }

// Kind is the type of an entry: a file, a directory, or a symbolic or hard link.
type Kind uint8

// The kinds of entries, by their numbers in an index.
const (
	File Kind = iota
	Dir
	Symlink
	Hardlink
)

// Entry is one path of a tree.
type Entry struct {
	Path string
	Kind Kind
	Mode fs.FileMode        // permission bits, and a directory's sticky and set-group-id bits
	Size int64              // of a file
	Sum  deployments.Digest // of a file's content
	// Offset is where a file's content begins in the archive's tar stream; of an empty file it means nothing.
	Offset int64
	// Target is the target of a symbolic link. Original is the number of the entry that a hard link is another
	// name of.
	Target   string
	Original int
}

// Frame is one zstd frame of the archive.
type Frame struct {
	Offset, Size  int64              // in the archive
	Start, Length int64              // in the tar stream
	Sum           deployments.Digest // of the frame as it lies in the archive
	// Content, unless it is zero, is the SHA-256 of what the frame decodes to, all of which is one file's content.
	Content deployments.Digest
}

// Index describes a tree, and where its bytes lie in an archive.
type Index struct {
	Archive bool // false: a list of hashes of a tree that came without an index; it has no frames
	Entries []Entry
	Frames  []Frame
}

// TreeSize returns the total size of the tree's files, in bytes.
func (x *Index) TreeSize() (n int64) {
	for i := range x.Entries {
		n += x.Entries[i].Size
	}
	return n
}

// ArchiveSize returns the size of the archive, in bytes; 0 for a list of hashes.
func (x *Index) ArchiveSize() int64 {
	if len(x.Frames) == 0 {
		return 0
	}
	last := x.Frames[len(x.Frames)-1]
	return last.Offset + last.Size
}

// FramesOf returns the range of frames that hold a file's content: those from number from on, before number to. The
// range is empty for an empty file. If x is a list of hashes, which has no frames, the result has no meaning.
func (x *Index) FramesOf(e *Entry) (from, to int) {
	if e.Size == 0 {
		return 0, 0
	}
	at := func(f Frame, offset int64) int { return cmp.Compare(f.Start+f.Length, offset) }
	from, found := slices.BinarySearchFunc(x.Frames, e.Offset, at)
	if found { // it ends where the content begins
		from++
	}
	to, _ = slices.BinarySearchFunc(x.Frames, e.Offset+e.Size, at)
	return from, to + 1
}

// ComparePaths orders paths as a walk visits them: a directory, then its content, then its next sibling.
func ComparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			switch {
			case a[i] == '/':
				return -1
			case b[i] == '/':
				return 1
			}
			return cmp.Compare(a[i], b[i])
		}
	}
	return cmp.Compare(len(a), len(b))
}

// Find returns the number of the entry at p, or -1.
func (x *Index) Find(p string) int {
	i, ok := slices.BinarySearchFunc(x.Entries, p, func(e Entry, p string) int { return ComparePaths(e.Path, p) })
	if !ok {
		return -1
	}
	return i
}

// Encode returns the index in the format of the package comment. It checks nothing: see DecodeIndex.
func (x *Index) Encode() []byte {
	out := make([]byte, 0, len(indexMagic)+64*len(x.Entries)+40*len(x.Frames)+16)
	out = append(out, indexMagic...)
	flags := uint64(0)
	if x.Archive {
		flags = 1
	}
	out = binary.AppendUvarint(out, flags)
	out = binary.AppendUvarint(out, uint64(len(x.Entries)))
	out = binary.AppendUvarint(out, uint64(len(x.Frames)))
	last, end := "", int64(0)
	for i := range x.Entries {
		e := &x.Entries[i]
		shared := commonPrefix(last, e.Path)
		out = append(out, byte(e.Kind))
		out = binary.AppendUvarint(out, uint64(shared))
		out = appendString(out, e.Path[shared:])
		out = binary.AppendUvarint(out, uint64(UnixMode(e.Mode)))
		last = e.Path
		switch e.Kind {
		case File:
			out = binary.AppendUvarint(out, uint64(e.Size))
			out = append(out, e.Sum[:]...)
			switch {
			case !x.Archive:
			case e.Size == 0: // it has no place in the stream
				out = binary.AppendUvarint(out, 0)
			default:
				out = binary.AppendUvarint(out, uint64(e.Offset-end))
				end = e.Offset + e.Size
			}
		case Symlink:
			out = appendString(out, e.Target)
		case Hardlink:
			out = binary.AppendUvarint(out, uint64(e.Original))
		}
	}
	for i := range x.Frames {
		f := &x.Frames[i]
		out = binary.AppendUvarint(out, uint64(f.Size))
		if f.Content.IsZero() {
			out = binary.AppendUvarint(out, uint64(f.Length)<<1)
			out = append(out, f.Sum[:]...)
		} else {
			out = binary.AppendUvarint(out, uint64(f.Length)<<1|1)
			out = append(out, f.Sum[:]...)
			out = append(out, f.Content[:]...)
		}
	}
	return out
}

func appendString(out []byte, s string) []byte {
	return append(binary.AppendUvarint(out, uint64(len(s))), s...)
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// dirOnly are mode bits that a release's directories may have, and its files may not.
const dirOnly = fs.ModeSticky | fs.ModeSetgid

// UnixMode returns a mode's bits for chmod: the permission bits, and those of dirOnly.
func UnixMode(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	if m&fs.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	return bits
}

// modeOf is the inverse of UnixMode.
func modeOf(bits uint32) fs.FileMode {
	m := fs.FileMode(bits & 0o777)
	if bits&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	if bits&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	return m
}
