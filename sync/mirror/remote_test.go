package mirror

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

// env returns a Config.Env with these pairs.
func env(pairs ...string) func(string) string {
	return func(name string) string {
		for i := 0; i < len(pairs); i += 2 {
			if pairs[i] == name {
				return pairs[i+1]
			}
		}
		return ""
	}
}

// pollsInVain waits for some polls, none of which may fetch.
func pollsInVain(h *gittest.HTTPSOrigin, m *running) {
	h.TB.Helper()
	listed, fetched := h.Lists.Load(), h.Fetches.Load()
	m.await("more polls", func() error {
		if h.Lists.Load() < listed+5 {
			return errors.New("no polls")
		}
		return nil
	})
	if got := h.Fetches.Load(); got != fetched {
		h.TB.Errorf("polls without a push fetched %d times", got-fetched)
	}
}

func TestHTTPS(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	store := dirStore(t)
	tokenFile := filepath.Join(t.TempDir(), "token")
	gittest.WriteFile(t, tokenFile, "wrong\n")
	cache := t.TempDir()
	c := Config{Store: store, Repo: h.URL, Every: 100 * time.Millisecond, CacheDir: cache,
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN_FILE", tokenFile, "GIT_SSL_CAINFO", h.CAFile)}
	m := start(t, c)
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "KEDGE_GIT_TOKEN") })
	gittest.WriteFile(t, tokenFile, "s3cret\n") // read anew, without a restart
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "no such branch: main") })

	m.at(h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	m.runs("prod/web/app", "app/1")
	for i := range 3 {
		m.at(h.Push(map[string]string{"prod/web/app.yaml": unitFile(fmt.Sprint("app/1", i))}))
	}
	if got := h.Fetches.Load(); got > 5 { // one a push, and one again at most for a push between list and fetch
		t.Errorf("%d fetches for 4 pushes", got)
	}
	pollsInVain(h, m)

	// Git goes away: what is mirrored stays, and a mirror that starts now goes on from its cache.
	h.Away.Store(true)
	m.status(func(s deployments.MirrorState) bool { return strings.Contains(s.Error, "502") })
	m.stop()
	m = start(t, c)
	put(t, store, "desired/prod/web/app", pointer("hand/1").String())
	m.runs("prod/web/app", "app/12")
	h.Away.Store(false)
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.at(head)
	m.runs("prod/web/app", "app/2")
	if log := m.log.String(); strings.Contains(log, "s3cret") {
		t.Error("the token is in the log")
	}

	// A force push is compared with what was taken, even if the host has forgotten that commit.
	h.Git(h.Work, "reset", "-q", "--hard", "HEAD~2")
	forced := h.Commit(map[string]string{"prod/web/app.yaml": unitFile("evil/1"), "kedge.yaml": "allow_rewind: true\n"})
	h.Git(h.Work, "push", "-q", "-f", "origin", "HEAD:main")
	h.Git(h.Bare, "gc", "-q", "--prune=now")
	m.refuses(forced, "does not descend from")
	m.stop()
	c.CacheDir = t.TempDir()
	m = start(t, c)
	m.await("a log line", func() error {
		if !strings.Contains(m.log.String(), "the commit is refused") {
			return errors.New("nothing is refused")
		}
		return nil
	})
	m.runs("prod/web/app", "app/2")
}

