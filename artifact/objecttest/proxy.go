package objecttest

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"kedge/artifact/object"
)

// Proxy is a proxy before a Server that counts requests, and injects faults that no real server produces on demand.
// It ends with the test.
type Proxy struct {
	server   *Server
	direct   *object.Client
	proxy    *httptest.Server
	requests atomic.Int64
	sent     atomic.Int64
	ended    chan struct{}

	mu    sync.Mutex
	fault func(Request) Fault
	seen  map[string]int
}

// Request describes a request to a Proxy, by which the function given to Play chooses a fault.
type Request struct {
	Method string
	Key    string // the object's key; "" for a list
	Name   string // the part after the key's last slash
	N      int    // the number of earlier requests since Play with the same Method, Key and Probe
	From   int64  // the first requested byte
	Probe  bool   // only the first byte is requested, to see whether the object exists
}

// Fault handles a request in place of the server; next passes the request on to the server. A nil Fault means no
// fault.
type Fault func(w http.ResponseWriter, r *http.Request, next http.Handler)

// NewProxy starts a proxy without faults.
func NewProxy(tb testing.TB, server *Server) *Proxy {
	tb.Helper()
	upstream, err := url.Parse(server.Endpoint())
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{server: server, direct: server.Client(), ended: make(chan struct{}), seen: map[string]int{}}
	next := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { // the host stays, as it is signed
			r.Out.URL.Scheme, r.Out.URL.Host = upstream.Scheme, upstream.Host
		},
		FlushInterval: -1,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.proxy = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.requests.Add(1)
		w = &counted{w, &p.sent}
		if fault := p.choose(r); fault != nil {
			fault(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	}))
	tb.Cleanup(func() {
		close(p.ended)
		p.proxy.Close()
	})
	return p
}

func (p *Proxy) choose(r *http.Request) Fault {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == nil {
		return nil
	}
	key := strings.Trim(strings.TrimPrefix(r.URL.Path, "/"+bucket), "/")
	probe := r.Header.Get("Range") == "bytes=0-0"
	var from int64
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
	id := fmt.Sprint(r.Method, probe, key)
	request := Request{
		From:   from,
		Method: r.Method,
		Key:    key,
		Name:   key[strings.LastIndex(key, "/")+1:],
		N:      p.seen[id],
		Probe:  probe,
	}
	p.seen[id]++
	return p.fault(request)
}

// Play sets the function that chooses a fault for each request, and resets all counts. nil: no faults.
func (p *Proxy) Play(choose func(Request) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = choose
	clear(p.seen)
	p.requests.Store(0)
	p.sent.Store(0)
}

// Counted returns the number of requests since Play, and the bytes of the bodies sent.
func (p *Proxy) Counted() (requests, sent int64) { return p.requests.Load(), p.sent.Load() }

// Endpoint returns the proxy's URL.
func (p *Proxy) Endpoint() string { return p.proxy.URL }

// Client returns a client that reads and writes through the proxy. change edits its configuration.
func (p *Proxy) Client(change ...func(*object.Config)) *object.Client {
	c := p.server.config(p.Endpoint())
	for _, f := range change {
		f(&c)
	}
	return object.New(c)
}

// counted counts the bytes of a body.
type counted struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w *counted) Write(data []byte) (int, error) {
	n, err := w.ResponseWriter.Write(data)
	w.n.Add(int64(n))
	return n, err
}

func (w *counted) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Status answers as S3 does with this HTTP status: with an XML error of this code.
func Status(status int, code string) Fault {
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		if r.Method != http.MethodHead {
			fmt.Fprintf(
				w,
				`<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>as the test wants</Message></Error>`,
				code,
			)
		}
	}
}

// SlowDown answers as S3 does when it throttles.
func SlowDown() Fault { return Status(http.StatusServiceUnavailable, "SlowDown") }

// Denied answers as S3 does when access is denied.
func Denied() Fault { return Status(http.StatusForbidden, "AccessDenied") }

// Cut closes the connection once it has sent as many bytes of the body as after says. A shorter body is sent whole.
func Cut(after int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&limited{w, after, func() { panic(http.ErrAbortHandler) }}, r)
	}
}

