package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"kedge/deployments"
)

// aclParties are the parties for which kedge acl prints Consul ACL rules.
var aclParties = []string{"agent", "bridge", "maintenance", "mirror", "operator", "web"}

func (a *app) aclCommand() *cobra.Command {
	var stage, node string
	var roles []string
	c := &cobra.Command{
		Use:   "acl agent|bridge|maintenance|mirror|operator|web",
		Short: "Print the Consul ACL rules that a party needs",
		Long: `Prints the rules of the least token that will do, to be made a policy:

  kedge acl agent --stage prod --roles web --node web-1 | consul acl policy create -name kedge-agent-web-1 -rules -
  kedge acl mirror --node git-1 | consul acl policy create -name kedge-mirror -rules -
  kedge acl operator | consul acl policy create -name kedge-operator -rules -

"bridge" is for kedge bridge. "maintenance" comes on top of "agent", for agents with --maintenance. "web" is for kedge web, and for people who only look.
--node is the name of the Consul node that the agent or the mirror talks to.`,
		Args:      cobra.ExactArgs(1),
		ValidArgs: aclParties,
		RunE: func(_ *cobra.Command, args []string) error {
			party := args[0]
			if !slices.Contains(aclParties, party) {
				return usagef("%q: want one of %s", party, strings.Join(aclParties, ", "))
			}
			prefix := a.keyPrefix()
			for part := range strings.SplitSeq(strings.TrimSuffix(prefix, "/"), "/") {
				if err := deployments.CheckSegment("prefix", part); err != nil {
					return usageError{fmt.Errorf("--prefix: %w", err)}
				}
			}
			need := map[string][]string{"agent": {"stage", "roles", "node"}, "maintenance": {"node"}, "mirror": {"node"}}[party]
			given := map[string][]string{"stage": {stage}, "roles": roles, "node": {node}}
			for _, flag := range need {
				if len(given[flag]) == 0 || given[flag][0] == "" {
					return usagef("the rules of %s need --%s", party, strings.Join(need, ", --"))
				}
				for _, value := range given[flag] {
					if err := deployments.CheckSegment(strings.TrimSuffix(flag, "s"), value); err != nil {
						return usageError{fmt.Errorf("--%s: %w", flag, err)}
					}
				}
			}
			if party != "agent" {
				roles = []string{""}
			}
			for i, role := range roles {
				rules := deployments.ConsulRules(party, deployments.RuleVars{Prefix: prefix, Stage: stage, Role: role, Node: node})
				if i > 0 {
					fmt.Fprintln(a.stdout)
				}
				fmt.Fprint(a.stdout, rules)
			}
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&stage, "stage", "", "the agent's stage")
	f.StringSliceVar(&roles, "roles", nil, "the agent's roles, separated by commas")
	f.StringVar(&node, "node", "", "the Consul node that the agent or the mirror talks to")
	return c
}
