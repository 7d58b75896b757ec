package artifact

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"kedge/artifact/archive"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/deployments"
)

const (
	// maxListed bounds the objects that publish lists to find earlier releases: some thousands of releases, in
	// twenty requests to S3.
	maxListed = 20_000
	// spareManifests is how many manifests publish reads beyond the number that it needs, in case some can't be used.
	spareManifests = 5
)

// earlier is a release to make a delta from.
type earlier struct {
	pointer  deployments.Pointer
	manifest *deployments.Manifest
	named    bool // PublishOptions.Since names it: if it can't be used, that is an error
}

// earlier returns the releases to make deltas from, newest first: those of PublishOptions.Since or, if Since is empty,
// those that findEarlier returns.
func (p *publisher) earlier(index deployments.Digest) ([]earlier, error) {
	if len(p.opt.Since) == 0 {
		return p.findEarlier(index)
	}
	var found []earlier
	for _, from := range p.opt.Since {
		raw, err := ReadManifest(p.ctx, p.objects, from)
		if err != nil {
			return nil, fmt.Errorf("delta from %s: %w", deployments.ShownURL(from.URL), err)
		}
		m, err := deployments.ParseTemplate(raw, from.URL) // only its tree is needed, so variables may stay unknown
		if err != nil {
			return nil, fmt.Errorf("delta from %s: %w", deployments.ShownURL(from.URL), err)
		}
		found = append(found, earlier{pointer: from, manifest: m, named: true})
	}
	return found, nil
}

// findEarlier returns the releases that were published last below TO/NAME/, at most PublishOptions.Find, each tree
// once. It leaves out the tree whose index has the digest in index. Finding fewer is no error, as nodes then only fetch
// more. The only error is that ctx has ended.
func (p *publisher) findEarlier(index deployments.Digest) (found []earlier, err error) {
	if p.opt.Find <= 0 {
		return nil, nil
	}
	manifests, err := p.listManifests()
	if p.ctx.Err() != nil {
		return nil, p.ctx.Err()
	}
	if err != nil {
		p.log.Warn("could not list earlier releases, so no deltas from them are made: name them with --since",
			"prefix", p.beside, "error", err)
		return nil, nil
	}
	seen := map[deployments.Digest]bool{index: true}
	for _, l := range manifests[:min(len(manifests), p.opt.Find+spareManifests)] {
		if len(found) == p.opt.Find {
			break
		}
		e, err := p.readEarlier(l)
		if p.ctx.Err() != nil {
			return nil, p.ctx.Err()
		}
		if err != nil {
			p.log.Warn("could not make a delta from an earlier release: nodes that run it fetch more",
				"url", l.URL, "error", err)
			continue
		}
		if !seen[e.manifest.Index.SHA256] {
			seen[e.manifest.Index.SHA256] = true
			found = append(found, e)
		}
	}
	return found, nil
}

// listManifests returns the manifests of this name's versions, last written first. S3 gives whole seconds: within
// one second the later version comes first.
func (p *publisher) listManifests() ([]object.Listed, error) {
	objects, more, err := p.objects.List(p.ctx, p.beside, maxListed)
	if err != nil {
		return nil, err
	}
	if more {
		p.log.Warn(
			"there are too many objects to list them all: deltas from some of the last releases may be missing; "+
				"name these with --since",
			"prefix",
			p.beside,
			"objects",
			maxListed,
		)
	}
	objects = slices.DeleteFunc(objects, func(o object.Listed) bool {
		version, ok := strings.CutSuffix(strings.TrimPrefix(o.URL, p.beside), "/"+manifestName)
		return !ok || strings.Contains(version, "/")
	})
	slices.SortFunc(objects, func(a, b object.Listed) int {
		return cmp.Or(b.Modified.Compare(a.Modified), compareVersions(b.URL, a.URL))
	})
	return objects, nil
}

