package artifact

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	maxSpan     = 8 << 20   // most bytes of one ranged GET, unless one frame is larger
	spanGap     = 128 << 10 // so many unwanted bytes are cheaper to read than a second request
	connections = 8
	// tries is how many requests in a row may bring no frame of a span until another source is tried; of a mirror, one.
	tries = 4
)

// base is a release on disk to take unchanged files from; nil: none.
type base struct {
	dir    string
	index  []byte
	digest deployments.Digest // SHA-256 of index
	name   string             // of its directory, if it is one of this dest's releases
	known  *knownFiles        // nil: each file is hashed before it is used

	decoded *archive.Index // nil: decode makes it
}

// decode returns the decoded index.
func (b *base) decode() (x *archive.Index, err error) {
	if b.decoded == nil {
		b.decoded, err = archive.DecodeIndex(b.index)
	}
	return b.decoded, err
}

// fetchedTree is a tree that was put into a directory.
type fetchedTree struct {
	index   []byte
	decoded *archive.Index // nil: index isn't decoded yet
	// stats has, by entry of the index, the stats of files that were hard-linked to verified ones, from after linking.
	// All others are zero.
	stats []fileStat
}

// fetchIndexed fills the private directory dir with the tree of m. Content that an earlier call left in dir is kept if
// its hash is right, and removed otherwise. Written files may not be synced yet. Files of the base are only read or
// hard-linked, and not used if they don't match its index.
func fetchIndexed(
	ctx context.Context,
	objects *object.Client,
	m *deployments.Manifest,
	base *base,
	dir string,
	opt StageOptions,
) (tree fetchedTree, err error) {
	if m.Index == nil {
		return tree, fmt.Errorf("fetch %s: the manifest names no index", deployments.ShownURL(m.Src))
	}
	f := &fetch{objects: objects, manifest: m, meter: meter.New("fetch", 0, opt.Progress), log: opt.Log}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.run(ctx, base, dir); err != nil {
		return tree, fmt.Errorf("fetch %s: %w", deployments.ShownURL(m.Src), err)
	}
	f.meter.Finish()
	if err := dropDeltas(dir, ""); err != nil {
		return tree, fmt.Errorf("fetch %s: %w", deployments.ShownURL(m.Src), err)
	}
	return fetchedTree{f.encoded, f.index, f.tree.stats}, nil
}

// fetch is the state of one fetch of an indexed archive: of a release to unpack, or of an old one for a delta.
type fetch struct {
	objects  *object.Client
	manifest *deployments.Manifest
	meter    *meter.Meter

	index   *archive.Index
	encoded []byte // of index
	tree    *builder
	old     *source        // nil: none
	delta   *archive.Delta // nil: none
	// large is a delta that is fetched only if the disk has room for the delta and the tree; nil: none.
	large *deployments.Delta
	// only returns, by entry of the index, which files to make. If it is set, links are left out, and directories' modes
	// aren't set. nil: all files are made.
	only func(*archive.Index) []bool

	log     *slog.Logger    // nil: nothing is logged
	said    map[string]bool // what was logged already
	spoiled spoiled
}

func (f *fetch) close() error {
	var errs []error
	if f.delta != nil {
		errs = append(errs, f.delta.Close())
	}
	if f.old != nil {
		f.old.close()
	}
	if f.tree != nil {
		errs = append(errs, f.tree.close())
	}
	return errors.Join(errs...)
}

