package deployments

import (
	"embed"
	"fmt"
	"os"
	"strings"
)

//go:embed consul
var rules embed.FS

// RuleVars are the variables of Consul ACL rules.
type RuleVars struct {
	// Prefix is the prefix of all of kedge's keys; empty: kedge/.
	Prefix string
	// Stage and Role are an agent's. Other parties have none.
	Stage, Role string
	// Node is the name of the Consul node of an agent or a mirror: the one whose Consul agent it talks to. Other parties
	// have none.
	Node string
}

// ConsulRules returns the Consul ACL rules of a party, in HCL. The party is "agent", "bridge", "mirror", "operator",
// "web" or "maintenance". The last one's rules let an agent switch its node's maintenance mode, in addition to its own
// rules. ConsulRules panics for another party, and if a variable that the rules need is missing or isn't a valid part
// of a key. Without the panic, the rules would be about keys other than those meant.
func ConsulRules(party string, v RuleVars) string {
	file, err := rules.ReadFile("consul/" + party + ".hcl")
	if err != nil {
		panic(fmt.Sprintf("consul rules: no party %q: want agent, bridge, maintenance, mirror, operator or web", party))
	}
	if v.Prefix == "" {
		v.Prefix = "kedge/"
	}
	segment := func(what, s string) string {
		if err := CheckSegment(what, s); err != nil {
			panic(fmt.Sprintf("consul rules of the %s: %v", party, err))
		}
		return s
	}
	var text strings.Builder
	for line := range strings.Lines(string(file)) {
		if !strings.HasPrefix(line, "#") {
			text.WriteString(line)
		}
	}
	return strings.TrimLeft(os.Expand(text.String(), func(name string) string {
		switch name {
		case "prefix":
			for part := range strings.SplitSeq(strings.TrimSuffix(v.Prefix, "/"), "/") {
				segment("prefix", part)
			}
			return v.Prefix
		case "stage":
			return segment("stage", v.Stage)
		case "role":
			return segment("role", v.Role)
		case "node":
			return segment("node", v.Node)
		}
		panic(fmt.Sprintf("consul rules of the %s: no variable %q", party, name))
	}), "\n")
}
