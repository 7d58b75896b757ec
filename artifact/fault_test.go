package artifact

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/objecttest"
	"kedge/artifact/treetest"
	"kedge/deployments"
)

// routes is an S3 server with two releases, the second published in every way that a node can come to it by.
type routes struct {
	gateway  *objecttest.Server
	direct   *object.Client
	disk     string // where nodes have their directories
	old, new string // the trees
	from     deployments.Pointer
	to       map[string]deployments.Pointer // by route
}

// The routes. All but the first start from the old release.
const (
	routeCold  = "ranges of all"
	routeWarm  = "ranges of what changed"
	routeDelta = "delta"
	routeGz    = "tar.gz"
	routeZst   = "tar.zst"
)

var allRoutes = []string{routeCold, routeWarm, routeDelta, routeGz, routeZst}

// quickDir is a directory where a sync costs nothing, where tests may mount one.
func quickDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if os.Geteuid() == 0 {
		treetest.MountTmpfs(t, dir, "size=1g")
	}
	return dir
}

// newRoutes makes trees with one large file of so many bytes, and thirty small ones.
func newRoutes(t testing.TB, large int) *routes {
	t.Helper()
	r := &routes{gateway: objecttest.Start(t), disk: quickDir(t), old: t.TempDir(), new: t.TempDir(), to: map[string]deployments.Pointer{}}
	server := treetest.Random(1, large)
	tree := treetest.Tree{"bin": {Mode: os.ModeDir | 0o755}, "bin/server": {Mode: 0o755, Data: string(server)},
		"lib": {Mode: os.ModeDir | 0o755}}
	for i := range 30 {
		tree[fmt.Sprintf("lib/%02d.txt", i)] = treetest.File{Mode: 0o644, Data: treetest.Prose(uint64(i), 2000)}
	}
	tree.Write(t, r.old)
	server = slices.Concat(server[:500_000], []byte("one line more"), server[500_000:])
	tree["bin/server"] = treetest.File{Mode: 0o755, Data: string(server)}
	tree["lib/07.txt"] = treetest.File{Mode: 0o644, Data: treetest.Prose(100, 2000)}
	tree.Write(t, r.new)

	r.direct = r.gateway.Client()
	publish := func(dir, version string, find int) deployments.Pointer {
		t.Helper()
		out, err := Publish(t.Context(), r.direct, PublishOptions{Dir: dir, To: r.gateway.URL("releases"), Manifest: template(version), Find: find})
		if err != nil || len(out.Deltas) != find {
			t.Fatalf("%+v, %v", out, err)
		}
		return out.Pointer
	}
	r.from = publish(r.old, "1", 0)
	r.to[routeDelta] = publish(r.new, "2", 1)
	r.to[routeWarm] = publish(r.new, "2-alone", 0)
	r.to[routeCold] = r.to[routeWarm]
	for route, flag := range map[string]string{routeGz: "-czf", routeZst: "--zstd -cf"} {
		dir := filepath.Join(r.gateway.Dir(), "plain", route)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		archive := filepath.Join(dir, "app."+route)
		if out, err := exec.Command("sh", "-c", `tar `+flag+` "$1" -C "$2" .`, "sh", archive, r.new).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		data, err := os.ReadFile(archive)
		if err != nil {
			t.Fatal(err)
		}
		manifest := fmt.Sprintf("src: app.%s\nchecksum: %s\ndest: /srv/app\nsync_strategy: release\n", route,
			deployments.DigestOf(data))
		if err := os.WriteFile(filepath.Join(dir, manifestName), []byte(manifest), 0o644); err != nil {
			t.Fatal(err)
		}
		r.to[route] = deployments.Pointer{URL: r.gateway.URL("plain/" + route + "/" + manifestName),
			Digest: deployments.DigestOf([]byte(manifest))}
	}
	return r
}

// node is one that runs the old release, or none for routeCold, and reaches storage through a proxy of its own.
type node struct {
	routes   *routes
	proxy    *objecttest.Proxy
	releases *Releases
	log      bytes.Buffer
	before   map[string]string // what is on its disk
}

const stallTimeout = 400 * time.Millisecond

func (r *routes) node(t testing.TB, route string) *node {
	t.Helper()
	n := &node{routes: r, proxy: objecttest.NewProxy(t, r.gateway)}
	client := n.proxy.Client(func(c *object.Config) { c.StallTimeout = stallTimeout })
	dir, err := os.MkdirTemp(r.disk, "node-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n.releases = Open(filepath.Join(dir, "app"), client, slog.New(slog.NewTextHandler(&n.log, &slog.HandlerOptions{Level: slog.LevelWarn})))
	if route != routeCold {
		if err := n.releases.Switch(stageOne(t, n.releases, r.from)); err != nil {
			t.Fatal(err)
		}
	}
	n.before = n.files()
	return n
}

// files lists what is on the node's disk by top directory: releases, and what is private.
func (n *node) files() map[string]string {
	found := map[string]string{}
	for _, dir := range []string{n.releases.top(), n.releases.private()} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() != ".kedge" {
				found[dir+"/"+e.Name()] = e.Type().String()
			}
		}
	}
	return found
}

func (n *node) stage(t testing.TB, route string) (*Release, error) {
	t.Helper()
	m, raw, err := fetchManifest(t.Context(), n.routes.direct, n.routes.to[route], nil)
	if err != nil {
		t.Fatal(err)
	}
	return n.releases.Stage(t.Context(), n.routes.to[route], m, raw, StageOptions{})
}

