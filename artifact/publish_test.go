package artifact

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

func template(version string) deployments.Manifest {
	return deployments.Manifest{Name: "app", Version: version, Dest: "/srv/app", Strategy: deployments.StrategyRelease}
}

// stored reads all objects below a directory of the server's.
func stored(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	objects := map[string][]byte{}
	for _, name := range treetest.List(t, dir) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		objects[name] = data
	}
	return objects
}

func TestPublishToS3(t *testing.T) {
	t.Parallel()
	gateway := objecttest.Start(t)
	client := gateway.Client()
	old, new := t.TempDir(), t.TempDir()
	writeVersion(t, old, treetest.Noise(1, 100_000))
	writeVersion(t, new, treetest.Noise(1, 100_000)+"one line more")
	first, err := Publish(t.Context(), client, PublishOptions{Dir: old, To: gateway.URL("one"), Manifest: template("1")})
	if err != nil {
		t.Fatal(err)
	}
	opt := PublishOptions{Dir: new, To: gateway.URL("one"), Manifest: template("2"), Since: []deployments.Pointer{first.Pointer},
		Sign: func(manifest []byte) ([]byte, error) {
			return []byte("signed " + deployments.DigestOf(manifest).String()), nil
		}}
	second, err := Publish(t.Context(), client, opt)
	if err != nil {
		t.Fatal(err)
	}
	if len(second.Deltas) != 1 || second.Deltas[0].From != first.Pointer || second.Deltas[0].Bytes == 0 || second.Files == 0 {
		t.Errorf("%+v", second)
	}

	// Again, or elsewhere, the same bytes; with another tree, none.
	here := filepath.Join(gateway.Dir(), "one", "app", "2")
	before := stored(t, here)
	if again, err := Publish(t.Context(), client, opt); err != nil || again.Pointer != second.Pointer {
		t.Errorf("published again: %+v, %v", again.Pointer, err)
	}
	elsewhere := opt
	elsewhere.To = gateway.URL("two")
	moved, err := Publish(t.Context(), client, elsewhere)
	if err != nil || moved.Pointer.Digest != second.Pointer.Digest {
		t.Errorf("published elsewhere: %+v, %v", moved.Pointer, err)
	}
	opt.Dir = old
	if _, err := Publish(t.Context(), client, opt); !errors.Is(err, object.ErrExists) || !strings.Contains(err.Error(), "another version") {
		t.Errorf("another tree as the same version: %v", err)
	}
	after := stored(t, here)
	for name, data := range before {
		if !bytes.Equal(after[name], data) {
			t.Errorf("%s was overwritten", name)
		}
	}
	if want := "signed " + second.Pointer.Digest.String(); string(after[signatureName]) != want {
		t.Errorf("the signature is %q", after[signatureName])
	}

	// A node that runs the first fetches the delta alone.
	releases := Open(filepath.Join(t.TempDir(), "app"), gateway.Client(), nil)
	if err := releases.Switch(stageOne(t, releases, first.Pointer)); err != nil {
		t.Fatal(err)
	}
	_, read := releases.objects.Requests()
	rel := stageOne(t, releases, second.Pointer)
	_, now := releases.objects.Requests()
	if now -= read; now > second.Deltas[0].Bytes+int64(len(rel.Raw)) {
		t.Errorf("it read %d bytes for a delta of %d", now, second.Deltas[0].Bytes)
	}
	treetest.Same(t, rel.Dir, new)
}

// All URLs are relative: a copied directory is a release.
func TestPublishedDirectoryCanBeCopied(t *testing.T) {
	t.Parallel()
	store, copied := t.TempDir(), t.TempDir()
	p := publishVersions(t, store, "1")[0]
	if err := os.CopyFS(copied, os.DirFS(store)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(store, "app")); err != nil {
		t.Fatal(err)
	}
	p.URL = strings.Replace(p.URL, store, copied, 1)
	releases := Open(filepath.Join(t.TempDir(), "app"), object.New(object.Config{}), nil)
	if err := whole(stageOne(t, releases, p).Dir); err != nil {
		t.Error(err)
	}
}

// Cut off anywhere, there is no manifest yet, and publishing again ends well.
func TestPublishCutOff(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	for _, phase := range []string{"pack", "upload"} {
		store := t.TempDir()
		opt := PublishOptions{Dir: tree, To: "file://" + store, Manifest: template("1")}
		ctx, cancel := context.WithCancel(t.Context())
		cut := opt
		cut.Progress = func(p meter.Progress) {
			if p.Phase == phase {
				cancel()
			}
		}
		if _, err := Publish(ctx, object.New(object.Config{}), cut); !errors.Is(err, context.Canceled) {
			t.Errorf("cut while it does %q: %v", phase, err)
		}
		if _, err := os.Stat(filepath.Join(store, "app", "1", manifestName)); err == nil {
			t.Errorf("cut while it does %q, there is a manifest", phase)
		}
		if _, err := Publish(t.Context(), object.New(object.Config{}), opt); err != nil {
			t.Errorf("after a cut while it did %q: %v", phase, err)
		}
	}
}

