package archive

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"strings"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/meter"
	"kedge/deployments"
	"kedge/deployments/wait"
)

// maxPatched bounds, in bytes, the sizes of the old and the new file of a patch, as both are in memory. If either is
// larger, the new file comes from the archive.
const maxPatched = 1 << 30

// MakeDelta writes a delta from one release to another, both unpacked, to w. It reads the files that ChoosePatches
// returns. A file that doesn't match its index is an error, which wraps deployments.ErrDigest. progress may be nil.
func MakeDelta(
	ctx context.Context,
	oldTree string,
	oldIndex []byte,
	newTree string,
	newIndex []byte,
	w io.Writer,
	progress func(meter.Progress),
) error {
	oldX, err := DecodeIndex(oldIndex)
	if err != nil {
		return fmt.Errorf("the index of %s: %w", oldTree, err)
	}
	newX, err := DecodeIndex(newIndex)
	if err != nil {
		return fmt.Errorf("the index of %s: %w", newTree, err)
	}
	m := &deltaMaker{old: oldX, new: newX}
	if m.oldRoot, err = os.OpenRoot(oldTree); err != nil {
		return err
	}
	defer m.oldRoot.Close()
	if m.newRoot, err = os.OpenRoot(newTree); err != nil {
		return err
	}
	defer m.newRoot.Close()
	header := append([]byte(deltaMagic), digestSlice(oldIndex)...)
	if _, err := w.Write(append(header, digestSlice(newIndex)...)); err != nil {
		return err
	}
	m.out, err = zstd.NewWriter(w, zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(deltaWindow))
	if err != nil {
		return err
	}
	jobs := ChoosePatches(oldX, newX)
	total := int64(len(newIndex))
	for _, job := range jobs {
		total += newX.Entries[job.Entry].Size
	}
	m.meter = meter.New("delta", total, progress)
	m.out.Write(binary.AppendUvarint(nil, uint64(len(newIndex))))
	if err := m.writePatch(ctx, oldIndex, newIndex); err != nil {
		return err
	}
	if err := m.run(ctx, jobs); err != nil {
		return fmt.Errorf("making patches from %s to %s: %w", oldTree, newTree, err)
	}
	m.out.Write([]byte{0})
	m.meter.Finish()
	return m.out.Close()
}

func digestSlice(data []byte) []byte {
	d := deployments.DigestOf(data)
	return d[:]
}

type deltaMaker struct {
	old, new         *Index
	oldRoot, newRoot *os.Root
	out              *zstd.Encoder
	meter            *meter.Meter
}

// FilePatch is a file to patch: Entry is its number in the new index, From that of the file in the old index; -1: none.
type FilePatch struct{ Entry, From int }

// ChoosePatches returns the files whose content the old release lacks, and for each the most similar old file, if any.
// That is the file at the same path or, if there is none, the file nearest in size at a path that differs only in
// digits and hash-like parts (hashed assets, versioned directories). If there is no such file either, it is the file
// nearest in size of the same name. A new file is left out if it is empty, or if it or its old file has more than
// maxPatched bytes.
func ChoosePatches(old, new *Index) []FilePatch {
	type key struct{ by, name string }
	have := make(map[deployments.Digest]bool, len(old.Entries))
	similar := make(map[key][]int)
	for i := range old.Entries {
		e := &old.Entries[i]
		if e.Kind != File || e.Size == 0 {
			continue
		}
		have[e.Sum] = true
		for _, k := range []key{{"shape", shapeOf(e.Path)}, {"name", path.Base(e.Path)}} {
			similar[k] = append(similar[k], i)
		}
	}
	var jobs []FilePatch
	for i := range new.Entries {
		e := &new.Entries[i]
		if e.Kind != File || e.Size == 0 || e.Size > maxPatched || have[e.Sum] {
			continue
		}
		job := FilePatch{i, old.Find(e.Path)}
		if job.From >= 0 && old.Entries[job.From].Kind != File {
			job.From = -1
		}
		for _, k := range []key{{"shape", shapeOf(e.Path)}, {"name", path.Base(e.Path)}} {
			if job.From < 0 {
				job.From = old.nearest(similar[k], e.Size)
			}
		}
		if job.From >= 0 && old.Entries[job.From].Size > maxPatched {
			continue
		}
		jobs = append(jobs, job)
	}
	return jobs
}

// nearest returns which of the first 64 entries in entries has the size nearest to size; -1: entries is empty.
func (x *Index) nearest(entries []int, size int64) int {
	best := -1
	for _, i := range entries[:min(len(entries), 64)] { // names like index.js occur everywhere
		if best < 0 || distance(x.Entries[i].Size, size) < distance(x.Entries[best].Size, size) {
			best = i
		}
	}
	return best
}

