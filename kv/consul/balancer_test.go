package consul_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// newBalancer stands before several Consul agents and gives each request to the next one that runs.
func newBalancer(t *testing.T, nodes []*kvtest.ConsulNode) *api.Config {
	t.Helper()
	var next atomic.Int64
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme = "http"
			for range nodes {
				n := nodes[int(next.Add(1))%len(nodes)]
				if r.Out.URL.Host = n.Addr; n.Running() {
					return
				}
			}
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	server := httptest.NewServer(proxy)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return &api.Config{Address: server.Listener.Addr().String()}
}

// Behind a balancer, the check that a lease hangs on is registered at one agent and beaten at another. The holder must
// notice, and hold the next one by its TTL alone.
func TestLeaseBehindBalancer(t *testing.T) {
	if testing.Short() {
		t.Skip("needs three Consul agents, and takes 20 s")
	}
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Clients: []string{"a", "b"}})
	folders(t, c, "mirror/", "desired/")
	s := open(t, consul.Config{Client: newBalancer(t, c.Clients)})
	const ttl, steady = 10 * time.Second, 12 * time.Second
	for lost := 0; ; lost++ {
		lease, err := s.Lease(t.Context(), "mirror/lease", "first", ttl)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-lease.Context().Done():
			if lost > 1 {
				t.Fatalf("the lease was lost %d times: %v", lost+1, context.Cause(lease.Context()))
			}
		case <-time.After(steady):
			if err := s.Commit(t.Context(), lease, kv.Put("desired/k", nil)); err != nil {
				t.Error(err)
			}
			if err := lease.Release(t.Context()); err != nil {
				t.Error(err)
			}
			return
		}
	}
}

// A node without a Consul agent of its own talks to the servers. The death of one of them says nothing of the node.
func TestPresenceOutlivesServer(t *testing.T) {
	if testing.Short() {
		t.Skip("needs three Consul servers")
	}
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3})
	folders(t, c, "status/prod/web/")
	// Its session is made at the first server, and then that server dies.
	nodes := slices.Clone(c.Servers)
	leader := c.Leader()
	slices.SortFunc(nodes, func(a, b *kvtest.ConsulNode) int { return map[bool]int{true: 1}[a == leader] })
	first := nodes[0]
	var current atomic.Pointer[kvtest.ConsulNode]
	current.Store(first)
	f := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", current.Load().Addr },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	})
	t.Cleanup(f.Close)
	t.Cleanup(f.CloseClientConnections)
	s := open(t, consul.Config{Client: &api.Config{Address: f.Listener.Addr().String()}})
	views := kvtest.Watch(t, nodes[1].Open(""), "status/prod/web/")
	kvtest.Present(t, s, "web-7")
	v := views.Await(t, "the entry", kvtest.Held("web-7=ready"))

	first.Kill()
	current.Store(nodes[2])
	kvtest.Await(t, "the servers notice the death", func() error {
		checks, _, err := nodes[1].Client("").Health().Node(first.Name, nil)
		if err == nil && checks.AggregatedStatus() != api.HealthCritical {
			err = fmt.Errorf("its health is %s", checks.AggregatedStatus())
		}
		return err
	})
	info, _, err := nodes[1].Client("").Session().Info(v.Entries[0].Session, &api.QueryOptions{RequireConsistent: true})
	if err != nil || info == nil {
		t.Fatalf("the session went with the server: %+v, %v", info, err)
	}
	views.Never(t, "the node was taken for dead", func(v kv.View) bool { return len(v.Entries) == 1 && v.Entries[0].Session == "" })
}

// An agent that was killed on a node that lives is gone, unless another is there in time.
func TestPresenceDiesWithProcess(t *testing.T) {
	if testing.Short() {
		t.Skip("needs a Consul server, and takes 40 s")
	}
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	folders(t, c, "status/prod/web/")
	views := kvtest.Watch(t, c.Open(""), "status/prod/web/")
	name := c.Servers[0].Name
	gone := func(v kv.View) bool { return len(v.Entries) == 1 && v.Entries[0].Session == "" }

	child := kvtest.StartChild(t, "presence", c.Addr(), name)
	child.Expect(t, "held")
	v := views.Await(t, "the entry", kvtest.Held(name+"=ready"))
	child.Signal(t, syscall.SIGKILL)
	again := kvtest.StartChild(t, "presence", c.Addr(), name)
	again.Expect(t, "held")
	views.Await(t, "the entry of the next process", func(now kv.View) bool {
		return kvtest.Held(name+"=ready")(now) && now.Entries[0].Session != v.Entries[0].Session
	})
	kvtest.Await(t, "the end of what the killed one left", func() error {
		info, _, err := c.Client().Session().Info(v.Entries[0].Session, nil)
		if err == nil && info != nil {
			err = fmt.Errorf("there is %+v", info)
		}
		return err
	})
	views.Never(t, "a restart looked like a death", gone)

	again.Signal(t, syscall.SIGKILL)
	killed := time.Now()
	views.Await(t, "the death of an agent that nobody starts again", gone)
	if took := time.Since(killed); took < 20*time.Second {
		t.Errorf("it was gone after %v: an agent that restarts would be missed", took)
	}
}
