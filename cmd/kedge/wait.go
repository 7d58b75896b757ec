package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/kv"
	"kedge/sync/fleet"
	"kedge/sync/git"
)

func (a *app) waitCommand() *cobra.Command {
	var timeout, patience time.Duration
	var commit, ready string
	var progress, postReceive bool
	c := &cobra.Command{
		Use:   "wait [STAGE[/ROLE[/UNIT]]]",
		Short: "Wait until the fleet, or this node, has converged",
		Long: `Waits until all live nodes of the units named run what they should: for CI after a push, with --commit, and for people.
With --ready it asks this node's agent instead, and needs no store: for cloud-init and for scripts on the node.

  kedge wait prod/web --commit $(git rev-parse HEAD) --timeout 10m
  kedge wait --ready 127.0.0.1:7070

It prints what is still missing, whenever that changes, unless --progress=false is given. As a hook of the repo that people push to, it shows them the
rollout that they began until it ends, and nothing of units that they left alone; to interrupt it stops the watching alone. Put this in hooks/post-receive:

  #!/bin/sh
  exec kedge wait --post-receive --timeout 30m

Exit code 0 when converged, 1 when a node refused its release (it says which and why) or the store was out of reach for longer
than --patience, 3 when the time is over.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if timeout <= 0 {
				return usagef("--timeout %s: want a time to wait, as in 10m", timeout)
			}
			if commit != "" {
				if err := fleet.CheckCommit(commit); err != nil {
					return usageError{err}
				}
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, errNotConverged)
			defer cancel()
			if ready != "" {
				return waitReady(ctx, ready)
			}
			filter, err := filterOf(args)
			if err != nil {
				return err
			}
			store, err := a.quiet()
			if err != nil {
				return err
			}
			defer store.Close()
			var tell func(string)
			if postReceive {
				if commit, err = git.Pushed(a.stdin, envOr("KEDGE_BRANCH", "main")); err != nil || commit == "" {
					return err
				}
			}
			if progress || postReceive {
				began := time.Now()
				tell = func(missing string) { a.tell("%4ds  %s", int(time.Since(began).Seconds()), missing) }
			}
			done := "all nodes run what they should"
			if postReceive {
				done = "all nodes run what was pushed"
			}
			err = fleet.Wait(
				ctx,
				store,
				filter,
				fleet.Waiting{Commit: commit, Push: postReceive, Patience: patience, Tell: tell},
			)
			if err == nil && tell != nil {
				tell(done)
			}
			switch {
			case err == nil:
				return nil
			case context.Cause(ctx) == errNotConverged:
				err = fmt.Errorf("%w: after %s, %w", errNotConverged, timeout, err)
			case errors.Is(err, context.Canceled):
				err = fmt.Errorf("interrupted: %w", err)
			case errors.Is(err, kv.ErrUnavailable):
				hint := "to wait through a longer outage: --patience 0 (for ever), or a longer time"
				return hintError{err, strings.TrimSpace(a.storeHint(err) + "\n" + hint)}
			case errors.Is(err, fleet.ErrRefused):
				return err
			}
			return withMissing(cmd.Context(), store, filter, err)
		},
	}
	f := c.Flags()
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "give up after this long")
	f.StringVar(&commit, "commit", "", "wait until the mirror has taken this commit, or one after it, as well")
	f.BoolVar(&progress, "progress", true, "print what is missing, as it changes")
	f.DurationVar(
		&patience,
		"patience",
		30*time.Second,
		"give up when the store is out of reach for this long; 0: only when --timeout is over",
	)
	f.BoolVar(
		&postReceive,
		"post-receive",
		false,
		"wait for the commit that was pushed, read from standard input as Git's hook gets it (branch: $KEDGE_BRANCH, or main)",
	)
	f.StringVar(&ready, "ready", "", "`address` of this node's agent (its --listen): wait until /ready says 200")
	return a.completeArgs(c, wantPart)
}

// withMissing adds to an error that the unit which was waited for isn't there, and which may have been meant.
func withMissing(ctx context.Context, store kv.Store, filter fleet.Filter, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	f, readErr := fleet.Read(ctx, store, filter)
	if readErr != nil {
		return err
	}
	if missing := fleet.Missing(ctx, store, f, filter); missing != nil {
		return hintError{err, missing.Error()}
	}
	return err
}

// waitReady asks an agent's /ready until it says 200.
func waitReady(ctx context.Context, address string) error {
	last := "the agent was not asked"
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/ready", nil)
		if err != nil {
			return usagef("--ready %q: %w", address, err)
		}
		response, err := http.DefaultClient.Do(request)
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
			last = "the agent says " + response.Status
		} else if ctx.Err() == nil {
			last = err.Error()
		}
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); cause == errNotConverged {
				return fmt.Errorf("%w: %s", cause, last)
			}
			return fmt.Errorf("interrupted: %s", last)
		case <-time.After(250 * time.Millisecond):
		}
	}
}
