package consul_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

func TestMaintenance(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	vars := deployments.RuleVars{Stage: "prod", Role: "web", Node: c.Servers[0].Name}
	agent := deployments.ConsulRules("agent", vars)
	open := func(rules string) kv.Maintainer {
		m, ok := c.Open(c.Token(rules)).(kv.Maintainer)
		if !ok {
			t.Fatal("the store in Consul is no Maintainer")
		}
		return m
	}
	node := open(agent + deployments.ConsulRules("maintenance", vars))
	client := c.Client()
	reason := func() string {
		t.Helper()
		checks, err := client.Agent().Checks()
		if err != nil {
			t.Fatal(err)
		}
		if check, ok := checks["_node_maintenance"]; ok {
			return check.Notes
		}
		return ""
	}
	turn := func(on bool, why string) {
		t.Helper()
		if err := node.SetMaintenance(t.Context(), on, why); err != nil {
			t.Fatal(err)
		}
	}

	turn(true, "kedge deploys prod/web/app")
	turn(true, "kedge deploys prod/web/app")
	if got := reason(); got != "kedge deploys prod/web/app" {
		t.Errorf("in maintenance mode for the reason %q", got)
	}
	turn(false, "")
	turn(false, "")
	if got := reason(); got != "" {
		t.Errorf("still in maintenance mode, for the reason %q", got)
	}

	if err := client.Agent().EnableNodeMaintenance("a new disk"); err != nil {
		t.Fatal(err)
	}
	turn(true, "kedge deploys prod/web/app")
	turn(false, "")
	if got := reason(); got != "a new disk" {
		t.Errorf("an operator's maintenance is now for the reason %q", got)
	}
	if err := client.Agent().DisableNodeMaintenance(); err != nil {
		t.Fatal(err)
	}

	if err := open(agent).SetMaintenance(t.Context(), true, "kedge deploys prod/web/app"); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("without node:write: %v", err)
	}
}

// A Consul agent that takes the call and never answers must not keep an agent from stopping.
func TestMaintenanceEndsWithItsContext(t *testing.T) {
	t.Parallel()
	for _, on := range []bool{true, false} {
		ctx, cancel := context.WithCancel(t.Context())
		f := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch {
			case r.Method == http.MethodPut:
				io.Copy(io.Discard, r.Body) // only then is it noticed that the client goes
				cancel()
				<-r.Context().Done()
			case on:
				io.WriteString(w, "{}")
			default:
				io.WriteString(w, `{"_node_maintenance": {"CheckID": "_node_maintenance", "Notes": "kedge deploys prod/web/app"}}`)
			}
		}))
		t.Cleanup(f.Close)
		s := open(t, consul.Config{Client: &api.Config{Address: f.URL}})
		done := make(chan error, 1)
		go func() { done <- s.SetMaintenance(ctx, on, "kedge deploys prod/web/app") }()
		select {
		case err := <-done:
			if err == nil {
				t.Errorf("on %v: no error without an answer", on)
			}
		case <-time.After(20 * time.Second):
			f.CloseClientConnections()
			t.Fatalf("on %v: it waits for an answer after its end", on)
		}
	}
}
