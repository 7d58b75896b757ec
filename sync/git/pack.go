package git

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

// maxObject bounds an object that is fetched, in bytes. go-git indexes a pack by reading one object
// after the other into memory, before anybody can look for a signature. What is read of a commit is
// no larger.
const maxObject = maxTree

// objectTooLarge says that the branch leads to an object beyond maxObject.
type objectTooLarge struct{ size int64 }

func (e *objectTooLarge) Error() string {
	return fmt.Sprintf("the branch, or its history, has an object of %d bytes, and at most %d are fetched: "+
		"take the commit that brought it out of the branch "+
		"(git push --force), or mirror a bare clone on the mirror's own machine, which is read in place", e.size, maxObject)
}

// boundedStorage is a repository on disk that takes no pack with an object beyond maxObject.
type boundedStorage struct{ *filesystem.Storage }

// PackfileWriter lays what is written to it aside, and checks it on the way: go-git reads a pack
// while it is still coming in.
func (s boundedStorage) PackfileWriter() (io.WriteCloser, error) {
	aside, err := os.CreateTemp(filepath.Join(s.Filesystem().Root(), "objects", "pack"), "tmp_kedge_")
	if err != nil {
		return nil, err
	}
	r, w := io.Pipe()
	p := &packWriter{into: s.Storage, aside: aside, check: w, verdict: make(chan error, 1)}
	go func() {
		err := checkPack(r, maxObject)
		p.verdict <- err
		r.CloseWithError(err)
	}()
	return p, nil
}

// packWriter is a pack that is coming in.
type packWriter struct {
	into    *filesystem.Storage
	aside   *os.File
	check   *io.PipeWriter
	verdict chan error // holds one
}

func (p *packWriter) Write(data []byte) (int, error) {
	if n, err := p.aside.Write(data); err != nil {
		return n, err
	}
	return p.check.Write(data) // fails as soon as the check does
}

// Close gives the pack to the repository if it passed the check.
func (p *packWriter) Close() error {
	defer os.Remove(p.aside.Name())
	defer p.aside.Close()
	p.check.Close()
	if err := <-p.verdict; err != nil {
		return err
	}
	if _, err := p.aside.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return packfile.WritePackfileToObjectStorage(p.into, p.aside)
}

// checkPack reads a pack to its end, and looks for objects beyond most. It keeps nothing of it: an
// object's size comes before the object, and that of one that is stored as a delta at the delta's
// beginning.
func checkPack(r io.Reader, most int64) error {
	s := packfile.NewScanner(r)
	_, count, err := s.Header()
	if err != nil {
		return err
	}
	for range count {
		o, err := s.NextObjectHeader() // passes over the one before, if that was not read
		switch {
		case err != nil:
			return fmt.Errorf("pack: %w", err)
		case o.Length > most:
			return &objectTooLarge{o.Length}
		case !o.Type.IsDelta():
			continue
		}
		var start head
		if n, _, err := s.NextObject(&start); err != nil {
			return fmt.Errorf("pack: %w", err)
		} else if n != o.Length {
			return fmt.Errorf("pack: a delta has %d bytes, not the %d that it says", n, o.Length)
		}
		_, n := binary.Uvarint(start) // the size of what it is a delta to
		if n <= 0 {
			return fmt.Errorf("pack: a delta: %w", packfile.ErrInvalidDelta)
		}
		size, n := binary.Uvarint(start[n:])
		if n <= 0 {
			return fmt.Errorf("pack: a delta: %w", packfile.ErrInvalidDelta)
		}
		if size > uint64(most) {
			return &objectTooLarge{int64(min(size, 1<<63-1))}
		}
	}
	if _, err := s.Checksum(); err != nil {
		return fmt.Errorf("pack: %w", err)
	}
	_, err = io.Copy(io.Discard, r)
	return err
}

// head keeps the first bytes that are written to it: enough for two sizes.
type head []byte

func (p *head) Write(data []byte) (int, error) {
	*p = append(*p, data[:min(len(data), 2*binary.MaxVarintLen64-len(*p))]...)
	return len(data), nil
}
