// Package object reads and writes objects by URL: s3://, gs:// and file://. It only reads https://, and http:// from
// this machine or Config.Sources.
package object

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"kedge/deployments"
)

var (
	// ErrUnavailable means that the storage, or the network to it, fails: the same call may succeed later, and the
	// release is not to blame.
	ErrUnavailable = errors.New("the storage is unavailable")
	// ErrCredentials means that AWS credentials could not be got, so that no request was sent. Such an error matches
	// ErrUnavailable, too: an instance's role takes a moment at boot.
	ErrCredentials = errors.New("no AWS credentials")
	ErrNotFound    = errors.New("no such object")
	ErrDenied      = errors.New("access is denied")
	// ErrExists means that the object exists with other bytes: a release is immutable.
	ErrExists = errors.New("the object exists with other bytes")
	// ErrTooLarge means that the object is larger than the caller's bound, or than 16 GiB if its size isn't announced.
	ErrTooLarge = errors.New("the object is larger than allowed")
	// ErrChanged means that the object isn't, or is no longer, the one that an Object describes.
	ErrChanged = errors.New("the object changed while it was read")
)

// Config configures a Client.
type Config struct {
	// MaxBandwidth bounds all reads of this client together, in bytes a second; 0: unbounded.
	MaxBandwidth int64
	// S3 overrides AWS's own configuration from the environment; nil: nothing is overridden.
	S3 *S3Config
	// UnconditionalPut is set for an S3 without conditional PUT. Put may then overwrite an object
	// that another process writes at the same time. It needs the rights to read the object and, for
	// a missing object, to list the bucket.
	UnconditionalPut bool
	// GSEndpoint is the endpoint of gs://; empty: Google's own.
	GSEndpoint string
	// StallTimeout is how long a server may take to answer a request, or to send the next 4 KiB of an answer. After that
	// another connection is tried. Default 10 s.
	StallTimeout time.Duration
	// LeastRate is the lowest rate of a read, in bytes a second over six StallTimeouts. A slower read ends with
	// ErrUnavailable. Default 1 KiB/s. Time spent waiting for MaxBandwidth doesn't count, except in ReadAll.
	LeastRate int64
	// Redirect returns an error if a redirect may not lead to url, which is passed without its query. A nil function
	// allows any. In any case a redirect from https must lead to https, and a redirect from another machine may not lead
	// to this machine.
	Redirect func(url string) error
	// Sources are URLs, or prefixes of URLs. Plain http is read from another machine only if the URL is in Sources or
	// lies below a URL of Sources.
	Sources []string
	// NoLocal refuses connections to loopback, link-local and similar addresses, whatever name leads there. It applies to
	// http:// and https:// URLs that Sources doesn't name, and not to connections through a proxy.
	NoLocal bool
	// Mirrors are tried before an object's own place by callers that can check its bytes. Their timeouts are shorter.
	Mirrors Mirrors
	Log     *slog.Logger // nil: discard
}

// Client reads and writes objects. A call retries transient errors (broken connections, 5xx, S3's 503 SlowDown) with
// backoff, up to seven tries without progress, or two from a mirror. Between seven tries it pauses for some 6 seconds
// in all, or longer if the server says so. After the last try the error wraps a sentinel of this package if one fits.
// Without Config.S3, AWS's own environment, profile or instance role is read when the first s3:// URL is used.
type Client struct {
	log      *slog.Logger
	limit    *rate.Limiter // nil: none
	stall    time.Duration
	least    int64
	maxTries int          // of a call, without progress
	mirrors  *mirrors     // nil: there are none
	http     *http.Client // of http:// and https://
	google   *http.Client
	redirect func(url string) error // Config.Redirect
	sources  []string
	noLocal  bool
	s3       s3Lazy
	gs       string
	account  gsAccount
	requests atomic.Int64
	bytes    atomic.Int64
}

// Object describes an existing object: where it is, its size, and how it can be read.
type Object struct {
	URL  string
	Size int64
	// ETag makes a read fail with ErrChanged if the object was replaced; empty: the server has none that can be relied on.
	ETag string
	// Ranges is false if the server is known to ignore Range.
	Ranges bool
}

// PutOptions are the options of Client.Put.
type PutOptions struct {
	ContentType string
	// Progress is called with the bytes sent so far, in the end with the size, even if nothing was sent; may be nil.
	Progress func(sent int64)
}

// store is one kind of storage. Each method makes one try; only a part of a multipart upload is tried again.
type store interface {
	stat(ctx context.Context, u *url.URL) (Object, error)
	// read returns n bytes from offset on (n < 0: all), guarded by the object's ETag. If the server
	// ignores Range, r gives the whole object. before is how many bytes of r come before the
	// requested ones.
	read(ctx context.Context, u *url.URL, o Object, offset, n int64) (r io.ReadCloser, before int64, err error)
	// put writes an object. If the object exists, the error is errOccupied. With body.replace or Config.UnconditionalPut,
	// put replaces an existing object atomically instead.
	put(ctx context.Context, u *url.URL, body *body, contentType string) error
}

