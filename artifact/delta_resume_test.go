package artifact

import (
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments/tooltest"
)

// largeDelta is a release with a delta of more than a few MiB, from one that a node has. Its archive is larger still.
func largeDelta(t *testing.T) (old, new *published) {
	t.Helper()
	one, two := t.TempDir(), t.TempDir()
	writeVersion(t, one, "1")
	writeVersion(t, two, "2")
	if err := os.WriteFile(filepath.Join(two, "large"), treetest.Random(1, 2*deltaInMem), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{one, two} {
		if err := os.WriteFile(filepath.Join(dir, "same"), treetest.Random(2, deltaInMem), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old = publishTree(t, one)
	new = publishTree(t, two, old)
	if new.manifest.Deltas[0].Size <= deltaInMem {
		t.Fatalf("it has %d bytes", new.manifest.Deltas[0].Size)
	}
	return old, new
}

// A large delta whose fetch was cut off, or killed, goes on where it was; what was spoiled meanwhile is fetched anew.
func TestALargeDeltaGoesOn(t *testing.T) {
	t.Parallel()
	old, new := largeDelta(t)
	const first = 3 << 20
	for name, c := range map[string]struct {
		damage func(t *testing.T, file string)
		again  bool
	}{
		"as it was":  {func(*testing.T, string) {}, false},
		"spoiled":    {func(t *testing.T, file string) { flip(t, file, 100) }, true},
		"of another": {func(t *testing.T, file string) { os.Rename(file, file[:len(file)-12]+"000000000000") }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var sent atomic.Int64
			var file string
			files := http.FileServer(http.Dir(new.store))
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasSuffix(r.URL.Path, "/delta0") {
					w = &cutting{ResponseWriter: w, sent: &sent, at: first, cut: func() {
						for sizeOf(file) < first/2 && r.Context().Err() == nil {
							time.Sleep(time.Millisecond)
						}
						cancel()
						<-r.Context().Done()
						panic(http.ErrAbortHandler)
					}}
				}
				files.ServeHTTP(w, r)
			}))
			defer server.Close()
			m := new.at(server.URL)
			dir := filepath.Join(t.TempDir(), "staging-x")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			file = deltaFile(dir, m.Deltas[0])
			fetch := func(ctx context.Context) error {
				_, err := fetchIndexed(ctx, object.New(object.Config{}), m, old.asBase(old.dir), dir, StageOptions{})
				return err
			}
			if err := fetch(ctx); err == nil {
				t.Fatal("it was not cut off")
			}
			had := sizeOf(file)
			if had == 0 {
				t.Fatal("nothing is left of it")
			}
			c.damage(t, file)
			sent.Store(-1 << 40) // no cut
			before := sent.Load()
			if err := fetch(t.Context()); err != nil {
				t.Fatal(err)
			}
			treetest.Same(t, dir, new.dir)
			want := m.Deltas[0].Size
			if !c.again {
				want -= had
			}
			if got := sent.Load() - before; got < want || got > 2*want {
				t.Errorf("%d bytes were sent the second time, want %d", got, want)
			} else if !c.again && got != want {
				t.Errorf("%d bytes were sent the second time, want %d", got, want)
			}
			if left, _ := filepath.Glob(dir + ".*"); len(left) > 0 {
				t.Errorf("%q is left", left)
			}
		})
	}
}

// cutting passes on so many bytes of all responses together, and then cuts.
type cutting struct {
	http.ResponseWriter
	sent *atomic.Int64
	at   int64
	cut  func()
}

func (c *cutting) Write(data []byte) (int, error) {
	if c.sent.Add(int64(len(data))) > c.at {
		c.ResponseWriter.(http.Flusher).Flush()
		c.cut()
	}
	return c.ResponseWriter.Write(data)
}

// A disk that holds the tree, but not the delta beside it, gets the parts of the archive.
func TestALargeDeltaNeedsRoom(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	old, new := largeDelta(t)
	disk := t.TempDir()
	treetest.MountTmpfs(t, disk, "size=14m")
	dir := filepath.Join(disk, "staging-x")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := *new.manifest
	m.Deltas = slices.Clone(m.Deltas)
	m.Deltas[0].URL = "file:///none" // it isn't asked for
	requests, _, err := fetchTree(t, t.Context(), &m, old.asBase(old.dir), dir)
	if err != nil || requests == 0 {
		t.Fatal(requests, err)
	}
	treetest.Same(t, dir, new.dir)
	var st syscall.Statfs_t
	if err := syscall.Statfs(disk, &st); err != nil || int64(st.Bfree)*st.Bsize > m.Deltas[0].Size {
		t.Errorf("the disk had room for the delta, too: %v", err)
	}
}