// Stall sends as many bytes of the body as after says, then nothing, and keeps the connection open. If after is
// negative, it never answers. A shorter body is sent whole.
func (p *Proxy) Stall(after int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		wait := func() {
			http.NewResponseController(w).Flush()
			select {
			case <-r.Context().Done():
			case <-p.ended:
			}
			panic(http.ErrAbortHandler)
		}
		if after < 0 {
			select {
			case <-r.Context().Done():
			case <-p.ended:
			}
			panic(http.ErrAbortHandler)
		}
		next.ServeHTTP(&limited{w, after, wait}, r)
	}
}

// Trickle sends the body one byte at a time, and waits for the duration every before each.
func (p *Proxy) Trickle(every time.Duration) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&trickling{w, r, p, every}, r)
	}
}

type trickling struct {
	http.ResponseWriter
	r     *http.Request
	p     *Proxy
	every time.Duration
}

func (w *trickling) Write(data []byte) (int, error) {
	for i := range data {
		select {
		case <-time.After(w.every):
		case <-w.r.Context().Done():
			panic(http.ErrAbortHandler)
		case <-w.p.ended:
			panic(http.ErrAbortHandler)
		}
		if _, err := w.ResponseWriter.Write(data[i : i+1]); err != nil {
			return i, err
		}
		http.NewResponseController(w.ResponseWriter).Flush()
	}
	return len(data), nil
}

// limited passes on the first bytes of a body, and then calls end.
type limited struct {
	http.ResponseWriter
	left int64
	end  func()
}

func (w *limited) Write(data []byte) (int, error) {
	if int64(len(data)) < w.left {
		w.left -= int64(len(data))
		return w.ResponseWriter.Write(data)
	}
	w.ResponseWriter.Write(data[:w.left])
	w.left = 0
	http.NewResponseController(w.ResponseWriter).Flush()
	w.end()
	return 0, http.ErrAbortHandler
}

func (w *limited) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Flip changes the byte at position at of the object, in every answer that contains it. A negative position counts
// from the end of what is sent.
func Flip(at int64) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		next.ServeHTTP(&flipping{ResponseWriter: w, at: at}, r)
	}
}

type flipping struct {
	http.ResponseWriter
	at int64 // in the body
}

func (w *flipping) WriteHeader(status int) {
	var from int64
	fmt.Sscanf(w.Header().Get("Content-Range"), "bytes %d-", &from)
	if w.at < 0 {
		length, _ := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64)
		w.at += length
	} else {
		w.at -= from
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *flipping) Write(data []byte) (int, error) {
	at := w.at
	w.at -= int64(len(data))
	if at < 0 || at >= int64(len(data)) {
		if at < 0 {
			w.at = -1
		}
		return w.ResponseWriter.Write(data)
	}
	changed := append([]byte(nil), data...)
	changed[at] ^= 0x20
	return w.ResponseWriter.Write(changed)
}

func (w *flipping) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WithoutRange answers every request with the whole object, as a server without support of Range does.
func (p *Proxy) WithoutRange() Fault {
	return p.instead(func(data []byte) []byte { return data })
}

// Resized answers as if the object were longer by this many bytes, which are zero; if negative, shorter.
func (p *Proxy) Resized(by int) Fault {
	return p.instead(func(data []byte) []byte {
		if by > 0 {
			return append(data, make([]byte, by)...)
		}
		return data[:max(0, len(data)+by)]
	})
}

// instead returns a Fault that answers with the whole object, changed by change.
func (p *Proxy) instead(change func([]byte) []byte) Fault {
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		data, err := os.ReadFile(
			filepath.Join(p.server.Dir(), filepath.FromSlash(strings.TrimPrefix(r.URL.Path, "/"+bucket))),
		)
		if err != nil {
			next.ServeHTTP(w, r)
			return
		}
		o, err := p.direct.Stat(r.Context(), p.server.URL(strings.TrimPrefix(r.URL.Path, "/"+bucket+"/")))
		if err != nil {
			w.WriteHeader(http.StatusBadGateway)
			return
		}
		data = change(data)
		w.Header().Set("ETag", o.ETag)
		w.Header().Set("Content-Length", strconv.Itoa(len(data)))
		w.Write(data)
	}
}
