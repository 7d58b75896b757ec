package kv_test

import (
	"errors"
	"testing"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
)

func TestConsulMaintenance(t *testing.T) {
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
		if err := node.Maintain(t.Context(), on, why); err != nil {
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

	if err := open(agent).Maintain(t.Context(), true, "kedge deploys prod/web/app"); !errors.Is(err, kv.ErrDenied) {
		t.Errorf("without node:write: %v", err)
	}
}
