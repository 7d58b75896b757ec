package artifact

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kedge/artifact/archive"
	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// Cut connections cost requests, and no bytes twice: within one fetch, and from a fetch that failed to the next.
func TestACutIsNotFetchedAgain(t *testing.T) {
	t.Parallel()
	routes := newRoutes(t, 10<<20)
	archive := size(t, filepath.Join(routes.gateway.Dir(), "releases/app/2-alone", archiveName))
	index := size(t, filepath.Join(routes.gateway.Dir(), "releases/app/2-alone", indexName))
	const onTheWay = 300_000 // bytes of a cut request that were sent and not read, and a server's answers that are no body
	// A busy machine is no server that stalls: to hang up there loses all that is on the way.
	patient := func(n *node) *node {
		n.releases.objects = n.proxy.Client()
		return n
	}

	t.Run("within a fetch", func(t *testing.T) {
		t.Parallel()
		for _, route := range []string{routeCold, routeGz, routeZst} {
			n := patient(routes.node(t, route))
			cuts := []int64{5, 1_000_000, 3_000_000, 100}
			n.proxy.Play(func(r objecttest.Request) objecttest.Fault {
				if isBody(r.Name) && !r.Probe && r.N < len(cuts) {
					return objecttest.Cut(cuts[r.N])
				}
				return nil
			})
			rel, err := n.stage(t, route)
			if err != nil {
				t.Fatal(err)
			}
			n.whole(t, rel)
			most := archive + index
			if route != routeCold {
				most = size(t, filepath.Join(routes.gateway.Dir(), "plain", route, "app."+route))
			}
			if _, sent := n.proxy.Counted(); sent > most+int64(len(cuts))*onTheWay {
				t.Errorf("%s: %d bytes were sent for %d", route, sent, most)
			}
		}
	})

	t.Run("by the next fetch", func(t *testing.T) {
		t.Parallel()
		n := patient(routes.node(t, routeCold))
		// Of the first span two frames of 2 MiB go through and half of a third, of the others nothing; then the node may
		// read no more.
		n.proxy.Play(func(r objecttest.Request) objecttest.Fault {
			switch {
			case r.Name != archiveName || r.Probe:
				return nil
			case r.From < 4<<20: // a cut loses what the node hasn't read yet: then it asks again
				return objecttest.Cut(5<<20 - r.From)
			case r.From < 6<<20:
				return objecttest.Denied()
			}
			return n.proxy.Stall(-1)
		})
		if _, err := n.stage(t, routeCold); !errors.Is(err, object.ErrDenied) {
			t.Fatalf("it ends with %v", err)
		}
		for path := range n.files() {
			if !strings.HasPrefix(filepath.Base(path), stagingPrefix) {
				t.Errorf("it leaves %s", path)
			}
		}
		n.proxy.Play(nil)
		rel, err := n.stage(t, routeCold)
		if err != nil {
			t.Fatal(err)
		}
		n.whole(t, rel)
		if _, sent := n.proxy.Counted(); sent > archive+index-4<<20 {
			t.Errorf("the second fetch took %d bytes of %d, when four MiB were there", sent, archive+index)
		}
	})
}

