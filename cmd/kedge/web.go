package main

import (
	"github.com/spf13/cobra"

	"kedge/sync/web"
)

func (a *app) webCommand() *cobra.Command {
	var c web.Config
	command := &cobra.Command{
		Use:   "web",
		Short: "The fleet in a browser, live and read-only",
		Long: `Serves what status, explain and history print as pages that follow the store: / all units, with what is
wrong first, /STAGE/ROLE those of a role, /STAGE/ROLE/UNIT one, with a map of its nodes,
/STAGE/ROLE/UNIT/NODE why a node runs what it runs, and
/-/overrides pins, orders and freezes. /-/fleet.json is what kedge status --json prints.

It changes nothing, and its token needs no more than the rules of kedge acl web. It asks nobody who they are:
to show it to other machines, put a proxy that asks for a login in front of it, and give the name that browsers
use: --host.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := a.logger()
			if err != nil {
				return err
			}
			if err := checkAddress(c.Listen); err != nil {
				return usagef("--listen %w", err)
			}
			store, err := a.open(log)
			if err != nil {
				return err
			}
			defer store.Close()
			c.Store, c.Log = store, log
			w, err := web.New(c)
			if err != nil {
				return err
			}
			a.printMessage("the fleet is at http://%s/", w.Addr())
			return w.Run(cmd.Context())
		},
	}
	f := command.Flags()
	f.StringVar(&c.Listen, "listen", "127.0.0.1:7080", "`address` to listen at")
	f.StringArrayVar(&c.Hosts, "host", nil,
		"`name` by which browsers may reach the dashboard, besides localhost and IP addresses: others are refused; "+
			"repeatable")
	f.StringVar(&c.CommitURL, "commit-url", "",
		"`address` of commits' pages, with {commit} in place of the hash: each commit is linked to its page")
	return command
}
