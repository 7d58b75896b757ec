// Package kvtest helps tests of kedge's store. It starts real Consul servers, alone or as a cluster, with or without
// ACLs. It has the conformance suite that every store passes, and a store that fails on demand.
package kvtest

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments/tooltest"
	"kedge/kv"
	"kedge/kv/consul"
)

// startTimeout bounds each wait for a Consul, such as for the election of a leader on a busy machine.
const startTimeout = 60 * time.Second

// ConsulOptions describes a Consul to start. The zero value is one server without ACLs, in memory.
type ConsulOptions struct {
	// Servers is the number of servers in the cluster; 0: 1.
	Servers int
	// Clients are the names of nodes that run a client agent, as a fleet's machines do.
	Clients []string
	// ACL turns on ACLs that deny by default. Consul.RootToken may do everything, and Consul.Token creates other tokens.
	ACL bool
	// Persistent keeps the data of a lone server on disk, so that it can be restarted after Stop or Kill. The first
	// start then takes some 2 s longer. Servers of a cluster, and clients, can always be restarted.
	Persistent bool
	// Config is additional configuration for every node, in HCL.
	Config string
}

// Consul is a running Consul, which ends with the test.
type Consul struct {
	// RootToken is the bootstrap token, empty without ACLs.
	RootToken string
	Servers   []*ConsulNode
	Clients   []*ConsulNode

	tb testing.TB
}

// ConsulNode is one Consul process, a server or a client, on its own loopback address.
type ConsulNode struct {
	Name string
	// IP is the node's own address in 127.0.0.0/8.
	IP string
	// Addr is the HTTP API's address, IP:PORT, as in CONSUL_HTTP_ADDR. It stays the same after a restart.
	Addr string

	consul               *Consul
	dir                  string
	memory               bool
	serfPort, serverPort int

	mu   sync.Mutex
	proc *process
}

// StartConsul starts a Consul and returns once it has a leader and accepts writes. It ends with the test, even if
// the test's process is killed.
func StartConsul(tb testing.TB, o ConsulOptions) *Consul {
	tb.Helper()
	c := &Consul{tb: tb}
	if o.ACL {
		c.RootToken = newUUID()
	}
	servers := max(o.Servers, 1)
	memory := servers == 1 && !o.Persistent
	for i := range servers {
		c.Servers = append(c.Servers, c.newNode(fmt.Sprintf("server-%d", i+1), memory))
	}
	for _, name := range o.Clients {
		c.Clients = append(c.Clients, c.newNode(name, false))
	}
	var join []string
	for _, n := range c.Servers {
		join = append(join, fmt.Sprintf("%s:%d", n.IP, n.serfPort))
	}
	for i, n := range c.Nodes() {
		n.configure(o, i < servers, servers, join)
	}
	for _, n := range c.Nodes() {
		n.start()
	}
	c.WaitReady()
	return c
}

// Nodes returns the servers, then the clients.
func (c *Consul) Nodes() []*ConsulNode {
	return append(append([]*ConsulNode{}, c.Servers...), c.Clients...)
}

// Addr returns the HTTP address of the first server.
func (c *Consul) Addr() string { return c.Servers[0].Addr }

// Env returns the variables with which a kedge or consul process uses the first server with this token.
func (c *Consul) Env(token string) []string { return c.Servers[0].Env(token) }

// Env returns the variables with which a kedge or consul process uses the node with this token.
func (n *ConsulNode) Env(token string) []string {
	return []string{"CONSUL_HTTP_ADDR=" + n.Addr, "CONSUL_HTTP_TOKEN=" + token}
}

// Client returns Consul's own client for the first server, with the root token.
func (c *Consul) Client() *api.Client { return c.Servers[0].Client(c.RootToken) }

// Client returns Consul's own client for the node.
func (n *ConsulNode) Client(token string) *api.Client {
	client, err := api.NewClient(n.Config(token))
	if err != nil {
		n.consul.tb.Fatalf("make a consul client: %v", err)
	}
	return client
}

// Config returns the client configuration for the node and a token, for consul.Config.Client.
func (n *ConsulNode) Config(token string) *api.Config {
	return &api.Config{Address: n.Addr, Token: token}
}

// Open opens a store on the first server, with the default prefix. It is closed when the test ends.
func (c *Consul) Open(token string) kv.Store { return c.Servers[0].Open(token) }

