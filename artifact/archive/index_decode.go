package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/safetext"
)

// DecodeIndex decodes an untrusted index. Whatever the bytes are, it neither panics nor takes more memory than 64 MiB
// plus some 60 times their length. An index that breaks a rule of the package comment is an error that wraps ErrIndex.
// Only the rules for symbolic links' targets are left to CheckTargets.
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
		return nil, fmt.Errorf("%w: it lists frames, but describes no archive", ErrIndex)
	}
	end, err := x.decodeEntries(r)
	if err == nil {
		err = x.decodeFrames(r, end)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIndex, err)
	}
	if len(r.rest) > 0 {
		return nil, fmt.Errorf("%w: %d bytes follow its end", ErrIndex, len(r.rest))
	}
	return x, nil
}

const pathsAtOnce = 64 << 10

// decodeEntries decodes all entries, and returns where the last file's content ends in the tar stream.
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
			return 0, fmt.Errorf("entry %d: the paths so far have more bytes than an index of this size may have", i)
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
				return 0, fmt.Errorf("entry %d: %q shares a longer beginning with the path before it than the index says",
					i, e.Path)
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
				return 0, fmt.Errorf("entry %d: %q is a hard link, but not to a file that comes earlier in the index", i, e.Path)
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
	within := 0 // the files among x.Entries[:within] end at start or before
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
			return fmt.Errorf("frame %d: %d bytes can't decode to %d", i, f.Size, f.Length)
		case length&1 == 1 && f.Content.IsZero():
			return fmt.Errorf("frame %d: the hash of its content is zero", i)
		}
		if length&1 == 1 {
			ended := func(e *Entry) bool { return e.Kind != File || e.Offset+e.Size <= start }
			for within < len(x.Entries) && ended(&x.Entries[within]) {
				within++
			}
			if within == len(x.Entries) || start < x.Entries[within].Offset ||
				start+f.Length > x.Entries[within].Offset+x.Entries[within].Size {
				return fmt.Errorf("frame %d: it has a hash of its content, but does not lie within one file", i)
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

func clip(s string) string { return safetext.Cut(s, 120) }

// cursor reads numbers and bytes from a buffer. After the first error it returns zeros and no bytes.
type cursor struct {
	rest []byte
	err  error
}

var errShort = errors.New("the data is cut short")

// number reads a varint of at most max, in its shortest encoding.
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

// bytes returns the next n bytes, which alias the buffer; nil after an error, such as that fewer are left.
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
