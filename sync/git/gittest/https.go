package gittest

import (
	"bytes"
	"encoding/pem"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
)

// HTTPSOrigin serves a repository as Git hosts do: by git-http-backend behind TLS and basic authentication.
type HTTPSOrigin struct {
	*Origin
	URL, CAFile string
	Lists       atomic.Int64 // answers to ls-refs
	Fetches     atomic.Int64 // requests for a pack
	Away        atomic.Bool  // while set, every request is answered with 502
	// Half makes the server send the first 50,000 bytes of a pack, and then close the connection or, with Hang, send
	// nothing more.
	Half, Hang atomic.Bool
	// Front, if set, is called first unless Away, with the request's body, and reports whether it has answered.
	Front atomic.Pointer[func(w http.ResponseWriter, r *http.Request, asked []byte) bool]
	Conns atomic.Int64 // connections that were opened
}

// halfWriter passes on the first left bytes, and drops all that follow.
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

// ServeHTTPS serves o until the test ends, to user mirror with the password s3cret. tune may change the server.
func ServeHTTPS(t testing.TB, o *Origin, tune ...func(*httptest.Server)) *HTTPSOrigin {
	t.Helper()
	execPath := o.Git("", "--exec-path")
	backend := &cgi.Handler{
		Path: filepath.Join(execPath, "git-http-backend"),
		Dir:  filepath.Dir(o.Bare),
		Env:  append([]string{"GIT_PROJECT_ROOT=" + filepath.Dir(o.Bare), "GIT_HTTP_EXPORT_ALL=1"}, Env()...),
	}
	h := &HTTPSOrigin{Origin: o}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h.Away.Load() {
			http.Error(w, "bad gateway", http.StatusBadGateway)
			return
		}
		asked, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(asked))
		if front := h.Front.Load(); front != nil && (*front)(w, r, asked) {
			return
		}
		if user, password, _ := r.BasicAuth(); user != "mirror" || password != "s3cret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		if bytes.Contains(asked, []byte("command=ls-refs")) {
			h.Lists.Add(1)
		} else if strings.HasSuffix(r.URL.Path, "/git-upload-pack") {
			h.Fetches.Add(1)
			if h.Half.Load() {
				backend.ServeHTTP(&halfWriter{w, 50_000}, r)
				w.(http.Flusher).Flush()
				if h.Hang.Load() {
					<-r.Context().Done()
				}
				panic(http.ErrAbortHandler)
			}
		}
		backend.ServeHTTP(w, r)
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			h.Conns.Add(1)
		}
	}
	for _, f := range tune {
		f(server)
	}
	server.StartTLS()
	t.Cleanup(server.Close)
	h.URL = server.URL + "/" + filepath.Base(o.Bare)
	h.CAFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(h.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE",
		Bytes: server.Certificate().Raw}), 0o644); err != nil {
		t.Fatal(err)
	}
	return h
}
