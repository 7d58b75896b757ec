package object

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"

	"github.com/aws/aws-sdk-go-v2/aws"
	awshttp "github.com/aws/aws-sdk-go-v2/aws/transport/http"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/deployments/inputfile"
)

// S3Config overrides AWS's environment, for tests and for programs that use more than one S3.
type S3Config struct {
	Endpoint, Region     string
	AccessKey, SecretKey string
}

// s3Lazy loads AWS's configuration when the first s3:// URL is used.
type s3Lazy struct {
	config *S3Config
	client *Client
	// unconditional is Config.UnconditionalPut.
	unconditional bool

	mu    sync.Mutex
	store *s3Store
}

func (l *s3Lazy) get(ctx context.Context) (*s3Store, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.store != nil {
		return l.store, nil
	}
	options := []func(*config.LoadOptions) error{
		config.WithLogger(awsLogger(l.client.log)),
		config.WithHTTPClient(awshttp.NewBuildableClient().WithTransportOptions(l.client.tune)),
	}
	if c := l.config; c != nil {
		options = append(options, config.WithRegion(c.Region),
			config.WithCredentialsProvider(credentials.NewStaticCredentialsProvider(c.AccessKey, c.SecretKey, "")))
	}
	if err := checkAWSFiles(); err != nil {
		return nil, err
	}
	cfg, err := config.LoadDefaultConfig(ctx, options...)
	if err != nil {
		return nil, fmt.Errorf("reading AWS's configuration: %w", err)
	}
	if cfg.Region == "" {
		cfg.Region = "us-east-1"
	}
	client := s3.NewFromConfig(cfg, func(o *s3.Options) {
		if l.config != nil {
			o.BaseEndpoint = aws.String(l.config.Endpoint)
		}
		o.HTTPClient = l.client.s3Client(cfg.HTTPClient)
		if l.config == nil && cfg.Credentials != nil {
			o.Credentials = &slowCredentials{CredentialsProvider: cfg.Credentials, log: l.client.log}
		}
		// Anything that isn't AWS names buckets in the path.
		o.UsePathStyle = o.BaseEndpoint != nil
		// Retries are ours: one policy for all kinds of storage.
		o.Retryer = aws.NopRetryer{}
		// Bytes are checked against digests; S3 has no checksum of a range.
		o.ResponseChecksumValidation = aws.ResponseChecksumValidationWhenRequired
		o.RequestChecksumCalculation = aws.RequestChecksumCalculationWhenRequired
	})
	l.store = &s3Store{client: client, retry: l.client.retry, unconditional: l.unconditional}
	return l.store, nil
}

// awsLogger returns a logger for AWS's own code that writes to log at the level debug. By default that code writes its
// messages, such as that a metadata service is outdated, to standard error.
func awsLogger(log *slog.Logger) logging.Logger {
	return logging.LoggerFunc(func(kind logging.Classification, format string, args ...any) {
		log.Debug("message of the AWS SDK", "kind", kind, "message", fmt.Sprintf(format, args...))
	})
}

// checkAWSFiles returns an error if AWS's environment names a file that can't be read within the bounds of inputfile.
// A file that is missing, or may not be read, is left to AWS's own code, which reads all these files by itself.
func checkAWSFiles() error {
	for _, name := range []string{"AWS_CA_BUNDLE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE",
		"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"} {
		file := os.Getenv(name)
		if file == "" {
			continue
		}
		if err := inputfile.Check(name, file); err != nil && !errors.Is(err, fs.ErrNotExist) &&
			!errors.Is(err, fs.ErrPermission) {
			return err
		}
	}
	return nil
}

