package main

import (
	"cmp"

	"github.com/spf13/cobra"

	"kedge/deployments"
	"kedge/sync/fleet"
)

func (a *app) nodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "node NAME",
		Short: "All units of one node: what runs there, and what is wrong",
		Long: `Shows what a node runs in each of its roles, for how long, and what is wrong with it. Why it runs that is what
kedge explain NAME/UNIT says.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := deployments.CheckSegment("node", args[0]); err != nil {
				return usageError{err}
			}
			f, err := a.readToExplain(cmd.Context(), fleet.Filter{}, "UNIT")
			if err != nil {
				return err
			}
			of, err := fleet.UnitsOf(f, args[0])
			if err != nil {
				return notFound(f, err)
			}
			if a.json {
				return cmp.Or(a.printJSON(of), f.CheckComplete())
			}
			opt := fleet.TableOptions{Width: a.terminal(), Color: a.color()}
			return cmp.Or(fleet.WriteNode(a.stdout, f, of, opt), f.CheckComplete())
		},
	}
	a.jsonFlag(c, "the node")
	return a.completeArgs(c, wantNode)
}
