package main

import (
	"context"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"kedge/cmd/kedge/demo"
	"kedge/kv"
	"kedge/sync/fleet"
)

func (a *app) demoCommand() *cobra.Command {
	var once bool
	var dir string
	c := &cobra.Command{
		Use:   "demo",
		Short: "The whole system on this machine, with nothing installed",
		Long: `Starts a deployments repo to push to, a mirror, and three agents as processes of their own, over a directory for the
store and another for releases. It shows the fleet live, and takes keys: push a release, promote it past its canary,
pin, unpin. Needs git. Ctrl-C ends it and removes what it made.

With --once it walks by itself through publish, push, a second release, a pin, an unpin, a node that boots late and a broken
release, prints each step with its time, and leaves nothing behind.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config := demo.Config{Dir: dir, Out: a.stdout, In: a.stdin, Color: a.color()}
			if a.terminal() > 0 {
				config.Screen = func(ctx context.Context, store kv.Store, draw func(io.Writer, *fleet.Fleet, int)) error {
					return a.watchOnScreen(ctx, store, fleet.Filter{}, draw)
				}
			}
			d, err := demo.New(cmd.Context(), config)
			if errors.Is(err, demo.ErrNoGit) {
				return hintError{err, "install git (apt-get install git) and run it again"}
			}
			if err != nil {
				return err
			}
			if once {
				err = d.Walk()
			} else {
				err = d.Live()
			}
			if errors.Is(err, demo.ErrNotConverged) {
				err = notInTime{err}
			}
			return errors.Join(err, d.Close())
		},
	}
	c.Flags().BoolVar(&once, "once", false, "walk through it by itself, then end")
	c.Flags().
		StringVar(&dir, "dir", "", "empty or missing `directory` to use, and keep (default: a temporary one, removed at the end)")
	return c
}