func (f *fetch) run(ctx context.Context, base *base, dir string) error {
	opened := make(chan error, 1)
	go func() { // while the first request runs
		var err error
		if base != nil {
			f.old, err = openSource(base)
		}
		opened <- err
	}()
	err := f.fetchIndex(ctx, base)
	if oldErr := <-opened; oldErr != nil { // a base that can't be read isn't used
		f.fallBack("the old release can't be used", "dir", base.dir, "error", oldErr)
		if f.delta != nil {
			err = errors.Join(err, f.delta.Close())
			f.delta = nil
		}
	}
	if err != nil {
		return err
	}
	if f.old != nil {
		f.old.match(f.index)
	}
	if f.tree, err = newBuilder(dir, f.index); err != nil {
		return err
	}
	if err := f.tree.prepare(ctx); err != nil {
		return err
	}
	if f.only != nil {
		for i, wanted := range f.only(f.index) {
			f.tree.ready[i] = f.tree.ready[i] || !wanted
		}
	}
	if err := f.checkSpace(dir, 0); err != nil {
		return err
	}
	if f.large != nil && f.old != nil {
		if err := f.openLargeDelta(ctx, base, dir); err != nil {
			return err
		}
	}
	group, inner := errgroup.WithContext(ctx)
	group.Go(func() error { return f.tree.makeDirs(inner) })
	group.Go(func() error { return f.makeFiles(inner) })
	if err := group.Wait(); err != nil {
		return err
	}
	// What the old release and the delta lacked, or had wrong, comes from the archive.
	if n, first := f.spoiled.sum(); n > 0 {
		f.fallBack("the old release or the delta has wrong content", "dir", base.dir, "files", n, "first", first)
	}
	if err := f.fetchFrames(ctx, f.tree.selectMissingFrames(nil)); err != nil {
		return err
	}
	if f.only != nil {
		return nil
	}
	return f.tree.finish()
}

// makeFiles makes the tree's files from what an earlier call left, from the old release, and from a delta or, without
// one, fetched frames. What the delta lacks is left out.
func (f *fetch) makeFiles(ctx context.Context) error {
	if f.old != nil && f.delta == nil {
		if err := f.takeChunks(ctx); err != nil {
			return err
		}
	}
	missing := f.tree.selectMissingFrames(f.old) // before takeLocal changes what this reads
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return f.takeLocal(ctx) })
	if f.delta != nil {
		group.Go(func() error { return f.applyDelta(ctx) })
	} else {
		group.Go(func() error { return f.fetchFrames(ctx, missing) })
	}
	return group.Wait()
}

// fetchIndex sets index and encoded. It takes the index from a small delta against the base, from the base itself if
// that has the same tree, or from the storage. It also sets delta, or large for a delta of more than deltaInMem bytes.
func (f *fetch) fetchIndex(ctx context.Context, base *base) error {
	m := f.manifest
	if base != nil {
		for _, d := range m.Deltas {
			if d.From != base.digest {
				continue
			}
			if m.Size > 0 && d.Size >= m.Size && d.Size > deltaInMem { // a small delta still saves requests
				f.fallBack("the delta is as large as the archive", "size", d.Size)
				break
			}
			if d.Size > deltaInMem {
				f.large = &d
				break
			}
			delta, data, err := f.openDelta(ctx, d, base.index)
			if err != nil {
				if ctx.Err() != nil {
					return err
				}
				f.fallBack("the delta can't be used", "error", err)
				break // the archive has everything
			}
			x, err := f.decode(data)
			if err == nil {
				f.index, f.encoded, f.delta = x, data, delta
				return nil
			}
			f.fallBack("the delta can't be used", "error", err)
			delta.Close()
		}
	}
	if base != nil && base.digest == m.Index.SHA256 { // the same tree
		x, err := f.decode(base.index)
		if err == nil {
			f.index, f.encoded = x, base.index
			return nil
		}
		f.fallBack("the old release's index can't be used", "error", err)
	}
	if m.Index.Size > archive.MaxIndex {
		return fmt.Errorf("%w: the manifest gives it %d bytes, at most %d are allowed", archive.ErrIndex, m.Index.Size,
			archive.MaxIndex)
	}
	f.meter.Expect(m.Index.Size)
	for try := 0; ; try++ {
		data, err := f.objects.ReadPinned(ctx, m.Index.URL, m.Index.Size, func(data []byte) (err error) {
			f.index, err = f.decode(data)
			return err
		})
		if errors.Is(err, deployments.ErrDigest) && try == 0 {
			continue // as with a frame, it may have been damaged on the way
		}
		if err == nil {
			f.encoded = data
			f.meter.Add(int64(len(data)))
		}
		return err
	}
}

