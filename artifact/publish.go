package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
)

// PublishOptions for Publish.
type PublishOptions struct {
	// Dir is the tree to publish; To the URL prefix to publish below: To/NAME/VERSION/manifest.yaml and its objects.
	Dir string
	To  string
	// Manifest is the template: everything but Src, Checksum, Size, Index and Deltas, which Publish sets. Name and
	// Version are required.
	Manifest deployments.Manifest
	// Template, where set, is text to begin the manifest with, byte for byte, variables ({{ env }}) included. Of
	// Manifest only the fields that Template doesn't set may be set then.
	Template []byte
	// Since are pointers of earlier releases to make deltas from; newest first.
	Since []deployments.Pointer
	// Find is how many earlier releases to make deltas from are looked for where Since is empty: those published last
	// below To/NAME/. One that can't be found or read gets none, and the log says why. 0: none.
	Find int
	// Compression of the archive.
	Compression Compression
	// Sign, if not nil, returns a signature of the manifest's bytes, which is put beside it as manifest.yaml.sig.
	Sign func(manifest []byte) ([]byte, error)
	// Signed checks that a signature is of these bytes and by the key of Sign. It is asked where another one than
	// Sign's is there already, as a cut publish leaves it with keys whose signatures differ each time (ECDSA); nil:
	// only the same one will do.
	Signed   func(manifest, signature []byte) error
	Progress func(Progress)
	Log      *slog.Logger // nil: discard
}

// Published is the result of Publish.
type Published struct {
	Pointer deployments.Pointer `json:"pointer"`
	Files   int                 `json:"files"`
	Tree    int64               `json:"tree"`    // bytes of the tree
	Archive int64               `json:"archive"` // bytes of the archive
	Index   int64               `json:"index"`   // bytes of its index
	// Again is true where this version was there already, with the same bytes.
	Again  bool             `json:"again,omitempty"`
	Deltas []PublishedDelta `json:"deltas"`
}

// PublishedDelta says how much a node that runs From fetches, manifest and signature aside.
type PublishedDelta struct {
	From     deployments.Pointer `json:"from"`
	Version  string              `json:"version,omitempty"` // of From
	Bytes    int64               `json:"bytes"`
	Requests int                 `json:"requests"`
	// Dropped is what a delta would have cost, in bytes, where the changed parts of the archive cost less: it has none
	// then.
	Dropped int64 `json:"dropped,omitempty"`
}

// The objects of a release, beside each other.
const (
	manifestName  = "manifest.yaml"
	signatureName = "manifest.yaml.sig"
	archiveName   = "archive.tar.zst"
	indexName     = "index"
)

// MaxSignature bounds a manifest's signature, in bytes.
const MaxSignature = 16 << 10

