// Package pack stores the packs that a server sends, with an index that it computes, within bounds of memory and
// disk.
package pack

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/format/idxfile"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
)

const (
	// maxObjects bounds the objects of a pack, each of which takes some 130 bytes of memory while the pack is read.
	maxObjects = 16 << 20
	// maxDeltas bounds the chain of deltas that leads to an object, as git(1) does.
	maxDeltas = 4095
)

// ObjectTooLarge means that the branch refers to a commit or a directory beyond Limits.Object.
type ObjectTooLarge struct{ size, most int64 }

func (e *ObjectTooLarge) Error() string {
	return fmt.Sprintf("the branch, or its history, has a directory's list or a commit of %d bytes, and at most %d "+
		"are fetched: remove the commit that added it from the branch "+
		"(git push --force), or mirror a bare clone on the mirror's own machine, which is read in place", e.size, e.most)
}

// TooLarge means that the branch's objects don't fit into the cache.
type TooLarge struct{ most int64 }

func (e *TooLarge) Error() string {
	return fmt.Sprintf("the branch's history has more than %d bytes, as the server sends it: make the server leave "+
		"large files out (git config uploadpack.allowFilter true), or mirror a bare clone on the mirror's own "+
		"machine, which is read in place", e.most)
}

// indexer reads a pack once from its sender, and computes the pack's index. It holds no large
// object in memory. A file beyond maxObject is left out of the index, with all deltas to it, as if
// the sender had left it out.
type indexer struct {
	// memory bounds the base objects held in memory, in bytes; the one in use is held in any case.
	memory    int
	maxObject int64     // as Limits.Object
	progress  io.Writer // written to at each slow step
	file      *os.File
	objects   []indexed                 // sorted by offset
	refs      map[plumbing.Hash][]int32 // deltas, by the hash of their base
	orphans   int                       // deltas of refs whose base was not found yet
	dropped   bool                      // a delta whose hash is unknown was left out
	scanner   *packfile.Scanner         // reads file
	checksum  plumbing.Hash
}

// indexed is an object of a pack.
type indexed struct {
	offset      int64
	hash        plumbing.Hash
	kind        plumbing.ObjectType // the delta's own kind until its base is known
	crc         uint32
	leftOut     bool  // left out of the index
	first, next int32 // indexes of the first delta to it, and of the next delta to the same base; 0: none
}

// Limits bounds a pack.
type Limits struct {
	// Object is in bytes. A larger file, and a larger delta of unknown kind, is left out. A larger commit, directory or
	// tag is an ObjectTooLarge.
	Object int64
	Pack   int64 // in bytes; a pack of this size or larger is a TooLarge
}

// Store reads a pack from r, and puts it with its index into dir, a repository's directory of packs. A pack without
// objects is not stored. If Store fails, it adds no pack. It writes to progress at each slow step.
func Store(ctx context.Context, r io.Reader, dir string, limits Limits, progress io.Writer) error {
	file, err := os.CreateTemp(dir, "tmp_pack_")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	x := &indexer{maxObject: limits.Object, memory: 4 * int(limits.Object), progress: progress, file: file}
	bounded := &io.LimitedReader{R: r, N: limits.Pack}
	err = x.read(ctx, bounded)
	if bounded.N <= 0 {
		return &TooLarge{limits.Pack}
	}
	if err != nil || len(x.objects) == 1 {
		return err
	}
	return x.save(dir)
}

// read reads a pack, stores it, and computes the hashes of its objects.
func (x *indexer) read(ctx context.Context, r io.Reader) error {
	if err := x.scan(io.TeeReader(r, x.file)); err != nil {
		return err
	}
	return x.resolve(ctx)
}