// Variables are set on nodes; a delta needs none of them.
func TestDeltaFromAReleaseWithVariables(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	var since []deployments.Pointer
	for _, version := range []string{"1", "2"} {
		tree := t.TempDir()
		writeVersion(t, tree, version)
		m := template(version)
		m.Dest = "{{ must_env `ROOT` }}/app"
		m.Health.Checks = []deployments.Check{{HTTP: &deployments.HTTPCheck{URL: "{{ must_env `SITE` }}/VERSION"}}}
		out, err := Publish(t.Context(), object.New(object.Config{}), PublishOptions{Dir: tree, To: "file://" + store, Manifest: m, Since: since})
		if err != nil {
			t.Fatal(err)
		}
		if len(out.Deltas) != len(since) {
			t.Errorf("%d deltas", len(out.Deltas))
		}
		since = append(since, out.Pointer)
	}
}

func TestPublishRefuses(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	writeVersion(t, tree, "1")
	dir := t.TempDir()
	store := "file://" + dir
	for name, opt := range map[string]PublishOptions{
		"no name":          {Dir: tree, To: store, Manifest: deployments.Manifest{Version: "1", Dest: "/srv/app"}},
		"no version":       {Dir: tree, To: store, Manifest: deployments.Manifest{Name: "app", Dest: "/srv/app"}},
		"a name with ..":   {Dir: tree, To: store, Manifest: deployments.Manifest{Name: "..", Version: "1", Dest: "/srv/app"}},
		"no dest":          {Dir: tree, To: store, Manifest: deployments.Manifest{Name: "app", Version: "1"}},
		"a relative dest":  {Dir: tree, To: store, Manifest: deployments.Manifest{Name: "app", Version: "1", Dest: "srv"}},
		"no directory":     {Dir: tree + "/none", To: store, Manifest: template("1")},
		"nowhere":          {Dir: tree, To: "releases", Manifest: template("1")},
		"over its own src": {Dir: tree, To: store, Manifest: template("1"), Template: []byte("name: app\nversion: 1\ndest: /srv/app\nsrc: x\n")},
	} {
		out, err := Publish(t.Context(), object.New(object.Config{}), opt)
		if err == nil {
			t.Errorf("%s: published as %s", name, out.Pointer)
		}
	}
	if there := treetest.List(t, dir); len(there) > 0 { // what no node would take is seen before anything is uploaded
		t.Errorf("uploaded are %q", there)
	}
}

// Anybody may have put a manifest beside the one that is published: it leads to nothing elsewhere, and one of no
// use costs its delta.
func TestPublishFindsAnEarlierReleaseOfAnybody(t *testing.T) {
	t.Parallel()
	objects := object.New(object.Config{})
	one, two := t.TempDir(), t.TempDir()
	writeVersion(t, one, treetest.Noise(1, 100_000))
	writeVersion(t, two, treetest.Noise(1, 100_000)+"one line more")
	var asked atomic.Int64
	stranger := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		http.Error(w, "no", http.StatusNotFound)
	}))
	defer stranger.Close()
	index := deployments.DigestOf(publishTree(t, two).index)
	for name, c := range map[string]struct {
		change func(m *deployments.Manifest)
		deltas int
	}{
		"as published":      {func(*deployments.Manifest) {}, 1},
		"an archive abroad": {func(m *deployments.Manifest) { m.Src = stranger.URL + "/" + archiveName }, 0},
		"an index abroad":   {func(m *deployments.Manifest) { m.Index.URL = stranger.URL + "/" + indexName }, 0},
		"no index":          {func(m *deployments.Manifest) { m.Index = nil }, 0},
		"a delta abroad": {func(m *deployments.Manifest) {
			m.Deltas = []deployments.Delta{{From: index, Blob: deployments.Blob{URL: stranger.URL + "/delta", Size: 100, SHA256: index}}}
		}, 1},
		"an archive of another size": {func(m *deployments.Manifest) { m.Size++ }, 0},
		"another index":              {func(m *deployments.Manifest) { m.Index.SHA256 = index; m.Index.SHA256[0] ^= 1 }, 0},
	} {
		store := t.TempDir()
		opt := PublishOptions{Dir: one, To: "file://" + store, Manifest: template("1")}
		first, err := Publish(t.Context(), objects, opt)
		if err != nil {
			t.Fatal(err)
		}
		m, _, err := fetchManifest(t.Context(), objects, first.Pointer, nil)
		if err != nil {
			t.Fatal(err)
		}
		c.change(m)
		text, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(store, "app/1", manifestName), text, 0o600); err != nil {
			t.Fatal(err)
		}
		var log strings.Builder
		opt.Dir, opt.Manifest, opt.Find, opt.Log = two, template("2"), 1, slog.New(slog.NewTextHandler(&log, nil))
		second, err := Publish(t.Context(), objects, opt)
		if err != nil || len(second.Deltas) != c.deltas {
			t.Errorf("%s: %d deltas, want %d: %v", name, len(second.Deltas), c.deltas, err)
		}
		if said := strings.Count(log.String(), "could not make a delta"); said != 1-c.deltas {
			t.Errorf("%s: the log says:\n%s", name, log.String())
		}
	}
	if n := asked.Load(); n > 0 {
		t.Errorf("a stranger's server was asked %d times", n)
	}
}

