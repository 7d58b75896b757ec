package artifact

import (
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// peer is a proxy of the kind that shares objects between nodes: what it is asked for it takes whole from its origin,
// once, and gives out in ranges.
type peer struct {
	origin string
	spoil  func([]byte) []byte // nil: it is honest

	mu    sync.Mutex
	cache map[string][]byte
	asked atomic.Int64
}

func (p *peer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.asked.Add(1)
	p.mu.Lock()
	defer p.mu.Unlock()
	data, ok := p.cache[r.URL.Path]
	if !ok {
		from, err := http.Get(p.origin + r.URL.Path)
		if err != nil || from.StatusCode != http.StatusOK {
			http.Error(w, "the origin has none", http.StatusNotFound)
			return
		}
		data, err = io.ReadAll(from.Body)
		from.Body.Close()
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		if p.spoil != nil {
			data = p.spoil(bytes.Clone(data))
		}
		p.cache[r.URL.Path] = data
	}
	http.ServeContent(w, r, path.Base(r.URL.Path), time.Time{}, bytes.NewReader(data))
}

func serve(t *testing.T, h http.Handler) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// Mirrors are asked before an object's own place, in their order: for the index, the archive, deltas and archives
// without an index. One that is down, slow, or gives other bytes costs a moment and a line in the log.
func TestMirrors(t *testing.T) {
	t.Parallel()
	old, new := twoReleases(t)
	plainDir := t.TempDir()
	treetest.Tree{"a": {Mode: 0o644, Data: "a"}, "large": {Mode: 0o644, Data: treetest.Noise(7, 2<<20)}}.Write(t, plainDir)
	plain := publishTree(t, plainDir).manifest
	if err := os.Rename(strings.TrimPrefix(plain.Src, "file://"), filepath.Join(new.store, "plain.tar.zst")); err != nil {
		t.Fatal(err)
	}
	fetches := map[string]func(t *testing.T, origin string, objects *object.Client, log *slog.Logger){
		"index and archive": func(t *testing.T, origin string, objects *object.Client, log *slog.Logger) {
			dir := t.TempDir()
			m := new.at(origin + "/new")
			if _, err := fetchIndexed(t.Context(), objects, m, nil, dir, StageOptions{Log: log}); err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, dir, new.dir)
		},
		"delta": func(t *testing.T, origin string, objects *object.Client, log *slog.Logger) {
			dir := t.TempDir()
			m := new.at(origin + "/new")
			if _, err := fetchIndexed(t.Context(), objects, m, old.asBase(old.dir), dir, StageOptions{Log: log}); err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, dir, new.dir)
		},
		"an archive without an index": func(t *testing.T, origin string, objects *object.Client, log *slog.Logger) {
			dir := t.TempDir()
			m := &deployments.Manifest{Src: origin + "/new/plain.tar.zst", Checksum: plain.Checksum}
			if err := Unpack(t.Context(), objects, m, dir, StageOptions{Log: log}); err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, dir, plainDir)
		},
	}
	flip := func(data []byte) []byte { data[len(data)/2] ^= 1; return data }
	for name, c := range map[string]struct {
		mirror func(origin string) http.Handler
		reason deployments.Reason // that the log gives; "": none
		enough bool               // no other mirror is asked
	}{
		"an honest peer": {enough: true, mirror: func(origin string) http.Handler {
			return &peer{origin: origin, cache: map[string][]byte{}}
		}},
		"other bytes": {reason: deployments.ReasonDigestMismatch, mirror: func(origin string) http.Handler {
			return &peer{origin: origin, cache: map[string][]byte{}, spoil: flip}
		}},
		"fewer bytes": {reason: deployments.ReasonDigestMismatch, mirror: func(origin string) http.Handler {
			shorten := func(data []byte) []byte { return data[:len(data)-1] }
			return &peer{origin: origin, cache: map[string][]byte{}, spoil: shorten}
		}},
		"it says nothing": {reason: deployments.ReasonStorageUnavailable, mirror: func(string) http.Handler {
			return http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		}},
		"it is broken": {reason: deployments.ReasonStorageUnavailable, mirror: func(string) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
		}},
		"it has nothing": {mirror: func(string) http.Handler { return http.NotFoundHandler() }},
	} {
		for what, fetch := range fetches {
			t.Run(name+", "+what, func(t *testing.T) {
				t.Parallel()
				var asked atomic.Int64
				origin := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
				behind := serve(t, http.StripPrefix("/new/", http.FileServer(http.Dir(new.store))))
				second := &peer{origin: behind, cache: map[string][]byte{}}
				mirrors := []string{serve(t, c.mirror(behind)) + "/new/", serve(t, second) + "/new/"}
				var log bytes.Buffer
				logger := slog.New(slog.NewTextHandler(&log, nil))
				objects := object.New(object.Config{Log: logger, Mirrors: object.Mirrors{origin + "/new/": mirrors}})
				fetch(t, origin, objects, logger)
				if c.reason != "" && !strings.Contains(log.String(), fmt.Sprintf("reason=%s", c.reason)) {
					t.Errorf("the log says nothing of the mirror:\n%s", log.String())
				}
				if n := second.asked.Load(); (n == 0) != c.enough {
					t.Errorf("the second mirror was asked %d times:\n%s", n, log.String())
				}
				if n := asked.Load(); n > 0 {
					t.Errorf("the place that mirrors stand for was asked %d times:\n%s", n, log.String())
				}
			})
		}
	}
}

