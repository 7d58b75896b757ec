package git

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/sync/git/gittest"
)

// openHTTPS opens branch main of h, with further variables.
func openHTTPS(t *testing.T, h *gittest.HTTPSOrigin, more ...string) Branch {
	t.Helper()
	return openBranch(t, Config{Repo: h.URL, Branch: "main",
		Env: env(append(more, "KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)...)})
}

func openBranch(t *testing.T, c Config) Branch {
	t.Helper()
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Env == nil {
		c.Env = env()
	}
	b, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// reads loads the branch's head, which must be want.
func reads(t *testing.T, b Branch, want string) *Commit {
	t.Helper()
	head, err := b.Head(t.Context())
	if err != nil || head != want {
		t.Fatalf("head %s, %v; want %s", head, err, want)
	}
	in, err := b.Objects()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	c, err := in.Load(head, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// fails reads the branch's head, and wants an error with all of words.
func fails(t *testing.T, b Branch, what string, words ...string) error {
	t.Helper()
	_, err := b.Head(t.Context())
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v, without %q", what, err, w)
		}
	}
	if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "s3cret") ||
		len(err.Error()) > 1000) {
		t.Errorf("%s: it isn't one line of some hundred bytes, or tells the secret: %v", what, err)
	}
	return err
}

func front(h *gittest.HTTPSOrigin, f func(w http.ResponseWriter, r *http.Request, asked []byte) bool) {
	if f == nil {
		h.Front.Store(nil)
		return
	}
	h.Front.Store(&f)
}

// speaksV0 makes a server speak only protocol v0.
func speaksV0(_ http.ResponseWriter, r *http.Request, _ []byte) bool {
	r.Header.Del("Git-Protocol")
	return false
}

// Azure DevOps and AWS CodeCommit speak protocol v0, and refuse clients that don't request multi_ack.
func TestServerThatInsistsOnMultiAck(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	front(h, func(w http.ResponseWriter, r *http.Request, asked []byte) bool {
		r.Header.Del("Git-Protocol")
		first, _, _ := bytes.Cut(asked, []byte("\n"))
		if strings.HasSuffix(r.URL.Path, "/git-upload-pack") && !bytes.Contains(first, []byte(" multi_ack")) {
			http.Error(w, "TF401041: the client must support multi_ack", http.StatusBadRequest)
			return true
		}
		return false
	})
	b := openHTTPS(t, h)
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	reads(t, b, first)
	for i := range 3 {
		h.Push(map[string]string{"README.md": fmt.Sprint(i)})
	}
	last := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	if c := reads(t, b, last); c.Tree.Units[0].Release != pointer("app/2") || !strings.Contains(c.Past, first[:12]) {
		t.Errorf("after an incremental fetch: %+v", c)
	}
	h.Git(h.Work, "reset", "-q", "--hard", first)
	reads(t, b, h.ForcePush(map[string]string{"prod/web/app.yaml": unitFile("app/3")}))
}

func TestServersOwnWords(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	answer := func(status int, kind, text string) func(http.ResponseWriter, *http.Request, []byte) bool {
		return func(w http.ResponseWriter, _ *http.Request, _ []byte) bool {
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, text)
			return true
		}
	}
	b := openHTTPS(t, h)
	for what, c := range map[string]struct {
		status     int
		kind, text string
		words      []string
	}{
		"a bad request": {400, "text/plain", "TF401041:\n the client is\ttoo old\n",
			[]string{"status code 400: TF401041: the client is too old"}},
		"who are you": {401, "text/plain", "token s3cret has expired", []string{"token ... has expired",
			"KEDGE_GIT_TOKEN"}},
		"not for you": {403, "text/html", "<html><head><title>\nSSO\nrequired</title></head>",
			[]string{"403: SSO required", "KEDGE_GIT_TOKEN"}},
		"not there": {404, "text/plain", "Repository not found.", []string{"Repository not found.",
			"may these credentials read the repository?"}},
		"a page of a book": {502, "text/plain", strings.Repeat("words ", 10_000), []string{"502: words words"}},
		"a login page": {200, "text/html; charset=utf-8", "<!doctype html><title>Sign in</title>",
			[]string{"page for people", "Sign in", "login page"}},
		"an error line": {200, "application/x-git-upload-pack-advertisement",
			"001e# service=git-upload-pack\n00000022ERR the repository is archived", []string{"the repository is archived"}},
	} {
		front(h, answer(c.status, c.kind, c.text))
		fails(t, b, what, c.words...)
	}
	// The same if only the fetch fails.
	front(h, func(w http.ResponseWriter, r *http.Request, asked []byte) bool {
		return bytes.Contains(asked, []byte("want ")) && answer(400, "text/plain", "quota exceeded")(w, r, asked)
	})
	fails(t, b, "a fetch", "fetch from", "quota exceeded")
	front(h, nil)
	reads(t, b, head)
}

// A busy server is left alone for as long as it asks.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	asked := 0
	front(h, func(w http.ResponseWriter, _ *http.Request, _ []byte) bool {
		asked++
		w.Header().Set("Retry-After", "3600")
		http.Error(w, "slow down", http.StatusTooManyRequests)
		return true
	})
	b := openHTTPS(t, h)
	for range 3 {
		fails(t, b, "a busy server", "429: slow down")
	}
	if asked != 1 {
		t.Errorf("it was asked %d times", asked)
	}
	r := b.(*remoteRepo)
	const most = 15 * time.Minute
	if left := time.Until(r.putOff); left > most || left < most-time.Minute {
		t.Errorf("it is asked again in %v", left)
	}
	front(h, nil)
	r.putOff = time.Time{}
	reads(t, b, head)
}

// Polls use one connection, request only the one branch, and fetch nothing.
func TestPollsAreCheap(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	h.Refer(20_000, head)
	b := openHTTPS(t, h)
	reads(t, b, head)
	conns, lists, fetches := h.Conns.Load(), h.Lists.Load(), h.Fetches.Load()
	began := time.Now()
	for range 10 {
		reads(t, b, head)
	}
	t.Logf("a poll takes %v", time.Since(began)/10)
	if n := h.Conns.Load() - conns; n > 0 {
		t.Errorf("10 polls made %d connections", n)
	}
	if n := h.Lists.Load() - lists; n != 10 || h.Fetches.Load() != fetches {
		t.Errorf("10 polls asked for references %d times, and fetched %d times", n, h.Fetches.Load()-fetches)
	}
	if conns > 2 {
		t.Errorf("the first fetch took %d connections", conns)
	}
}

// Credentials stay with their host, whatever it answers.
func TestRedirects(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	h, other := gittest.ServeHTTPS(t, o), gittest.ServeHTTPS(t, o)
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	authorities := filepath.Join(t.TempDir(), "ca.pem")
	gittest.WriteFile(t, authorities, readFile(t, h.CAFile)+readFile(t, other.CAFile))
	plain := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(plain.Close)
	to := func(base string) func(http.ResponseWriter, *http.Request, []byte) bool {
		return func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
			http.Redirect(w, r, base+r.URL.RequestURI(), http.StatusMovedPermanently)
			return true
		}
	}
	b := openHTTPS(t, h, "GIT_SSL_CAINFO", authorities)
	front(h, to(plain.URL))
	fails(t, b, "to plain http", "plain http")
	front(h, to(strings.TrimSuffix(other.URL, "/"+filepath.Base(o.Bare))))
	fails(t, b, "to another host", "redirects to "+strings.Split(other.URL, "/")[2], "credentials aren't sent there")
	// Redirects within the host are followed.
	front(h, func(w http.ResponseWriter, r *http.Request, _ []byte) bool {
		if path, moved := strings.CutPrefix(r.URL.RequestURI(), "/old"); moved {
			http.Redirect(w, r, path, http.StatusMovedPermanently)
			return true
		}
		return false
	})
	moved := openBranch(t, Config{Repo: strings.Replace(h.URL, "/deployments.git", "/old/deployments.git", 1),
		Branch: "main",
		Env:    env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)})
	reads(t, moved, head)
	reads(t, moved, head)
}

