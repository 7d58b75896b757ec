package object

import (
	"context"
	"fmt"
	"net/url"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"kedge/deployments"
)

// version returns the version in a URL's ?versionId; nil: the newest.
func version(u *url.URL) *string {
	if v := u.Query().Get("versionId"); v != "" {
		return &v
	}
	return nil
}

// Versions returns the URLs of at most most older versions of an object, newest first. There are none if url names a
// version, or if the bucket or the storage keeps no versions. It needs s3:ListBucketVersions.
func (c *Client) Versions(ctx context.Context, url string, most int) (urls []string, err error) {
	s, u, err := c.store(ctx, url)
	if err != nil {
		return nil, err
	}
	in, ok := s.(*s3Store)
	if !ok || u.RawQuery != "" {
		return nil, nil
	}
	err = c.retry(ctx, "list the versions of "+deployments.ShownURL(url), func() error {
		urls = nil
		out, err := in.client.ListObjectVersions(ctx, &s3.ListObjectVersionsInput{
			Bucket: &u.Host, Prefix: aws.String(key(u)), MaxKeys: aws.Int32(int32(4*most + 1)),
		})
		if err != nil {
			return in.fail(ctx, err)
		}
		for _, v := range out.Versions {
			id := aws.ToString(v.VersionId)
			if aws.ToString(v.Key) != key(u) || aws.ToBool(v.IsLatest) || id == "" || len(urls) == most {
				continue
			}
			urls = append(urls, strings.TrimSuffix(url, "?")+"?versionId="+id)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the versions of %s: %w", deployments.ShownURL(url), err)
	}
	return urls, nil
}
