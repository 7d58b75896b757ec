package kvtest_test

import (
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv/kvtest"
)

func TestConsulCluster(t *testing.T) {
	t.Parallel()
	start := time.Now()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Servers: 3, Clients: []string{"web-1"}, ACL: true})
	t.Logf("three servers and a client after %v", time.Since(start))
	put := func(n *kvtest.ConsulNode, token, key string) error {
		_, err := n.Client(token).KV().Put(&api.KVPair{Key: key, Value: []byte("x")}, nil)
		return err
	}
	token := c.Token(`key_prefix "a/" { policy = "write" }`)
	if err := put(c.Clients[0], token, "a/1"); err != nil {
		t.Fatalf("write with the token's right: %v", err)
	}
	if err := put(c.Clients[0], token, "b/1"); err == nil {
		t.Fatal("the token could write what it has no right to")
	}
	old := c.Leader()
	old.Kill()
	if l := c.Leader(); l == old {
		t.Fatal("the dead server still leads")
	}
	old.Start()
	c.WaitReady()
	if err := put(old, token, "a/2"); err != nil {
		t.Fatalf("write at the server that came back: %v", err)
	}
}

func TestConsulSingle(t *testing.T) {
	t.Parallel()
	start := time.Now()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{})
	t.Logf("one server after %v", time.Since(start))
	snapshot := c.Snapshot()
	c.CLI("", "value\n", "kv", "put", "k", "-")
	if got := c.CLI("", "", "kv", "get", "k"); got != "value\n\n" {
		t.Fatalf("consul kv get says %q", got)
	}
	c.Restore(snapshot)
	if p, _, err := c.Client().KV().Get("k", nil); err != nil || p != nil {
		t.Fatalf("after the restore the key is %v, %v", p, err)
	}
}

func TestConsulRestart(t *testing.T) {
	t.Parallel()
	start := time.Now()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Persistent: true, ACL: true})
	t.Logf("one server on disk after %v", time.Since(start))
	c.CLI(c.RootToken, "", "kv", "put", "k", "v")
	c.Servers[0].Stop()
	c.Servers[0].Start()
	c.WaitReady()
	if got := c.CLI(c.RootToken, "", "kv", "get", "k"); got != "v\n" {
		t.Fatalf("consul kv get says %q", got)
	}
}
