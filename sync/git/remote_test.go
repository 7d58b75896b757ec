package git

import (
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/sync/git/gittest"
)

func TestCacheDoesNotGrowForEver(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	cache := t.TempDir()
	if err := os.Mkdir(filepath.Join(cache, fetchPrefix+"cut-off"), 0o700); err != nil {
		t.Fatal(err)
	}
	c := Config{Repo: h.URL, Branch: "main", CacheDir: cache, Log: slog.New(slog.DiscardHandler),
		Env: env("GIT_SSL_CAINFO", h.CAFile, "KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")}
	r, err := newRemoteRepo(c, ".")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.Head(t.Context()); err != nil || got != head {
		t.Fatalf("head %v, %v", got, err)
	}
	of := c
	of.Repo = "https://git.example.com/other.git"
	if other, err := newRemoteRepo(of, "."); err != nil || other.cache != "" {
		t.Errorf("the cache of another repository is taken: %v, %v", other, err)
	}
	packs := filepath.Join(cache, cacheName, "objects", "pack")
	gittest.WriteFile(t, filepath.Join(packs, "tmp_pack_1"), "half")
	if r, err = newRemoteRepo(c, "."); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(packs, "tmp_*")); len(left) > 0 {
		t.Errorf("a start leaves %v", left)
	}
	for i := range maxPacks {
		gittest.WriteFile(t, filepath.Join(packs, fmt.Sprintf("pack-%040d.pack", i)), "")
	}
	head = h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	if got, err := r.Head(t.Context()); err != nil || got != head {
		t.Fatalf("head %v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(packs, "*.pack")); len(left) != 1 {
		t.Errorf("%d packs are left", len(left))
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "*")); len(left) != 1 {
		t.Errorf("the cache directory has %v", left)
	}
}

// An incomplete pack leaves no files that further tries would add to, and a fetch is cancelled if the server
// stalls.
func TestHalfAPack(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	cache := t.TempDir()
	c := Config{Repo: h.URL, Branch: "main", CacheDir: cache, Log: slog.New(slog.DiscardHandler),
		Env: env("GIT_SSL_CAINFO", h.CAFile, "KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")}
	r, err := newRemoteRepo(c, ".")
	if err != nil {
		t.Fatal(err)
	}
	is := func(head string) {
		t.Helper()
		if got, err := r.Head(t.Context()); err != nil || got != head {
			t.Fatalf("head %v, %v; want %s", got, err, head)
		}
	}
	is(head)
	noise := make([]byte, 100_000)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	next := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "noise": string(noise)})
	h.Half.Store(true)
	for _, hang := range []bool{false, true} {
		h.Hang.Store(hang)
		r.stall = time.Second
		for range 2 {
			began := time.Now()
			// Even without hang a busy machine may stall.
			if _, err := r.Head(t.Context()); err == nil || hang && !errors.Is(err, errStalled) {
				t.Errorf("half a pack, hangs %v: %v", hang, err)
			}
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("half a pack, hangs %v: it took %v", hang, took)
			}
			if left, _ := filepath.Glob(filepath.Join(cache, "*", "objects", "pack", "tmp_*")); len(left) > 0 {
				t.Errorf("half a pack, hangs %v: %v are left", hang, left)
			}
		}
	}
	if got, err := r.cached(); err != nil || got != head {
		t.Errorf("meanwhile the cache has %v, %v", got, err)
	}
	h.Half.Store(false)
	r.stall = stallTimeout
	is(next)
}

