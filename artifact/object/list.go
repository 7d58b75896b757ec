package object

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"kedge/deployments"
)

// ErrNoList means that kedge can't list this kind of storage.
var ErrNoList = errors.New("gs:// and https:// can't be listed")

// Listed is an object that List found.
type Listed struct {
	URL      string
	Size     int64
	Modified time.Time
}

// List returns, in any order, objects whose URL begins with prefix, which must end in a slash. It returns up to most
// of them; more is set if there are others. If no object is found, that is no error. For gs:// and https:// the error
// wraps ErrNoList. S3 needs s3:ListBucket, without which the error wraps ErrDenied.
func (c *Client) List(ctx context.Context, prefix string, most int) (found []Listed, more bool, err error) {
	if !strings.HasSuffix(prefix, "/") {
		return nil, false, fmt.Errorf("list %s: the prefix must end in a slash", deployments.ShownURL(prefix))
	}
	s, u, err := c.store(ctx, prefix)
	if err != nil {
		return nil, false, err
	}
	lister, ok := s.(lister)
	if !ok {
		return nil, false, fmt.Errorf("list %s: %w", deployments.ShownURL(prefix), ErrNoList)
	}
	for after := ""; ; {
		var page []Listed
		var next string
		err := c.retry(ctx, "list "+deployments.ShownURL(prefix), func() (err error) {
			page, next, err = lister.list(ctx, u, after, most-len(found)+1)
			return err
		})
		if err != nil {
			return nil, false, fmt.Errorf("list %s: %w", deployments.ShownURL(prefix), err)
		}
		for i := range page { // with the caller's spelling of the prefix, which may differ from the canonical one
			page[i].URL = prefix + (&url.URL{Path: page[i].URL}).EscapedPath()
		}
		if found = append(found, page...); len(found) > most {
			return found[:most], true, nil
		}
		if next == "" {
			return found, false, nil
		}
		after = next
	}
}

// lister is a store that can be listed, page by page. list returns at most as many objects as most
// says. Their URLs are only the paths after the prefix. next is what to pass as after for the next
// page; empty: there is none.
type lister interface {
	list(ctx context.Context, prefix *url.URL, after string, most int) (page []Listed, next string, err error)
}

// s3Page is how many objects S3 lists in one answer.
const s3Page = 1000

func (s *s3Store) list(ctx context.Context, prefix *url.URL, after string, most int) ([]Listed, string, error) {
	in := &s3.ListObjectsV2Input{
		Bucket:  &prefix.Host,
		Prefix:  aws.String(key(prefix)),
		MaxKeys: aws.Int32(int32(min(most, s3Page))),
	}
	if after != "" {
		in.ContinuationToken = &after
	}
	out, err := s.client.ListObjectsV2(ctx, in)
	if err != nil {
		return nil, "", s3Error(err)
	}
	var page []Listed
	for _, o := range out.Contents {
		rest := strings.TrimPrefix(aws.ToString(o.Key), key(prefix))
		page = append(page, Listed{URL: rest, Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified)})
	}
	if !aws.ToBool(out.IsTruncated) {
		return page, "", nil
	}
	return page, aws.ToString(out.NextContinuationToken), nil
}

// list returns one page: all objects or, if there are more than most, any of them, as many as most
// says. It doesn't follow symbolic links, and skips unfinished puts.
func (s fileStore) list(ctx context.Context, prefix *url.URL, _ string, most int) (page []Listed, _ string, err error) {
	s.requests.Add(1)
	err = filepath.WalkDir(prefix.Path, func(p string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // the prefix doesn't exist, or p was removed meanwhile
			return nil
		case err != nil:
			return err
		case !d.Type().IsRegular() || strings.HasPrefix(d.Name(), putPrefix):
			return ctx.Err()
		case len(page) == most:
			return fs.SkipAll
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		rest, err := filepath.Rel(prefix.Path, p)
		if err != nil {
			return err
		}
		page = append(page, Listed{URL: rest, Size: info.Size(), Modified: info.ModTime()})
		return nil
	})
	if err != nil {
		return nil, "", fileError(err)
	}
	return page, "", nil
}
