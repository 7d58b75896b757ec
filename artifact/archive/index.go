package archive

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/safetext"
)

// ErrIndex means that an index is malformed, or does not match the archive or manifest that names it.
var ErrIndex = errors.New("bad index")

const (
	indexMagic = "kedgeix\x01"

	MaxIndex   = 512 << 20 // bytes of an index
	maxEntries = 4 << 20
	maxPath    = 4096 // bytes
	maxName    = 255  // bytes
	MaxLevels  = 128  // directories above a path, in an archive without an index, too
	// maxPaths, in bytes, and pathGrowth, in lengths of the index, bound all paths together: paths share the
	// beginning of the path before, so that an entry of six bytes can stand for a path of 4,096.
	maxPaths   = 64 << 20
	pathGrowth = 32
	maxTree    = 1 << 46 // bytes of a tree; keeps sums of sizes far from overflow
	MaxFrame   = 4 << 20 // bytes that one frame decodes to
)

// maxEncoded bounds a frame's size in the archive by what it decodes to: zstd stores what it can't compress.
func maxEncoded(raw int64) int64 { return raw + raw>>7 + 1024 }

// Kind is what an entry is.
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
	// Offset is where a file's content begins in the tar stream.
	Offset int64
	// Target is the target of a symbolic link. Original is the number of the entry that a hard link is another
	// name of.
	Target   string
	Original int
}

// Frame is one zstd frame of the archive.
type Frame struct {
	Offset, Size  int64 // in the archive
	Start, Length int64 // in the tar stream
	Sum           deployments.Digest
	// Content is the SHA-256 of what the frame decodes to if all of that is one file's content, else zero.
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

// ArchiveSize returns the size of the archive, in bytes.
func (x *Index) ArchiveSize() int64 {
	if len(x.Frames) == 0 {
		return 0
	}
	last := x.Frames[len(x.Frames)-1]
	return last.Offset + last.Size
}

// FramesOf returns the range of frames that hold a file's content.
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

// modeOf returns the mode of which UnixMode gives these bits.
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

// DecodeIndex decodes an untrusted index. Whatever the bytes are, it neither panics nor takes more memory than a
// small multiple of their length, and its result keeps every rule of the package comment.
func DecodeIndex(data []byte) (*Index, error) {
	if len(data) > MaxIndex {
		return nil, fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrIndex, len(data), MaxIndex)
	}
	rest, ok := bytes.CutPrefix(data, []byte(indexMagic))
	if !ok {
		return nil, fmt.Errorf("%w: it does not begin with the magic number of an index", ErrIndex)
	}
	r := &cursor{rest: rest}
	flags := r.number(1)
	// An entry has at least 5 bytes and a frame 34. This bounds both numbers before memory is allocated.
	entries := int(r.number(uint64(min(maxEntries, len(data)/5))))
	frames := int(r.number(uint64(len(data) / 34)))
	if r.err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIndex, r.err)
	}
	x := &Index{Archive: flags == 1, Entries: make([]Entry, entries), Frames: make([]Frame, frames)}
	if !x.Archive && frames > 0 {
		return nil, fmt.Errorf("%w: it lists frames, though it is of no archive", ErrIndex)
	}
	end, err := x.decodeEntries(r)
	if err == nil {
		err = x.decodeFrames(r, end)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIndex, err)
	}
	if len(r.rest) > 0 {
		return nil, fmt.Errorf("%w: %d bytes follow it", ErrIndex, len(r.rest))
	}
	return x, nil
}

const pathsAtOnce = 64 << 10