// untouched fails the test where a failed fetch left something, or changed what runs.
func (n *node) untouched(t testing.TB, route string) {
	t.Helper()
	if now := n.files(); !maps.Equal(now, n.before) {
		t.Errorf("it leaves %v, there was %v", slices.Sorted(maps.Keys(now)), slices.Sorted(maps.Keys(n.before)))
	}
	if route != routeCold {
		treetest.Same(t, n.releases.dest+"/.", n.routes.old)
	}
}

// whole fails the test where what was staged is not the new release, or something else lies beside it.
func (n *node) whole(t testing.TB, rel *Release) {
	t.Helper()
	treetest.Same(t, rel.Dir, n.routes.new)
	for path := range n.files() {
		name := filepath.Base(path)
		if _, there := n.before[path]; !there && !strings.HasPrefix(name, filepath.Base(rel.Dir)) {
			t.Errorf("it leaves %s", path)
		}
	}
}

// play is a fault, what it is played on, and how the fetch ends: nil is well.
type play struct {
	fault func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault
	ends  map[string]error // by route; "" for those not named
	on    []string         // these routes only; nil: all
	says  string           // what the log has then, once
}

// isBody tells the objects that most bytes come from.
func isBody(name string) bool {
	return strings.HasPrefix(name, "archive.") || strings.HasPrefix(name, "app.") || strings.HasPrefix(name, "delta-")
}

// isData tells the objects that a tree is made from.
func isData(name string) bool { return isBody(name) || name == indexName }

var plays = map[string]play{
	"connections that are cut": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if at := []int64{0, 10, 300_000, 1_200_000}; isData(r.Name) && !r.Probe && r.N < len(at) {
			return objecttest.Cut(at[r.N])
		}
		return nil
	}},
	"a server that stalls": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		switch {
		case !isData(r.Name):
		case r.N == 0:
			return p.Stall(-1)
		case r.N == 1 && !r.Probe:
			return p.Stall(100)
		}
		return nil
	}},
	"a server that trickles": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isBody(r.Name) && !r.Probe && r.N == 0 {
			return p.Trickle(stallTimeout / 10)
		}
		return nil
	}},
	"throttling": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isData(r.Name) && r.N < 3 {
			return objecttest.SlowDown()
		}
		return nil
	}},
	"a server that knows no Range": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isData(r.Name) {
			return p.WithoutRange()
		}
		return nil
	}},
	"an object that is too short": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isBody(r.Name) {
			return p.Resized(-700)
		}
		return nil
	}, ends: map[string]error{"": deployments.ErrDigest}},
	"an object that is too long": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isBody(r.Name) {
			return p.Resized(+700)
		}
		return nil
	}, ends: map[string]error{"": deployments.ErrDigest}},
	"a delta that is too short": {fault: func(p *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if strings.HasPrefix(r.Name, "delta-") {
			return p.Resized(-1)
		}
		return nil
	}, on: []string{routeDelta}, says: "the delta can't be used"},
	"a wrong byte in a delta": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if strings.HasPrefix(r.Name, "delta-") {
			return objecttest.Flip(500)
		}
		return nil
	}, on: []string{routeDelta}, says: "the delta can't be used"},
	"a wrong byte in an archive": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isBody(r.Name) && !strings.HasPrefix(r.Name, "delta-") {
			return objecttest.Flip(900_000)
		}
		return nil
	}, ends: map[string]error{"": deployments.ErrDigest, routeDelta: nil}},
	"a wrong byte on the way, once": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if isData(r.Name) && !r.Probe && r.N == 0 {
			return objecttest.Flip(1500)
		}
		return nil
	}, ends: map[string]error{routeGz: deployments.ErrDigest, routeZst: deployments.ErrDigest}},
	"a wrong byte in an index": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		if r.Name == indexName {
			return objecttest.Flip(700)
		}
		return nil
	}, ends: map[string]error{routeCold: deployments.ErrDigest, routeWarm: deployments.ErrDigest},
		on: []string{routeCold, routeWarm, routeDelta}},
	"a release that is withdrawn": {fault: func(_ *objecttest.Proxy, r objecttest.Request) objecttest.Fault {
		switch {
		case r.N == 0 && !r.Probe && isBody(r.Name):
			return objecttest.Cut(1000)
		case r.N == 0:
			return nil
		}
		return objecttest.Status(404, "NoSuchKey")
	}, ends: map[string]error{"": object.ErrNotFound}},
}

// Whatever a server does, and whatever way a release comes by: it is whole in the end, or nothing is left of it,
// the error says why, and what runs is as it was.
func TestFaultsOnEveryRoute(t *testing.T) {
	t.Parallel()
	routes := newRoutes(t, 5<<19)
	for name, play := range plays {
		if play.on == nil {
			play.on = allRoutes
		}
		for _, route := range play.on {
			t.Run(name+", "+route, func(t *testing.T) {
				t.Parallel()
				n := routes.node(t, route)
				n.proxy.Play(func(r objecttest.Request) objecttest.Fault { return play.fault(n.proxy, r) })
				want, named := play.ends[route]
				if !named {
					want = play.ends[""]
				}
				rel, err := n.stage(t, route)
				if want != nil {
					if !errors.Is(err, want) {
						t.Fatalf("it ends with %v, want %v", err, want)
					}
					n.untouched(t, route)
					n.proxy.Play(nil)
					rel, err = n.stage(t, route)
				}
				if err != nil {
					t.Fatal(err)
				}
				n.whole(t, rel)
				if said := strings.Count(n.log.String(), play.says); play.says != "" && said != 1 {
					t.Errorf("the log says %d times %q:\n%s", said, play.says, n.log.String())
				}
			})
		}
	}
}
