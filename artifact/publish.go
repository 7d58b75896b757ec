package artifact

import (
	"context"

	"kedge/artifact/object"
	"kedge/deployments"
)

// PublishOptions for Publish.
type PublishOptions struct {
	// Dir is the tree to publish; To the URL prefix to publish below: To/NAME/VERSION/manifest.yaml and its objects.
	Dir string
	To  string
	// Manifest is the template: everything but Src, Checksum, Size, Index and Deltas, which Publish sets. Name and Version are required.
	Manifest deployments.Manifest
	// Since are pointers of earlier releases to make deltas from; newest first.
	Since []deployments.Pointer
	// Sign, if not nil, returns a signature of the manifest's bytes, which is put beside it as manifest.yaml.sig.
	Sign     func(manifest []byte) ([]byte, error)
	Progress func(Progress)
}

// Published is what Publish made.
type Published struct {
	Pointer deployments.Pointer
	Files   int
	Tree    int64 // bytes of the tree
	Archive int64 // bytes of the archive
	Deltas  []PublishedDelta
}

// PublishedDelta says what the release costs a node that runs From.
type PublishedDelta struct {
	From  deployments.Pointer
	Bytes int64
}

// Publish packs Dir, uploads archive, index, deltas, signature and, last, the manifest, and returns its pointer. The same tree and
// options give the same bytes. Nothing is overwritten with other bytes; cut off at any point, it can be run again.
func Publish(ctx context.Context, objects *object.Client, opt PublishOptions) (Published, error) {
	return publish(ctx, objects, opt)
}