// s3Client returns the client for requests to S3. It keeps the transport of AWS's configuration, which knows of
// AWS_CA_BUNDLE. AWS's own client follows redirects to anywhere without end; this one follows only 307 and 308, and
// checks and bounds these. AWS's own client fetches credentials, as an instance gets them at a link-local address.
func (c *Client) s3Client(made aws.HTTPClient) aws.HTTPClient {
	buildable, ok := made.(*awshttp.BuildableClient)
	if !ok {
		return made
	}
	client := c.httpClient(buildable.GetTransport(), anyAddress)
	check := client.CheckRedirect
	client.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		switch r.Response.StatusCode {
		case http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
			return check(r, via)
		}
		return http.ErrUseLastResponse // s3Error reports what the answer says, such as the bucket's region
	}
	return client
}

type s3Store struct {
	client *s3.Client
	retry  retry
	// unconditional is Config.UnconditionalPut.
	unconditional bool
}

// fail is s3Error; for a denied call it adds which credentials were used.
func (s *s3Store) fail(ctx context.Context, err error) error {
	err = s3Error(err)
	if !errors.Is(err, ErrDenied) {
		return err
	}
	who, failed := s.client.Options().Credentials.Retrieve(ctx)
	if failed != nil {
		return err
	}
	return fmt.Errorf("%w (with the access key %s, from %s)", err, who.AccessKeyID,
		cmp.Or(who.Source, "the configuration"))
}

// ifNone returns the If-None-Match header of a put, which keeps it from overwriting; nil: the storage doesn't
// support it.
func (s *s3Store) ifNone() *string {
	if s.unconditional {
		return nil
	}
	return aws.String("*")
}

// stat requests the first byte. Unlike HEAD, this shows whether the server honours Range, and its errors have a
// message. If the object is empty, stat sends a HEAD as well.
func (s *s3Store) stat(ctx context.Context, u *url.URL) (Object, error) {
	out, err := s.client.GetObject(
		ctx,
		&s3.GetObjectInput{Bucket: &u.Host, Key: aws.String(key(u)), VersionId: version(u), Range: aws.String(firstByte)},
	)
	var api smithy.APIError
	if errors.As(err, &api) && api.ErrorCode() == "InvalidRange" { // the object is empty
		out, err := s.client.HeadObject(ctx,
			&s3.HeadObjectInput{Bucket: &u.Host, Key: aws.String(key(u)), VersionId: version(u)})
		if err != nil {
			return Object{}, s.fail(ctx, err)
		}
		return Object{Size: aws.ToInt64(out.ContentLength), ETag: aws.ToString(out.ETag), Ranges: true}, nil
	}
	if err != nil {
		return Object{}, s.fail(ctx, err)
	}
	defer out.Body.Close()
	if out.ContentRange == nil {
		size := aws.ToInt64(out.ContentLength)
		return Object{Size: size, ETag: aws.ToString(out.ETag), Ranges: size <= 1}, nil
	}
	io.CopyN(io.Discard, out.Body, 1) // so that the connection is used again
	size, err := sizeIn(*out.ContentRange)
	if err != nil {
		return Object{}, err
	}
	return Object{Size: size, ETag: aws.ToString(out.ETag), Ranges: true}, nil
}

func (s *s3Store) read(ctx context.Context, u *url.URL, o Object, offset, n int64) (io.ReadCloser, int64, error) {
	in := &s3.GetObjectInput{Bucket: &u.Host, Key: aws.String(key(u)), VersionId: version(u)}
	whole := n < 0 || offset == 0 && n == o.Size
	if !whole {
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", offset, offset+n-1))
	}
	if o.ETag != "" {
		in.IfMatch = &o.ETag
	}
	out, err := s.client.GetObject(ctx, in)
	if err != nil {
		return nil, 0, s.fail(ctx, err)
	}
	if o.ETag != "" && aws.ToString(out.ETag) != o.ETag {
		out.Body.Close()
		return nil, 0, ErrChanged
	}
	var before int64
	switch {
	case whole:
	case out.ContentRange != nil:
		if want := fmt.Sprintf("bytes %d-%d/", offset, offset+n-1); !strings.HasPrefix(*out.ContentRange, want) {
			out.Body.Close()
			return nil, 0, fmt.Errorf("S3 answered with Content-Range %q, want %s…", *out.ContentRange, want)
		}
	default:
		if size := aws.ToInt64(out.ContentLength); size != o.Size {
			out.Body.Close()
			return nil, 0, ErrChanged
		}
		before = offset // the server ignores Range
	}
	return out.Body, before, nil
}