// Open opens a store on the node, with the default prefix. It is closed when the test ends.
func (n *ConsulNode) Open(token string) kv.Store {
	tb := n.consul.tb
	tb.Helper()
	s, err := consul.Open(consul.Config{Client: n.Config(token)})
	if err != nil {
		tb.Fatalf("open a store on %s: %v", n.Name, err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

// Token creates a token with only these ACL rules. On a busy machine the servers may elect another leader
// meanwhile, so creation is retried with another name, as the first try may have succeeded.
func (c *Consul) Token(rules string) (secret string) {
	c.tb.Helper()
	acl := c.Client().ACL()
	c.await("a token", func() error {
		policy, _, err := acl.PolicyCreate(&api.ACLPolicy{Name: "test-" + newUUID(), Rules: rules}, nil)
		if err != nil {
			return fmt.Errorf("create a policy: %w", err)
		}
		token, _, err := acl.TokenCreate(&api.ACLToken{Policies: []*api.ACLLink{{ID: policy.ID}}}, nil)
		if err != nil {
			return fmt.Errorf("create a token: %w", err)
		}
		secret = token.SecretID
		return nil
	})
	return secret
}

// RevokeToken deletes a token that Token created.
func (c *Consul) RevokeToken(token string) {
	c.tb.Helper()
	self, _, err := c.Client().ACL().TokenReadSelf(&api.QueryOptions{Token: token})
	if err != nil {
		c.tb.Fatalf("find the token to revoke: %v", err)
	}
	if _, err := c.Client().ACL().TokenDelete(self.AccessorID, nil); err != nil {
		c.tb.Fatalf("revoke a token: %v", err)
	}
}

// CLI runs the consul program on the first server, as an operator would, and returns its output. Errors fail the test.
func (c *Consul) CLI(token, stdin string, args ...string) string {
	c.tb.Helper()
	cmd := exec.Command(tooltest.Path(c.tb, "consul"), args...)
	cmd.Env = append(os.Environ(), c.Env(token)...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.tb.Fatalf("consul %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Leader waits for a leader and returns its node.
func (c *Consul) Leader() *ConsulNode {
	c.tb.Helper()
	var leader *ConsulNode
	c.await("a leader", func() error {
		for _, n := range c.Servers {
			if !n.Running() {
				continue
			}
			addr, err := n.Client(c.RootToken).Status().Leader()
			if err != nil {
				return err
			}
			for _, l := range c.Servers {
				if l.Running() && addr == fmt.Sprintf("%s:%d", l.IP, l.serverPort) {
					leader = l
					return nil
				}
			}
		}
		return errors.New("no running server leads")
	})
	return leader
}

// Snapshot saves the whole state.
func (c *Consul) Snapshot() []byte {
	c.tb.Helper()
	r, _, err := c.Client().Snapshot().Save(nil)
	if err != nil {
		c.tb.Fatalf("save a snapshot: %v", err)
	}
	defer r.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(r); err != nil {
		c.tb.Fatalf("save a snapshot: %v", err)
	}
	return b.Bytes()
}

// Restore restores the state of a snapshot.
func (c *Consul) Restore(snapshot []byte) {
	c.tb.Helper()
	if err := c.Client().Snapshot().Restore(nil, bytes.NewReader(snapshot)); err != nil {
		c.tb.Fatalf("restore a snapshot: %v", err)
	}
}

// WaitReady returns once every running node answers, knows the leader, accepts a write and has a
// health check in the catalog.
func (c *Consul) WaitReady() {
	c.tb.Helper()
	for _, n := range c.Nodes() {
		if !n.Running() {
			continue
		}
		c.await(n.Name+" to be ready", func() error {
			const key = "kvtest-ready"
			client := n.Client(c.RootToken)
			if _, err := client.KV().Put(&api.KVPair{Key: key}, nil); err != nil {
				return err
			}
			if _, err := client.KV().Delete(key, nil); err != nil {
				return err
			}
			// Sessions are tied to the node's serfHealth check, which the leader creates when it sees the node
			// join.
			checks, _, err := client.Health().Node(n.Name, nil)
			if err == nil && len(checks) == 0 {
				err = errors.New("not in the catalog yet")
			}
			return err
		})
	}
}

func (c *Consul) await(what string, try func() error) {
	c.tb.Helper()
	deadline := time.Now().Add(startTimeout)
	for {
		err := try()
		if err == nil {
			return
		}
		for _, n := range c.Nodes() {
			if exit := n.exited(); exit != nil {
				c.tb.Fatalf("wait for %s: consul %s ended: %v\n%s", what, n.Name, exit, n.logTail())
			}
		}
		if time.Now().After(deadline) {
			c.tb.Fatalf("wait for %s: %v\n%s", what, err, c.Servers[0].logTail())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func newUUID() string {
	return fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", rand.Uint32(), rand.Uint32N(1<<16), rand.Uint32N(1<<12),
		rand.Uint32N(1<<12), rand.Uint64N(1<<48))
}

// Versions returns the ModifyIndex of every key that begins with prefix. If a key's index differs between two calls, or
// only one has it, the key was written or deleted meanwhile.
func (c *Consul) Versions(prefix string) map[string]uint64 {
	c.tb.Helper()
	pairs, _, err := c.Client().KV().List(prefix, nil)
	if err != nil {
		c.tb.Fatalf("list %s: %v", prefix, err)
	}
	versions := map[string]uint64{}
	for _, p := range pairs {
		versions[p.Key] = p.ModifyIndex
	}
	return versions
}
