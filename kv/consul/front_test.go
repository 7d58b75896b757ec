package consul_test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/kv/kvtest"
)

// front stands before a real Consul and makes the faults that it doesn't make on demand.
type front struct {
	addr string

	mu sync.Mutex
	// answer, if set, may answer a request itself; false passes it on.
	answer func(http.ResponseWriter, *http.Request) bool
	// rewrite, if set, may change Consul's answer.
	rewrite func(*http.Response)
	seen    []*http.Request
}

func newFront(t *testing.T, c *kvtest.Consul) *front {
	t.Helper()
	f := &front{}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: c.Addr()})
	proxy.ModifyResponse = func(r *http.Response) error {
		f.mu.Lock()
		rewrite := f.rewrite
		f.mu.Unlock()
		if rewrite != nil {
			rewrite(r)
		}
		return nil
	}
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.seen = append(f.seen, r)
		answer := f.answer
		f.mu.Unlock()
		if answer == nil || !answer(w, r) {
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	f.addr = server.Listener.Addr().String()
	return f
}

func (f *front) config(token string) *api.Config { return &api.Config{Address: f.addr, Token: token} }

func (f *front) setAnswer(answer func(http.ResponseWriter, *http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answer = answer
}

func (f *front) setRewrite(rewrite func(*http.Response)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rewrite = rewrite
}

// requests gives those since the last call.
func (f *front) requests() []*http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	seen := f.seen
	f.seen = nil
	return seen
}

func status(code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool {
		http.Error(w, "made by the test", code)
		return true
	}
}

func isStale(r *http.Request) bool { return r.URL.Query().Has("stale") }
