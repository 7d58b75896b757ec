package mirror

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

// env makes Config.Env of pairs.
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

// httpsOrigin serves the repository as Git hosts do: git-http-backend behind TLS and basic auth.
type httpsOrigin struct {
	*origin
	url, caFile string
	lists       atomic.Int64 // ls-remotes answered
	fetches     atomic.Int64
	away        atomic.Bool
	// half makes it send half of a pack, and then end the connection, or with hang say no more.
	half, hang atomic.Bool
}

// pollsInVain waits for some polls of m's, none of which may fetch.
func (h *httpsOrigin) pollsInVain(m *running) {
	h.tb.Helper()
	listed, fetched := h.lists.Load(), h.fetches.Load()
	m.await("more polls", func() error {
		if h.lists.Load() < listed+5 {
			return errors.New("no polls")
		}
		return nil
	})
	if got := h.fetches.Load(); got != fetched {
		h.tb.Errorf("polls without a push fetched %d times", got-fetched)
	}
}

// halfWriter passes on the first bytes alone.
type halfWriter struct {
	http.ResponseWriter
	left int
}

func (w *halfWriter) Write(p []byte) (int, error) {
	n := min(w.left, len(p))
	w.left -= n
	if _, err := w.ResponseWriter.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

func serveHTTPS(t *testing.T, o *origin) *httpsOrigin {
	t.Helper()
	execPath := o.git("", "--exec-path")
	backend := &cgi.Handler{
		Path: filepath.Join(execPath, "git-http-backend"),
		Dir:  filepath.Dir(o.bare),
		Env:  append([]string{"GIT_PROJECT_ROOT=" + filepath.Dir(o.bare), "GIT_HTTP_EXPORT_ALL=1"}, gitEnv...),
	}
	h := &httpsOrigin{origin: o}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h.away.Load() {
			http.Error(w, "bad gateway", http.StatusBadGateway)
			return
		}
		if user, password, _ := r.BasicAuth(); user != "mirror" || password != "s3cret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		if strings.HasSuffix(r.URL.Path, "/info/refs") {
			h.lists.Add(1)
		}
		if strings.HasSuffix(r.URL.Path, "/git-upload-pack") {
			h.fetches.Add(1)
			if h.half.Load() {
				backend.ServeHTTP(&halfWriter{w, 50_000}, r)
				w.(http.Flusher).Flush()
				if h.hang.Load() {
					<-r.Context().Done()
				}
				panic(http.ErrAbortHandler)
			}
		}
		backend.ServeHTTP(w, r)
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	h.url = server.URL + "/" + filepath.Base(o.bare)
	h.caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(h.caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	return h
}

func TestHTTPS(t *testing.T) {
	t.Parallel()
	h := serveHTTPS(t, newOrigin(t))
	store := dirStore(t)
	tokenFile := filepath.Join(t.TempDir(), "token")
	writeFile(t, tokenFile, "wrong\n")
	cache := t.TempDir()
	c := Config{Store: store, Repo: h.url, Every: 100 * time.Millisecond, CacheDir: cache,
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN_FILE", tokenFile, "GIT_SSL_CAINFO", h.caFile)}
	m := start(t, c)
	m.status(func(s Status) bool { return strings.Contains(s.Error, "KEDGE_GIT_TOKEN") })
	writeFile(t, tokenFile, "s3cret\n") // read anew, without a restart
	m.status(func(s Status) bool { return strings.Contains(s.Error, "no such branch: main") })

	m.at(h.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	m.runs("prod/web/app", "app/1")
	for i := range 3 {
		m.at(h.push(map[string]string{"prod/web/app.yaml": unitFile(fmt.Sprint("app/1", i))}))
	}
	if got := h.fetches.Load(); got > 5 { // one a push, and one again at most for a push between list and fetch
		t.Errorf("%d fetches for 4 pushes", got)
	}
	h.pollsInVain(m)

	// Git goes away: what is there stays, and a mirror that starts now goes on from its cache.
	h.away.Store(true)
	m.status(func(s Status) bool { return strings.Contains(s.Error, "502") })
	m.stop()
	m = start(t, c)
	put(t, store, "desired/prod/web/app", pointer("hand/1").String())
	m.runs("prod/web/app", "app/12")
	h.away.Store(false)
	head := h.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.at(head)
	m.runs("prod/web/app", "app/2")
	if log := m.log.String(); strings.Contains(log, "s3cret") {
		t.Error("the token is in the log")
	}

	// A force push is judged against what was taken, though the host has forgotten it.
	h.git(h.work, "reset", "-q", "--hard", "HEAD~2")
	forced := h.commit(map[string]string{"prod/web/app.yaml": unitFile("evil/1"), "kedge.yaml": "allow_rewind: true\n"})
	h.git(h.work, "push", "-q", "-f", "origin", "HEAD:main")
	h.git(h.bare, "gc", "-q", "--prune=now")
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
	h := serveHTTPS(t, newOrigin(t))
	cache := t.TempDir()
	c := Config{Store: dirStore(t), Repo: h.url, Every: 100 * time.Millisecond, CacheDir: cache,
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.caFile)}
	m := start(t, c)
	m.at(h.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")}))
	m.stop()
	packs, err := filepath.Glob(filepath.Join(cache, cacheName, "objects", "pack", "*"))
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
	m.at(h.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	m.runs("prod/web/app", "app/2")
}

func TestCacheDoesNotGrowForEver(t *testing.T) {
	t.Parallel()
	h := serveHTTPS(t, newOrigin(t))
	head := h.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	cache := t.TempDir()
	if err := os.Mkdir(filepath.Join(cache, fetchPrefix+"cut-off"), 0o700); err != nil {
		t.Fatal(err)
	}
	a := access{caFile: h.caFile, env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")}
	r, err := newRemoteRepo(h.url, "main", time.Minute, a, cache, start(t, Config{Store: dirStore(t), Repo: h.bare}).c.Log)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := r.head(t.Context()); err != nil || got.String() != head {
		t.Fatalf("head %v, %v", got, err)
	}
	if other, err := newRemoteRepo("https://git.example.com/other.git", "main", time.Minute, a, cache, r.log); err != nil || other.cache != "" {
		t.Errorf("the cache of another repository is taken: %v, %v", other, err)
	}
	packs := filepath.Join(cache, cacheName, "objects", "pack")
	writeFile(t, filepath.Join(packs, "tmp_pack_1"), "half")
	if r, err = newRemoteRepo(h.url, "main", time.Minute, a, cache, r.log); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(packs, "tmp_*")); len(left) > 0 {
		t.Errorf("a start leaves %v", left)
	}
	for i := range maxPacks {
		writeFile(t, filepath.Join(packs, fmt.Sprintf("pack-%040d.pack", i)), "")
	}
	head = h.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	if got, err := r.head(t.Context()); err != nil || got.String() != head {
		t.Fatalf("head %v, %v", got, err)
	}
	if left, _ := filepath.Glob(filepath.Join(packs, "*.pack")); len(left) != 1 {
		t.Errorf("%d packs are left", len(left))
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "*")); len(left) != 1 {
		t.Errorf("the cache directory has %v", left)
	}
}

// A pack that comes in part leaves nothing behind that further tries would add to, and a server that stops in its middle is given up.
func TestHalfAPack(t *testing.T) {
	t.Parallel()
	h := serveHTTPS(t, newOrigin(t))
	head := h.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	cache := t.TempDir()
	a := access{caFile: h.caFile, env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")}
	r, err := newRemoteRepo(h.url, "main", time.Minute, a, cache, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	is := func(head string) {
		t.Helper()
		if got, err := r.head(t.Context()); err != nil || got.String() != head {
			t.Fatalf("head %v, %v; want %s", got, err, head)
		}
	}
	is(head)
	noise := make([]byte, 100_000)
	if _, err := rand.Read(noise); err != nil {
		t.Fatal(err)
	}
	next := h.push(map[string]string{"prod/web/app.yaml": unitFile("app/2"), "noise": string(noise)})
	h.half.Store(true)
	for _, hang := range []bool{false, true} {
		h.hang.Store(hang)
		r.stall = time.Second
		for range 2 {
			began := time.Now()
			if _, err := r.head(t.Context()); err == nil || hang && !errors.Is(err, errStalled) { // without hang a machine that is busy may stall as well
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
	if got, err := r.cached(); err != nil || got.String() != head {
		t.Errorf("meanwhile the cache has %v, %v", got, err)
	}
	h.half.Store(false)
	r.stall = stallTimeout
	is(next)
}

func TestCertificateIsChecked(t *testing.T) {
	t.Parallel()
	h := serveHTTPS(t, newOrigin(t))
	m := start(t, Config{Store: dirStore(t), Repo: h.url, Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret")})
	m.status(func(s Status) bool {
		return strings.Contains(s.Error, "x509") && strings.Contains(s.Error, "GIT_SSL_CAINFO")
	})
}

func TestAddressesThatAreRefused(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"https://ada:s3cret@git.example.com/deployments.git": "KEDGE_GIT_TOKEN",
		"ssh://ada:s3cret@git.example.com/deployments.git":   "use a key",
		"http://git.example.com/deployments.git":             "use https",
		"git://git.example.com/deployments.git":              "not one of",
		"":                                                   "needs a store and a repository",
	} {
		_, err := New(Config{Store: dirStore(t), Repo: address})
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", address, err)
		}
	}
	for address, local := range map[string]bool{
		"/srv/git/deployments.git": true, "deployments.git": true, "./a:b": true, "file:///srv/git": true,
		"git@git.example.com:deployments.git": false, "git.example.com:deployments.git": false, "git.example.com:/srv/git/x": false, "git@git.example.com:/srv/git/x": false, "ssh://git@git.example.com/x": false, "https://git.example.com/x": false,
	} {
		if _, got := localPath(address); got != local {
			t.Errorf("%s: local %v, want %v", address, got, local)
		}
	}
}

// sshOrigin is a repository behind a real sshd on a port of its own.
type sshOrigin struct {
	*origin
	url, host  string
	key, known string // files
	hostKey    ssh.PublicKey
	sshd       *exec.Cmd
}

func serveSSH(t *testing.T, o *origin) *sshOrigin {
	t.Helper()
	path, err := exec.LookPath("sshd")
	if err != nil {
		path = "/usr/sbin/sshd"
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("these tests need sshd (%v): .ci/tools installs it", err)
	}
	dir := t.TempDir()
	s := &sshOrigin{origin: o, key: filepath.Join(dir, "id"), known: filepath.Join(dir, "known_hosts")}
	s.hostKey = newKey(t, filepath.Join(dir, "host"), "")
	userKey := newKey(t, s.key, "")
	writeFile(t, filepath.Join(dir, "authorized_keys"), string(ssh.MarshalAuthorizedKey(userKey)))
	port := freePort(t)
	if os.Getuid() == 0 { // sshd wants it, and its package makes it only with the service
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "sshd_config"), fmt.Sprintf(`ListenAddress 127.0.0.1:%s
HostKey %[2]s/host
AuthorizedKeysFile %[2]s/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=*
`, port, dir))
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.sshd = exec.Command(path, "-D", "-e", "-f", filepath.Join(dir, "sshd_config"))
	s.sshd.Stderr = log
	if err := s.sshd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.sshd.Process.Kill()
		s.sshd.Wait()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("sshd: %s", text)
		}
	})
	s.host = "127.0.0.1:" + port
	await(t, 10*time.Second, "sshd", func() error {
		c, err := net.Dial("tcp", s.host)
		if err == nil {
			c.Close()
		}
		return err
	})
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	s.url = "ssh://" + me.Username + "@" + s.host + o.bare
	s.know(t, s.hostKey)
	return s
}

// know makes known_hosts name key as the server's.
func (s *sshOrigin) know(t *testing.T, key ssh.PublicKey) {
	writeFile(t, s.known, knownhosts.Line([]string{knownhosts.Normalize(s.host)}, key)+"\n")
}

func newKey(t *testing.T, file, passphrase string) ssh.PublicKey {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, "", []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestSSH(t *testing.T) {
	t.Parallel()
	s := serveSSH(t, newOrigin(t))
	store := dirStore(t)
	dir := t.TempDir()
	other := newKey(t, filepath.Join(dir, "other"), "")
	newKey(t, filepath.Join(dir, "locked"), "passphrase")
	writeFile(t, filepath.Join(dir, "empty"), "")
	s.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})

	fails := func(c Config, words ...string) {
		t.Helper()
		c.Store, c.Repo = dirStore(t), s.url
		m := start(t, c)
		m.status(func(st Status) bool {
			for _, w := range words {
				if !strings.Contains(st.Error, w) {
					return false
				}
			}
			return st.Head == ""
		})
		m.stop()
	}
	fails(Config{SSHKey: s.key, KnownHosts: filepath.Join(dir, "empty")}, "is not in", ssh.FingerprintSHA256(s.hostKey))
	fails(Config{SSHKey: filepath.Join(dir, "other"), KnownHosts: s.known}, "doesn't accept this key")
	fails(Config{SSHKey: filepath.Join(dir, "locked"), KnownHosts: s.known}, "has a passphrase")
	fails(Config{SSHKey: filepath.Join(dir, "missing"), KnownHosts: s.known}, "no such file")

	m := start(t, Config{Store: store, Repo: s.url, SSHKey: s.key, KnownHosts: s.known, Every: 200 * time.Millisecond})
	m.runs("prod/web/app", "app/1")
	m.at(s.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))

	// Another key than the one that is known: somebody may be in between.
	s.know(t, other)
	m.status(func(st Status) bool {
		return strings.Contains(st.Error, "is not the one in") && strings.Contains(st.Error, "listening in")
	})
	m.runs("prod/web/app", "app/2")
	s.know(t, s.hostKey)
	m.at(s.push(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
	m.runs("prod/web/app", "app/3")
}

// A server that takes connections and never says a word must not hang the mirror for ever, nor keep it from ending.
func TestSilentServer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	key := newKey(t, filepath.Join(dir, "id"), "")
	host := l.Addr().String()
	writeFile(t, filepath.Join(dir, "known"), knownhosts.Line([]string{knownhosts.Normalize(host)}, key)+"\n")
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
