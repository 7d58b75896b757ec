package artifact

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

	maxIndex   = 512 << 20
	maxEntries = 4 << 20
	maxPath    = 4096
	maxName    = 255
	maxLevels  = 128 // directories above a path, in an archive without an index, too
	// maxPaths, in bytes, and pathGrowth, in lengths of the index, bound all paths together: paths share the
	// beginning of the path before, so that an entry of six bytes can stand for a path of 4,096.
	maxPaths   = 64 << 20
	pathGrowth = 32
	maxTree    = 1 << 46 // bytes of a tree; keeps sums of sizes far from overflow
	maxFrame   = 4 << 20 // bytes that one frame decodes to
)

// maxEncoded bounds a frame's size in the archive by what it decodes to: zstd stores what it can't compress.
func maxEncoded(raw int64) int64 { return raw + raw>>7 + 1024 }

type kind uint8

const (
	kindFile kind = iota
	kindDir
	kindSymlink
	kindHardlink
)

// entry is one path of a tree.
type entry struct {
	path string
	kind kind
	mode fs.FileMode // permission bits, and those of dirOnly
	size int64       // of a file
	sum  deployments.Digest
	// offset is where a file's content begins in the tar stream.
	offset int64
	// target is the target of a symbolic link. original is the number of the entry that a hard link is another
	// name of.
	target   string
	original int
}

// frame is one zstd frame of the archive.
type frame struct {
	offset, size  int64 // in the archive
	start, length int64 // in the tar stream
	sum           deployments.Digest
	// content is the SHA-256 of what the frame decodes to if all of that is one file's content, else zero.
	content deployments.Digest
}

// index describes a tree, and where its bytes lie in an archive.
type index struct {
	archive bool // false: a list of hashes, without frames
	entries []entry
	frames  []frame
}

// size returns the total size of the tree's files, and archiveSize that of the archive.
func (x *index) size() (n int64) {
	for i := range x.entries {
		n += x.entries[i].size
	}
	return n
}

func (x *index) archiveSize() int64 {
	if len(x.frames) == 0 {
		return 0
	}
	last := x.frames[len(x.frames)-1]
	return last.offset + last.size
}

// framesOf returns the range of frames that hold a file's content.
func (x *index) framesOf(e *entry) (from, to int) {
	if e.size == 0 {
		return 0, 0
	}
	at := func(f frame, offset int64) int { return cmp.Compare(f.start+f.length, offset) }
	from, found := slices.BinarySearchFunc(x.frames, e.offset, at)
	if found { // it ends where the content begins
		from++
	}
	to, _ = slices.BinarySearchFunc(x.frames, e.offset+e.size, at)
	return from, to + 1
}