func TestBrokenCacheIsMadeAnew(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	cache := t.TempDir()
	c := Config{Store: dirStore(t), Repo: h.URL, Every: 100 * time.Millisecond, CacheDir: cache,
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)}
	m := start(t, c)
	m.at(h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	m.stop()
	packs, err := filepath.Glob(filepath.Join(cache, "repo.git", "objects", "pack", "*"))
	if err != nil || len(packs) == 0 {
		t.Fatalf("packs %v, %v", packs, err)
	}
	for _, name := range packs {
		if err := os.Chmod(name, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(name, 20); err != nil {
			t.Fatal(err)
		}
	}
	m = start(t, c)
	m.at(h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	m.runs("prod/web/app", "app/2")
}

// The error of a history that a server's shallow clone cuts off says what to do there. Then the commit is taken,
// without another push.
func TestShallowCloneBehindAServer(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	m := start(t, Config{Store: dirStore(t), Repo: h.URL, Every: 100 * time.Millisecond, CacheDir: t.TempDir(),
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)})
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m.at(first)
	h.Away.Store(true)
	h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	whole := filepath.Join(t.TempDir(), "whole.git")
	if err := os.Rename(h.Bare, whole); err != nil {
		t.Fatal(err)
	}
	h.Git("", "clone", "-q", "--bare", "--depth=1", "file://"+whole, h.Bare)
	h.Away.Store(false)
	m.status(func(s deployments.MirrorState) bool {
		return strings.Contains(s.Error, "git fetch --unshallow in it") && s.Head == first
	})
	h.Git(h.Bare, "fetch", "-q", "--unshallow")
	m.at(head)
	m.runs("prod/web/app", "app/3")
}

func TestCertificateIsChecked(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	m := start(t, Config{Store: dirStore(t), Repo: h.URL, Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")})
	m.status(func(s deployments.MirrorState) bool {
		return strings.Contains(s.Error, "x509") && strings.Contains(s.Error, "GIT_SSL_CAINFO")
	})
}

func TestSSH(t *testing.T) {
	t.Parallel()
	s := gittest.ServeSSH(t, gittest.New(t))
	store := dirStore(t)
	dir := t.TempDir()
	other := gittest.NewKey(t, filepath.Join(dir, "other"), "")
	gittest.NewKey(t, filepath.Join(dir, "locked"), "passphrase")
	gittest.WriteFile(t, filepath.Join(dir, "empty"), "")
	s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})

	fails := func(c Config, words ...string) {
		t.Helper()
		c.Store, c.Repo = dirStore(t), s.URL
		m := start(t, c)
		m.status(func(st deployments.MirrorState) bool {
			for _, w := range words {
				if !strings.Contains(st.Error, w) {
					return false
				}
			}
			return st.Head == ""
		})
		m.stop()
	}
	fails(Config{SSHKey: s.Key, KnownHosts: filepath.Join(dir, "empty")}, "is not in", ssh.FingerprintSHA256(s.HostKey))
	otherKey := filepath.Join(dir, "other")
	fails(Config{SSHKey: otherKey, KnownHosts: s.Known}, "accepts no key of "+otherKey)
	fails(Config{SSHKey: filepath.Join(dir, "locked"), KnownHosts: s.Known}, "has a passphrase")
	fails(Config{SSHKey: filepath.Join(dir, "missing"), KnownHosts: s.Known}, "no such file")

	m := start(t, Config{Store: store, Repo: s.URL, SSHKey: s.Key, KnownHosts: s.Known, Every: 200 * time.Millisecond})
	m.runs("prod/web/app", "app/1")
	m.at(s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))

	// Another key than the known one: somebody may be in between.
	s.Know(t, other)
	m.status(func(st deployments.MirrorState) bool {
		return strings.Contains(st.Error, "is not the one in") && strings.Contains(st.Error, "listening in")
	})
	m.runs("prod/web/app", "app/2")
	s.Know(t, s.HostKey)
	m.at(s.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
	m.runs("prod/web/app", "app/3")
}

// A server that accepts connections and never answers must not hang the mirror for ever, nor keep it from ending.
func TestSilentServer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	key := gittest.NewKey(t, filepath.Join(dir, "id"), "")
	host := l.Addr().String()
	gittest.WriteFile(t, filepath.Join(dir, "known"), knownhosts.Line([]string{knownhosts.Normalize(host)}, key)+"\n")
	m := start(t, Config{Store: dirStore(t), Repo: "ssh://git@" + host + "/x.git", SSHKey: filepath.Join(dir, "id"), KnownHosts: filepath.Join(dir, "known")})
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	m.stop()
	if took := time.Since(stopped); took > 5*time.Second {
		t.Errorf("it took %v to end", took)
	}
}

// A large object in the history is ignored. A unit's file that is too large is refused, is not fetched again and
// again, and does no other harm.
func TestLargeObjectsInTheHistory(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "big": strings.Repeat("x", 16<<20+1)})
	cache := t.TempDir()
	c := Config{Store: dirStore(t), Repo: h.URL, Every: 50 * time.Millisecond, CacheDir: cache,
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)}
	m := start(t, c)
	m.at(first)

	head := h.Push(map[string]string{"prod/web/app.yaml": strings.Repeat("x", 16<<20+1)})
	if s := m.refuses(head, "prod/web/app.yaml", "has more than"); s.Head != first {
		t.Errorf("the status is %+v", s)
	}
	pollsInVain(h, m)
	if left, _ := filepath.Glob(filepath.Join(cache, "*", "objects", "pack", "tmp_*")); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	put(t, m.store, "desired/prod/web/app", pointer("hand/1").String())
	m.runs("prod/web/app", "app/1")

	if s := m.at(h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})); s.Refused != "" {
		t.Errorf("the status is %+v", s)
	}
	if log := m.log.String(); strings.Contains(log, "fetching it again") {
		t.Error("the cache was fetched again")
	}
}
