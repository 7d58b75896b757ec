package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// httpStore implements https://, read only, and plain http://.
type httpStore struct {
	http *http.Client
	// meter bounds a read by the client's bandwidth and timeouts.
	meter func(context.Context, io.ReadCloser) *metered
}

// stat requests the first byte. Unlike HEAD, this shows whether the server honours Range, and works with presigned
// URLs. If the object is empty, stat sends a HEAD as well. If the server doesn't announce the size, stat reads the
// whole object.
func (s *httpStore) stat(ctx context.Context, u *url.URL) (Object, error) {
	h, err := requestHeaders(u)
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
	if errors.As(err, &answer) && answer.code == http.StatusRequestedRangeNotSatisfiable { // the object is empty
		r, err = send(ctx, s.http, http.MethodHead, u.String(), h, nil)
	}
	if err != nil {
		return Object{}, explainDenial(u, err)
	}
	ignoresRange := r.StatusCode != http.StatusPartialContent
	if r.Header.Get("Content-Range") == firstByteOf+"*" {
		r.Body.Close()
		if r, err = send(ctx, s.http, http.MethodGet, u.String(), h, nil); err != nil {
			return Object{}, explainDenial(u, err)
		}
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusPartialContent {
		if r.ContentLength < 0 {
			// The server doesn't announce the size, as for generated answers: the object is read once to learn it.
			if r.ContentLength, err = io.Copy(io.Discard, io.LimitReader(s.meter(ctx, r.Body), maxUncounted+1)); err != nil {
				return Object{}, &transientError{err: err}
			}
			if r.ContentLength > maxUncounted {
				return Object{}, fmt.Errorf("%w: the server doesn't say how large the object is, and it has more than %d bytes",
					ErrTooLarge, int64(maxUncounted))
			}
		}
		o, err := objectOf(r)
		if ignoresRange {
			o.Ranges = err == nil && o.Size <= 1
		}
		return o, err
	}
	io.CopyN(io.Discard, r.Body, 1) // so that the connection is reused
	if r.ContentLength, err = sizeIn(r.Header.Get("Content-Range")); err != nil {
		return Object{}, err
	}
	return objectOf(r)
}

// maxUncounted bounds how much is read, in bytes, of an object whose size the server doesn't announce.
const maxUncounted = 16 << 30

// firstByte is the Range of an object's first byte.
const firstByte = "bytes=0-0"

// firstByteOf begins the Content-Range of the answer to a request for firstByte. The size follows,
// or a * if the server doesn't know it.
const firstByteOf = "bytes 0-0/"

// sizeIn returns an object's size from the Content-Range of the answer to a request for firstByte.
func sizeIn(contentRange string) (int64, error) {
	size, ok := strings.CutPrefix(contentRange, firstByteOf)
	n, err := strconv.ParseInt(size, 10, 64)
	if !ok || err != nil || n < 1 {
		return 0, fmt.Errorf(
			"the server doesn't say how large the object is: want Content-Range: bytes 0-0/SIZE, got %q",
			contentRange,
		)
	}
	return n, nil
}

// objectOf returns the Object that an answer's headers describe.
func objectOf(r *http.Response) (Object, error) {
	if r.ContentLength < 0 {
		return Object{}, errors.New("the server doesn't say how large the object is")
	}
	o := Object{Size: r.ContentLength, Ranges: r.Header.Get("Accept-Ranges") != "none"}
	// A weak ETag guarantees nothing about bytes, and isn't valid in If-Match.
	if tag := r.Header.Get("ETag"); !strings.HasPrefix(tag, "W/") {
		o.ETag = tag
	}
	return o, nil
}

func (s *httpStore) read(ctx context.Context, u *url.URL, o Object, offset, n int64) (io.ReadCloser, int64, error) {
	h, err := requestHeaders(u)
	if err != nil {
		return nil, 0, err
	}
	body, before, err := readHTTP(ctx, s.http, u.String(), h, o, offset, n)
	return body, before, explainDenial(u, err)
}

// explainDenial adds to an ErrDenied that plain http to another machine gets no configured
// passwords or headers. It returns every other error unchanged.
func explainDenial(u *url.URL, err error) error {
	if !errors.Is(err, ErrDenied) || isConfidential(u) {
		return err
	}
	return fmt.Errorf("%w; configured passwords and headers are sent only by https, or to this machine", err)
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
			return nil, 0, fmt.Errorf("the server answered with Content-Range %q, want %s…",
				r.Header.Get("Content-Range"), want)
		}
	case r.StatusCode == http.StatusOK:
		if o.Size >= 0 && r.ContentLength >= 0 && r.ContentLength != o.Size {
			r.Body.Close()
			return nil, 0, ErrChanged
		}
		before = offset // the server ignores Range
	default:
		r.Body.Close()
		want := "206 Partial Content"
		if whole {
			want = "200 OK"
		}
		return nil, 0, fmt.Errorf("the server answered %s, want %s", r.Status, want)
	}
	return r.Body, before, nil
}

func (s *httpStore) put(context.Context, *url.URL, *body, string) error {
	return errors.New("https:// can't be written to: publish to s3://, gs:// or file://")
}

// send sends one request. Every status but 200, 201 and 206 is an error.
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

// plain removes the URL from an error of net/http: it may contain a signature, and callers name the object
// themselves.
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

// statusCode is the error of an answer whose status has no special meaning.
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
	return min(time.Duration(min(seconds, math.MaxInt32))*time.Second, maxRetryAfter) // more seconds would overflow
}
