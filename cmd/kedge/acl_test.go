package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"kedge/deployments"
)

// kedge acl prints the rules that the package has, filled in; an agent's once a role.
func TestACL(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"agent", "--stage", "prod", "--roles", "web,db", "--node", "n1"},
			deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: "web", Node: "n1"}) + "\n" +
				deployments.ConsulRules("agent", deployments.RuleVars{Stage: "prod", Role: "db", Node: "n1"})},
		{[]string{"maintenance", "--node", "n1"}, deployments.ConsulRules("maintenance", deployments.RuleVars{Node: "n1"})},
		{[]string{"mirror", "--node", "n1"}, deployments.ConsulRules("mirror", deployments.RuleVars{Node: "n1"})},
		{[]string{"operator", "--prefix", "x/y"}, deployments.ConsulRules("operator", deployments.RuleVars{Prefix: "x/y/"})},
		{[]string{"web"}, deployments.ConsulRules("web", deployments.RuleVars{})},
	} {
		var out, trouble bytes.Buffer
		if code := run(append([]string{"acl"}, c.args...), nil, &out, &trouble); code != exitDone || out.String() != c.want {
			t.Errorf("acl %s: exit %d, %s\n%s\nwant\n%s", strings.Join(c.args, " "), code, &trouble, &out, c.want)
		}
	}
}

func TestVersionCommand(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	if code := run([]string{"version", "--json"}, nil, &out, &out); code != exitDone {
		t.Fatalf("exit %d: %s", code, &out)
	}
	var v struct {
		Version     string `json:"version"`
		FormatLevel int    `json:"format_level"`
	}
	if err := json.Unmarshal(out.Bytes(), &v); err != nil || v.Version == "" || v.FormatLevel != deployments.FormatLevel {
		t.Errorf("%s: %v", &out, err)
	}
}
