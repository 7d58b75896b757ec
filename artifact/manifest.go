package artifact

import (
	"context"
	"errors"
	"fmt"

	"kedge/artifact/object"
	"kedge/deployments"
)

// ReadManifest returns the bytes of the manifest that p points to, if need be from an older version
// of the object. If the object exists, but neither it nor one of its last maxVersions versions has
// p's digest, the error wraps deployments.ErrDigest. The same holds if older versions can't be
// listed or read.
func ReadManifest(ctx context.Context, objects *object.Client, p deployments.Pointer) ([]byte, error) {
	raw, err := objects.ReadPinned(ctx, p.URL, deployments.MaxManifest, hasDigest(p.Digest))
	if err != nil && !errors.Is(err, deployments.ErrDigest) {
		return nil, fmt.Errorf("fetch the manifest: %w", err)
	}
	if err != nil {
		if raw, err := olderVersion(ctx, objects, p); err == nil {
			return raw, nil
		}
		// The actual digest is not shown: whoever can pin could probe files that only the agent can read.
		return nil, fmt.Errorf(
			"the manifest %s: %w: it was replaced, or the pointer is mistyped; each release needs a key of its own, "+
				"or a bucket that keeps versions",
			deployments.ShownURL(p.URL),
			deployments.ErrDigest,
		)
	}
	return raw, nil
}

// hasDigest returns a function that returns deployments.ErrDigest unless its argument has the digest want.
func hasDigest(want deployments.Digest) func([]byte) error {
	return func(data []byte) error {
		if deployments.DigestOf(data) != want {
			return deployments.ErrDigest
		}
		return nil
	}
}

// maxVersions bounds how many older versions of a manifest are read.
const maxVersions = 20

// olderVersion returns p's manifest from an older version of the object at p.URL: some publishers
// overwrite one key with each release. If none of the last maxVersions versions has p's digest, or
// the storage keeps no versions, the error is deployments.ErrDigest.
func olderVersion(ctx context.Context, objects *object.Client, p deployments.Pointer) ([]byte, error) {
	urls, err := objects.Versions(ctx, p.URL, maxVersions)
	if err != nil {
		return nil, err
	}
	for _, url := range urls {
		raw, err := objects.ReadAll(ctx, url, deployments.MaxManifest)
		if err != nil {
			return nil, err
		}
		if deployments.DigestOf(raw) == p.Digest {
			return raw, nil
		}
	}
	return nil, deployments.ErrDigest
}
