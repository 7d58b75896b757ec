package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// httpStore is https://, read only, and http:// on this machine.
type httpStore struct {
	http *http.Client
	// meter keeps a read to the client's bandwidth and patience.
	meter func(context.Context, io.ReadCloser) *metered
}

// stat asks for the first byte: that also tells whether the server keeps to Range, and a presigned URL takes no HEAD.
func (s *httpStore) stat(ctx context.Context, u *url.URL) (Object, error) {
	h, err := netrcHeader(u)
	if err != nil {
		return Object{}, err
	}
	ranged := h.Clone()
	if ranged == nil {
		ranged = http.Header{}
	}
	ranged.Set("Range", firstByte)
	r, err := send(ctx, s.http, http.MethodGet, u.String(), ranged, nil)
	var answer *statusCode
	if errors.As(err, &answer) && answer.code == http.StatusRequestedRangeNotSatisfiable { // it is empty
		r, err = send(ctx, s.http, http.MethodHead, u.String(), h, nil)
	}
	if err != nil {
		return Object{}, err
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusPartialContent {
		if r.ContentLength < 0 {
			// It doesn't say how large it is, as where it makes its answers as it goes: it is read once to know.
			if r.ContentLength, err = io.Copy(io.Discard, io.LimitReader(s.meter(ctx, r.Body), maxUncounted+1)); err != nil {
				return Object{}, &transientError{err: err}
			}
			if r.ContentLength > maxUncounted {
				return Object{}, fmt.Errorf(
					"%w: the server doesn't say how large it is, and it has more than %d bytes",
					ErrTooLarge,
					int64(maxUncounted),
				)
			}
		}
		o, err := found(r)
		o.Ranges = err == nil && o.Size <= 1
		return o, err
	}
	io.CopyN(io.Discard, r.Body, 1) // so that the connection is used again
	if r.ContentLength, err = sizeIn(r.Header.Get("Content-Range")); err != nil {
		return Object{}, err
	}
	return found(r)
}

// maxUncounted bounds, in bytes, how much is read of an object whose size the server doesn't tell.
const maxUncounted = 16 << 30

// firstByte is the Range of an object's first byte; sizeIn gives the object's size as the answer to that has it.
const firstByte = "bytes=0-0"

func sizeIn(contentRange string) (int64, error) {
	size, ok := strings.CutPrefix(contentRange, "bytes 0-0/")
	n, err := strconv.ParseInt(size, 10, 64)
	if !ok || err != nil || n < 1 {
		return 0, fmt.Errorf(
			"the server doesn't say how large it is: asked for the first byte, it answered with %q",
			contentRange,
		)
	}
	return n, nil
}

// found reads an answer's headers.
func found(r *http.Response) (Object, error) {
	if r.ContentLength < 0 {
		return Object{}, errors.New("the server doesn't say how large it is")
	}
	o := Object{Size: r.ContentLength, Ranges: r.Header.Get("Accept-Ranges") != "none"}
	// A weak one promises nothing about bytes, and no server takes it in If-Match.
	if tag := r.Header.Get("ETag"); !strings.HasPrefix(tag, "W/") {
		o.ETag = tag
	}
	return o, nil
}

func (s *httpStore) read(ctx context.Context, u *url.URL, o Object, offset, n int64) (io.ReadCloser, int64, error) {
	h, err := netrcHeader(u)
	if err != nil {
		return nil, 0, err
	}
	return readHTTP(ctx, s.http, u.String(), h, o, offset, n)
}

func readHTTP(
	ctx context.Context,
	client *http.Client,
	url string,
	header http.Header,
	o Object,
	offset, n int64,
) (io.ReadCloser, int64, error) {
	h := header.Clone()
	if h == nil {
		h = http.Header{}
	}
	whole := n < 0 || offset == 0 && n == o.Size
	if !whole {
		h.Set("Range", fmt.Sprintf("bytes=%d-%d", offset, offset+n-1))
	}
	if o.ETag != "" {
		h.Set("If-Match", o.ETag)
	}
	r, err := send(ctx, client, http.MethodGet, url, h, nil)
	if err != nil {
		return nil, 0, err
	}
	if tag := r.Header.Get("ETag"); o.ETag != "" && tag != "" && tag != o.ETag {
		r.Body.Close()
		return nil, 0, ErrChanged
	}
	var before int64
	switch {
	case r.StatusCode == http.StatusPartialContent && !whole:
		if want := fmt.Sprintf("bytes %d-%d/", offset, offset+n-1); !strings.HasPrefix(r.Header.Get("Content-Range"), want) {
			r.Body.Close()
			return nil, 0, fmt.Errorf("the server answered with %q, asked for %s", r.Header.Get("Content-Range"), want)
		}
	case r.StatusCode == http.StatusOK:
		if o.Size >= 0 && r.ContentLength >= 0 && r.ContentLength != o.Size {
			r.Body.Close()
			return nil, 0, ErrChanged
		}
		before = offset // it ignores Range
	default:
		r.Body.Close()
		return nil, 0, fmt.Errorf("the server answered %s", r.Status)
	}
	return r.Body, before, nil
}

func (s *httpStore) put(context.Context, *url.URL, *body, string) error {
	return errors.New("https:// can't be written to: publish to s3://, gs:// or file://")
}

// send sends one request, and makes an error of every answer but 200, 201 and 206.
func send(
	ctx context.Context,
	client *http.Client,
	method, url string,
	header http.Header,
	b *body,
) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return nil, err
	}
	if b != nil {
		request.Body = io.NopCloser(b.reader())
		request.ContentLength = b.size
	}
	for k, v := range header {
		request.Header[k] = v
	}
	r, err := client.Do(request)
	if refused := (redirectError{}); errors.As(err, &refused) {
		return nil, fmt.Errorf("redirected: %w", refused.error)
	}
	if isLocalAddress(err) {
		return nil, unavailableError{plain(err)}
	}
	if err != nil {
		return nil, &transientError{err: plain(err)}
	}
	switch r.StatusCode {
	case http.StatusOK, http.StatusCreated, http.StatusPartialContent:
		return r, nil
	}
	defer r.Body.Close()
	io.CopyN(io.Discard, r.Body, 64<<10) // so that the connection is used again
	return nil, statusError(r.StatusCode, r.Status, retryAfter(r.Header))
}

// plain strips the URL from an error of net/http: it may carry a signature, and callers name the object themselves.
func plain(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

func statusError(code int, status string, after time.Duration) error {
	switch code {
	case http.StatusNotFound, http.StatusGone:
		return ErrNotFound
	case http.StatusUnauthorized, http.StatusForbidden:
		return fmt.Errorf("%w: %s", ErrDenied, status)
	case http.StatusPreconditionFailed:
		return ErrChanged
	case http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusTooEarly:
		return &transientError{err: fmt.Errorf("the server answered %s", status), after: after}
	}
	if code >= 500 && code != http.StatusNotImplemented {
		return &transientError{err: fmt.Errorf("the server answered %s", status), after: after}
	}
	return &statusCode{code, status}
}

// statusCode is an answer that means nothing in particular.
type statusCode struct {
	code   int
	status string
}

func (s *statusCode) Error() string { return "the server answered " + s.status }

// maxRetryAfter bounds how long a server can make us wait.
const maxRetryAfter = 30 * time.Second

func retryAfter(h http.Header) time.Duration {
	seconds, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || seconds < 0 {
		return 0
	}
	return min(time.Duration(seconds)*time.Second, maxRetryAfter)
}