// compareVersions compares texts with runs of digits by value, so that 1.10 comes after 1.9.
func compareVersions(a, b string) int {
	digits := func(s string) int {
		return len(s) - len(strings.TrimLeft(s, "0123456789"))
	}
	for a != "" && b != "" {
		m, n := digits(a), digits(b)
		if m == 0 || n == 0 {
			if a[0] != b[0] {
				return cmp.Compare(a[0], b[0])
			}
			a, b = a[1:], b[1:]
			continue
		}
		x, y := strings.TrimLeft(a[:m], "0"), strings.TrimLeft(b[:n], "0")
		if c := cmp.Or(cmp.Compare(len(x), len(y)), strings.Compare(x, y)); c != 0 {
			return c
		}
		a, b = a[m:], b[n:]
	}
	return cmp.Compare(len(a), len(b))
}

// readEarlier reads a manifest that was found in the storage. Anybody may have written it: it may only refer to
// objects beside it.
func (p *publisher) readEarlier(l object.Listed) (earlier, error) {
	raw, err := p.objects.ReadAll(p.ctx, l.URL, deployments.MaxManifest)
	if err != nil {
		return earlier{}, err
	}
	m, err := deployments.ParseTemplate(raw, l.URL)
	if err != nil {
		return earlier{}, err
	}
	if m.Index == nil {
		return earlier{}, errors.New("the release has no index")
	}
	beside := strings.TrimSuffix(l.URL, manifestName)
	if m.Src != beside+archiveName || m.Index.URL != beside+indexName {
		return earlier{}, errors.New("the release's archive and index don't lie beside its manifest")
	}
	m.Deltas = nil // a delta from the tree to publish would be fetched, and its URL may lead anywhere
	return earlier{pointer: deployments.Pointer{URL: l.URL, Digest: deployments.DigestOf(raw)}, manifest: m}, nil
}

// deltas makes a delta from each earlier release, and uploads it if nodes that run that release fetch fewer bytes with
// the delta than without. costs says how much these nodes fetch. A release that can't be used is an error if the caller
// named it; if not, it is left out.
func (p *publisher) deltas(made archive.Packed) (deltas []deployments.Delta, costs []PublishedDelta, err error) {
	index := deployments.DigestOf(made.Index)
	found, err := p.earlier(index)
	if err != nil {
		return nil, nil, err
	}
	done := map[deployments.Digest]bool{index: true} // the same tree needs no fetching
	for _, e := range found {
		from, delta, cost, err := p.delta(e, made, done)
		switch {
		case p.ctx.Err() != nil:
			return nil, nil, p.ctx.Err()
		case err != nil && e.named, errors.Is(err, errUpload):
			return nil, nil, fmt.Errorf("delta from %s: %w", deployments.ShownURL(e.pointer.URL), err)
		case err != nil:
			p.log.Warn("could not make a delta from an earlier release: nodes that run it fetch more",
				"url", deployments.ShownURL(e.pointer.URL), "error", err)
			continue
		case done[from]:
			continue
		}
		done[from] = true
		cost.From, cost.Version = e.pointer, e.manifest.Version
		costs = append(costs, cost)
		if delta != nil {
			deltas = append(deltas, *delta)
		}
	}
	return deltas, costs, nil
}

// errUpload marks a failure to upload, as opposed to a failure to read an earlier release.
var errUpload = errors.New("upload")

