package artifact

import (
	"bytes"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// BenchmarkPeers times ways to get a release onto a disk, side by side, and prints walls, ratios to the best pipeline of standard
// tools, and what the server counted. The tree is the Go toolchain's, and the server's binary that KEDGE_BENCH_SERVER names,
// which KEDGE_BENCH_REBUILT, the same after a change, replaces in the next release. As root, each run has a freshly
// made ext4 file system of its own: where a tree was just removed, ext4 is slow for reasons that are none of the peers'.
//
//	go test ./artifact -run '^$' -bench Peers -benchtime 1x
func BenchmarkPeers(b *testing.B) {
	for range b.N {
		benchmarkPeers(b)
	}
}

func benchmarkPeers(b *testing.B) {
	v1, v2, v3 := filepath.Join(b.TempDir(), "v1"), filepath.Join(b.TempDir(), "v2"), filepath.Join(b.TempDir(), "v3")
	run(b, "sh", "-c", `cp -r "$(go env GOROOT)" "$1"`, "sh", v1)
	if server := os.Getenv("KEDGE_BENCH_SERVER"); server != "" {
		run(b, "cp", server, filepath.Join(v1, "server"))
	}
	run(b, "cp", "-r", v1, v2)
	edit(b, v2, 71)
	run(b, "cp", "-r", v2, v3)
	if rebuilt := os.Getenv("KEDGE_BENCH_REBUILT"); rebuilt != "" {
		run(b, "cp", rebuilt, filepath.Join(v3, "server"))
	}

	start := time.Now()
	old := publishTree(b, v1)
	packing := time.Since(start)
	plain := filepath.Join(old.store, "plain.tar.zst")
	start = time.Now()
	run(b, "sh", "-c", `tar -C "$1" -cf - . | zstd -q -T0 -3 -o "$2"`, "sh", v1, plain)
	b.Logf("pack: %.2fs, tar | zstd -T0 -3: %.2fs, ratio %.2f; %d MB, %d MB", packing.Seconds(), time.Since(start).Seconds(),
		packing.Seconds()/time.Since(start).Seconds(), old.manifest.Size>>20, size(b, plain)>>20)
	start = time.Now()
	edited := publishTree(b, v2, old)
	rebuilt := publishTree(b, v3, old)
	b.Logf("two more releases with their deltas: %.2fs", time.Since(start).Seconds())

	var requests, sent atomic.Int64
	var pipeline float64
	serve := func(p *published) *httptest.Server {
		return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			requests.Add(1)
			http.ServeFile(&tally{w, &sent}, r, filepath.Join(p.store, filepath.Base(r.URL.Path)))
		}))
	}
	measure := func(name string, p *published, prepare, work func(disk, url string)) {
		server := serve(p)
		defer server.Close()
		disk := freshDisk(b)
		if prepare != nil {
			prepare(disk, server.URL)
		}
		requests.Store(0)
		sent.Store(0)
		start := time.Now()
		work(disk, server.URL)
		wall := time.Since(start).Seconds()
		if pipeline == 0 {
			pipeline = wall
		}
		b.Logf("%-34s %6.2fs  %5.2f  %8.2f MB  %3d requests", name, wall, wall/pipeline, float64(sent.Load())/1e6, requests.Load())
	}
	fetch := func(p *published, from *published, immutable bool) func(disk, url string) {
		return func(disk, url string) {
			m := p.at(url)
			m.Immutable = immutable
			dir := filepath.Join(disk, "new")
			if err := os.Mkdir(dir, 0o755); err != nil {
				b.Fatal(err)
			}
			var old *base
			if from != nil {
				old = from.asBase(filepath.Join(disk, "old"))
			}
			mustFetch(b, m, old, dir)
		}
	}
	running := func(disk, _ string) { run(b, "cp", "-r", v1, filepath.Join(disk, "old")) }
	withoutDelta := *rebuilt
	m := *rebuilt.manifest
	m.Deltas = nil
	withoutDelta.manifest = &m

	measure("curl | zstd | tar", old, nil, func(disk, url string) {
		run(b, "sh", "-c", `curl -sf "$1/plain.tar.zst" | zstd -dcq | tar -xf - -C "$2"`, "sh", url, disk)
	})
	measure("cp -r", old, nil, func(disk, _ string) { run(b, "cp", "-r", v1, disk) })
	measure("kedge, cold", old, nil, fetch(old, nil, false))
	measure("kedge, 71 edits, hard links", edited, running, fetch(edited, old, true))
	measure("kedge, 71 edits, copies", edited, running, fetch(edited, old, false))
	measure("kedge, server rebuilt, hard links", rebuilt, running, fetch(rebuilt, old, true))
	measure("kedge, the same without a delta", &withoutDelta, running, fetch(&withoutDelta, old, true))
}

type tally struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (t *tally) Write(data []byte) (int, error) {
	t.n.Add(int64(len(data)))
	return t.ResponseWriter.Write(data)
}

// edit changes a word in n source files, spread over the tree.
func edit(b *testing.B, dir string, n int) {
	var files []string
	filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if strings.HasSuffix(p, ".go") && d.Type().IsRegular() {
			files = append(files, p)
		}
		return err
	})
	for i := range min(n, len(files)) {
		p := files[i*len(files)/n]
		data, err := os.ReadFile(p)
		if err != nil {
			b.Fatal(err)
		}
		data = append(bytes.Replace(data, []byte("return"), []byte("return "), 1), fmt.Sprintf("\n// %d\n", i)...)
		if err := os.WriteFile(p, data, 0o644); err != nil {
			b.Fatal(err)
		}
	}
}

// freshDisk gives a directory, on a file system of its own where that can be had.
func freshDisk(b *testing.B) string {
	dir := b.TempDir()
	if os.Geteuid() != 0 {
		return dir
	}
	image := filepath.Join(b.TempDir(), "image")
	run(b, "truncate", "-s", "4G", image)
	run(b, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	run(b, "mount", "-o", "loop", image, dir)
	b.Cleanup(func() { run(b, "umount", dir) })
	return dir
}

func run(b *testing.B, name string, args ...string) {
	b.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		b.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}