// scan reads the pack to its end, and adds its objects to x.objects.
func (x *indexer) scan(r io.Reader) error {
	s := packfile.NewScanner(r)
	_, count, err := s.Header()
	if err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	if count > maxObjects {
		return fmt.Errorf("pack: it has %d objects, and at most %d are fetched", count, maxObjects)
	}
	x.objects = append(x.objects, indexed{}) // unused: index 0 means none
	x.refs = map[plumbing.Hash][]int32{}
	for range count {
		h, err := s.NextObjectHeader()
		if err != nil {
			return fmt.Errorf("pack: %w", noEOF(err))
		}
		if err := x.add(s, h); err != nil {
			return err
		}
	}
	if x.checksum, err = s.Checksum(); err != nil {
		return fmt.Errorf("pack: %w", noEOF(err))
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// add reads the object after the header h, and adds it to x.objects. h has the object's size or, if the object is
// stored as a delta, the delta's; the object's size is then at the beginning of the delta.
func (x *indexer) add(s *packfile.Scanner, h *packfile.ObjectHeader) error {
	o := indexed{offset: h.Offset, kind: h.Type}
	at := int32(len(x.objects))
	size := h.Length
	var into io.Writer = io.Discard
	var hasher plumbing.Hasher
	var start head
	switch {
	case h.Type.IsDelta():
		into = &start
	case h.Type < plumbing.CommitObject || h.Type > plumbing.TagObject:
		return fmt.Errorf("pack: unknown kind of object: %d", h.Type)
	case h.Length <= x.maxObject:
		hasher = plumbing.NewHasher(h.Type, h.Length)
		into = hasher
	case h.Type != plumbing.BlobObject:
		return &ObjectTooLarge{h.Length, x.maxObject}
	}
	n, crc, err := s.NextObject(into)
	switch {
	case err != nil:
		return fmt.Errorf("pack: %w", noEOF(err))
	case n != h.Length:
		return fmt.Errorf("pack: an object has %d bytes, not the %d that it says", n, h.Length)
	}
	o.crc = crc
	if h.Type.IsDelta() {
		target, err := start.target()
		if err != nil {
			return err
		}
		size = max(size, target)
	}
	if o.leftOut = size > x.maxObject; !o.leftOut && !h.Type.IsDelta() {
		o.hash = hasher.Sum()
	}
	switch h.Type {
	case plumbing.OFSDeltaObject:
		base, found := slices.BinarySearchFunc(x.objects, h.OffsetReference,
			func(o indexed, offset int64) int { return int(min(max(o.offset-offset, -1), 1)) })
		if !found || base == 0 {
			return fmt.Errorf("pack: a delta: %w", plumbing.ErrObjectNotFound)
		}
		b := &x.objects[base]
		o.leftOut = o.leftOut || b.leftOut
		o.kind = b.kind
		o.next, b.first = b.first, at
	case plumbing.REFDeltaObject:
		if !o.leftOut {
			x.refs[h.Reference] = append(x.refs[h.Reference], at)
			x.orphans++
		}
	}
	if o.leftOut {
		if size > x.maxObject && o.kind != plumbing.BlobObject && !o.kind.IsDelta() {
			return &ObjectTooLarge{size, x.maxObject}
		}
		x.dropped = x.dropped || h.Type.IsDelta()
	}
	x.objects = append(x.objects, o)
	return nil
}

// resolve computes the hashes of the deltas that are not left out. A missing base is an error, unless it may be an
// object that was left out.
func (x *indexer) resolve(ctx context.Context) error {
	x.scanner = packfile.NewScanner(x.file)
	for i := 1; i < len(x.objects); i++ {
		if o := &x.objects[i]; !o.leftOut && o.hash != plumbing.ZeroHash {
			x.link(int32(i))
			if err := x.resolveFrom(ctx, int32(i)); err != nil {
				return err
			}
		}
	}
	if x.orphans > 0 && !x.dropped {
		return fmt.Errorf("pack: a delta: %w", packfile.ErrReferenceDeltaNotFound)
	}
	return nil
}

// link attaches to object i the deltas that name their base by object i's hash.
func (x *indexer) link(i int32) {
	o := &x.objects[i]
	for _, child := range x.refs[o.hash] {
		x.objects[child].next, o.first = o.first, child
		x.orphans--
	}
	delete(x.refs, o.hash)
}

// held is an object on the path to a delta, with its content. If content is nil, it is computed when it is needed.
type held struct {
	object  int32
	content []byte
}

// resolveFrom computes the hashes of all direct and indirect deltas to object root that are not left out.
func (x *indexer) resolveFrom(ctx context.Context, root int32) error {
	kind := x.objects[root].kind
	path := []held{{object: root}}
	sum, kept := 0, 0 // bytes of the contents on the path, and the first element that is still held
	for len(path) > 0 {
		last := len(path) - 1
		child := x.objects[path[last].object].first
		if child == 0 {
			sum -= len(path[last].content)
			path = path[:last]
			kept = min(kept, last)
			continue
		}
		c := &x.objects[child]
		x.objects[path[last].object].first = c.next
		if c.leftOut {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		_, _ = x.progress.Write([]byte{0})
		if path[last].content == nil {
			content, err := x.contentOf(path)
			if err != nil {
				return err
			}
			path[last].content = content
			sum += len(content)
			kept = min(kept, last)
		}
		content, err := x.patch(path[last].content, child)
		if err != nil {
			return err
		}
		c.hash, c.kind = plumbing.ComputeHash(kind, content), kind
		if x.link(child); c.first == 0 {
			continue
		}
		if path = append(path, held{child, content}); len(path) > maxDeltas {
			return fmt.Errorf("pack: more than %d deltas lead to an object", maxDeltas)
		}
		for sum += len(content); sum > x.memory && kept < len(path)-1; kept++ {
			sum -= len(path[kept].content)
			path[kept].content = nil
		}
	}
	return nil
}

// contentOf returns the content of the last object of a path.
func (x *indexer) contentOf(path []held) (content []byte, err error) {
	from := len(path) - 1
	for from > 0 && path[from].content == nil {
		from--
	}
	if content = path[from].content; content == nil {
		if content, err = x.raw(path[from].object); err != nil {
			return nil, err
		}
	}
	for _, h := range path[from+1:] {
		if content, err = x.patch(content, h.object); err != nil {
			return nil, err
		}
	}
	return content, nil
}

// patch computes an object from its base.
func (x *indexer) patch(base []byte, object int32) ([]byte, error) {
	delta, err := x.raw(object)
	if err != nil {
		return nil, err
	}
	content, err := packfile.PatchDelta(base, delta)
	if err != nil {
		return nil, fmt.Errorf("pack: a delta: %w", err)
	}
	if content == nil { // nil would mean that the content isn't held: see held
		content = []byte{}
	}
	return content, nil
}

// raw reads an object, or the delta that it is stored as.
func (x *indexer) raw(object int32) ([]byte, error) {
	h, err := x.scanner.SeekObjectHeader(x.objects[object].offset)
	if err != nil {
		return nil, fmt.Errorf("pack: %w", noEOF(err))
	}
	content := bytes.NewBuffer(make([]byte, 0, h.Length))
	if _, _, err := x.scanner.NextObject(content); err != nil {
		return nil, fmt.Errorf("pack: %w", noEOF(err))
	}
	return content.Bytes(), nil
}

// save puts the index and the pack into dir. The index comes first, as go-git uses a pack once its .pack file is there.
func (x *indexer) save(dir string) error {
	w := &idxfile.Writer{}
	for _, o := range x.objects {
		if !o.leftOut && o.hash != plumbing.ZeroHash {
			w.Add(o.hash, uint64(o.offset), o.crc)
		}
	}
	if err := w.OnFooter(x.checksum); err != nil {
		return err
	}
	index, err := w.Index()
	if err != nil {
		return err
	}
	file, err := os.CreateTemp(dir, "tmp_idx_")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	if _, err := idxfile.NewEncoder(file).Encode(index); err != nil {
		return err
	}
	if err := file.Close(); err != nil {
		return err
	}
	name := filepath.Join(dir, "pack-"+x.checksum.String())
	if err := os.Rename(file.Name(), name+".idx"); err != nil {
		return err
	}
	return os.Rename(x.file.Name(), name+".pack")
}

// head keeps the first bytes of a delta that is written to it: enough for the two sizes with which a delta begins.
type head []byte

func (p *head) Write(data []byte) (int, error) {
	*p = append(*p, data[:min(len(data), 2*binary.MaxVarintLen64-len(*p))]...)
	return len(data), nil
}

// target returns the size of a delta's result, which follows the size of its base.
func (p head) target() (int64, error) {
	_, n := binary.Uvarint(p)
	if n <= 0 {
		return 0, fmt.Errorf("pack: a delta: %w", packfile.ErrInvalidDelta)
	}
	size, n := binary.Uvarint(p[n:])
	if n <= 0 {
		return 0, fmt.Errorf("pack: a delta: %w", packfile.ErrInvalidDelta)
	}
	return int64(min(size, 1<<63-1)), nil
}

// noEOF turns io.EOF into io.ErrUnexpectedEOF.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
