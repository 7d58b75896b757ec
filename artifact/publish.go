package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"kedge/artifact/archive"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
)

// PublishOptions are the options of Publish.
type PublishOptions struct {
	// Dir is the tree to publish. To is a URL prefix: the manifest goes to To/NAME/VERSION/manifest.yaml, and its
	// objects beside it.
	Dir string
	To  string
	// Manifest has all fields but Src, Checksum, Size, Index and Deltas, which Publish sets. Name and Version are
	// required.
	Manifest deployments.Manifest
	// Template, if not nil, is text that the manifest begins with, byte for byte but for newlines
	// at its end, including variables ({{ env }}). Manifest must have what Template sets. Of what
	// Template lacks, Publish adds Name, Version, Created and Dest from Manifest, and strategy
	// release.
	Template []byte
	// Since are pointers of earlier releases to make deltas from, newest first. If one can't be used, that is an error.
	Since []deployments.Pointer
	// Find is how many earlier releases to look for and make deltas from if Since is empty: those published last
	// below To/NAME/. A release that can't be found or read gets no delta, and the log says why. 0: none.
	Find int
	// Compression is the archive's compression.
	Compression archive.Compression
	// Sign, if not nil, returns a signature of the manifest's bytes, which is stored beside it as
	// manifest.yaml.sig.
	Sign func(manifest []byte) ([]byte, error)
	// CheckSignature returns an error unless a signature is of these bytes and by the key of Sign.
	// It is called if another signature is stored already. An interrupted publish may have left it,
	// with a key whose signatures differ each time (ECDSA). Nil: only an equal signature is
	// accepted.
	CheckSignature func(manifest, signature []byte) error
	Progress       func(meter.Progress) // may be nil
	Log            *slog.Logger         // nil: discard
}

// Published is the result of Publish.
type Published struct {
	Pointer deployments.Pointer `json:"pointer"`
	Files   int                 `json:"files"`
	Tree    int64               `json:"tree"`    // bytes of the tree
	Archive int64               `json:"archive"` // bytes of the archive
	Index   int64               `json:"index"`   // bytes of its index
	// AlreadyPublished is set if this version was published already, with the same bytes.
	AlreadyPublished bool `json:"again,omitempty"`
	// Deltas has an element for each earlier release that a delta was made from. It is empty if
	// there is no such release, or if an earlier run of Publish had made the deltas.
	Deltas []PublishedDelta `json:"deltas"`
}

// PublishedDelta says how much a node that runs the release From fetches, without manifest and signature.
type PublishedDelta struct {
	From     deployments.Pointer `json:"from"`
	Version  string              `json:"version,omitempty"` // version of From
	Bytes    int64               `json:"bytes"`
	Requests int                 `json:"requests"`
	// Dropped is the number of bytes to fetch with a delta that was made but not published, as a node fetches no more
	// without it; 0: the delta was published.
	Dropped int64 `json:"dropped,omitempty"`
}

// Names of a release's objects, which lie beside each other.
const (
	manifestName  = "manifest.yaml"
	signatureName = "manifest.yaml.sig"
	archiveName   = "archive.tar.zst"
	indexName     = "index"
)

// MaxSignature bounds a manifest's signature, in bytes.
const MaxSignature = 16 << 10

// Publish packs Dir, and uploads archive, index, deltas, manifest and signature. The same tree and
// options give the same bytes, if Find finds the same releases. An object that exists with other
// bytes is an error (object.ErrExists), except a signature that CheckSignature accepts. After an
// interruption Publish can be run again: it takes the time of the release from the first run's
// manifest. The signature covers that time, and is therefore uploaded after the manifest.
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
		return out, fmt.Errorf("publish to %s: %w", deployments.ShownURL(p.url), err)
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
	beside  string // the prefix of all versions of this name, with a slash at the end
	url     string // the prefix of this version, with a slash at the end
	dir     string // a temporary directory
}