const (
	partSize  = 16 << 20 // bytes; above it a put is multipart
	maxParts  = 10_000
	partsOpen = 4
)

func (s *s3Store) put(ctx context.Context, u *url.URL, b *body, contentType string) error {
	if u.RawQuery != "" {
		return errVersion
	}
	if b.size > partSize {
		return s.putParts(ctx, u, b, contentType)
	}
	in := &s3.PutObjectInput{Bucket: &u.Host, Key: aws.String(key(u)), Body: b.reader(), ContentLength: &b.size}
	if !b.replace {
		in.IfNoneMatch = s.ifNone()
	}
	if contentType != "" {
		in.ContentType = &contentType
	}
	_, err := s.client.PutObject(ctx, in)
	return putError(s.fail(ctx, err))
}

// putParts uploads parts in parallel. A failed upload is aborted, as its parts would otherwise be kept and paid
// for.
func (s *s3Store) putParts(ctx context.Context, u *url.URL, b *body, contentType string) (err error) {
	size := max(int64(partSize), (b.size+maxParts-1)/maxParts)
	in := &s3.CreateMultipartUploadInput{Bucket: &u.Host, Key: aws.String(key(u))}
	if contentType != "" {
		in.ContentType = &contentType
	}
	created, err := s.client.CreateMultipartUpload(ctx, in)
	if err != nil {
		return s.fail(ctx, err)
	}
	defer func() {
		if err != nil {
			s.client.AbortMultipartUpload(context.WithoutCancel(ctx),
				&s3.AbortMultipartUploadInput{Bucket: &u.Host, Key: in.Key, UploadId: created.UploadId})
		}
	}()
	parts := make([]types.CompletedPart, (b.size+size-1)/size)
	var mu sync.Mutex
	var sent int64
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(partsOpen)
	for i := range parts {
		group.Go(func() error {
			offset := int64(i) * size
			n := min(size, b.size-offset)
			number := int32(i + 1)
			var out *s3.UploadPartOutput
			// Each part is retried by itself, so that the others aren't sent again.
			err := s.retry(groupCtx, "put a part of "+deployments.ShownURL(u.String()), func() (err error) {
				out, err = s.client.UploadPart(groupCtx, &s3.UploadPartInput{
					Bucket: &u.Host, Key: in.Key, UploadId: created.UploadId, PartNumber: &number,
					Body: io.NewSectionReader(b.ReaderAt, offset, n), ContentLength: &n,
				})
				return s.fail(ctx, err)
			})
			if err != nil {
				return err
			}
			parts[i] = types.CompletedPart{ETag: out.ETag, PartNumber: &number}
			mu.Lock()
			defer mu.Unlock()
			sent += n
			b.progress(sent)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	_, err = s.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{
		Bucket: &u.Host, Key: in.Key, UploadId: created.UploadId, IfNoneMatch: s.ifNone(),
		MultipartUpload: &types.CompletedMultipartUpload{Parts: parts},
	})
	return putError(s.fail(ctx, err))
}

// errVersion means that a URL to write names a version of an object.
var errVersion = errors.New("a version of an object can't be written: leave ?versionId out")

// putError returns errOccupied for a failed If-None-Match. An error of a store that has no conditional PUT gets a
// hint; every other is returned unchanged.
func putError(err error) error {
	var answer *statusCode
	switch {
	case errors.Is(err, ErrChanged):
		return errOccupied
	case errors.As(err, &answer) && answer.code == http.StatusNotImplemented:
		return fmt.Errorf("%w: the store has no conditional PUT (If-None-Match), which keeps objects from being "+
			"overwritten: if only one publishes at a time, use --unconditional-put, which checks first and then writes", err)
	}
	return err
}
