package artifact

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
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
	// Manifest is the template: everything but Src, Checksum, Size, Index and Deltas, which Publish sets. Name and Version are required.
	Manifest deployments.Manifest
	// Template, where set, is text to begin the manifest with, byte for byte, variables ({{ env }}) included. Of Manifest only
	// the fields that Template doesn't set may be set then.
	Template []byte
	// Since are pointers of earlier releases to make deltas from; newest first.
	Since []deployments.Pointer
	// Sign, if not nil, returns a signature of the manifest's bytes, which is put beside it as manifest.yaml.sig.
	Sign     func(manifest []byte) ([]byte, error)
	Progress func(Progress)
}

// Published is what Publish made.
type Published struct {
	Pointer deployments.Pointer `json:"pointer"`
	Files   int                 `json:"files"`
	Tree    int64               `json:"tree"`    // bytes of the tree
	Archive int64               `json:"archive"` // bytes of the archive
	Deltas  []PublishedDelta    `json:"deltas,omitempty"`
}

// PublishedDelta says what the release costs a node that runs From.
type PublishedDelta struct {
	From  deployments.Pointer `json:"from"`
	Bytes int64               `json:"bytes"`
}

// The objects of a release, beside each other.
const (
	manifestName  = "manifest.yaml"
	signatureName = "manifest.yaml.sig"
	archiveName   = "archive.tar.zst"
	indexName     = "index"
)

// Publish packs Dir, uploads archive, index, deltas, signature and, last, the manifest, and returns its pointer. The same tree and
// options give the same bytes. Nothing is overwritten with other bytes; cut off at any point, it can be run again.
func Publish(ctx context.Context, objects *object.Client, opt PublishOptions) (out Published, err error) {
	m := opt.Manifest
	if m.Name == "" || m.Version == "" {
		return out, errors.New("publish: a release needs a name and a version")
	}
	p := &publisher{ctx: ctx, objects: objects, opt: opt, url: strings.TrimSuffix(opt.To, "/") + "/" + m.Name + "/" + m.Version + "/"}
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
	url     string // with a slash behind
	dir     string // temporary
}

func (p *publisher) run(m deployments.Manifest) (out Published, err error) {
	if m.Created, err = p.created(m.Created); err != nil {
		return out, err
	}
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
	made, err := pack(p.ctx, p.opt.Dir, archive, p.opt.Progress)
	if err != nil {
		return out, err
	}
	out = Published{Files: made.Files, Tree: made.Tree, Archive: made.Size}
	m.Src, m.Checksum, m.Size = archiveName, made.SHA256.String(), made.Size
	m.Index = &deployments.Blob{URL: indexName, Size: int64(len(made.Index)), SHA256: digestOf(made.Index)}
	m.Deltas = nil
	if err := p.put(archiveName, archive, made.Size); err != nil {
		return out, err
	}
	if err := p.put(indexName, bytes.NewReader(made.Index), int64(len(made.Index))); err != nil {
		return out, err
	}
	for _, from := range p.opt.Since {
		delta, err := p.delta(from, made)
		if err != nil {
			return out, fmt.Errorf("delta from %s: %w", from.URL, err)
		}
		if delta.From == m.Index.SHA256 || contains(m.Deltas, delta.From) {
			continue // the same tree: nothing to fetch
		}
		m.Deltas = append(m.Deltas, delta)
		out.Deltas = append(out.Deltas, PublishedDelta{From: from, Bytes: delta.Size})
	}
	text, err := p.text(m)
	if err != nil {
		return out, err
	}
	if p.opt.Sign != nil {
		signature, err := p.opt.Sign(text)
		if err != nil {
			return out, err
		}
		if err := p.put(signatureName, bytes.NewReader(signature), int64(len(signature))); err != nil {
			return out, err
		}
	}
	if err := p.put(manifestName, bytes.NewReader(text), int64(len(text))); err != nil {
		return out, err
	}
	out.Pointer = deployments.Pointer{URL: p.url + manifestName, Digest: sha256.Sum256(text)}
	return out, nil
}

// created is when this version was published first, where it was: so that publishing it again gives the same bytes. What lies there
// may be anybody's: a later time than now's is not taken over.
func (p *publisher) created(now time.Time) (time.Time, error) {
	if now.IsZero() {
		return now, nil
	}
	raw, err := p.objects.ReadAll(p.ctx, p.url+manifestName, deployments.MaxManifest)
	if errors.Is(err, object.ErrNotFound) {
		return now, nil
	}
	if err != nil {
		return now, fmt.Errorf("looking whether the release is there already: %w", err)
	}
	there, err := deployments.ParseTemplate(raw, p.url+manifestName)
	if err == nil && !there.Created.IsZero() && there.Created.Before(now) {
		return there.Created, nil
	}
	return now, nil
}

func contains(deltas []deployments.Delta, from deployments.Digest) bool {
	for _, d := range deltas {
		if d.From == from {
			return true
		}
	}
	return false
}

// ownFields are those that Publish writes.
var ownFields = regexp.MustCompile(`(?m)^(src|checksum|size|index|deltas)[ \t]*:`)

// text gives the manifest's bytes: the template as it is, then what it lacks.
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
	lacks := func(field string) bool {
		return !regexp.MustCompile(`(?m)^` + field + `[ \t]*:`).Match(p.opt.Template)
	}
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
	_, err = deployments.ParseTemplate(text, p.url+manifestName)
	return text, err
}

func (p *publisher) put(name string, body io.ReaderAt, size int64) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	opt := object.PutOptions{ContentType: "application/octet-stream"}
	if p.opt.Progress != nil {
		opt.Progress = func(sent int64) { p.opt.Progress(Progress{Phase: "upload", Done: sent, Total: size}) }
	}
	err := p.objects.Put(p.ctx, p.url+name, body, size, opt)
	if errors.Is(err, object.ErrExists) {
		return fmt.Errorf("%w: this version is published already, from another tree or with other settings; a release is immutable: choose another version", err)
	}
	return err
}

// delta makes and uploads what turns an earlier release into this one. The earlier one is fetched first.
func (p *publisher) delta(from deployments.Pointer, made packed) (d deployments.Delta, err error) {
	raw, err := fetchRaw(p.ctx, p.objects, from)
	if err != nil {
		return d, err
	}
	// Only its tree is wanted.
	old, err := deployments.ParseTemplate(raw, from.URL)
	if err != nil {
		return d, err
	}
	old.Owner, old.Immutable = "", false // of no use here; the owner perhaps no user of this machine
	tree := filepath.Join(p.dir, "from-"+from.Digest.String())
	if err := os.Mkdir(tree, 0o700); err != nil {
		return d, err
	}
	// Most of it is in the new tree, and need not be fetched.
	new := &base{dir: p.opt.Dir, index: made.Index, digest: digestOf(made.Index)}
	oldIndex, err := fill(p.ctx, p.objects, old, new, tree, StageOptions{})
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	d.From = digestOf(oldIndex)
	d.URL = "delta-" + d.From.Short()
	if d.From == digestOf(made.Index) {
		return d, nil
	}
	f, err := os.Create(filepath.Join(p.dir, d.URL))
	if err != nil {
		return d, err
	}
	defer f.Close()
	sum := sha256.New()
	if err := makeDelta(p.ctx, tree, oldIndex, p.opt.Dir, made.Index, io.MultiWriter(f, sum), p.opt.Progress); err != nil {
		return d, err
	}
	info, err := f.Stat()
	if err != nil {
		return d, err
	}
	d.Size, d.SHA256 = info.Size(), deployments.Digest(sum.Sum(nil))
	return d, p.put(d.URL, f, d.Size)
}
