package consul_test

import (
	"errors"
	"testing"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

func TestNodeName(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	name := func(s kv.Store) (string, error) {
		t.Helper()
		n, ok := s.(kv.Namer)
		if !ok {
			t.Fatal("the store in Consul is no Namer")
		}
		return n.NodeName(t.Context())
	}
	want := c.Servers[0].Name
	if got, err := name(c.Open(c.Token(deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: "web", Node: want})))); err != nil || got != want {
		t.Errorf("by an agent's rules it is %q, %v, want %q", got, err, want)
	}
	if _, err := name(c.Open(c.Token(""))); !errors.Is(err, kv.ErrDenied) || errors.Is(err, kv.ErrTokenUnknown) {
		t.Errorf("without rights: %v", err)
	}
	if _, err := name(c.Open("5a1f0c1e-0000-4000-8000-000000000000")); !errors.Is(err, kv.ErrDenied) || !errors.Is(err, kv.ErrTokenUnknown) {
		t.Errorf("by a token that nobody knows: %v", err)
	}
	if _, err := name(open(t, consul.Config{Client: &api.Config{Address: "127.0.0.1:1"}})); !errors.Is(err, kv.ErrUnavailable) {
		t.Errorf("of one that isn't there: %v", err)
	}
	// It would name itself, and with it all nodes that ask it.
	for _, far := range []string{"192.0.2.1:8500", "https://consul.example.com", "http://[2001:db8::1]:8500", "localhost.example.com:8500"} {
		if got, err := name(open(t, consul.Config{Client: &api.Config{Address: far}})); err != nil || got != "" {
			t.Errorf("%s is asked for this node's name: %q, %v", far, got, err)
		}
	}
	for _, near := range []string{"127.0.0.1:1", "127.8.9.1:1", "http://localhost:1", "http://[::1]:1", "unix:///nowhere/consul.sock"} {
		if _, err := name(open(t, consul.Config{Client: &api.Config{Address: near}})); !errors.Is(err, kv.ErrUnavailable) {
			t.Errorf("%s: %v", near, err)
		}
	}
}
