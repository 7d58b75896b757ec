package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"kedge/deployments/durable"
)

// fileStore implements file://, in the file system of this machine.
type fileStore struct{ requests *atomic.Int64 }

func (s fileStore) stat(_ context.Context, u *url.URL) (Object, error) {
	s.requests.Add(1)
	info, err := os.Stat(u.Path)
	if err != nil {
		return Object{}, fileError(err)
	}
	if !info.Mode().IsRegular() {
		return Object{}, fmt.Errorf("%w: it is no regular file", ErrNotFound)
	}
	return Object{Size: info.Size(), ETag: etag(info), Ranges: true}, nil
}

func etag(info fs.FileInfo) string {
	return fmt.Sprintf("%x-%x", info.ModTime().UnixNano(), info.Size())
}

func (s fileStore) read(_ context.Context, u *url.URL, o Object, offset, n int64) (io.ReadCloser, int64, error) {
	s.requests.Add(1)
	f, err := os.OpenFile(u.Path, os.O_RDONLY|unix.O_NONBLOCK, 0) // opening a pipe would block for ever
	if err != nil {
		return nil, 0, fileError(err)
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%w: it is no regular file", ErrNotFound)
	case o.ETag != "" && o.ETag != etag(info):
		err = ErrChanged
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	if n < 0 {
		n = info.Size() - offset
	}
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(f, offset, n), f}, 0, nil
}

// putPrefix begins the name of a file that put has not finished yet.
const putPrefix = ".kedge-"

// putPiece is how many bytes put writes between two checks of its context.
const putPiece = 4 << 20

// put writes to a temporary file, syncs it, and links it to the object's name. Linking fails if that name exists. To
// replace an object, put renames the file instead.
func (s fileStore) put(ctx context.Context, u *url.URL, b *body, _ string) (err error) {
	s.requests.Add(1)
	dir := filepath.Dir(u.Path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, putPrefix+"*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	var sent int64
	for left := b.reader(); ; { // in pieces, to notice when ctx ends
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.CopyN(f, left, putPiece)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		sent += n
		b.progress(sent)
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync()); err != nil {
		return err
	}
	link := os.Link
	if b.replace {
		link = os.Rename
	}
	if err := link(f.Name(), u.Path); errors.Is(err, fs.ErrExist) {
		return errOccupied
	} else if err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

func fileError(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return err
}
