package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"time"

	"kedge/deployments"
	"kedge/deployments/wait"
)

const (
	maxTries   = 7 // without progress
	firstPause = 100 * time.Millisecond
	maxPause   = 5 * time.Second
)

// transientError is an error that is worth another try. after is the pause that the server asked for; 0: none.
type transientError struct {
	err   error
	after time.Duration
}

func (e *transientError) Error() string { return e.err.Error() }

func (e *transientError) Unwrap() error { return e.err }

// retry is the signature of Client.retry, for stores that call it.
type retry func(ctx context.Context, what string, try func() error) error

// retry calls try until it succeeds, fails permanently, or has failed Client.maxTries times, or
// until ctx has ended. what names the call in the log. A transient error becomes ErrUnavailable. If
// ctx ends in a pause, retry returns the cause of ctx.
func (c *Client) retry(ctx context.Context, what string, try func() error) error {
	pause := wait.NewBackoff(firstPause, maxPause)
	for n := 1; ; n++ {
		err := try()
		var transient *transientError
		if err == nil || !errors.As(err, &transient) || n == c.maxTries || ctx.Err() != nil {
			return withoutTransient(err)
		}
		c.log.Debug("trying again", "what", what, "error", err)
		if err := wait.For(ctx, max(pause.Next(), transient.after)); err != nil {
			return err
		}
	}
}

// withoutTransient returns the error to report when no more tries are made: a transient one becomes
// ErrUnavailable.
func withoutTransient(err error) error {
	var transient *transientError
	if !errors.As(err, &transient) {
		return err
	}
	if err == error(transient) {
		err = transient.err
	}
	return unavailableError{err}
}

// unavailableError is ErrUnavailable with its cause, such as the error of the last try.
type unavailableError struct{ error }

func (e unavailableError) Is(target error) bool { return target == ErrUnavailable }

func (e unavailableError) Unwrap() error { return e.error }

func (c *Client) stream(ctx context.Context, o Object, offset, n int64) (io.ReadCloser, error) {
	if offset < 0 || n < 0 || offset+n > o.Size {
		return nil, fmt.Errorf("%s: bytes %d to %d of an object of %d", deployments.ShownURL(o.URL), offset, offset+n, o.Size)
	}
	s, u, err := c.store(ctx, o.URL)
	if err != nil {
		return nil, err
	}
	r := &resuming{
		client: c,
		ctx:    ctx,
		store:  s,
		url:    u,
		object: o,
		offset: offset,
		left:   n,
		pause:  wait.NewBackoff(firstPause, maxPause),
	}
	if n == 0 {
		return r, nil
	}
	if err := r.open(); err != nil {
		return nil, fmt.Errorf("%s: %w", deployments.ShownURL(o.URL), err)
	}
	return r, nil
}

// resuming is an object's body. If a connection breaks, it requests the missing bytes on another.
// It counts its tries anew each time that stallLeast bytes have come.
type resuming struct {
	client *Client
	ctx    context.Context
	store  store
	url    *url.URL
	object Object
	offset int64
	left   int64
	body   *metered
	// limited is how long the bandwidth limit has delayed reads.
	limited time.Duration
	tries   int
	since   int // bytes since tries began
	pause   *wait.Backoff
	pace    pace
}

// pace measures how fast a stream's bytes arrive, over all its connections.
type pace struct {
	bytes int64
	took  time.Duration // without the bandwidth limit's delays
}

// tooSlowAfter counts in p a read of n bytes. Each time that minStalls stallTimeouts have passed,
// it reports whether the rate over this time was too low, and starts p anew. Until then it returns
// false.
func (c *Client) tooSlowAfter(p *pace, n int, took time.Duration) bool {
	p.bytes += int64(n)
	if p.took += took; p.took < minStalls*c.stall {
		return false
	}
	slow := float64(p.bytes) < float64(c.least)*p.took.Seconds()
	*p = pace{}
	return slow
}

func (r *resuming) open() error {
	return r.client.retry(r.ctx, "read "+deployments.ShownURL(r.object.URL), func() error {
		body, before, err := r.store.read(r.ctx, r.url, r.object, r.offset, r.left)
		if err != nil {
			return err
		}
		metered := r.client.meter(r.ctx, body)
		if _, err := io.CopyN(io.Discard, metered, before); err != nil {
			body.Close()
			return &transientError{err: err}
		}
		r.body = metered
		return nil
	})
}

func (r *resuming) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	began, limited := time.Now(), r.limited
	n, err := r.read(p)
	if err == nil && r.left > 0 && r.client.tooSlowAfter(&r.pace, n, time.Since(began)-(r.limited-limited)) {
		err = unavailableError{
			fmt.Errorf("%s: the answer comes slower than %d bytes a second", deployments.ShownURL(r.object.URL), r.client.least),
		}
	}
	return n, err
}

// read is Read without the check of the rate.
func (r *resuming) read(p []byte) (int, error) {
	for {
		if r.body == nil {
			if err := r.open(); err != nil {
				return 0, fmt.Errorf("%s: %w", deployments.ShownURL(r.object.URL), err)
			}
		}
		before := r.body.limited
		n, err := r.body.Read(p[:min(int64(len(p)), r.left)])
		r.limited += r.body.limited - before
		r.offset += int64(n)
		r.left -= int64(n)
		if r.since += n; r.since >= stallLeast {
			r.tries, r.since = 0, 0
			r.pause.Reset()
		}
		if r.left == 0 || err == nil {
			return n, nil
		}
		r.body.Close()
		r.body = nil
		if err := r.ctx.Err(); err != nil {
			return n, err
		}
		if r.tries++; r.tries == r.client.maxTries {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return n, unavailableError{
				fmt.Errorf("%s: cut off at byte %d of %d: %w", deployments.ShownURL(r.object.URL), r.offset, r.object.Size, err),
			}
		}
		r.client.log.Debug("a read was cut off", "url", deployments.ShownURL(r.object.URL), "at", r.offset, "error", err)
		if err := r.pause.Wait(r.ctx); err != nil {
			return n, err
		}
		if n > 0 {
			return n, nil
		}
	}
}

func (r *resuming) Close() error {
	if r.body == nil {
		return nil
	}
	return r.body.Close()
}
