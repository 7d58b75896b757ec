package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"kedge/artifact/meter"
	"kedge/artifact/object"
)

const (
	// archiveSuffix, followed by 12 hexadecimal digits that identify the archive, is appended to a directory's name to
	// name the spool of the archive that is unpacked into the directory.
	archiveSuffix = ".archive-"
	// minSpooled is the size, in bytes, below which an archive is streamed again rather than spooled.
	minSpooled = 16 << 20
)

// spool is a file that lets an interrupted fetch of an archive without an index be resumed. It lies beside the
// directory that the archive is unpacked into. The first try streams the archive, and leaves the spool empty. If the
// disk has room, a try that finds the spool appends to it, from where the last try ended. It unpacks the spool after
// that is complete and has the right checksum.
type spool struct {
	path    string // empty: the archive gets no spool
	size    int64  // of the archive
	fetched int64  // bytes in the file
	// found is set if the file exists, as an earlier try was cut off.
	found bool
}

// openSpool returns the spool for an object that is unpacked into dir, and removes the spools of other objects. Small
// objects get none, nor do objects whose server ignores Range or sends no ETag. Without an ETag a changed object could
// not be told from the one that an earlier try began to fetch.
func openSpool(dir string, o object.Object, checksum string) (spool, error) {
	s := spool{size: o.Size}
	if o.Size >= minSpooled && o.ETag != "" && o.Ranges {
		id := sha256.Sum256(fmt.Appendf(nil, "%s %s %d", checksum, o.ETag, o.Size))
		s.path = dir + archiveSuffix + hex.EncodeToString(id[:6])
	}
	if err := dropSpools(dir, s.path); err != nil || s.path == "" {
		return s, err
	}
	info, err := os.Lstat(s.path)
	if s.found = err == nil && info.Mode().IsRegular(); s.found {
		s.fetched = min(info.Size(), s.size)
	}
	return s, nil
}

// spoolName matches the names of spools, and of no other regular file beside them, whatever a version is called. The
// directory of a release that is being removed may have such a name.
var spoolName = regexp.MustCompile(regexp.QuoteMeta(archiveSuffix) + `[0-9a-f]{12}$`)

// dropSpools removes all spools beside dir except the file keep. Among them may be spools of other releases, which were
// superseded before they were complete.
func dropSpools(dir, keep string) error {
	beside := filepath.Dir(dir)
	entries, err := os.ReadDir(beside)
	for _, e := range entries {
		file := filepath.Join(beside, e.Name())
		if file != keep && e.Type().IsRegular() && spoolName.MatchString(e.Name()) {
			err = errors.Join(err, os.Remove(file))
		}
	}
	return err
}

// spooled reports whether dir has a spool that isn't empty.
func spooled(dir string) bool {
	found, _ := filepath.Glob(globLiteral.Replace(dir) + archiveSuffix + "*")
	return slices.ContainsFunc(found, func(file string) bool { return sizeOf(file) > 0 })
}

// fits reports whether dir's disk has room for a tree of the archive's size, and for the part of the archive that
// isn't fetched yet.
func (s spool) fits(dir string) bool {
	var st unix.Statfs_t
	err := unix.Statfs(dir, &st)
	return err == nil && 2*s.size-s.fetched <= int64(st.Bavail)*st.Bsize
}

// createEmpty creates the spool, or truncates it, so that the next try fetches into it. It does
// nothing for an archive without a spool.
func (s spool) createEmpty() error {
	if s.path == "" {
		return nil
	}
	file, err := s.create(os.O_TRUNC)
	if err != nil {
		return err
	}
	return file.Close()
}

func (s spool) create(flags int) (*os.File, error) {
	return os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|flags, 0o600)
}

// fetch appends the missing bytes of the archive to the spool, and returns the complete file, open at its start. If the
// checksum is wrong (deployments.ErrDigest) and an earlier try wrote a part, fetch fetches the whole archive, once.
func (s spool) fetch(
	ctx context.Context,
	from object.Source,
	o object.Object,
	checksum string,
	meter *meter.Meter,
) (*os.File, error) {
	file, err := s.create(0)
	if err != nil {
		return nil, err
	}
	sum := newHash(checksum)
	had, err := io.Copy(sum, io.LimitReader(file, s.size))
	if err == nil {
		err = file.Truncate(had) // if it holds more than the archive
	}
	if err == nil {
		meter.Add(had)
		err = copyFrom(ctx, from, o, had, io.MultiWriter(file, sum, meter))
	}
	if err == nil && !matches(sum, checksum) {
		if err = wrongChecksum(sum, checksum); had > 0 { // what was there may have been spoiled by a loss of power
			meter.Add(-s.size)
			if err := errors.Join(file.Close(), s.createEmpty()); err != nil {
				return nil, err
			}
			return s.fetch(ctx, from, o, checksum, meter)
		}
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return file, nil
}

// copyFrom copies an object from an offset to its end.
func copyFrom(ctx context.Context, from object.Source, o object.Object, offset int64, to io.Writer) error {
	body, err := from.Read(ctx, o, offset)
	if err != nil {
		return err
	}
	defer body.Close()
	_, err = io.Copy(to, body)
	return err
}

// resumable reports whether a fetch that ended with err can be resumed later: its context ended, or the storage was
// unavailable. An error of the disk, or of the archive itself, would only recur.
func resumable(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, object.ErrUnavailable)
}

// full reports whether err means that the disk, or a quota, is full.
func full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
