package agent

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/sync/conns/connstest"
)

// Clients on other machines may read whether the node serves, but not what it runs, nor its metrics.
func TestStatusIsNotForEveryone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(withMetrics, allowEmpty, func(c *Config) { c.ListenStatus = "127.0.0.1:0" })
	for path, wants := range map[string][2]int{ // elsewhere, and at listen_status
		"/ready": {200, 200}, "/converged": {200, 200}, "/live": {200, 200}, "/status": {403, 200}, "/metrics": {403, 200},
	} {
		a.awaitReady()
		elsewhere := httptest.NewRecorder()
		a.handler(false).ServeHTTP(elsewhere, httptest.NewRequest("GET", path, nil))
		resp, err := http.Get("http://" + a.statusListener.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if elsewhere.Code != wants[0] || resp.StatusCode != wants[1] {
			t.Errorf("%s: %d and %d, want %v", path, elsewhere.Code, resp.StatusCode, wants)
		}
		if elsewhere.Code == 403 && !strings.Contains(elsewhere.Body.String(), "listen_status") {
			t.Errorf("%s: it isn't said where to ask: %s", path, elsewhere.Body)
		}
	}
	for ip, want := range map[string]bool{"127.0.0.1": true, "127.9.9.9": true, "::1": true, "0.0.0.0": false, "::": false, "10.0.0.7": false} {
		if got := onlyThisMachine(&net.TCPAddr{IP: net.ParseIP(ip)}); got != want {
			t.Errorf("%s is this machine's alone: %v", ip, got)
		}
	}
}

// Idle connections don't keep a load balancer out, and are bounded.
func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(allowEmpty, func(c *Config) { c.Listen, c.Metrics = "127.0.0.1:0", prometheus.NewRegistry() })
	a.awaitReady()
	connstest.Bounded(t, a.Addr(), maxConns, func() bool { a.awaitReady(); return true })
}

// pipes is a listener whose connections are pipes: they buffer nothing.
type pipes struct {
	conns chan net.Conn
	ended chan struct{}
}

func (p pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p pipes) Close() error   { close(p.ended); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// A client that never reads the answer, or never ends the request, holds a connection for a bounded time.
func TestHeldConnectionsEnd(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sent   string
		within time.Duration
	}{
		"reads nothing":       {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", writeTimeout},
		"no end of a header":  {"GET / HTTP/1.1\r\nHost: a\r\n", headerTimeout},
		"no end of a body":    {"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx", writeTimeout},
		"asks nothing at all": {"", headerTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				p := pipes{make(chan net.Conn), make(chan struct{})}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				var handled atomic.Bool
				wg.Go(func() {
					err := serveOn(ctx, p, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
						defer handled.Store(true)
						_, _ = io.Copy(io.Discard, r.Body)
						_, _ = w.Write(make([]byte, 1<<20))
					}))
					if err != nil {
						t.Error(err)
					}
				})
				near, far := net.Pipe()
				p.conns <- far
				began := time.Now()
				if _, err := near.Write([]byte(c.sent)); err != nil {
					t.Error(err)
				}
				time.Sleep(c.within + time.Second)
				synctest.Wait()
				if asked := strings.HasPrefix(name, "no end of a body") || name == "reads nothing"; asked && !handled.Load() {
					t.Errorf("the answer is under way still after %v", time.Since(began))
				}
				if _, err := io.Copy(io.Discard, near); err != nil { // until the other end is closed
					t.Error(err)
				}
				if took := time.Since(began); took > c.within+time.Second {
					t.Errorf("it was held for %v", took)
				}
				cancel()
				wg.Wait()
			})
		})
	}
}