// A server that requests a client certificate gets that of GIT_SSL_CERT, also after it was replaced.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	h := gittest.ServeHTTPS(t, gittest.New(t), func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, VerifyPeerCertificate: func(raw [][]byte,
			_ [][]*x509.Certificate) error {
			c, err := x509.ParseCertificate(raw[0])
			if err == nil && c.SerialNumber.Int64() != 2 {
				err = errors.New("revoked")
			}
			return err
		}}
	})
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	fails(t, openHTTPS(t, h), "without one", "tls: certificate required")
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	b := openHTTPS(t, h, "GIT_SSL_CERT", cert, "GIT_SSL_KEY", key)
	fails(t, b, "a file that isn't there", "GIT_SSL_CERT")
	clientCertificate(t, cert, key, 1)
	fails(t, b, "one that doesn't count", "tls: bad certificate")
	clientCertificate(t, cert, key, 2)
	reads(t, b, head)
}

func clientCertificate(t *testing.T, certFile, keyFile string, serial int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, certFile, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})))
	gittest.WriteFile(t, keyFile, string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw})))
}

// A large file besides the units does no harm, whether or not the server can leave it out.
func TestLargeForeignObjects(t *testing.T) {
	t.Parallel()
	for what, serve := range map[string]func(o *gittest.Origin) Branch{
		"https, with filters": func(o *gittest.Origin) Branch {
			o.Git(o.Bare, "config", "uploadpack.allowFilter", "true")
			return openHTTPS(t, gittest.ServeHTTPS(t, o))
		},
		"https":   func(o *gittest.Origin) Branch { return openHTTPS(t, gittest.ServeHTTPS(t, o)) },
		"ssh, v0": func(o *gittest.Origin) Branch { return openSSH(t, gittest.ServeSSH(t, o)) },
	} {
		t.Run(what, func(t *testing.T) {
			if testing.Short() && what != "https" {
				t.Skip("takes seconds: left out with -short")
			}
			t.Parallel()
			o := gittest.New(t)
			b := serve(o)
			// A file that grows beyond the bound, and shrinks again: large and small versions are deltas to one
			// another.
			for i, size := range []int{maxObject - 10, maxObject + 10, maxFile / 2} {
				o.Commit(map[string]string{"docs/film.mov": strings.Repeat("x", size) + fmt.Sprint(i)})
			}
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
			o.Git(o.Bare, "gc", "-q")
			reads(t, b, o.Git(o.Work, "rev-parse", "HEAD"))
			c := reads(t, b, o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2"),
				"docs/film.mov": strings.Repeat("y", maxObject+1)}))
			if c.Tree.Units[0].Release != pointer("app/2") {
				t.Errorf("units %+v", c.Tree.Units)
			}

			head := o.Push(map[string]string{"prod/web/app.yaml": strings.Repeat("x", maxObject+1)})
			if _, err := b.Head(t.Context()); err != nil {
				t.Fatal(err)
			}
			in, err := b.Objects()
			if err != nil {
				t.Fatal(err)
			}
			defer in.Close()
			if _, err := in.Load(
				head,
				nil,
			); !errors.As(err, new(*BadCommit)) ||
				!strings.Contains(err.Error(), "has more than") {
				t.Errorf("a unit's file that was left out: %v", err)
			}
		})
	}
}