func distance(a, b int64) int64 { return max(a-b, b-a) }

// shapeOf returns a path with # in place of each run of hexadecimal digits that are all decimal, or that are at least
// eight. Such runs change from build to build.
func shapeOf(p string) string {
	var b strings.Builder
	for len(p) > 0 {
		run := 0
		digits := true
		for run < len(p) && isHex(p[run]) {
			digits = digits && p[run] <= '9'
			run++
		}
		switch {
		case run == 0:
			b.WriteByte(p[0])
			p = p[1:]
		case digits || run >= 8:
			b.WriteByte('#')
			p = p[run:]
		default:
			b.WriteString(p[:run])
			p = p[run:]
		}
	}
	return b.String()
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

// run makes the patches of jobs, and writes them in order. Files of one section are patched in parallel. A larger file
// is patched when its turn to be written comes, its sections in parallel.
func (m *deltaMaker) run(ctx context.Context, jobs []FilePatch) error {
	type result struct {
		job   FilePatch
		patch []byte
		large bool
		done  chan struct{}
	}
	group, ctx := errgroup.WithContext(ctx)
	cores := runtime.GOMAXPROCS(0)
	order := make(chan *result, 4*cores)
	todo := make(chan *result)
	group.Go(func() error {
		defer close(order)
		defer close(todo)
		for _, job := range jobs {
			r := &result{job: job, large: m.new.Entries[job.Entry].Size > sectionSize, done: make(chan struct{})}
			to := []chan *result{order, todo}
			if r.large {
				to = to[:1]
			}
			for _, c := range to {
				if err := wait.Send(ctx, c, r); err != nil {
					return err
				}
			}
		}
		return nil
	})
	for range cores {
		group.Go(func() error {
			for r := range todo {
				old, new, err := m.load(r.job)
				if err != nil {
					return err
				}
				r.patch = appendPatch(nil, newMatcher(old), old, new)
				close(r.done)
			}
			return nil
		})
	}
	group.Go(func() error {
		last := -1
		for r := range order {
			head := binary.AppendUvarint(nil, uint64(r.job.Entry-last))
			head = binary.AppendUvarint(head, uint64(r.job.From+1))
			last = r.job.Entry
			if _, err := m.out.Write(head); err != nil {
				return err
			}
			if r.large {
				old, new, err := m.load(r.job)
				if err == nil {
					err = m.writePatch(ctx, old, new)
				}
				if err != nil {
					return err
				}
				continue
			}
			select {
			case <-r.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			if _, err := m.out.Write(r.patch); err != nil {
				return err
			}
			m.meter.Add(m.new.Entries[r.job.Entry].Size)
		}
		return nil
	})
	return group.Wait()
}

// load reads a job's old file, if it has one, and its new one, and verifies both against their indexes.
func (m *deltaMaker) load(job FilePatch) (old, new []byte, err error) {
	if job.From >= 0 {
		if old, err = loadFile(m.oldRoot, &m.old.Entries[job.From]); err != nil {
			return nil, nil, err
		}
	}
	new, err = loadFile(m.newRoot, &m.new.Entries[job.Entry])
	return old, new, err
}

func loadFile(root *os.Root, e *Entry) ([]byte, error) {
	data, err := root.ReadFile(e.Path)
	if err != nil {
		return nil, err
	}
	if deployments.DigestOf(data) != e.Sum {
		return nil, fmt.Errorf("%s: %w: the file changed after its tree was indexed", e.Path, deployments.ErrDigest)
	}
	return data, nil
}

// writePatch makes the sections of one patch on all cores, and writes them.
func (m *deltaMaker) writePatch(ctx context.Context, old, new []byte) error {
	match := newMatcher(old)
	cores := runtime.GOMAXPROCS(0)
	for from := 0; from < len(new); from += cores * sectionSize {
		if err := ctx.Err(); err != nil {
			return err
		}
		patches := make([][]byte, cores)
		var group errgroup.Group
		for i := range patches {
			begin := from + i*sectionSize
			if begin >= len(new) {
				break
			}
			group.Go(func() error {
				patches[i] = appendSection(nil, match, old, new, begin, min(begin+sectionSize, len(new)))
				return nil
			})
		}
		group.Wait()
		for _, p := range patches {
			if _, err := m.out.Write(p); err != nil {
				return err
			}
		}
		m.meter.Add(int64(min(cores*sectionSize, len(new)-from)))
	}
	return nil
}