// decodeEntries returns where the last file's content ends in the tar stream.
func (x *Index) decodeEntries(r *cursor) (end int64, err error) {
	var last []byte
	var paths strings.Builder // holds the paths of many entries in one allocation
	var tree int64
	left := maxPaths + pathGrowth*len(r.rest)
	dirs := []string{""} // the directories that the next entry may lie in
	for i := range x.Entries {
		e := &x.Entries[i]
		e.Kind = Kind(r.number(uint64(Hardlink)))
		shared := r.number(uint64(len(last)))
		suffix := r.bytes(r.number(maxPath))
		mode := r.number(0o3777)
		if r.err != nil {
			return 0, fmt.Errorf("entry %d: %w", i, r.err)
		}
		last = append(last[:shared], suffix...)
		if left -= len(last); left < 0 {
			return 0, fmt.Errorf("entry %d: its path and those before it have too many bytes for so short an index", i)
		}
		if paths.Cap()-paths.Len() < len(last) {
			paths = strings.Builder{}
			paths.Grow(min(len(r.rest), pathsAtOnce) + len(last))
		}
		paths.Write(last)
		e.Path = paths.String()[paths.Len()-len(last):]
		if e.Mode = modeOf(uint32(mode)); e.Mode&dirOnly != 0 && e.Kind != Dir {
			return 0, fmt.Errorf("entry %d: %q is sticky or setgid, which only a directory may be", i, e.Path)
		}
		parent := safefs.Parent(e.Path)
		for len(dirs) > 0 && dirs[len(dirs)-1] != parent {
			dirs = dirs[:len(dirs)-1]
		}
		// Of most paths the directory has been checked, and only the name is new.
		if parent == "" || len(dirs) == 0 || len(dirs) > MaxLevels || len(e.Path) > maxPath ||
			!isName(e.Path[len(parent)+1:]) {
			if err := CheckPath(e.Path); err != nil {
				return 0, fmt.Errorf("entry %d: %w", i, err)
			}
		}
		if i > 0 {
			before := x.Entries[i-1].Path
			same := commonPrefix(before, e.Path)
			if ComparePaths(before[same:], e.Path[same:]) >= 0 {
				return 0, fmt.Errorf("entry %d: %q is not in order", i, e.Path)
			}
			if uint64(same) != shared {
				return 0, fmt.Errorf("entry %d: %q shares more with the path before it than it says", i, e.Path)
			}
		}
		if len(dirs) == 0 {
			return 0, fmt.Errorf("entry %d: %q does not lie in a directory of the tree", i, e.Path)
		}
		switch e.Kind {
		case Dir:
			dirs = append(dirs, e.Path)
		case File:
			e.Size = int64(r.number(maxTree))
			r.digest(&e.Sum)
			if x.Archive {
				gap := int64(r.number(maxTree))
				if e.Size == 0 && gap > 0 {
					return 0, fmt.Errorf("entry %d: %q is empty and yet has an offset", i, e.Path)
				}
				e.Offset = end + gap
				end = e.Offset + e.Size
			}
			if tree += e.Size; tree > maxTree || end > 2*maxTree {
				return 0, fmt.Errorf("entry %d: the tree has more than %d bytes", i, int64(maxTree))
			}
		case Symlink:
			e.Target = string(r.bytes(r.number(maxPath)))
			if r.err == nil {
				if err := checkTargetText(e.Path, e.Target); err != nil {
					return 0, fmt.Errorf("entry %d: %w", i, err)
				}
			}
		case Hardlink:
			e.Original = int(r.number(maxEntries))
			if e.Original >= i || x.Entries[e.Original].Kind != File {
				return 0, fmt.Errorf("entry %d: %q is a hard link to what is not a file before it", i, e.Path)
			}
		}
		if r.err != nil {
			return 0, fmt.Errorf("entry %d: %w", i, r.err)
		}
	}
	return end, nil
}

func (x *Index) decodeFrames(r *cursor, end int64) error {
	var offset, start int64
	within := 0 // the first entry that ends after start
	for i := range x.Frames {
		f := &x.Frames[i]
		f.Offset, f.Start = offset, start
		f.Size = int64(r.number(math.MaxInt32))
		length := r.number(2*MaxFrame + 1)
		f.Length = int64(length >> 1)
		r.digest(&f.Sum)
		if length&1 == 1 {
			r.digest(&f.Content)
		}
		switch {
		case r.err != nil:
			return fmt.Errorf("frame %d: %w", i, r.err)
		case f.Size == 0 || f.Length == 0 || f.Size > maxEncoded(f.Length):
			return fmt.Errorf("frame %d: %d bytes that decode to %d", i, f.Size, f.Length)
		case length&1 == 1 && f.Content.IsZero():
			return fmt.Errorf("frame %d: no hash of its content", i)
		}
		if length&1 == 1 {
			ended := func(e *Entry) bool { return e.Kind != File || e.Offset+e.Size <= start }
			for within < len(x.Entries) && ended(&x.Entries[within]) {
				within++
			}
			if within == len(x.Entries) || start < x.Entries[within].Offset ||
				start+f.Length > x.Entries[within].Offset+x.Entries[within].Size {
				return fmt.Errorf("frame %d: it has a hash of its content, which is not one file's", i)
			}
		}
		offset += f.Size
		start += f.Length
	}
	if x.Archive && end > start {
		return fmt.Errorf("the files end at byte %d of the tar stream, the frames at %d", end, start)
	}
	return nil
}