// decode decodes an index. If its digest isn't the manifest's, the error wraps deployments.ErrDigest; if it is
// malformed, or doesn't fit the manifest, archive.ErrIndex.
func (f *fetch) decode(data []byte) (*archive.Index, error) {
	if deployments.DigestOf(data) != f.manifest.Index.SHA256 {
		return nil, fmt.Errorf("%w: the index %s is not the one that the manifest names", deployments.ErrDigest,
			deployments.ShownURL(f.manifest.Index.URL))
	}
	x, err := archive.DecodeIndex(data)
	if err != nil {
		return nil, err
	}
	if !x.Archive {
		return nil, fmt.Errorf("%w: it describes no archive", archive.ErrIndex)
	}
	if err := x.CheckTargets(f.manifest.Symlinks); err != nil {
		return nil, fmt.Errorf("%w: %w", archive.ErrIndex, err)
	}
	if size := f.manifest.Size; size != 0 && size != x.ArchiveSize() {
		return nil, fmt.Errorf("%w: it describes an archive of %d bytes, and the manifest one of %d", archive.ErrIndex,
			x.ArchiveSize(), size)
	}
	return x, nil
}

// spaceOf returns the bytes that an entry takes on the disk, in whole blocks of 4 KiB. A directory takes one block,
// and so does a symbolic link that is too long for its inode.
func spaceOf(e *archive.Entry) int64 {
	switch {
	case e.Kind == archive.Dir, e.Kind == archive.Symlink && len(e.Target) >= 60:
		return dirSize
	case e.Kind == archive.File:
		return (e.Size + 4095) &^ 4095
	}
	return 0
}

// checkSpace returns an error that wraps ENOSPC if the disk has no room for what the tree lacks, and for other files of
// beside bytes. Files that may share blocks with the old release's take no room.
func (f *fetch) checkSpace(dir string, beside int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	shares := f.manifest.Immutable || st.Type == unix.BTRFS_SUPER_MAGIC || st.Type == unix.XFS_SUPER_MAGIC
	bytes, inodes := beside, int64(0)
	for i := range f.index.Entries {
		e := &f.index.Entries[i]
		if f.tree.ready[i] || e.Kind == archive.File && shares && f.old.has(i) {
			continue
		}
		bytes += spaceOf(e)
		if e.Kind != archive.Hardlink {
			inodes++
		}
	}
	if free := int64(st.Bavail) * st.Bsize; bytes > free {
		return fmt.Errorf("the tree takes %s more, %s has %s left: %w", sizeText(bytes), dir, sizeText(free), syscall.ENOSPC)
	}
	if st.Files > 0 && inodes > int64(st.Ffree) {
		return fmt.Errorf("the tree takes %d files more, %s has room for %d: %w", inodes, dir, st.Ffree, syscall.ENOSPC)
	}
	return nil
}

// takeLocal makes, on all cores, the files that need no fetching: empty ones, and those of the old release. It counts
// in spoiled the files that it can't make because the old release lacks their content.
func (f *fetch) takeLocal(ctx context.Context) error {
	// Neighbours mostly lie in one directory, and two workers would contend for its lock: of 44,567 links, batches of
	// 64 files took an eighth longer.
	const batch = gateWidth
	group, ctx := errgroup.WithContext(ctx)
	batches := make(chan int)
	group.Go(func() error {
		defer close(batches)
		for from := 0; from < len(f.index.Entries); from += batch {
			if err := wait.Send(ctx, batches, from); err != nil {
				return err
			}
		}
		return nil
	})
	share := newSharing(f.manifest)
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() error {
			w := f.tree.worker()
			defer w.close()
			var reader *sourceReader
			if f.old != nil {
				reader = f.old.reader()
				defer reader.close()
			}
			for from := range batches {
				to := min(from+batch, len(f.index.Entries))
				if err := f.tree.await(ctx, to-1); err != nil {
					return err
				}
				for i := from; i < to; i++ {
					if err := w.takeLocal(i, reader, share); err != nil {
						return err
					}
					if f.old.has(i) && !f.tree.ready[i] {
						f.spoiled.add(f.index.Entries[i].Path)
					}
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// takeChunks copies frames of large files from the old release, if the old release doesn't have the
// whole file.
func (f *fetch) takeChunks(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	for _, i := range f.tree.files {
		if e := &f.index.Entries[i]; e.Size < archive.LargeFile || f.tree.ready[i] || f.old.has(i) {
			continue
		}
		group.Go(func() error {
			if err := f.tree.await(ctx, i); err != nil {
				return err
			}
			w, reader := f.tree.worker(), f.old.reader()
			defer w.close()
			defer reader.close()
			return w.takeChunks(i, reader)
		})
	}
	return group.Wait()
}
