// Package object reads and writes objects by URL: s3://, gs://, https://, file:// (and http:// to this machine).
package object

import (
	"context"
	"errors"
	"io"
	"log/slog"
)

var (
	ErrNotFound = errors.New("no such object")
	ErrDenied   = errors.New("access to the object is denied")
	// ErrExists means that other bytes are there already: a release is immutable.
	ErrExists = errors.New("the object exists with other bytes")
	// ErrTooLarge means that the object is larger than the caller's bound.
	ErrTooLarge = errors.New("the object is larger than allowed")
	// ErrChanged means that the object was replaced while it was read.
	ErrChanged = errors.New("the object changed while it was read")
)

// Config configures a Client.
type Config struct {
	// MaxBandwidth bounds all reads of this client together, in bytes a second; 0: unbounded.
	MaxBandwidth int64
	Log          *slog.Logger // nil: discard
}

// Client reads and writes objects. Transient faults (cut connections, 5xx, S3's 503 SlowDown) are retried within a call with
// back-off, a bounded number of times; what is left is an error that wraps a sentinel of this package where one fits.
// AWS is configured by its own environment, profile or instance role.
type Client struct{ impl }

// Object is an object that was found.
type Object struct {
	URL  string
	Size int64
	// ETag guards ranged reads against a replaced object; empty where the server has none.
	ETag string
	// Ranges is false where the server is known to ignore Range.
	Ranges bool
}

// PutOptions for Client.Put.
type PutOptions struct {
	ContentType string
	// Progress is told of bytes sent so far; nil: nobody.
	Progress func(sent int64)
}

// New makes a client; it does no I/O.
func New(c Config) *Client { return newClient(c) }

// Stat finds an object.
func (c *Client) Stat(ctx context.Context, url string) (Object, error) { return c.stat(ctx, url) }

// ReadAll reads a whole small object; ErrTooLarge if it has more than max bytes.
func (c *Client) ReadAll(ctx context.Context, url string, max int64) ([]byte, error) {
	return c.readAll(ctx, url, max)
}

// Read opens a stream of the whole object from offset on. A cut connection is resumed where it was cut, guarded by ETag.
func (c *Client) Read(ctx context.Context, o Object, offset int64) (io.ReadCloser, error) {
	return c.read(ctx, o, offset)
}

// ReadRange reads n bytes at offset in one request, If-Match its ETag; where the server ignores Range it reads and discards
// what lies before.
func (c *Client) ReadRange(ctx context.Context, o Object, offset, n int64) (io.ReadCloser, error) {
	return c.readRange(ctx, o, offset, n)
}

// Put writes an object (S3: multipart above 16 MiB), never over other bytes: if one exists with the same size and SHA-256 it
// is left and Put succeeds; with others, ErrExists. Size is body's; body is read from its start, perhaps more than once.
func (c *Client) Put(ctx context.Context, url string, body io.ReaderAt, size int64, opt PutOptions) error {
	return c.put(ctx, url, body, size, opt)
}

// Requests counts the requests sent and the bytes read since New: what a benchmark and a log line want to know.
func (c *Client) Requests() (requests, bytes int64) { return c.requests() }