// CheckPath returns an error unless a path is clean, relative, and stays in the tree.
func CheckPath(p string) error {
	if p == "" || len(p) > maxPath || strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("the path %q is empty, too long or has a zero byte", clip(p))
	}
	if strings.Count(p, "/") >= MaxLevels {
		return fmt.Errorf("the path %q lies more than %d directories deep", clip(p), MaxLevels)
	}
	for part := range strings.SplitSeq(p, "/") {
		if !isName(part) {
			return fmt.Errorf("the path %q is absolute, leaves the tree, is not clean, or has a name over %d bytes",
				clip(p), maxName)
		}
	}
	return nil
}

// isName reports whether a part of a path is a name that a file can have.
func isName(part string) bool {
	return part != "" && part != "." && part != ".." && len(part) <= maxName && strings.IndexByte(part, 0) < 0
}

// CheckTargets returns an error unless the symbolic links lead where they may.
func (x *Index) CheckTargets(allowed deployments.Symlinks) error {
	for i := range x.Entries {
		if e := &x.Entries[i]; e.Kind == Symlink {
			if err := CheckTarget(e.Path, e.Target, allowed); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkTargetText returns an error unless a text can be a symbolic link's target.
func checkTargetText(p, target string) error {
	if target == "" || len(target) >= maxPath || strings.IndexByte(target, 0) >= 0 {
		return fmt.Errorf("the target of the symbolic link %q is empty, too long or has a zero byte", clip(p))
	}
	return nil
}

// CheckTarget returns an error unless a symbolic link stays in the tree, or the manifest allows any. It need not
// resolve other links on the target's way: the target's ".." come first, and there can be no more of them than real
// directories above the link.
func CheckTarget(p, target string, allowed deployments.Symlinks) error {
	if err := checkTargetText(p, target); err != nil || allowed == deployments.SymlinksAny {
		return err
	}
	if strings.HasPrefix(target, "/") {
		return fmt.Errorf(
			"the symbolic link %q leads out of the tree, to %q, which takes symlinks: any in the manifest",
			clip(p),
			clip(target),
		)
	}
	depth, climbing := strings.Count(p, "/"), true
	for part := range strings.SplitSeq(target, "/") {
		switch part {
		case "..":
			if depth--; depth < 0 || !climbing {
				return fmt.Errorf(
					"the symbolic link %q leads out of the tree, or might: %q; that takes symlinks: any in the manifest",
					clip(p),
					clip(target),
				)
			}
		case "", ".":
		default:
			climbing = false
		}
	}
	return nil
}

func clip(s string) string { return safetext.Cut(s, 120) }

// cursor reads numbers and bytes from a buffer. After the first error it returns zeros.
type cursor struct {
	rest []byte
	err  error
}

var errShort = errors.New("it is cut short")

// number reads a varint of at most max.
func (r *cursor) number(max uint64) uint64 {
	n, size := binary.Uvarint(r.rest)
	switch {
	case r.err != nil:
		return 0
	case size == 0:
		r.err = errShort
		return 0
	case size < 0 || n > max:
		r.err = fmt.Errorf("a number is larger than allowed: at most %d", max)
		return 0
	case size > 1 && r.rest[size-1] == 0:
		r.err = errors.New("a number is not in its shortest encoding")
		return 0
	}
	r.rest = r.rest[size:]
	return n
}

// bytes returns the next n bytes, which alias the buffer.
func (r *cursor) bytes(n uint64) []byte {
	if r.err == nil && n > uint64(len(r.rest)) {
		r.err = errShort
	}
	if r.err != nil {
		return nil
	}
	out := r.rest[:n]
	r.rest = r.rest[n:]
	return out
}

func (r *cursor) digest(d *deployments.Digest) { copy(d[:], r.bytes(uint64(len(d)))) }
