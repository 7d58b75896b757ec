package artifact

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// verifyTree compares a tree with its index, and returns the differences, sorted by path. It
// doesn't compare owners, as an index has none. It reads each file whose size is the index's, at
// most limit bytes a second (0: no limit). It skips the paths in skip, and what lies below them.
// stats has, by entry, the stats of files whose content was right and that didn't change just
// before or during the read; all others are zero.
func verifyTree(
	ctx context.Context,
	dir string,
	data []byte,
	limit int64,
	skip ...string,
) (found []Difference, stats []fileStat, err error) {
	x, err := archive.DecodeIndex(data)
	if err != nil {
		return nil, nil, fmt.Errorf("verify %s: %w", dir, err)
	}
	v := newVerifier(x, limit, skip)
	if err := v.verify(ctx, dir); err != nil {
		return nil, nil, fmt.Errorf("verify %s: %w", dir, err)
	}
	return v.found, v.stats, nil
}

func newVerifier(x *archive.Index, limit int64, skip []string) *verifier {
	v := &verifier{
		index:  x,
		skip:   skip,
		stats:  make([]fileStat, len(x.Entries)),
		seen:   make([]fs.FileInfo, len(x.Entries)),
		buffer: make([]byte, 64<<10),
	}
	if limit > 0 {
		v.limit = rate.NewLimiter(rate.Limit(limit), len(v.buffer))
	}
	return v
}

// verify compares the tree at dir with the index. It sets found, sorted by path, and stats.
func (v *verifier) verify(ctx context.Context, dir string) (err error) {
	if v.root, err = os.OpenRoot(dir); err != nil {
		return err
	}
	defer v.root.Close()
	if err := v.run(ctx); err != nil {
		return err
	}
	slices.SortFunc(v.found, func(a, b Difference) int {
		return cmp.Or(archive.ComparePaths(a.Path, b.Path), cmp.Compare(a.What, b.What))
	})
	return nil
}

type verifier struct {
	root  *os.Root
	index *archive.Index
	skip  []string
	seen  []fs.FileInfo
	stats []fileStat
	found []Difference
	// made are paths that the release's commands made. Neither these paths nor paths below them count as extra.
	made pathSet
	// extra counts the paths in found that the index lacks, at most maxExtra; more counts such paths beyond these.
	extra, more int
	limit       *rate.Limiter // nil: no bound
	// known are stats of files that needn't be read if their inode, mtime and size are the same; nil: none.
	known  []fileStat
	buffer []byte
}

func (v *verifier) run(ctx context.Context) error {
	err := fs.WalkDir(v.root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if p == "." {
			return err
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // p was removed while the tree was read: if the index has it, the end of run reports it as missing
		}
		if unreadable(err) {
			return nil // p is a directory: the end of run reports what the index has in it as missing
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if isBelow(p, v.skip) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		i := v.index.Find(p)
		if i < 0 && d.IsDir() && isAbove(p, v.skip) {
			return nil // p leads to a path that is skipped
		}
		if i < 0 {
			v.addExtra(p)
			if d.IsDir() {
				return fs.SkipDir // the difference of the directory is enough
			}
			return nil
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		v.seen[i] = info
		return v.compare(ctx, i, info)
	})
	if err != nil {
		return err
	}
	for i, info := range v.seen {
		if info == nil && !isBelow(v.index.Entries[i].Path, v.skip) {
			v.differs(v.index.Entries[i].Path, "missing")
		}
	}
	return nil
}

// isBelow reports whether p is one of dirs, or below one.
func isBelow(p string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool {
		return p == dir || len(p) > len(dir) && p[len(dir)] == '/' && p[:len(dir)] == dir
	})
}

// isAbove reports whether one of paths lies below dir.
func isAbove(dir string, paths []string) bool {
	return slices.ContainsFunc(paths, func(p string) bool { return p != dir && isBelow(p, []string{dir}) })
}

func (v *verifier) differs(path, what string) {
	v.found = append(v.found, Difference{Path: path, What: what})
}

// addExtra notes a path that the index lacks. An application can make any number of them.
func (v *verifier) addExtra(p string) {
	switch {
	case v.made.covers(p):
	case v.extra == maxExtra:
		v.more++
	default:
		v.extra++
		v.differs(p, "extra")
	}
}

// dirBits are the bits of a directory's mode that are always compared. Set-group-id is compared only if the entry has
// it, as a directory may inherit that bit from the directory above.
const dirBits = fs.ModePerm | fs.ModeSticky | fs.ModeSetuid