// The cache is bounded on disk. It is rebuilt if only an older history fills it; a history beyond the bound is
// refused, and not fetched again and again.
func TestCacheIsBounded(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	noise := func() string {
		data := make([]byte, 100_000)
		_, _ = rand.Read(data)
		return string(data)
	}
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "noise": noise()})
	b := openHTTPS(t, h)
	r := b.(*remoteRepo)
	r.room = 150_000
	reads(t, b, first)
	h.Git(h.Work, "checkout", "-q", "--orphan", "other")
	forced := h.ForcePush(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "noise": noise()})
	reads(t, b, forced)
	if size := sizeOf(filepath.Join(r.cache, "objects", "pack")); size > r.room {
		t.Errorf("the cache has %d bytes", size)
	}
	head := h.Push(map[string]string{"noise": noise()})
	for range 2 {
		if err := fails(t, b, "a large history", "more than 150000 bytes", "allowFilter"); !errors.As(err, new(*BadCommit)) {
			t.Errorf("it isn't refused: %v", err)
		}
	}
	fetches := h.Fetches.Load()
	fails(t, b, "again", "allowFilter")
	if n := h.Fetches.Load() - fetches; n > 0 {
		t.Errorf("it was fetched %d times more", n)
	}
	if left, _ := filepath.Glob(filepath.Join(r.dir, fetchPrefix+"*")); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	r.room = maxCache
	r.refused = nil
	reads(t, b, head)
}

func TestAddressesThatAreRefused(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"https://ada:s3cret@git.example.com/deployments.git": "KEDGE_GIT_TOKEN",
		"ssh://ada:s3cret@git.example.com/deployments.git":   "use a key",
		"http://git.example.com/deployments.git":             "use https",
		"git://git.example.com/deployments.git":              "not one of",
	} {
		_, err := Open(Config{Repo: address, Branch: "main", Env: env()})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", address, err)
		}
	}
	for address, local := range map[string]bool{
		"/srv/git/deployments.git": true, "deployments.git": true, "./a:b": true, "file:///srv/git": true,
		"git@git.example.com:deployments.git": false,
		"git.example.com:deployments.git":     false,
		"git.example.com:/srv/git/x":          false,
		"git@git.example.com:/srv/git/x":      false,
		"ssh://git@git.example.com/x":         false,
		"https://git.example.com/x":           false,
	} {
		if _, got := localPath(address); got != local {
			t.Errorf("%s: local %v, want %v", address, got, local)
		}
	}
}

// A killed mirror leaves its temporary cache, and the next one removes it, but not that of a running mirror, and
// nothing else.
func TestTemporaryDirsOfTheDead(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	dead, held, err := temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Close(); err != nil { // as its death does
		t.Fatal(err)
	}
	alive, held, err := temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	foreign := filepath.Join(parent, temporaryPrefix+"foreign")
	if err := os.Mkdir(foreign, 0o700); err != nil {
		t.Fatal(err)
	}
	hourAgo := time.Now().Add(-time.Hour)
	for _, dir := range []string{dead, alive, foreign} {
		if err := os.Chtimes(dir, hourAgo, hourAgo); err != nil {
			t.Fatal(err)
		}
	}
	_, held, err = temporaryDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for dir, stays := range map[string]bool{dead: false, alive: true, foreign: true} {
		if _, err := os.Stat(dir); stays != (err == nil) {
			t.Errorf("%s: %v, want it to stay: %v", dir, err, stays)
		}
	}
}

// A temporary directory that can't get its lock is removed again: no later mirror would.
func TestTemporaryDirWithoutLock(t *testing.T) {
	t.Parallel()
	// With the suffix of 6 to 10 digits the directory's path fits into PATH_MAX, but not that of
	// the lock in it.
	parent := t.TempDir()
	for length := unix.PathMax - len("/"+temporaryPrefix) - 11; len(parent) < length; {
		parent = filepath.Join(parent, strings.Repeat("d", min(250, max(1, length-len(parent)-1))))
	}
	if err := os.MkdirAll(parent, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, _, err := temporaryDir(parent); !errors.Is(err, unix.ENAMETOOLONG) || !strings.Contains(err.Error(), lockFile) {
		t.Fatalf("the error is %v", err)
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("it leaves %v, %v", left, err)
	}
}
