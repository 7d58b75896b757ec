package artifact

import (
	"bufio"
	"context"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/url"
	"os"
	"path"
	"strings"

	"kedge/artifact/archive"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

// extractFrom empties dir, and calls extract, with one source of the archive after the other until
// one succeeds. It goes on to the next if a source can't deliver the archive, or delivers one of
// another size or checksum. After any other error, of the archive itself or of this machine, no
// other source is tried. If a spool has filled the disk, the spool is removed, and the archive
// streamed once more. Mirrors are used only if the manifest's checksum is at least as long as
// SHA-256: shorter hashes are not collision-resistant.
func extractFrom(
	ctx context.Context,
	objects *object.Client,
	m *deployments.Manifest,
	dir string,
	opt StageOptions,
	checkOwner func(uid, gid int) error,
) error {
	var own error
	try := func(s object.Source) error {
		if err := safefs.EmptyDir(dir); err != nil { // half a tree can't be completed
			own = err
			return nil
		}
		err := extract(ctx, s, m, dir, opt, checkOwner)
		if opt.resumes && full(err) && ctx.Err() == nil && spooled(dir) { // without the spool, the tree may have room
			if own = errors.Join(dropSpools(dir, ""), safefs.EmptyDir(dir)); own != nil {
				return nil
			}
			streams := opt
			streams.resumes = false
			err = extract(ctx, s, m, dir, streams, checkOwner)
		}
		for _, fault := range []error{
			deployments.ErrDigest, object.ErrUnavailable, object.ErrNotFound, object.ErrDenied, object.ErrChanged,
		} {
			if errors.Is(err, fault) {
				return err
			}
		}
		own = err
		return nil
	}
	var err error
	if len(m.Checksum) < len(archive.EmptyDigest.String()) {
		err = try(object.Source{Client: objects, URL: m.Src})
	} else {
		err = objects.EachSource(ctx, m.Src, try)
	}
	if err = errors.Join(err, own); opt.resumes && (err == nil || !resumable(ctx, err)) {
		err = errors.Join(err, dropSpools(dir, ""))
	}
	return err
}

// extract streams an archive without an index into the empty directory dir: it fetches, hashes, decodes and writes at
// once. It keeps no copy of the archive, unless an earlier try was cut off: see spool. The tree must only be used if
// extract returns nil, as the checksum is known only at the end.
func extract(
	ctx context.Context,
	from object.Source,
	m *deployments.Manifest,
	dir string,
	opt StageOptions,
	checkOwner func(uid, gid int) error,
) error {
	src := deployments.ShownURL(from.URL)
	o, err := from.Stat(ctx, from.URL)
	if err != nil {
		return fmt.Errorf("extract: %w", err)
	}
	if m.Size > 0 && o.Size != m.Size {
		return fmt.Errorf("extract %s: %w: it has %d bytes, the manifest says %d", src, deployments.ErrDigest, o.Size, m.Size)
	}
	meter := meter.New("fetch", o.Size, opt.Progress)
	stream, err := openPlain(ctx, from, o, m, dir, opt, meter)
	if err != nil {
		return fmt.Errorf("extract %s: %w", src, err)
	}
	defer stream.Close()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	sum := newHash(m.Checksum)
	x := &extractor{
		ctx:      ctx,
		root:     root,
		symlinks: m.Symlinks,
		manifest: m,
		links:    map[string]bool{},
		dirs:     map[string]*attributes{},
		left:     max(freeGrowth, min(o.Size, maxUnpacked/maxGrowth)*maxGrowth),
		// As tar does for root, and stretcher's users rely on it; an owner in the manifest takes precedence.
		owners:     os.Geteuid() == 0 && m.Owner == "",
		checkOwner: checkOwner,
		uids:       map[string]int{},
		gids:       map[string]int{},
	}
	raw := bufio.NewReaderSize(io.TeeReader(stream, sum), 256<<10)
	if err := x.archive(raw, nameIn(m.Src)); err != nil {
		// A wrong checksum explains any other error, and is what the user has to know.
		if _, cut := io.Copy(io.Discard, raw); cut == nil && !matches(sum, m.Checksum) {
			return fmt.Errorf("extract %s: %w", src, wrongChecksum(sum, m.Checksum))
		}
		return fmt.Errorf("extract %s: %w", src, err)
	}
	if _, err := io.Copy(io.Discard, raw); err != nil {
		return fmt.Errorf("extract %s: %w", src, err)
	}
	if !matches(sum, m.Checksum) {
		return fmt.Errorf("extract %s: %w", src, wrongChecksum(sum, m.Checksum))
	}
	meter.Finish()
	return nil
}

// openPlain opens an archive without an index, and returns its stream. With opt.resumes, if an earlier try was cut off
// and the disk has room for archive and tree, it returns the completed spool instead.
func openPlain(
	ctx context.Context,
	from object.Source,
	o object.Object,
	m *deployments.Manifest,
	dir string,
	opt StageOptions,
	meter *meter.Meter,
) (io.ReadCloser, error) {
	var s spool
	if opt.resumes {
		var err error
		if s, err = openSpool(dir, o, m.Checksum); err != nil {
			return nil, err
		}
		if s.found && s.fits(dir) {
			return s.fetch(ctx, from, o, m.Checksum, meter)
		}
		if err := s.createEmpty(); err != nil {
			return nil, err
		}
	}
	if err := checkFree(dir, "the archive alone", o.Size); err != nil {
		return nil, err
	}
	stream, err := from.Read(ctx, o, 0)
	if err != nil {
		return nil, err
	}
	return struct {
		io.Reader
		io.Closer
	}{io.TeeReader(stream, meter), stream}, nil
}

// nameIn returns the last part of a URL's path; "." or "/" if the path has none, and empty if src is no URL.
func nameIn(src string) string {
	u, err := url.Parse(src)
	if err != nil {
		return ""
	}
	return path.Base(u.Path)
}

// newHash returns md5, sha1, sha256 or sha512, chosen by the checksum's length, which the manifest's parser has
// checked.
func newHash(checksum string) hash.Hash {
	switch len(checksum) {
	case 2 * md5.Size:
		return md5.New()
	case 2 * sha1.Size:
		return sha1.New()
	case 2 * sha512.Size:
		return sha512.New()
	}
	return sha256.New()
}

func matches(sum hash.Hash, checksum string) bool {
	return hex.EncodeToString(sum.Sum(nil)) == strings.ToLower(checksum)
}

func wrongChecksum(sum hash.Hash, checksum string) error {
	return fmt.Errorf("%w: the manifest gives the archive's checksum as %s, and the archive has %x", deployments.ErrDigest,
		checksum, sum.Sum(nil))
}