func (v *verifier) compare(ctx context.Context, i int, info fs.FileInfo) error {
	e := &v.index.Entries[i]
	want := map[archive.Kind]fs.FileMode{archive.Dir: fs.ModeDir, archive.Symlink: fs.ModeSymlink}[e.Kind]
	if info.Mode().Type() != want {
		v.differs(e.Path, "type")
		return nil
	}
	kept := dirBits | fs.ModeSetgid
	if e.Kind == archive.Dir && e.Mode&fs.ModeSetgid == 0 {
		kept = dirBits
	}
	if (e.Kind == archive.File || e.Kind == archive.Dir) && info.Mode()&kept != e.Mode {
		v.differs(e.Path, "mode")
	}
	switch e.Kind {
	case archive.Symlink:
		if target, err := v.root.Readlink(e.Path); err != nil || target != e.Target {
			v.differs(e.Path, "link")
		}
	case archive.Hardlink:
		if first := v.seen[e.Original]; first == nil || !os.SameFile(first, info) {
			v.differs(e.Path, "link")
		}
	case archive.File:
		sum, err := v.hash(ctx, i, info)
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !unreadable(err) {
			return err
		}
		if err != nil || sum != e.Sum {
			v.differs(e.Path, "content")
		}
	}
	return nil
}

// unreadable reports whether err is the fault of the tree, such as a file's mode or a damaged
// block, and not of the machine. Healing mends that.
func unreadable(err error) bool {
	return errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EUCLEAN)
}

func (v *verifier) hash(ctx context.Context, i int, info fs.FileInfo) (deployments.Digest, error) {
	e := &v.index.Entries[i]
	if info.Size() != e.Size {
		return deployments.Digest{}, nil
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && v.known != nil && v.known[i] != (fileStat{}) &&
		v.known[i].sameContent(fileStat{inode: st.Ino, mtime: st.Mtim.Nano()}) {
		return e.Sum, nil
	}
	f, err := v.root.OpenFile(e.Path, os.O_RDONLY|unix.O_NONBLOCK, 0) // opening a pipe would block for ever
	if err != nil {
		return deployments.Digest{}, err
	}
	defer f.Close()
	var before, after unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &before); err != nil || before.Mode&unix.S_IFMT != unix.S_IFREG {
		return deployments.Digest{}, err
	}
	sum, err := hashSlowly(ctx, io.LimitReader(f, e.Size+1), v.limit,
		v.buffer) // limited, as the file might grow as long as it is read
	if err == nil && sum == e.Sum && unix.Fstat(int(f.Fd()), &after) == nil && statOf(&before) == statOf(&after) &&
		time.Since(time.Unix(before.Ctim.Unix())) > clockTick {
		v.stats[i] = statOf(&after)
	}
	return sum, err
}

// hashSlowly returns the SHA-256 of what r reads, at the speed that limit allows (nil: any).
func hashSlowly(ctx context.Context, r io.Reader, limit *rate.Limiter, buffer []byte) (deployments.Digest, error) {
	h := sha256.New()
	for {
		n, err := r.Read(buffer)
		h.Write(buffer[:n])
		if limit != nil {
			if err := limit.WaitN(ctx, n); err != nil {
				return deployments.Digest{}, err
			}
		}
		if err == io.EOF {
			return deployments.Digest(h.Sum(nil)), nil
		}
		if err := cmp.Or(err, ctx.Err()); err != nil {
			return deployments.Digest{}, err
		}
	}
}

// indexOfTree returns an encoded index without frames: the hashes of a tree's files. They serve to compare dest with
// the tree; for an archive without an index, also to verify the tree and to take files from it.
func indexOfTree(ctx context.Context, dir string) ([]byte, error) {
	top, err := safefs.OpenDir(dir)
	if err != nil {
		return nil, fmt.Errorf("hashing the files of %s: %w", dir, err)
	}
	defer top.Close()
	entries, err := archive.Scan(ctx, top)
	if err != nil {
		return nil, fmt.Errorf("hashing the files of %s: %w", dir, err)
	}
	dirs, buffer := &safefs.Dirs{Top: top}, make([]byte, 256<<10)
	defer dirs.Close()
	for i := range entries {
		e := &entries[i]
		if e.Kind != archive.File || e.Size == 0 {
			continue
		}
		fd, err := dirs.OpenFile(e.Path, unix.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, fmt.Errorf("hashing the files of %s: %w", dir, err)
		}
		f := os.NewFile(uintptr(fd), e.Path)
		e.Sum, err = hashSlowly(ctx, f, nil, buffer)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("hashing the files of %s: %w", dir, err)
		}
	}
	return (&archive.Index{Entries: entries}).Encode(), nil
}
