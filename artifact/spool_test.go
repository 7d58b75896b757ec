package artifact

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
	"kedge/artifact/treetest"
	"kedge/deployments"
	"kedge/deployments/tooltest"
)

// plainServer serves an archive without an index.
type plainServer struct {
	*httptest.Server
	data []byte
	tag  atomic.Pointer[string]
	sent atomic.Int64
	// cut ends a fetch once so many bytes were sent; 0: none. It waits for those that written counts.
	cut     atomic.Int64
	written func() int64
	end     atomic.Pointer[context.CancelFunc]
}

func servePlain(t *testing.T, data []byte) *plainServer {
	t.Helper()
	s := &plainServer{data: data, written: func() int64 { return 1 << 62 }}
	s.setTag(`"one"`)
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if tag := *s.tag.Load(); tag != "" {
			w.Header().Set("ETag", tag)
		}
		at := s.cut.Load()
		if at == 0 {
			at = 1 << 62
		}
		w = &cutting{ResponseWriter: w, sent: &s.sent, at: at, cut: func() {
			for s.written() == 0 && r.Context().Err() == nil {
				time.Sleep(time.Millisecond)
			}
			(*s.end.Load())()
			<-r.Context().Done()
			panic(http.ErrAbortHandler)
		}}
		http.ServeContent(w, r, "app.tar", time.Time{}, bytes.NewReader(s.data))
	}))
	t.Cleanup(s.Close)
	return s
}

func (s *plainServer) setTag(tag string) { s.tag.Store(&tag) }

// try stages a release, cut off after so many bytes, and returns how many were sent.
func (s *plainServer) try(t *testing.T, switcher Switcher, rel *Release, cut int64) (sent int64, err error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.end.Store(&cancel)
	s.sent.Store(0)
	s.cut.Store(cut)
	err = switcher.Stage(ctx, rel, StageOptions{})
	return s.sent.Load(), err
}

