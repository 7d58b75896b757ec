package artifact

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"kedge/artifact/object"
	"kedge/deployments"
)

// archiveSource is the place that a fetch currently reads its archive from. Several goroutines use it.
type archiveSource struct {
	objects *object.Client
	size    int64

	mu   sync.Mutex
	now  archiveCopy
	left []object.Source // sources to try when now fails
}

// archiveCopy is one source's copy of an archive.
type archiveCopy struct {
	object.Object
	source object.Source
}

// IsMirror reports whether p is a mirror's copy, not the one at the archive's own URL.
func (p archiveCopy) IsMirror() bool { return p.source.IsMirror() }

// openArchive opens the archive at the first source that has it.
func (f *fetch) openArchive(ctx context.Context) (*archiveSource, error) {
	a := &archiveSource{objects: f.objects, size: f.index.ArchiveSize(), left: f.objects.Sources(f.manifest.Src)}
	if err := a.open(ctx); err != nil {
		return nil, err
	}
	return a, nil
}

func (a *archiveSource) current() archiveCopy {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.now
}

// nextSource makes the next source that has the archive the current one, after reading from the place in from has
// failed with err. It does nothing if another goroutine has already replaced that place. An error means that no source
// is left, or that ctx has ended.
func (a *archiveSource) nextSource(ctx context.Context, from archiveCopy, err error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.now.source != from.source {
		return nil
	}
	a.objects.NoteFailure(from.source, err)
	return a.open(ctx)
}

// open makes the next source that has the archive, in the size that the index says, the current one. A mirror must also
// keep to Range. If no source is left, open returns the error of the archive's own URL, if this call tried that URL, or
// an error that says that no place is left.
func (a *archiveSource) open(ctx context.Context) error {
	err := errors.New("no place is left to read the archive from")
	for len(a.left) > 0 {
		s := a.left[0]
		a.left = a.left[1:]
		o, failed := s.Stat(ctx, s.URL)
		switch {
		case failed != nil:
		case o.Size != a.size:
			failed = fmt.Errorf(
				"%w: the archive %s has %d bytes, its index says %d", deployments.ErrDigest,
				deployments.ShownURL(o.URL), o.Size, a.size)
		case s.IsMirror() && !o.Ranges:
			failed = fmt.Errorf("the mirror ignores Range requests, with which parts of an archive are read: %w",
				object.ErrUnavailable)
		default:
			a.now = archiveCopy{o, s}
			return nil
		}
		if ctx.Err() != nil {
			return failed
		}
		if a.objects.NoteFailure(s, failed); !s.IsMirror() {
			err = failed
		}
	}
	return err
}
