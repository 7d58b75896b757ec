package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
)

// span is a range of frames that one request fetches. Unwanted frames in it are skipped.
type span struct{ from, to int }

// spansOf returns the spans of the frames whose element of wanted is set. A span bridges gaps of up to spanGap bytes,
// and has at most maxSpan bytes, unless one frame has more.
func spansOf(x *archive.Index, wanted []bool) []span {
	var spans []span
	for i, want := range wanted {
		if !want {
			continue
		}
		f := &x.Frames[i]
		if n := len(spans); n > 0 {
			last := &spans[n-1]
			end := x.Frames[last.to-1]
			if f.Offset-(end.Offset+end.Size) <= spanGap && f.Offset+f.Size-x.Frames[last.from].Offset <= maxSpan {
				last.to = i + 1
				continue
			}
		}
		spans = append(spans, span{i, i + 1})
	}
	return spans
}

// fetched is a frame whose hash was verified.
type fetched struct {
	frame int
	data  []byte
}

// fetchFrames fetches the frames whose element of wanted is set, and writes from them the files that the tree still
// lacks.
func (f *fetch) fetchFrames(ctx context.Context, wanted []bool) error {
	spans := spansOf(f.index, wanted)
	if len(spans) == 0 {
		return nil
	}
	for _, s := range spans {
		last := f.index.Frames[s.to-1]
		f.meter.Expect(last.Offset + last.Size - f.index.Frames[s.from].Offset)
	}
	source, err := f.openArchive(ctx)
	if err != nil {
		return err
	}
	readers := connections
	if o := source.current(); !o.Ranges { // one stream that skips what isn't wanted
		f.fallBack("the server ignores Range", "url", deployments.ShownURL(o.URL))
		spans = []span{{spans[0].from, spans[len(spans)-1].to}}
		readers = 1
	}
	readers = min(readers, len(spans))
	cores := runtime.GOMAXPROCS(0)

	group, ctx := errgroup.WithContext(ctx)
	todo := make(chan span)
	frames := make(chan fetched)
	var encoded, decoded int64
	for i, want := range wanted {
		if want {
			encoded, decoded = max(encoded, f.index.Frames[i].Size), max(decoded, f.index.Frames[i].Length)
		}
	}
	buffers := make(chan []byte, readers+cores) // all buffers that will ever exist
	for range cap(buffers) {
		buffers <- nil // allocated when needed
	}
	group.Go(func() error {
		defer close(todo)
		for _, s := range spans {
			if err := wait.Send(ctx, todo, s); err != nil {
				return err
			}
		}
		return nil
	})
	var reading sync.WaitGroup
	reading.Add(readers)
	for range readers {
		group.Go(func() error {
			defer reading.Done()
			for s := range todo {
				if err := f.readSpan(ctx, source, s, wanted, buffers, frames); err != nil {
					return err
				}
			}
			return nil
		})
	}
	group.Go(func() error {
		reading.Wait()
		close(frames)
		return nil
	})
	for range cores {
		group.Go(func() error {
			w := f.tree.worker()
			defer w.close()
			decoder, err := newDecoder()
			if err != nil {
				return err
			}
			defer decoder.Close()
			raw := make([]byte, 0, decoded)
			for job := range frames {
				fr := &f.index.Frames[job.frame]
				raw, err = decoder.DecodeAll(job.data, raw[:0])
				if err != nil {
					return fmt.Errorf("%w: decoding frame %d of the archive: %w", archive.ErrIndex, job.frame, err)
				}
				if int64(len(raw)) != fr.Length {
					return fmt.Errorf("%w: frame %d of the archive decodes to %d bytes, and not to %d", archive.ErrIndex,
						job.frame, len(raw), fr.Length)
				}
				buffers <- job.data
				if err := w.writeFrame(ctx, job.frame, raw); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// newDecoder returns a decoder for frames whose hash was verified.
func newDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(archive.MaxFrame),
		zstd.IgnoreChecksum(true))
}

// readSpan reads a span, and sends its wanted frames to out. If the connection breaks, or a frame is wrong, another
// request, if need be to another source, continues with the first frame that wasn't sent.
func (f *fetch) readSpan(
	ctx context.Context,
	source *archiveSource,
	s span,
	wanted []bool,
	buffers chan []byte,
	out chan<- fetched,
) error {
	pause := wait.NewBackoff(100*time.Millisecond, time.Minute)
	for next, failed := s.from, 0; next < s.to; {
		o := source.current()
		reached, err := f.tryReadSpan(ctx, o, span{next, s.to}, wanted, buffers, out)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return err
		}
		if reached > next {
			failed = 0
			pause.Reset()
		}
		next, failed = reached, failed+1
		if o.IsMirror() || failed == tries || errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrDenied) ||
			errors.Is(err, object.ErrChanged) {
			if source.nextSource(ctx, o, err) != nil {
				return err
			}
			failed = 0
			continue
		}
		if err := pause.Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}

// tryReadSpan makes one request for the span in s, and sends its wanted frames to out. It returns the number of the
// first frame that it could neither send nor skip; s.to if there is none.
func (f *fetch) tryReadSpan(
	ctx context.Context,
	o archiveCopy,
	s span,
	wanted []bool,
	buffers chan []byte,
	out chan<- fetched,
) (int, error) {
	first, last := f.index.Frames[s.from], f.index.Frames[s.to-1]
	length := o.Size - first.Offset
	if o.Ranges {
		length = last.Offset + last.Size - first.Offset
	}
	body, err := o.source.ReadRange(ctx, o.Object, first.Offset, length)
	if err != nil {
		return s.from, err
	}
	defer body.Close()
	for i := s.from; i < s.to; i++ {
		fr := &f.index.Frames[i]
		if !wanted[i] {
			if _, err := io.CopyN(io.Discard, body, fr.Size); err != nil {
				return i, fmt.Errorf("read %s at %d: %w", deployments.ShownURL(o.URL), fr.Offset, err)
			}
			f.meter.Add(fr.Size)
			continue
		}
		var buffer []byte
		select {
		case buffer = <-buffers:
		case <-ctx.Done():
			return i, ctx.Err()
		}
		buffer = slices.Grow(buffer[:0], int(fr.Size))[:fr.Size]
		_, err := io.ReadFull(body, buffer)
		if err == nil && deployments.DigestOf(buffer) != fr.Sum {
			err = fmt.Errorf("%w: frame %d is not the one that the index names", deployments.ErrDigest, i)
		}
		if err != nil {
			buffers <- buffer
			return i, fmt.Errorf("read %s at %d: %w", deployments.ShownURL(o.URL), fr.Offset, err)
		}
		f.meter.Add(fr.Size)
		if err := wait.Send(ctx, out, fetched{i, buffer}); err != nil {
			return i, err
		}
	}
	return s.to, nil
}
