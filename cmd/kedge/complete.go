package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

// completionTimeout bounds how long completion waits for the store.
const completionTimeout = 2 * time.Second

// wanted is the kind of name that an argument takes, for its completion.
type wanted int

const (
	wantUnit    wanted = iota
	wantPart           // a stage, a STAGE/ROLE, or a unit
	wantNode           // a node
	wantRelease        // a version of the unit that the first argument names, or hold
)

// completeArgs makes the shell complete a command's arguments from the store: the first with names of kind want[0], and
// so on. It completes --node, too, if the command has that flag. It returns c.
func (a *app) completeArgs(c *cobra.Command, want ...wanted) *cobra.Command {
	c.ValidArgsFunction = func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) >= len(want) {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return a.complete(cmd.Context(), want[len(args)], args, typed), cobra.ShellCompDirectiveNoFileComp
	}
	if c.Flags().Lookup("node") != nil {
		c.RegisterFlagCompletionFunc(
			"node",
			func(cmd *cobra.Command, args []string, typed string) ([]cobra.Completion, cobra.ShellCompDirective) {
				return a.complete(cmd.Context(), wantNode, args, typed), cobra.ShellCompDirectiveNoFileComp
			},
		)
	}
	return c
}

// complete returns the names of kind want that begin with what was typed. It returns none if the
// store can't be read within completionTimeout.
func (a *app) complete(ctx context.Context, want wanted, args []string, typed string) []string {
	if ctx == nil {
		ctx = context.Background()
	}
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	store, err := a.openExisting()
	if err != nil {
		return nil
	}
	defer store.Close()
	var names []string
	for _, name := range a.completions(ctx, store, want, args) {
		value, _, _ := strings.Cut(name, "\t")
		if strings.HasPrefix(value, typed) {
			names = append(names, name)
		}
	}
	return names
}

func (a *app) completions(ctx context.Context, store kv.Store, want wanted, args []string) (names []string) {
	if want == wantRelease {
		id, err := deployments.ParseUnitID(args[0])
		if err != nil {
			return nil
		}
		releases, err := fleet.Releases(ctx, store, id)
		if err != nil {
			return nil
		}
		for _, r := range releases {
			names = append(names, r.Version+"\t"+r.Pointer.Digest.Short())
		}
		return append(names, "hold\tkeep what runs")
	}
	f, err := fleet.Read(ctx, store, fleet.Filter{})
	if err != nil {
		return nil
	}
	units, nodes := fleet.Names(f)
	switch want {
	case wantNode:
		return nodes
	case wantPart:
		for _, unit := range units {
			stage, _, _ := strings.Cut(unit, "/")
			names = append(names, stage, unit[:strings.LastIndex(unit, "/")], unit)
		}
		slices.Sort(names)
		return slices.Compact(names)
	}
	return units
}

// completeFlagValues makes the shell complete a flag's value from the fixed list all.
func completeFlagValues(c *cobra.Command, flag string, all ...string) {
	c.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(all, cobra.ShellCompDirectiveNoFileComp))
}