// A mirror that ignores Range would send the archive from its start for each span: it is passed over.
func TestMirrorsThatIgnoreRange(t *testing.T) {
	t.Parallel()
	_, new := twoReleases(t)
	files := http.StripPrefix("/new/", http.FileServer(http.Dir(new.store)))
	origin := serve(t, files)
	mirror := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.Clone(r.Context())
		r.Header.Del("Range")
		files.ServeHTTP(w, r)
	}))
	var log bytes.Buffer
	objects := object.New(object.Config{
		Log: slog.New(slog.NewTextHandler(&log, nil)), Mirrors: object.Mirrors{origin + "/new": {mirror + "/new"}},
	})
	dir := t.TempDir()
	if _, err := fetchIndexed(t.Context(), objects, new.at(origin+"/new"), nil, dir, StageOptions{}); err != nil {
		t.Fatal(err)
	}
	treetest.Same(t, dir, new.dir)
	if !strings.Contains(log.String(), "ignores Range requests") {
		t.Errorf("the log says nothing of it: %s", log.String())
	}
}

// What an object's own place can't give, one mirror that has it is enough for: the manifest, too.
func TestMirrorsWithoutTheirOrigin(t *testing.T) {
	t.Parallel()
	_, new := twoReleases(t)
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	mirror := serve(t, http.StripPrefix("/new/", http.FileServer(http.Dir(new.store))))
	objects := object.New(object.Config{
		Mirrors: object.Mirrors{gone.URL + "/new": {gone.URL + "/other", mirror + "/new"}},
	})
	dir := t.TempDir()
	if _, err := fetchIndexed(t.Context(), objects, new.at(gone.URL+"/new"), nil, dir, StageOptions{}); err != nil {
		t.Fatal(err)
	}
	treetest.Same(t, dir, new.dir)

	manifest := []byte("src: x.tar\n")
	if err := os.WriteFile(filepath.Join(new.store, "manifest.yaml"), manifest, 0o600); err != nil {
		t.Fatal(err)
	}
	p := deployments.Pointer{URL: gone.URL + "/new/manifest.yaml", Digest: deployments.DigestOf(manifest)}
	if got, err := ReadManifest(t.Context(), objects, p); err != nil || !bytes.Equal(got, manifest) {
		t.Errorf("the manifest: %q, %v", got, err)
	}
}