func (p *publisher) run(m deployments.Manifest) (out Published, err error) {
	there, err := p.storedManifest()
	if err != nil {
		return out, err
	}
	m.Created = there.created(m.Created)
	// A manifest that no node would take is refused before anything is uploaded.
	draft := m
	draft.Src, draft.Checksum = archiveName, archive.EmptyDigest.String()
	if _, err := p.text(draft); err != nil {
		return out, err
	}
	file, err := os.Create(filepath.Join(p.dir, archiveName))
	if err != nil {
		return out, err
	}
	defer file.Close()
	made, err := archive.Pack(p.ctx, p.opt.Dir, m.Symlinks, p.opt.Compression, file, p.opt.Progress)
	if err != nil {
		return out, err
	}
	if made.Entries == 0 {
		return out, fmt.Errorf("publish %s: it is empty: nothing would be left at dest", p.opt.Dir)
	}
	out = Published{Files: made.Files, Tree: made.Tree, Archive: made.Size, Index: int64(len(made.Index))}
	m.Src, m.Checksum, m.Size = archiveName, made.SHA256.String(), made.Size
	m.Index = &deployments.Blob{URL: indexName, Size: int64(len(made.Index)), SHA256: deployments.DigestOf(made.Index)}
	if err := p.put(archiveName, file, made.Size); err != nil {
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
	out.AlreadyPublished = bytes.Equal(there.raw, text)
	out.Pointer = deployments.Pointer{URL: p.url + manifestName, Digest: deployments.DigestOf(text)}
	return out, nil
}

// publishedManifest is the manifest that is stored for this version already, if any. It is not trusted.
type publishedManifest struct {
	raw      []byte
	manifest *deployments.Manifest // nil: none that parses
}

// storedManifest reads the manifest that is stored for this version. It returns the zero publishedManifest if there is
// none, or if the credentials may not read it.
func (p *publisher) storedManifest() (b publishedManifest, err error) {
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

// created returns the time of the stored manifest, since publishing a version again must give the same bytes. It
// returns now if there is no such time, if that time is not before now, or if now is zero.
func (b publishedManifest) created(now time.Time) time.Time {
	if m := b.manifest; m != nil && !now.IsZero() && !m.Created.IsZero() && m.Created.Before(now) {
		return m.Created
	}
	return now
}

// deltas returns the deltas of the manifest that an earlier run published for the same tree. A new search could find
// other bases, and the manifest of a release must not change. ok is false if there is no such manifest, Since is set or
// Find isn't positive. The manifest needn't be trusted: a node verifies what a delta makes.
func (b publishedManifest) deltas(p *publisher, index deployments.Digest) (deltas []deployments.Delta, ok bool) {
	if b.manifest == nil || b.manifest.Index == nil || b.manifest.Index.SHA256 != index || len(p.opt.Since) > 0 ||
		p.opt.Find <= 0 {
		return nil, false
	}
	for _, d := range b.manifest.Deltas {
		d.URL = deltaName(d.From) // if it lies elsewhere, the manifest differs: put refuses it
		deltas = append(deltas, d)
	}
	return deltas, true
}

// sign stores a signature beside the manifest, unless a valid one is there.
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
	if p.opt.CheckSignature != nil {
		there, readErr := p.objects.ReadAll(p.ctx, p.url+signatureName, MaxSignature)
		if readErr != nil {
			return fmt.Errorf("this version is signed already, and that signature can't be read: %w", readErr)
		}
		wrong := p.opt.CheckSignature(manifest, there)
		if wrong == nil {
			return nil
		}
		err = fmt.Errorf("%w (%w)", err, wrong)
	}
	return fmt.Errorf(
		"%w: this version is signed already, by another key: sign with that one, or choose another version",
		err,
	)
}

// ownFields matches the fields that only Publish writes.
var ownFields = regexp.MustCompile(`(?m)^(src|checksum|size|index|deltas)[ \t]*:`)

// TemplateSets reports whether a manifest's template sets a field, in a line FIELD: VALUE. Publish sets name, version,
// created, dest and sync_strategy if the template doesn't; the strategy is then release.
func TemplateSets(template []byte, field string) bool {
	return regexp.MustCompile(`(?m)^` + field + `[ \t]*:[ \t]*[^ \t\r\n#]`).Match(template)
}

// text returns the manifest's bytes: m's encoding or, with a template, the template and then the fields that it lacks.
// Bytes that don't parse are an error.
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
			"the manifest's template isn't valid with the fields that publishing appends; write it as plain lines, "+
				"FIELD: VALUE: %w",
			err,
		)
	}
	return text, nil
}

// put uploads an object that must have the same bytes in every run. If it exists with others, the
// error says that a release is immutable.
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
		opt.Progress = func(sent int64) { p.opt.Progress(meter.Progress{Phase: "upload", Done: sent, Total: size}) }
	}
	return p.objects.Put(p.ctx, p.url+name, body, size, opt)
}