// tarWith returns an archive of files.
func tarWith(t *testing.T, files ...[]byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for i, content := range files {
		h := tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("large", i), Size: int64(len(content)), Mode: 0o644}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// plainRelease returns a release of an archive without an index.
func plainRelease(url, dest string, checksum [md5.Size]byte, strategy deployments.Strategy) *Release {
	m := &deployments.Manifest{Src: url + "/app.tar", Checksum: hex.EncodeToString(checksum[:]), Dest: dest,
		DestMode: 0o755, Strategy: strategy}
	raw := fmt.Appendf(nil, "src: %s\nchecksum: %s\ndest: %s\nsync_strategy: %s\n", m.Src, m.Checksum, dest, strategy)
	p := deployments.Pointer{URL: url + "/m.yml", Digest: deployments.DigestOf(raw)}
	return &Release{Pointer: p, Manifest: m, Raw: raw}
}

// spoolsIn returns the spools below a directory.
func spoolsIn(t *testing.T, dir string) (found []string) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, _ os.DirEntry, _ error) error {
		if strings.Contains(filepath.Base(path), archiveSuffix) {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// A large archive without an index is streamed. Once that was cut off, each further try goes on where the last one
// ended, if it is the same object still; nothing of it is used before all of it has the right checksum.
func TestALargePlainArchiveGoesOn(t *testing.T) {
	t.Parallel()
	content := treetest.Random(7, minSpooled+8<<20)
	data := tarWith(t, content)
	size := int64(len(data))
	const step = 8 << 20
	for name, c := range map[string]struct {
		strategy deployments.Strategy
		before   func(t *testing.T, s *plainServer, spool string) // the last try
		anew     bool                                             // it is fetched from the start
	}{
		"rsync":   {strategy: deployments.StrategyRsync},
		"mv":      {strategy: deployments.StrategyMv},
		"release": {strategy: deployments.StrategyRelease},
		"spoiled by a loss of power": {deployments.StrategyMv, func(t *testing.T, _ *plainServer, spool string) {
			flip(t, spool, 1000)
		}, true},
		"longer than the archive": {deployments.StrategyMv, func(t *testing.T, _ *plainServer, spool string) {
			if err := os.WriteFile(spool, make([]byte, size+1), 0o600); err != nil {
				t.Fatal(err)
			}
		}, true},
		"another object by now": {deployments.StrategyRelease, func(_ *testing.T, s *plainServer, _ string) {
			s.setTag(`"two"`)
		}, true},
		"nothing tells objects apart": {deployments.StrategyRelease, func(_ *testing.T, s *plainServer, _ string) {
			s.setTag("")
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			home := t.TempDir()
			s := servePlain(t, data)
			rel := plainRelease(s.URL, filepath.Join(home, "app"), md5.Sum(data), c.strategy)
			trees := filepath.Join(home, "trees")
			switcher := NewSwitcher(rel.Manifest, SwitcherConfig{Objects: object.New(object.Config{}), Trees: trees})
			spool := func() string {
				if all := spoolsIn(t, home); len(all) == 1 {
					return all[0]
				}
				return ""
			}
			s.written = func() int64 { return 1 } // a stream keeps nothing
			if _, err := s.try(t, switcher, rel, step); err == nil || sizeOf(spool()) > 0 {
				t.Fatalf("streamed, it ended with %v, and left %d bytes", err, sizeOf(spool()))
			}
			s.written = func() int64 { return sizeOf(spool()) }
			had := int64(0)
			for range 2 {
				sent, err := s.try(t, switcher, rel, step)
				left := sizeOf(spool())
				if err == nil || left <= had || left > had+sent {
					t.Fatalf("cut off, it ended with %v: %d bytes were there, %d came, and %d are left", err, had, sent, left)
				}
				had = left
			}
			if err := PruneTrees(trees, []deployments.Digest{rel.Pointer.Digest}); err != nil || spool() == "" {
				t.Fatalf("pruning takes what was fetched of a release that is kept: %v", err)
			}
			if c.before != nil {
				c.before(t, s, spool())
			}
			sent, err := s.try(t, switcher, rel, 0)
			if err != nil {
				t.Fatal(err)
			}
			if resumed := sent < size; resumed == c.anew || resumed && sent > size-had+1000 {
				t.Errorf("%d bytes of %d came, when %d were there", sent, size, had)
			}
			if left := spoolsIn(t, home); len(left) > 0 {
				t.Errorf("it leaves %q", left)
			}
			found, err := filepath.Glob(filepath.Join(home, "*", "*", "large0"))
			if err != nil || len(found) != 1 {
				t.Fatalf("its file is at %q, %v", found, err)
			}
			if got, err := os.ReadFile(found[0]); err != nil || !bytes.Equal(got, content) {
				t.Errorf("its file is another: %v", err)
			}
		})
	}
}

// What was fetched of an archive goes once the release is refused, or another one is fetched.
func TestASpoolGoes(t *testing.T) {
	t.Parallel()
	data := tarWith(t, treetest.Random(8, minSpooled))
	for name, c := range map[string]struct {
		wrong   bool // the checksum
		another bool // comes after the cut
	}{
		"refused":              {wrong: true},
		"replaced":             {another: true},
		"replaced and refused": {true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, strategy := range []deployments.Strategy{deployments.StrategyMv, deployments.StrategyRelease} {
				home := t.TempDir()
				s := servePlain(t, data)
				trees := filepath.Join(home, "trees")
				release := func(name string, wrong bool) (*Release, Switcher) {
					sum := md5.Sum(data)
					if wrong {
						sum[0]++
					}
					rel := plainRelease(s.URL+name, filepath.Join(home, "app"), sum, strategy)
					return rel, NewSwitcher(rel.Manifest, SwitcherConfig{Objects: object.New(object.Config{}), Trees: trees})
				}
				rel, switcher := release("", c.wrong && !c.another)
				if _, err := s.try(t, switcher, rel, 1<<20); err == nil || len(spoolsIn(t, home)) != 1 {
					t.Fatalf("cut off, it ended with %v, and left %q", err, spoolsIn(t, home))
				}
				if c.another {
					rel, switcher = release("/2", c.wrong)
				}
				if _, err := s.try(t, switcher, rel, 0); (err != nil) != c.wrong {
					t.Fatal(err)
				}
				if left := spoolsIn(t, home); len(left) > 0 {
					t.Errorf("%s leaves %q", strategy, left)
				}
			}
		})
	}
}

// A release that is being removed may be called as a spool is.
func TestOnlyFilesAreSpools(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	trash := trashPrefix + nameOf("1.archive", deployments.DigestOf(nil))
	if err := os.MkdirAll(filepath.Join(dir, trash, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	treetest.WriteFile(t, filepath.Join(dir, "old"+archiveSuffix+"0123456789ab"), "part")
	if err := dropSpools(filepath.Join(dir, "new"), ""); err != nil {
		t.Error(err)
	}
	if left := treetest.List(t, dir); !slices.Equal(left, []string{trash}) {
		t.Errorf("it leaves %q", left)
	}
}

// A disk that holds the tree, but not the archive beside it, has it streamed again.
func TestASpoolNeedsRoom(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	content := treetest.Random(9, minSpooled)
	for name, c := range map[string]struct {
		disk    string
		archive []byte
	}{
		"plain": {"size=30m", tarWith(t, content)},
		// It grows as it is unpacked.
		"gz": {"size=38m", compressed(t, "gzip", tarWith(t, content, make([]byte, 10<<20)), "-1")},
	} {
		disk, archive := t.TempDir(), c.archive
		treetest.MountTmpfs(t, disk, c.disk)
		s := servePlain(t, archive)
		rel := plainRelease(s.URL, filepath.Join(disk, name), md5.Sum(archive), deployments.StrategyMv)
		trees := filepath.Join(disk, "trees")
		switcher := NewSwitcher(rel.Manifest, SwitcherConfig{Objects: object.New(object.Config{}), Trees: trees})
		if _, err := s.try(t, switcher, rel, 1<<20); err == nil {
			t.Fatalf("%s: it was not cut off", name)
		}
		if _, err := s.try(t, switcher, rel, 0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if left := spoolsIn(t, disk); len(left) > 0 {
			t.Errorf("%s leaves %q", name, left)
		}
	}
}