// errOccupied means that a put found an existing object.
var errOccupied = errors.New("an object is there already")

const (
	idleConnections = 32
	// stallTimeout is the default of Config.StallTimeout. Without it a dead connection goes unnoticed for hours.
	stallTimeout = 10 * time.Second
	dialTimeout  = 10 * time.Second
	stallLeast   = 4 << 10 // bytes: a server that gives less in a stallTimeout might as well give nothing
	minRate      = 1 << 10 // Config.LeastRate's default
	minStalls    = 6       // stallTimeouts over which the rate is measured
)

// New returns a client; it does no I/O.
func New(c Config) *Client {
	client := &Client{
		log:      c.Log,
		stall:    cmp.Or(c.StallTimeout, stallTimeout),
		least:    cmp.Or(c.LeastRate, minRate),
		maxTries: maxTries,
	}
	if client.log == nil {
		client.log = slog.New(slog.DiscardHandler)
	}
	if c.MaxBandwidth > 0 {
		client.limit = rate.NewLimiter(rate.Limit(c.MaxBandwidth), limitChunk)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	client.tune(transport)
	client.redirect, client.sources, client.noLocal = c.Redirect, c.Sources, c.NoLocal
	client.http = client.httpClient(transport, client.mayLeadHere)
	client.s3.config, client.s3.client = c.S3, client
	client.s3.unconditional = c.UnconditionalPut
	client.google = client.httpClient(transport, anyAddress)
	client.gs, client.account.http = c.GSEndpoint, client.google
	if len(c.Mirrors) > 0 {
		client.mirrors = newMirrors(c, client)
	}
	return client
}

// tune sets a transport up for many large parallel reads. Idle connections are probed: after an unnoticed cut of
// the network, each of them would cost a stallTimeout.
func (c *Client) tune(t *http.Transport) {
	t.DialContext = dialer().DialContext
	t.MaxIdleConns, t.MaxIdleConnsPerHost = idleConnections, idleConnections
	t.ResponseHeaderTimeout = c.stall
	// HTTP/2 would put all reads on one connection, and a retry on the one that stalled.
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	t.ForceAttemptHTTP2 = false
	// Objects are compressed already, and their length is checked.
	t.DisableCompression = true
	t.ReadBufferSize = 64 << 10
}

func dialer() *net.Dialer {
	return &net.Dialer{Timeout: dialTimeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 2,
	}}
}

// Requests returns the requests sent and the bytes read since New, from mirrors, too, for benchmarks and logs.
func (c *Client) Requests() (requests, bytes int64) {
	requests, bytes = c.requests.Load(), c.bytes.Load()
	if c.mirrors != nil {
		r, b := c.mirrors.client.Requests()
		requests, bytes = requests+r, bytes+b
	}
	return requests, bytes
}

func (c *Client) store(ctx context.Context, text string) (store, *url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", deployments.ShownURL(text), plain(err))
	}
	switch u.Scheme {
	case "s3":
		s, err := c.s3.get(ctx)
		return s, u, err
	case "gs":
		return &gsStore{http: c.google, endpoint: c.gs, account: &c.account}, u, nil
	case "https":
		return &httpStore{http: c.http, meter: c.meter}, u, nil
	case "http":
		if !c.mayRead(u) {
			return nil, nil, fmt.Errorf("%s: %w", deployments.ShownURL(text), errPlainHTTP)
		}
		return &httpStore{http: c.http, meter: c.meter}, u, nil
	case "file":
		return fileStore{requests: &c.requests}, u, nil
	}
	return nil, nil, fmt.Errorf("%s: the scheme is not one of s3, gs, https, file", deployments.ShownURL(text))
}

// Stat returns an object's description. If an http server doesn't announce the size, the whole object is read for it.
func (c *Client) Stat(ctx context.Context, url string) (o Object, err error) {
	s, u, err := c.store(ctx, url)
	if err != nil {
		return o, err
	}
	err = c.retry(ctx, "stat "+deployments.ShownURL(url), func() (err error) { o, err = s.stat(ctx, u); return err })
	if err != nil {
		return o, fmt.Errorf("%s: %w", deployments.ShownURL(url), err)
	}
	o.URL = url
	return o, nil
}

