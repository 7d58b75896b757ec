package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/fleet"
)

// An agent that was killed, and that nobody starts again, on a node whose Consul agent lives: it is seen to be gone,
// and the next release is neither stopped nor taken back for it.
func TestDeadAgentOnALivingNode(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and S3, and takes a minute")
	}
	t.Parallel()
	nodes := []string{"web-1", "web-2", "web-3"}
	w := newWorld(t, nodes...)
	w.startMirror("mirror-1")
	for _, node := range nodes {
		w.startAgent(node)
	}
	release := func(version string) deployments.Pointer {
		p := w.publish("app", version)
		file := fmt.Sprintf("release: %s\nrollout: {max_unavailable: 1, max_failures: 0, deadline: 20s}\n", p)
		w.push("release "+version, map[string]*string{webApp.String(): &file})
		return p
	}
	release("1")
	w.live("app", "1", nodes...)
	for _, node := range nodes {
		w.reported(node, "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged {
				return "it has not converged"
			}
			return ""
		})
	}

	w.processes["web-3"].kill()
	w.held(false, "web-3")
	out, errs, _ := w.kedge("status", "--json")
	var f fleet.Fleet
	if err := json.Unmarshal([]byte(out), &f); err != nil || len(f.Units) != 1 || f.Units[0].Gone != 1 || f.Units[0].Live != 2 {
		t.Errorf("status: %v, %s%s", err, out, errs)
	}

	two := release("2")
	w.live("app", "2", "web-1", "web-2")
	w.eventually("the rollout ends without it", func() error {
		e, err := w.store.Get(t.Context(), kv.DesiredKey(webApp))
		if err != nil {
			return err
		}
		r, err := deployments.ParseRecord(e.Value)
		if err == nil && (r.Rollout != nil || r.Stable != two) {
			err = fmt.Errorf("the record is %s", e.Value)
		}
		return err
	})
	w.startAgent("web-3")
	w.live("app", "2", "web-3")
}

// Nodes without a Consul agent of their own talk to the servers through one address. The death of the server that they
// talk to says nothing of them: nobody is gone, and a rollout goes on.
func TestDeadServerOfNodesWithoutConsulAgents(t *testing.T) {
	if testing.Short() {
		t.Skip("needs Consul and S3, and takes a minute")
	}
	t.Parallel()
	w := newWorldOn(t, kvtest.ConsulOptions{ACL: true, Servers: 3})
	leader := w.consul.Leader()
	spare := slices.DeleteFunc(slices.Clone(w.consul.Servers), func(n *kvtest.ConsulNode) bool { return n == leader })
	victim := spare[0]
	var behind atomic.Pointer[string]
	behind.Store(&victim.Addr)
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", *behind.Load() },
		ErrorHandler: func(rw http.ResponseWriter, _ *http.Request, _ error) { rw.WriteHeader(http.StatusBadGateway) },
	})
	t.Cleanup(front.Close)
	t.Cleanup(front.CloseClientConnections)
	w.store = leader.Open(w.consul.RootToken)
	mirror := w.consul.Token(`key_prefix "kedge/" { policy = "write" } session_prefix "" { policy = "write" } service "kedge-mirror" { policy = "write" }`)
	w.start("mirror-1", slices.Concat(leader.Env(mirror), []string{"SSL_CERT_FILE=" + w.git.caFile}),
		"mirror", w.git.url, "--every", "300ms", "--lease-ttl", "10s", "--name", "mirror-1")
	nodes := []string{"web-1", "web-2", "web-3"}
	agent := w.consul.Token(`key_prefix "kedge/" { policy = "read" } key_prefix "kedge/status/" { policy = "write" } session_prefix "" { policy = "write" }`)
	for _, node := range nodes {
		if err := os.MkdirAll(w.srv(node), 0o755); err != nil {
			t.Fatal(err)
		}
		env := slices.Concat([]string{"CONSUL_HTTP_ADDR=" + front.URL, "CONSUL_HTTP_TOKEN=" + agent}, w.s3.Env(), []string{"SRV=" + w.srv(node)})
		w.start(node, env, "agent", "--node", node, "--stage", "prod", "--roles", "web", "--state-dir", filepath.Join(w.dir, node, "state"))
	}
	release := func(version string) {
		p := w.publish("app", version)
		file := fmt.Sprintf("release: %s\nrollout: {canary: 1, bake: 1s, max_unavailable: 1, max_failures: 0}\n", p)
		w.push("release "+version, map[string]*string{webApp.String(): &file})
	}
	release("1")
	w.live("app", "1", nodes...)
	views := kvtest.Watch(t, w.store, "status/prod/web/")
	views.Await(t, "all are there", func(v kv.View) bool {
		return len(v.Entries) == 3 && !slices.ContainsFunc(v.Entries, func(e kv.Entry) bool { return e.Session == "" })
	})
	release("2")
	victim.Kill()
	behind.Store(&spare[1].Addr)
	w.live("app", "2", nodes...)
	takenOut := false
	w.eventually("the servers notice the death", func() error {
		checks, _, err := leader.Client(w.consul.RootToken).Health().Node(victim.Name, nil)
		takenOut = err == nil && len(checks) == 0
		if err == nil && !takenOut && checks.AggregatedStatus() != api.HealthCritical {
			err = fmt.Errorf("its health is %s", checks.AggregatedStatus())
		}
		return err
	})
	gone := func(v kv.View) bool {
		return slices.ContainsFunc(v.Entries, func(e kv.Entry) bool { return e.Session == "" })
	}
	// Autopilot may take a dead server out of the catalog within a second, and with it the sessions that were made there:
	// then the nodes make themselves others.
	views.Await(t, "all are there, or again", func(v kv.View) bool { return len(v.Entries) == 3 && !gone(v) })
	if takenOut {
		return
	}
	views.Never(t, "a node was taken for dead", func(v kv.View) bool {
		return gone(v)
	})
}