// comparePaths orders paths as a walk visits them: a directory, then its content, then its next sibling.
func comparePaths(a, b string) int {
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

// find returns the number of the entry at p, or -1.
func (x *index) find(p string) int {
	i, ok := slices.BinarySearchFunc(x.entries, p, func(e entry, p string) int { return comparePaths(e.path, p) })
	if !ok {
		return -1
	}
	return i
}

func (x *index) encode() []byte {
	out := make([]byte, 0, len(indexMagic)+64*len(x.entries)+40*len(x.frames)+16)
	out = append(out, indexMagic...)
	flags := uint64(0)
	if x.archive {
		flags = 1
	}
	out = binary.AppendUvarint(out, flags)
	out = binary.AppendUvarint(out, uint64(len(x.entries)))
	out = binary.AppendUvarint(out, uint64(len(x.frames)))
	last, end := "", int64(0)
	for i := range x.entries {
		e := &x.entries[i]
		shared := commonPrefix(last, e.path)
		out = append(out, byte(e.kind))
		out = binary.AppendUvarint(out, uint64(shared))
		out = appendString(out, e.path[shared:])
		out = binary.AppendUvarint(out, uint64(unixMode(e.mode)))
		last = e.path
		switch e.kind {
		case kindFile:
			out = binary.AppendUvarint(out, uint64(e.size))
			out = append(out, e.sum[:]...)
			switch {
			case !x.archive:
			case e.size == 0: // it has no place in the stream
				out = binary.AppendUvarint(out, 0)
			default:
				out = binary.AppendUvarint(out, uint64(e.offset-end))
				end = e.offset + e.size
			}
		case kindSymlink:
			out = appendString(out, e.target)
		case kindHardlink:
			out = binary.AppendUvarint(out, uint64(e.original))
		}
	}
	for i := range x.frames {
		f := &x.frames[i]
		out = binary.AppendUvarint(out, uint64(f.size))
		if f.content.IsZero() {
			out = binary.AppendUvarint(out, uint64(f.length)<<1)
			out = append(out, f.sum[:]...)
		} else {
			out = binary.AppendUvarint(out, uint64(f.length)<<1|1)
			out = append(out, f.sum[:]...)
			out = append(out, f.content[:]...)
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

// unixMode returns a mode's bits for chmod: the permission bits, and those of dirOnly.
func unixMode(m fs.FileMode) uint32 {
	bits := uint32(m.Perm())
	if m&fs.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	if m&fs.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	return bits
}

// modeOf is the reverse of unixMode.
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

// decodeIndex decodes an untrusted index. Whatever the bytes are, it neither panics nor takes more memory than a
// small multiple of their length, and its result keeps every rule of the package comment.
func decodeIndex(data []byte) (*index, error) {
	if len(data) > maxIndex {
		return nil, fmt.Errorf("%w: it has %d bytes, at most %d are allowed", ErrIndex, len(data), maxIndex)
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
	x := &index{archive: flags == 1, entries: make([]entry, entries), frames: make([]frame, frames)}
	if !x.archive && frames > 0 {
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
func (x *index) decodeEntries(r *cursor) (end int64, err error) {
	var last []byte
	var paths strings.Builder // holds the paths of many entries in one allocation
	var tree int64
	left := maxPaths + pathGrowth*len(r.rest)
	dirs := []string{""} // the directories that the next entry may lie in
	for i := range x.entries {
		e := &x.entries[i]
		e.kind = kind(r.number(uint64(kindHardlink)))
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
		e.path = paths.String()[paths.Len()-len(last):]
		if e.mode = modeOf(uint32(mode)); e.mode&dirOnly != 0 && e.kind != kindDir {
			return 0, fmt.Errorf("entry %d: %q is sticky or setgid, which only a directory may be", i, e.path)
		}
		parent := safefs.Parent(e.path)
		for len(dirs) > 0 && dirs[len(dirs)-1] != parent {
			dirs = dirs[:len(dirs)-1]
		}
		// Of most paths the directory has been checked, and only the name is new.
		if parent == "" || len(dirs) == 0 || len(dirs) > maxLevels || len(e.path) > maxPath ||
			!isName(e.path[len(parent)+1:]) {
			if err := checkPath(e.path); err != nil {
				return 0, fmt.Errorf("entry %d: %w", i, err)
			}
		}
		if i > 0 {
			before := x.entries[i-1].path
			same := commonPrefix(before, e.path)
			if comparePaths(before[same:], e.path[same:]) >= 0 {
				return 0, fmt.Errorf("entry %d: %q is not in order", i, e.path)
			}
			if uint64(same) != shared {
				return 0, fmt.Errorf("entry %d: %q shares more with the path before it than it says", i, e.path)
			}
		}
		if len(dirs) == 0 {
			return 0, fmt.Errorf("entry %d: %q does not lie in a directory of the tree", i, e.path)
		}
		switch e.kind {
		case kindDir:
			dirs = append(dirs, e.path)
		case kindFile:
			e.size = int64(r.number(maxTree))
			r.digest(&e.sum)
			if x.archive {
				gap := int64(r.number(maxTree))
				if e.size == 0 && gap > 0 {
					return 0, fmt.Errorf("entry %d: %q is empty and yet has an offset", i, e.path)
				}
				e.offset = end + gap
				end = e.offset + e.size
			}
			if tree += e.size; tree > maxTree || end > 2*maxTree {
				return 0, fmt.Errorf("entry %d: the tree has more than %d bytes", i, int64(maxTree))
			}
		case kindSymlink:
			e.target = string(r.bytes(r.number(maxPath)))
			if r.err == nil {
				if err := checkTargetText(e.path, e.target); err != nil {
					return 0, fmt.Errorf("entry %d: %w", i, err)
				}
			}
		case kindHardlink:
			e.original = int(r.number(maxEntries))
			if e.original >= i || x.entries[e.original].kind != kindFile {
				return 0, fmt.Errorf("entry %d: %q is a hard link to what is not a file before it", i, e.path)
			}
		}
		if r.err != nil {
			return 0, fmt.Errorf("entry %d: %w", i, r.err)
		}
	}
	return end, nil
}

func (x *index) decodeFrames(r *cursor, end int64) error {
	var offset, start int64
	within := 0 // the first entry that ends after start
	for i := range x.frames {
		f := &x.frames[i]
		f.offset, f.start = offset, start
		f.size = int64(r.number(math.MaxInt32))
		length := r.number(2*maxFrame + 1)
		f.length = int64(length >> 1)
		r.digest(&f.sum)
		if length&1 == 1 {
			r.digest(&f.content)
		}
		switch {
		case r.err != nil:
			return fmt.Errorf("frame %d: %w", i, r.err)
		case f.size == 0 || f.length == 0 || f.size > maxEncoded(f.length):
			return fmt.Errorf("frame %d: %d bytes that decode to %d", i, f.size, f.length)
		case length&1 == 1 && f.content.IsZero():
			return fmt.Errorf("frame %d: no hash of its content", i)
		}
		if length&1 == 1 {
			for within < len(x.entries) && (x.entries[within].kind != kindFile || x.entries[within].offset+x.entries[within].size <= start) {
				within++
			}
			if within == len(x.entries) || start < x.entries[within].offset ||
				start+f.length > x.entries[within].offset+x.entries[within].size {
				return fmt.Errorf("frame %d: it has a hash of its content, which is not one file's", i)
			}
		}
		offset += f.size
		start += f.length
	}
	if x.archive && end > start {
		return fmt.Errorf("the files end at byte %d of the tar stream, the frames at %d", end, start)
	}
	return nil
}

// checkPath returns an error unless a path is clean, relative, and stays in the tree.
func checkPath(p string) error {
	if p == "" || len(p) > maxPath || strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("the path %q is empty, too long or has a zero byte", clip(p))
	}
	if strings.Count(p, "/") >= maxLevels {
		return fmt.Errorf("the path %q lies more than %d directories deep", clip(p), maxLevels)
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

// checkTargets returns an error unless the symbolic links lead where they may.
func (x *index) checkTargets(allowed deployments.Symlinks) error {
	for i := range x.entries {
		if e := &x.entries[i]; e.kind == kindSymlink {
			if err := checkTarget(e.path, e.target, allowed); err != nil {
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

// checkTarget returns an error unless a symbolic link stays in the tree, or the manifest allows any. It need not
// resolve other links on the target's way: the target's ".." come first, and there can be no more of them than real
// directories above the link.
func checkTarget(p, target string, allowed deployments.Symlinks) error {
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