// A frame that came is written, also where the fetch has failed meanwhile.
func TestAFrameIsWrittenAfterAFailure(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	content := []byte(treetest.Prose(1, 5000))
	for range 30 { // whatever a select chooses
		b, err := newBuilder(t.TempDir(), &archive.Index{Archive: true,
			Entries: []archive.Entry{{
				Path: "file", Mode: 0o644, Size: int64(len(content)), Sum: deployments.DigestOf(content), Offset: 512,
			}},
			Frames: []archive.Frame{{Size: 1, Length: 6144}}})
		if err != nil {
			t.Fatal(err)
		}
		b.selectMissingFrames(nil)
		w := b.worker()
		raw := slices.Concat(make([]byte, 512), content, make([]byte, 6144-512-len(content)))
		if err := w.writeFrame(ctx, 0, raw); !errors.Is(err, context.Canceled) {
			t.Fatalf("without its directory: %v", err)
		}
		close(b.made[0])
		if err := w.writeFrame(ctx, 0, raw); err != nil || !b.ready[0] {
			t.Fatalf("with its directory: %v", err)
		}
		w.close()
		if err := b.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// Each reason why more is fetched than should be is in the log, once.
func TestTheLogSaysWhyMoreIsFetched(t *testing.T) {
	t.Parallel()
	routes := newRoutes(t, 5<<19)
	damage := func(paths ...string) func(t *testing.T, n *node) {
		return func(t *testing.T, n *node) {
			rel, err := n.releases.Current()
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range paths {
				flip(t, filepath.Join(rel.Dir, p), 1000)
			}
		}
	}
	index := func(n *node) string {
		found, _ := filepath.Glob(filepath.Join(n.releases.private(), "*"+indexSuffix))
		return found[0]
	}
	for name, c := range map[string]struct {
		route  string
		before func(t *testing.T, n *node)
		says   []string // that it says, and nothing else; nil: nothing at all
	}{
		"all is well":       {route: routeDelta},
		"no delta was made": {route: routeWarm},
		"files of the old release are damaged": {routeWarm, damage("lib/03.txt", "lib/05.txt"),
			[]string{"the old release or the delta has wrong content", "files=2", "first=lib/03.txt"}},
		"what a delta starts from is damaged": {routeDelta, damage("bin/server"),
			[]string{"the old release or the delta has wrong content", "files=1", "first=bin/server"}},
		"the old release's index is missing": {routeDelta, func(t *testing.T, n *node) { os.Remove(index(n)) },
			[]string{"old release can't be used", "no such file"}},
		"the old release's index is damaged": {routeDelta, func(t *testing.T, n *node) { flip(t, index(n), 100) },
			[]string{"old release can't be used", "digest"}},
		"the delta is missing": {routeDelta, func(_ *testing.T, n *node) {
			n.proxy.Play(func(r objecttest.Request) objecttest.Fault {
				if strings.HasPrefix(r.Name, "delta-") {
					return objecttest.Status(404, "NoSuchKey")
				}
				return nil
			})
		}, []string{"delta can't be used", "no such object"}},
		"the server ignores Range": {routeWarm, func(_ *testing.T, n *node) {
			n.proxy.Play(func(r objecttest.Request) objecttest.Fault { return n.proxy.WithoutRange() })
		}, []string{"ignores Range"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := routes.node(t, c.route)
			if c.before != nil {
				c.before(t, n)
			}
			rel, err := n.stage(t, c.route)
			if err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, rel.Dir, routes.new)
			log := n.log.String()
			if lines := strings.Count(log, "\n"); lines != min(1, len(c.says)) {
				t.Errorf("the log has %d lines:\n%s", lines, log)
			}
			for _, want := range c.says {
				if !strings.Contains(log, want) {
					t.Errorf("the log doesn't say %q:\n%s", want, log)
				}
			}
		})
	}
}

// The old release may be removed while a new one is made of it.
func TestTheOldReleaseGoesMeanwhile(t *testing.T) {
	t.Parallel()
	routes := newRoutes(t, 5<<19)
	for _, route := range []string{routeWarm, routeDelta} {
		n := routes.node(t, route)
		rel, err := n.releases.Current()
		if err != nil {
			t.Fatal(err)
		}
		n.proxy.Play(func(r objecttest.Request) objecttest.Fault {
			if r.N == 0 && isData(r.Name) {
				if err := os.RemoveAll(rel.Dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Error(err)
				}
			}
			return nil
		})
		next, err := n.stage(t, route)
		if err != nil {
			t.Fatalf("%s: %v", route, err)
		}
		treetest.Same(t, next.Dir, routes.new)
	}
}

// Of what was spoiled the log names the first by name, in whatever order it is found.
func TestTheFirstThatIsSpoiled(t *testing.T) {
	t.Parallel()
	var s spoiled
	for _, path := range []string{"b", "a", "c"} {
		s.add(path)
	}
	if n, first := s.sum(); n != 3 || first != "a" {
		t.Errorf("%d, the first is %q", n, first)
	}
}
