package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

// balancer hands each TCP connection to the next Consul server that takes it, as a network load balancer does.
type balancer struct {
	addr  string
	mu    sync.Mutex
	used  int
	given map[string]int // connections that each server was given
}

func newBalancer(t *testing.T, servers []*kvtest.ConsulNode) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{addr: l.Addr().String(), given: map[string]int{}}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { b.join(ctx, client, servers) })
		}
	})
	return b
}

// join copies between a client and a server until one of them ends or ctx does.
func (b *balancer) join(ctx context.Context, client net.Conn, servers []*kvtest.ConsulNode) {
	defer client.Close()
	server := b.dial(servers)
	if server == nil {
		return
	}
	defer server.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, pair := range [][2]net.Conn{{client, server}, {server, client}} {
		go func() {
			io.Copy(pair[0], pair[1])
			cancel()
		}()
	}
	<-ctx.Done()
}

func (b *balancer) dial(servers []*kvtest.ConsulNode) net.Conn {
	for range servers {
		b.mu.Lock()
		s := servers[b.used%len(servers)]
		b.used++
		b.mu.Unlock()
		if conn, err := net.DialTimeout("tcp", s.Addr, time.Second); err == nil {
			b.mu.Lock()
			b.given[s.Name]++
			b.mu.Unlock()
			return conn
		}
	}
	return nil
}

// Mirror and agents reach three Consul servers through one TCP balancer, each with the shipped rules for its own keys.
// No node is taken for dead at rest; when the leader among the servers is killed, and Consul takes it out with the
// sessions that were made there, their nodes are back at once; the mirror's lease comes to rest; and a push arrives.
func TestServersBehindBalancer(t *testing.T) {
	t.Parallel()
	w := newWorldOn(t, kvtest.ConsulOptions{ACL: true, Servers: 3})
	b := newBalancer(t, w.consul.Servers)
	var sessions strings.Builder // one may be made at any of the servers
	for _, s := range w.consul.Servers {
		fmt.Fprintf(&sessions, "session %q { policy = \"write\" }\nagent %q { policy = \"read\" }\n", s.Name, s.Name)
	}
	env := func(party string, vars deployments.RuleVars) []string {
		token := w.consul.Token(deployments.ConsulRules(party, vars) + sessions.String())
		return []string{"CONSUL_HTTP_ADDR=" + b.addr, "CONSUL_HTTP_TOKEN=" + token}
	}
	v1, v2 := w.publish("app", "v1"), w.publish("app", "v2")
	w.release("first", v1)
	mirror := w.start("mirror", slices.Concat(env("mirror", deployments.RuleVars{Node: "git-1"}),
		[]string{"SSL_CERT_FILE=" + w.git.caFile}),
		"mirror", w.git.url, "--every", "300ms", "--lease-ttl", "10s", "--name", "mirror")
	nodes := []string{"web-1", "web-2"}
	for _, node := range nodes {
		w.start(node, slices.Concat(env("agent", deployments.RuleVars{Node: node, Stage: "prod", Role: "web"}),
			w.s3.Env(), []string{"SRV=" + w.srv(node)}),
			"agent", "--node", node, "--stage", "prod", "--roles", "web", "--state-dir", w.dir+"/"+node+"/state")
	}
	w.live("app", "v1", nodes...)

	// The test itself looks at a server that stays.
	leader := w.consul.Leader()
	stays := w.consul.Servers[slices.IndexFunc(w.consul.Servers, func(n *kvtest.ConsulNode) bool { return n != leader })]
	w.store = stays.Open(w.consul.RootToken)
	for _, node := range nodes {
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged {
				return "not converged"
			}
			return ""
		})
	}
	reports := kvtest.Watch(t, w.store, "status/prod/web/")
	allHeld := func(v kv.View) bool {
		return len(v.Entries) == 2 && v.Entries[0].Session != "" && v.Entries[1].Session != ""
	}
	reports.Await(t, "both reports, held", allHeld)
	const rest = 6 * time.Second // longer than a check may go without its heartbeat
	held, since, began := "", time.Now(), time.Now()
	leaseRests := func(alsoIf func() bool) {
		t.Helper()
		await(t, "the lease to come to rest", func() error {
			enough := alsoIf() // first, as the mirror says so before it takes the lease
			e, err := w.store.Get(t.Context(), kv.MirrorLease)
			if err != nil {
				return err
			}
			if e.Session != held {
				held, since = e.Session, time.Now()
			}
			if took := time.Since(since); held == "" || took < rest && !enough {
				return fmt.Errorf("it is held for %v only, by the session %q", took, held)
			}
			return nil
		})
		t.Logf("%v: the lease rests", time.Since(began).Round(time.Millisecond))
	}
	fellBack := func() bool { return strings.Contains(mirror.logged(), "several Consul agents") }
	leaseRests(fellBack)

	reports.Never(t, "a live node was taken for dead", func(v kv.View) bool {
		return v.Synced && v.Err == nil && !allHeld(v)
	})
	leader.Kill()
	killed := time.Now()
	w.release("second", v2)
	w.live("app", "v2", nodes...)
	t.Logf("the push arrived %v after the leader's death", time.Since(killed).Round(time.Millisecond))
	leaseRests(func() bool { return false })
	reports.Await(t, "both reports, held, without the server that led", allHeld)
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.given) != 3 {
		t.Errorf("not every server was used: %v", b.given)
	}
}