// A release of the same tree takes no other's place among those that get deltas, found or named.
func TestPublishMakesOneDeltaForEachTree(t *testing.T) {
	t.Parallel()
	objects := object.New(object.Config{})
	store := "file://" + t.TempDir()
	one, two, three := treetest.Noise(1, 100_000), treetest.Noise(1, 100_000)+"more", treetest.Noise(1, 100_000)+"most"
	published := map[string]deployments.Pointer{}
	for _, c := range []struct {
		version, content string
		since, from      []string // no since: one is to be found
	}{
		{"1", one, nil, nil}, {"2", two, nil, []string{"1"}}, {"3", two, nil, []string{"1"}},
		{"4", three, []string{"3", "2", "1", "1"}, []string{"3", "1"}}, {"5", two, []string{"3", "1"}, []string{"1"}},
	} {
		tree := t.TempDir()
		writeVersion(t, tree, c.content)
		opt := PublishOptions{Dir: tree, To: store, Manifest: template(c.version), Find: 1}
		for _, version := range c.since {
			opt.Since = append(opt.Since, published[version])
		}
		out, err := Publish(t.Context(), objects, opt)
		if err != nil {
			t.Fatal(err)
		}
		published[c.version] = out.Pointer
		var from []string
		for _, d := range out.Deltas {
			from = append(from, d.Version)
		}
		if !slices.Equal(from, c.from) {
			t.Errorf("%s has deltas from %q, want %q", c.version, from, c.from)
		}
	}
}

// A delta that costs more than what changed of the archive is not published.
func TestPublishDropsADelta(t *testing.T) {
	t.Parallel()
	objects := object.New(object.Config{})
	store, tree := t.TempDir(), t.TempDir()
	opt := PublishOptions{Dir: tree, To: "file://" + store, Manifest: template("1")}
	if err := os.WriteFile(filepath.Join(tree, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Publish(t.Context(), objects, opt); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(tree, "file"), 0o755); err != nil { // a delta has two hashes, the index one file
		t.Fatal(err)
	}
	opt.Manifest, opt.Find = template("2"), 1
	out, err := Publish(t.Context(), objects, opt)
	if err != nil || len(out.Deltas) != 1 || out.Deltas[0].Bytes != out.Index || out.Deltas[0].Requests != 1 || out.Deltas[0].Dropped <= out.Index {
		t.Fatalf("%+v, %v", out, err)
	}
	if m, _, err := fetchManifest(t.Context(), objects, out.Pointer, nil); err != nil || len(m.Deltas) > 0 {
		t.Errorf("its manifest has deltas %v, %v", m.Deltas, err)
	}
	if there := treetest.List(t, filepath.Join(store, "app/2")); !slices.Equal(there,
		[]string{archiveName, indexName, manifestName}) {
		t.Errorf("published are %q", there)
	}
}

// A version says when it was published first, whoever publishes it again: unless that is yet to come, or a template
// says it.
func TestPublishSaysWhen(t *testing.T) {
	t.Parallel()
	objects := object.New(object.Config{})
	tree, store := t.TempDir(), "file://"+t.TempDir()
	writeVersion(t, tree, "1")
	first := time.Date(2025, 3, 1, 12, 0, 0, 0, time.UTC)
	publish := func(version string, at time.Time, text string) (Published, error) {
		opt := PublishOptions{Dir: tree, To: store + "/", Manifest: template(version)}
		opt.Manifest.Created = at
		if text != "" {
			opt.Template = []byte(text)
		}
		return Publish(t.Context(), objects, opt)
	}
	one, err := publish("1", first, "")
	if err != nil || one.AlreadyPublished || one.Pointer.URL != store+"/app/1/"+manifestName {
		t.Fatalf("%+v, %v", one, err)
	}
	if two, err := publish("1", first.Add(time.Hour), ""); err != nil || !two.AlreadyPublished ||
		two.Pointer != one.Pointer {
		t.Errorf("again: %+v, %v", two, err)
	}
	if _, err := publish("1", first.Add(-time.Hour), ""); !errors.Is(err, object.ErrExists) {
		t.Errorf("before it was published: %v", err)
	}
	out, err := publish("2", first, "created: 2024-01-02T03:04:05Z\ndest: /srv/app\n")
	if err != nil {
		t.Fatal(err)
	}
	m, _, err := fetchManifest(t.Context(), objects, out.Pointer, nil)
	if err != nil || m.Created.Year() != 2024 || m.Version != "2" {
		t.Errorf("by a template: %v, %v", m, err)
	}
}