// delta makes the delta from an earlier release, and uploads it if nodes that run that release fetch
// fewer bytes with it. If they don't, or if done has from, d is nil. from is the digest of the
// earlier release's index. If the earlier release has an index, delta fetches only the files that
// the new release's files are patched from.
func (p *publisher) delta(
	e earlier,
	made archive.Packed,
	done map[deployments.Digest]bool,
) (from deployments.Digest, d *deployments.Delta, cost PublishedDelta, err error) {
	tree, err := os.MkdirTemp(p.dir, "from-")
	if err != nil {
		return from, nil, cost, err
	}
	defer func() { err = errors.Join(err, safefs.RemoveTree(tree)) }()
	oldIndex, err := fetchPatched(p.ctx, p.objects, e.manifest,
		&base{dir: p.opt.Dir, index: made.Index, digest: deployments.DigestOf(made.Index)}, tree)
	if err != nil {
		return from, nil, cost, err
	}
	if from = deployments.DigestOf(oldIndex); done[from] {
		return from, nil, cost, nil
	}
	f, err := os.CreateTemp(p.dir, "delta-")
	if err != nil {
		return from, nil, cost, err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	sum := sha256.New()
	err = archive.MakeDelta(p.ctx, tree, oldIndex, p.opt.Dir, made.Index, io.MultiWriter(f, sum), p.opt.Progress)
	if err != nil {
		return from, nil, cost, err
	}
	info, err := f.Stat()
	if err != nil {
		return from, nil, cost, err
	}
	byRanges, byDelta, err := costsOf(tree, oldIndex, made.Index, info.Size())
	if err != nil {
		return from, nil, cost, err
	}
	if byRanges.Bytes <= byDelta.Bytes {
		byRanges.Dropped = byDelta.Bytes
		return from, nil, byRanges, nil
	}
	d = &deployments.Delta{
		From: from,
		Blob: deployments.Blob{URL: deltaName(from), Size: info.Size(), SHA256: deployments.Digest(sum.Sum(nil))},
	}
	if err := p.put(d.URL, f, d.Size); err != nil {
		return from, nil, cost, fmt.Errorf("%w: %w", errUpload, err)
	}
	return from, d, byDelta, nil
}

func deltaName(from deployments.Digest) string { return "delta-" + from.Short() }

// fetchPatched fills dir with the files of m's tree that archive.MakeDelta reads, or with all if m has no index, and
// returns the tree's index. If m has an index, content that is also in new, the tree that is being published, is copied
// from there instead of fetched.
func fetchPatched(
	ctx context.Context,
	objects *object.Client,
	m *deployments.Manifest,
	new *base,
	dir string,
) (data []byte, err error) {
	if m.Index == nil {
		plain := *m
		plain.Owner, plain.Immutable = "", false // not needed, and the owner may not exist on this machine
		tree, err := fetchInto(ctx, objects, &plain, nil, dir, StageOptions{}, nil)
		return tree.index, err
	}
	newX, err := new.decode()
	if err != nil {
		return nil, err
	}
	f := &fetch{objects: objects, manifest: m, meter: meter.New("fetch", 0, nil)}
	f.only = func(old *archive.Index) []bool {
		wanted := make([]bool, len(old.Entries))
		for _, job := range archive.ChoosePatches(old, newX) {
			if job.From >= 0 {
				wanted[job.From] = true
			}
		}
		return wanted
	}
	defer func() { err = errors.Join(err, f.close()) }()
	if err := f.run(ctx, new, dir); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", deployments.ShownURL(m.Src), err)
	}
	return f.encoded, nil
}

// costsOf returns what a node that runs the old release fetches for the new one, without and with a delta of the
// given size. tree names the old tree; its files are not read.
func costsOf(tree string, oldIndex, newIndex []byte, delta int64) (byRanges, byDelta PublishedDelta, err error) {
	old, err := openSource(&base{dir: tree, index: oldIndex})
	if err != nil {
		return byRanges, byDelta, err
	}
	defer old.close()
	x, err := archive.DecodeIndex(newIndex)
	if err != nil {
		return byRanges, byDelta, err
	}
	b, err := newBuilder(tree, x)
	if err != nil {
		return byRanges, byDelta, err
	}
	defer b.close()
	for _, job := range archive.ChoosePatches(old.index, x) {
		b.ready[job.Entry] = true
	}
	old.match(x)
	byDelta = costOf(x, b.selectMissingFrames(old))
	byDelta.Bytes += delta
	byDelta.Requests++
	clear(b.ready)
	for n := range x.Frames {
		_, b.chunks[n] = old.chunks[x.Frames[n].Content]
	}
	byRanges = costOf(x, b.selectMissingFrames(old))
	byRanges.Bytes += int64(len(newIndex))
	byRanges.Requests++
	return byRanges, byDelta, nil
}

// costOf returns the bytes and requests for fetching the wanted frames.
func costOf(x *archive.Index, wanted []bool) (cost PublishedDelta) {
	spans := spansOf(x, wanted)
	if len(spans) == 0 {
		return cost
	}
	cost.Requests = 1 + len(spans) // one request opens the archive
	for _, s := range spans {
		last := x.Frames[s.to-1]
		cost.Bytes += last.Offset + last.Size - x.Frames[s.from].Offset
	}
	return cost
}
