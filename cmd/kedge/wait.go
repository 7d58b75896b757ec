package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/deployments/safetext"
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
		Short: "Wait until the fleet has converged, or until this node serves",
		Long: `Waits until all live nodes of the units named run what they should: for CI after a push, with
--commit, and for people. With --ready it waits until this node's agent says that the node serves, whatever release,
and needs no store: for cloud-init and for scripts on the node. Of the other flags only --timeout and --json count
then.

  kedge wait prod/web --commit $(git rev-parse HEAD) --timeout 10m
  kedge wait --ready 127.0.0.1:7070

It prints what is still missing, whenever that changes, unless --progress=false is given; --post-receive always
does. As a hook of the repo that people push to, it shows them the rollout that they began until it ends, and
nothing of units that they left alone; interrupting it stops only the watching. Put this in hooks/post-receive:

  #!/bin/sh
  exec kedge wait --post-receive --timeout 30m

Exit code 0 when converged, 3 when the time is over, 1 when waiting can't help: the mirror or a node refused the
release, it was rolled back, or Git has no such unit (it says which and why); also when the store was out of reach
for longer than --patience, and when it was interrupted.`,
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
			began := time.Now()
			if ready != "" {
				return a.printWaitOutcome("", began, waitReady(ctx, ready))
			}
			filter, err := filterOf(args)
			if err != nil {
				return err
			}
			store, err := a.openExisting()
			if err != nil {
				return err
			}
			defer store.Close()
			var printProgress func(string)
			if postReceive {
				commit, err = git.Pushed(a.stdin, envOr("KEDGE_BRANCH", "main"))
				switch {
				case err != nil:
					return a.printWaitOutcome("", began, err)
				case commit == "" && a.json:
					return a.printJSON(WaitOutcome{Outcome: "nothing-pushed"})
				case commit == "":
					return nil
				}
			}
			if progress || postReceive {
				printProgress = func(missing string) { a.printMessage("%4ds  %s", int(time.Since(began).Seconds()), missing) }
			}
			done := "all nodes run what they should"
			if postReceive {
				done = "all nodes run what was pushed"
			}
			err = fleet.Wait(ctx, store, filter,
				fleet.WaitOptions{Commit: commit, Push: postReceive, Patience: patience, Progress: printProgress})
			if err == nil && printProgress != nil {
				printProgress(done)
			}
			if err != nil {
				err = a.waitError(cmd.Context(), ctx, store, filter, timeout, err)
			}
			return a.printWaitOutcome(commit, began, err)
		},
	}
	f := c.Flags()
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "give up after this long")
	f.StringVar(&commit, "commit", "", "wait until the mirror has taken this commit, or one after it, as well")
	f.BoolVar(&progress, "progress", true, "print what is missing, as it changes")
	f.DurationVar(&patience, "patience", 30*time.Second,
		"give up when the store is out of reach for this long; 0: only when --timeout is over")
	f.BoolVar(
		&postReceive,
		"post-receive",
		false,
		"wait for the commit that was pushed, read from standard input as Git's hook gets it (branch: $KEDGE_BRANCH, or main)",
	)
	f.StringVar(&ready, "ready", "", "`address` of this node's agent (its --listen): wait until /ready says 200")
	a.jsonFlag(c, "how it ended")
	return a.completeArgs(c, wantPart)
}

// waitError adds to err, with which a wait in ctx ended, whether the wait timed out or was interrupted, and a hint if
// there is one. It leaves a refusal unchanged. outer is the command's context, which has no timeout.
func (a *app) waitError(
	outer, ctx context.Context, store kv.Store, filter fleet.Filter, timeout time.Duration, err error,
) error {
	switch {
	case context.Cause(ctx) == errNotConverged:
		err = fmt.Errorf("%w: after %s, %w", errNotConverged, timeout, err)
	case errors.Is(err, context.Canceled):
		err = fmt.Errorf("interrupted: %w", err)
	case errors.Is(err, kv.ErrUnavailable):
		hint := "to wait through a longer outage: a longer --patience, or 0 to wait until --timeout"
		return hintError{err, strings.TrimSpace(a.storeHint(err) + "\n" + hint)}
	case errors.Is(err, fleet.ErrRefused):
		return err
	}
	return withMissing(outer, store, filter, err)
}

// WaitOutcome is the JSON of kedge wait.
type WaitOutcome struct {
	// Outcome is converged, refused, timeout, unreachable, interrupted or failed. With --post-receive it is nothing-pushed
	// if the push left the branch as it was, or removed it.
	Outcome string `json:"outcome"`
	// Commit is the commit that was waited for; empty: none was given or pushed.
	Commit string `json:"commit,omitempty"`
	// Seconds is how long the wait took.
	Seconds float64 `json:"seconds"`
	// Message says in words why the wait ended: what was missing, why waiting longer would not help, or which error there
	// was. It is left out if Outcome is converged or nothing-pushed.
	Message string `json:"message,omitempty"`
}

// printWaitOutcome returns err, the error of a wait that began at began; nil: the wait succeeded. With --json it first
// prints the outcome.
func (a *app) printWaitOutcome(commit string, began time.Time, err error) error {
	if !a.json {
		return err
	}
	o := WaitOutcome{Outcome: "converged", Commit: commit, Seconds: time.Since(began).Round(time.Millisecond).Seconds()}
	if err != nil {
		o.Message = safetext.URLs(err.Error())
	}
	switch {
	case err == nil:
	case errors.Is(err, errNotConverged):
		o.Outcome = "timeout"
	case errors.Is(err, fleet.ErrRefused):
		o.Outcome = "refused"
	case errors.Is(err, kv.ErrUnavailable):
		o.Outcome = "unreachable"
	case errors.Is(err, context.Canceled):
		o.Outcome = "interrupted"
	default:
		o.Outcome = "failed"
	}
	return errors.Join(a.printJSON(o), err)
}

// withMissing returns err, with a hint if the store doesn't know what filter names. The hint says so, and names
// something similar if there is any.
func withMissing(ctx context.Context, store kv.Store, filter fleet.Filter, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	f, readErr := fleet.Read(ctx, store, filter)
	if readErr != nil {
		return err
	}
	if missing := fleet.CheckSelected(ctx, store, f, filter); missing != nil {
		return hintError{err, missing.Error()}
	}
	return err
}

// waitReady requests an agent's /ready every 250 ms until it answers 200. If ctx ends first, the error says what came
// last, and wraps errNotConverged if that is ctx's cause.
func waitReady(ctx context.Context, address string) error {
	last := "the agent at " + address + " has not answered yet"
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
			last = "the agent answers " + response.Status + ": see why with curl http://" + address + "/ready"
		} else if ctx.Err() == nil {
			last = err.Error()
		}
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); cause == errNotConverged {
				return fmt.Errorf("%w: %s", cause, last)
			}
			return fmt.Errorf("interrupted: %w: %s", ctx.Err(), last)
		case <-time.After(250 * time.Millisecond):
		}
	}
}