// Publish packs Dir, uploads archive, index, deltas, manifest and signature, and returns the pointer. The same tree
// and options give the same bytes. Nothing is overwritten with other bytes; cut off at any point, it can be run
// again: that is why the signature comes last, as the manifest that is there says when it was made.
func Publish(ctx context.Context, objects *object.Client, opt PublishOptions) (out Published, err error) {
	m := opt.Manifest
	if m.Name == "" || m.Version == "" {
		return out, errors.New("publish: a release needs a name and a version")
	}
	beside := strings.TrimSuffix(opt.To, "/") + "/" + m.Name + "/"
	p := &publisher{ctx: ctx, objects: objects, opt: opt, log: opt.Log, beside: beside, url: beside + m.Version + "/"}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	if err := deployments.CheckURL(p.url + manifestName); err != nil {
		return out, fmt.Errorf("publish to %s: %w", p.url, err)
	}
	if p.dir, err = os.MkdirTemp("", "kedge-publish-"); err != nil {
		return out, fmt.Errorf("publish: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(p.dir)) }()
	if out, err = p.run(m); err != nil {
		return Published{}, fmt.Errorf("publish %s %s: %w", m.Name, m.Version, err)
	}
	return out, nil
}

type publisher struct {
	ctx     context.Context
	objects *object.Client
	opt     PublishOptions
	log     *slog.Logger
	beside  string // what all versions of this name lie below; with a slash behind
	url     string // what this one does; with a slash behind
	dir     string // temporary
}

func (p *publisher) run(m deployments.Manifest) (out Published, err error) {
	there, err := p.published()
	if err != nil {
		return out, err
	}
	m.Created = there.created(m.Created)
	// What no node would take is refused before anything is uploaded.
	draft := m
	draft.Src, draft.Checksum = archiveName, emptyDigest.String()
	if _, err := p.text(draft); err != nil {
		return out, err
	}
	archive, err := os.Create(filepath.Join(p.dir, archiveName))
	if err != nil {
		return out, err
	}
	defer archive.Close()
	made, err := pack(p.ctx, p.opt.Dir, m.Symlinks, p.opt.Compression, archive, p.opt.Progress)
	if err != nil {
		return out, err
	}
	out = Published{Files: made.Files, Tree: made.Tree, Archive: made.Size, Index: int64(len(made.Index))}
	m.Src, m.Checksum, m.Size = archiveName, made.SHA256.String(), made.Size
	m.Index = &deployments.Blob{URL: indexName, Size: int64(len(made.Index)), SHA256: digestOf(made.Index)}
	if err := p.put(archiveName, archive, made.Size); err != nil {
		return out, err
	}
	if err := p.put(indexName, bytes.NewReader(made.Index), int64(len(made.Index))); err != nil {
		return out, err
	}
	if deltas, ok := there.deltas(p, m.Index.SHA256); ok {
		m.Deltas = deltas
	} else if m.Deltas, out.Deltas, err = p.deltas(made); err != nil {
		return out, err
	}
	text, err := p.text(m)
	if err != nil {
		return out, err
	}
	if err := p.put(manifestName, bytes.NewReader(text), int64(len(text))); err != nil {
		return out, err
	}
	if err := p.sign(text); err != nil {
		return out, err
	}
	out.Again = bytes.Equal(there.raw, text)
	out.Pointer = deployments.Pointer{URL: p.url + manifestName, Digest: sha256.Sum256(text)}
	return out, nil
}

// before is what an earlier run published of this version: nothing, mostly. It may be anybody's.
type before struct {
	raw      []byte
	manifest *deployments.Manifest // nil: none that parses
}

func (p *publisher) published() (b before, err error) {
	b.raw, err = p.objects.ReadAll(p.ctx, p.url+manifestName, deployments.MaxManifest)
	if errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrDenied) { // see Client.Put
		return b, nil
	}
	if err != nil {
		return b, fmt.Errorf("looking whether the release is there already: %w", err)
	}
	b.manifest, _ = deployments.ParseTemplate(b.raw, p.url+manifestName)
	return b, nil
}

// created is when this version was published first, where it was: so that publishing it again gives the same bytes.
// A later time than now's is not taken over.
func (b before) created(now time.Time) time.Time {
	if m := b.manifest; m != nil && !now.IsZero() && !m.Created.IsZero() && m.Created.Before(now) {
		return m.Created
	}
	return now
}

// deltas returns the deltas that an earlier run published with this very tree, and ok is false if publish is to look
// for its own: a release is immutable, and other releases may exist by now. They can do no harm, whoever made them:
// what comes out is checked.
func (b before) deltas(p *publisher, index deployments.Digest) (deltas []deployments.Delta, ok bool) {
	if b.manifest == nil || b.manifest.Index == nil || b.manifest.Index.SHA256 != index || len(p.opt.Since) > 0 ||
		p.opt.Find <= 0 {
		return nil, false
	}
	for _, d := range b.manifest.Deltas {
		d.URL = deltaName(d.From) // where it is another, so is the manifest
		deltas = append(deltas, d)
	}
	return deltas, true
}

// sign puts a signature beside the manifest, unless there is a good one.
func (p *publisher) sign(manifest []byte) error {
	if p.opt.Sign == nil {
		return nil
	}
	signature, err := p.opt.Sign(manifest)
	if err != nil {
		return err
	}
	err = p.upload(signatureName, bytes.NewReader(signature), int64(len(signature)))
	if !errors.Is(err, object.ErrExists) {
		return err
	}
	if p.opt.Signed != nil {
		there, readErr := p.objects.ReadAll(p.ctx, p.url+signatureName, MaxSignature)
		if readErr == nil {
			readErr = p.opt.Signed(manifest, there)
		}
		if readErr == nil {
			return nil
		}
		err = fmt.Errorf("%w (%w)", err, readErr)
	}
	return fmt.Errorf(
		"%w: this version is signed already, by another key: sign with that one, or choose another version",
		err,
	)
}

// ownFields are those that Publish writes.
var ownFields = regexp.MustCompile(`(?m)^(src|checksum|size|index|deltas)[ \t]*:`)

// TemplateSets reports whether a manifest's template gives one of its fields a value. What it doesn't set of name,
// version, created, dest and sync_strategy Publish does: the strategy is release then.
func TemplateSets(template []byte, field string) bool {
	return regexp.MustCompile(`(?m)^` + field + `[ \t]*:[ \t]*[^ \t\r\n#]`).Match(template)
}

// text returns the manifest's bytes: the template as it is, then what it lacks.
func (p *publisher) text(m deployments.Manifest) ([]byte, error) {
	if p.opt.Template == nil {
		text, err := m.Encode()
		if err == nil {
			_, err = deployments.ParseTemplate(text, p.url+manifestName)
		}
		return text, err
	}
	if at := ownFields.FindSubmatch(p.opt.Template); at != nil {
		return nil, fmt.Errorf("the manifest's template sets %s, which publishing writes: remove it", at[1])
	}
	generated := deployments.Manifest{Src: m.Src, Checksum: m.Checksum, Size: m.Size, Index: m.Index, Deltas: m.Deltas}
	lacks := func(field string) bool { return !TemplateSets(p.opt.Template, field) }
	if lacks("name") {
		generated.Name = m.Name
	}
	if lacks("version") {
		generated.Version = m.Version
	}
	if lacks("created") {
		generated.Created = m.Created
	}
	if lacks("dest") {
		generated.Dest = m.Dest
	}
	if lacks("sync_strategy") {
		generated.Strategy = deployments.StrategyRelease
	}
	more, err := generated.Encode()
	if err != nil {
		return nil, err
	}
	text := append(bytes.TrimRight(bytes.Clone(p.opt.Template), "\n"), '\n')
	text = append(text, more...)
	if _, err := deployments.ParseTemplate(text, p.url+manifestName); err != nil {
		return nil, fmt.Errorf(
			"the manifest's template, with what publishing adds to its end (write it as plain lines, FIELD: VALUE): %w",
			err,
		)
	}
	return text, nil
}

// put uploads an object that must have the same bytes in every run.
func (p *publisher) put(name string, body io.ReaderAt, size int64) error {
	err := p.upload(name, body, size)
	if errors.Is(err, object.ErrExists) {
		return fmt.Errorf(
			"%w: this version is published already, from another tree or with other settings; a release is immutable: choose another version",
			err,
		)
	}
	return err
}

func (p *publisher) upload(name string, body io.ReaderAt, size int64) error {
	opt := object.PutOptions{ContentType: "application/octet-stream"}
	if p.opt.Progress != nil {
		opt.Progress = func(sent int64) { p.opt.Progress(Progress{Phase: "upload", Done: sent, Total: size}) }
	}
	return p.objects.Put(p.ctx, p.url+name, body, size, opt)
}