// ReadAll reads a whole small object. If it has more than max bytes, the error is ErrTooLarge. If
// reading takes longer than six StallTimeouts and the time for max bytes at LeastRate, the error is
// ErrUnavailable.
func (c *Client) ReadAll(ctx context.Context, url string, max int64) ([]byte, error) {
	s, u, err := c.store(ctx, url)
	if err != nil {
		return nil, err
	}
	allowed := minStalls*c.stall + time.Duration(float64(max)/float64(c.least)*float64(time.Second))
	slow := error(unavailableError{fmt.Errorf("it was not read within %v", allowed)})
	ctx, cancel := context.WithTimeoutCause(ctx, allowed, slow)
	defer cancel()
	var data []byte
	err = c.retry(ctx, "read "+deployments.ShownURL(url), func() error {
		r, _, err := s.read(ctx, u, Object{URL: url, Size: -1}, 0, -1)
		if err != nil {
			return err
		}
		defer r.Close()
		data, err = io.ReadAll(io.LimitReader(c.meter(ctx, r), max+1))
		if err != nil {
			return &transientError{err: err}
		}
		return nil
	})
	if err != nil && errors.Is(context.Cause(ctx), slow) {
		err = slow
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", deployments.ShownURL(url), err)
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("%s: %w: at most %d bytes", deployments.ShownURL(url), ErrTooLarge, max)
	}
	return data, nil
}

// Read opens a stream of the object from offset to its end. A broken connection is resumed where it broke, guarded by
// the ETag.
func (c *Client) Read(ctx context.Context, o Object, offset int64) (io.ReadCloser, error) {
	return c.stream(ctx, o, offset, o.Size-offset)
}

// ReadRange opens a stream of n bytes from offset on, and resumes it as Read does. If the server
// ignores Range, the bytes before offset are read and dropped.
func (c *Client) ReadRange(ctx context.Context, o Object, offset, n int64) (io.ReadCloser, error) {
	return c.stream(ctx, o, offset, n)
}

// body is the content of a put.
type body struct {
	io.ReaderAt
	size     int64
	progress func(int64)
	replace  bool // an existing object is overwritten
}

func (b *body) reader() *io.SectionReader { return io.NewSectionReader(b.ReaderAt, 0, b.size) }

// Put writes an object (S3: multipart above 16 MiB). If it exists with the same bytes, Put succeeds; with others,
// the error is ErrExists. r is read from its start, perhaps more than once.
func (c *Client) Put(ctx context.Context, url string, r io.ReaderAt, size int64, opt PutOptions) error {
	s, u, err := c.store(ctx, url)
	if err != nil {
		return err
	}
	b := &body{ReaderAt: r, size: size, progress: opt.Progress}
	if b.progress == nil {
		b.progress = func(int64) {}
	}
	err = c.retry(ctx, "put "+deployments.ShownURL(url), func() error {
		// The stat spares sending an object that exists. To a caller who may not list the bucket, S3 denies access to a
		// missing object. After that, only a conditional put keeps an object that may exist.
		switch _, err := s.stat(ctx, u); {
		case err == nil:
			return errOccupied
		case errors.Is(err, ErrDenied) && u.Scheme == "s3" && c.s3.unconditional:
			return fmt.Errorf("an unconditional put must first see whether the object is there: %w", err)
		case !errors.Is(err, ErrNotFound) && !errors.Is(err, ErrDenied):
			return err
		}
		return s.put(ctx, u, b, opt.ContentType)
	})
	if errors.Is(err, errOccupied) {
		err = c.verifyExisting(ctx, url, b)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", deployments.ShownURL(url), err)
	}
	b.progress(size)
	return nil
}

// Replace writes a small object, of at most 16 MiB, and overwrites an existing one. Readers see the old or the new
// one, never a part.
func (c *Client) Replace(ctx context.Context, url string, data []byte, contentType string) error {
	s, u, err := c.store(ctx, url)
	if err != nil {
		return err
	}
	if len(data) > partSize {
		return fmt.Errorf("%s: the new content has %d bytes, and at most %d can be written in one step",
			deployments.ShownURL(url), len(data), partSize)
	}
	b := &body{ReaderAt: bytes.NewReader(data), size: int64(len(data)), progress: func(int64) {}, replace: true}
	if err := c.retry(ctx, "replace "+deployments.ShownURL(url),
		func() error { return s.put(ctx, u, b, contentType) }); err != nil {
		return fmt.Errorf("%s: %w", deployments.ShownURL(url), err)
	}
	return nil
}

// verifyExisting returns nil if the stored object equals b, and ErrExists if it does not.
func (c *Client) verifyExisting(ctx context.Context, url string, b *body) error {
	o, err := c.Stat(ctx, url)
	if err != nil {
		return err
	}
	if o.Size != b.size {
		return ErrExists
	}
	r, err := c.Read(ctx, o, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	stored, ours := sha256.New(), sha256.New()
	if _, err := io.Copy(stored, r); err != nil {
		return err
	}
	if _, err := io.Copy(ours, b.reader()); err != nil {
		return fmt.Errorf("reading what to write: %w", err)
	}
	if !bytes.Equal(stored.Sum(nil), ours.Sum(nil)) {
		return ErrExists
	}
	return nil
}

// key returns an object's path in its bucket.
func key(u *url.URL) string { return strings.TrimPrefix(u.Path, "/") }
