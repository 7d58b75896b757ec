package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
	"kedge/sync/mirror"
)

func (a *app) jsonFlag(c *cobra.Command, what string) {
	c.Flags().BoolVar(&a.json, "json", false, "print "+what+" as JSON")
}

func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// filterOf reads STAGE, STAGE/ROLE or STAGE/ROLE/UNIT.
func filterOf(args []string) (fleet.Filter, error) {
	if len(args) == 0 {
		return fleet.Filter{}, nil
	}
	parts := strings.Split(strings.Trim(args[0], "/"), "/")
	if len(parts) > 3 {
		return fleet.Filter{}, usagef("%q: want STAGE, STAGE/ROLE or STAGE/ROLE/UNIT", args[0])
	}
	for _, p := range parts {
		if err := deployments.CheckSegment("name", p); err != nil {
			return fleet.Filter{}, usageError{err}
		}
	}
	parts = append(parts, "", "")
	return fleet.Filter{Stage: parts[0], Role: parts[1], Unit: parts[2]}, nil
}

func (a *app) statusCommand() *cobra.Command {
	var watch, nodes bool
	c := &cobra.Command{
		Use:   "status [STAGE[/ROLE[/UNIT]]]",
		Short: "What every unit should run, and which nodes do",
		Long: `Shows each unit's target, its pin, how many nodes are converged, and which are not and why. A node that is gone (its Consul
session has ended) is counted on its own. Exit code 0, whatever it shows: see kedge wait for a check.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := filterOf(args)
			if err != nil {
				return err
			}
			store, err := a.quiet(cmd.Context())
			if err != nil {
				return err
			}
			defer store.Close()
			opt := fleet.TableOptions{Width: a.terminal(), Color: a.color(), Nodes: nodes}
			if !watch {
				f, err := fleet.Read(cmd.Context(), store, filter)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(f)
				}
				return fleet.WriteTable(a.stdout, f, opt)
			}
			err = fleet.Watch(cmd.Context(), store, filter, func(f *fleet.Fleet) {
				switch {
				case a.json:
					json.NewEncoder(a.stdout).Encode(f)
				case opt.Width > 0:
					opt.Width = a.terminal()
					var screen strings.Builder
					fleet.WriteTable(&screen, f, opt)
					fmt.Fprint(a.stdout, "\x1b[H\x1b[2J"+screen.String())
				default:
					fleet.WriteTable(a.stdout, f, opt)
				}
			})
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and show every change")
	c.Flags().BoolVarP(&nodes, "nodes", "n", false, "show every node, not only those that aren't converged")
	a.jsonFlag(c, "the fleet")
	return c
}

func (a *app) explainCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "explain STAGE/ROLE/UNIT NODE",
		Short: "Why a node runs what it runs, and what would change it",
		Long:  `Prints the whole chain that decides: pins, record, admission, quarantine; and what would unblock what is stuck.`,
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deployments.ParseUnitID(args[0])
			if err != nil {
				return usageError{err}
			}
			store, err := a.quiet(cmd.Context())
			if err != nil {
				return err
			}
			defer store.Close()
			f, err := fleet.Read(cmd.Context(), store, fleet.Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
			if err != nil {
				return err
			}
			decision, err := fleet.Explain(f, id, args[1])
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(decision)
			}
			return fleet.WriteExplain(a.stdout, f, id, args[1], decision, fleet.TableOptions{Width: a.terminal(), Color: a.color()})
		},
	}
	a.jsonFlag(c, "the decision")
	return c
}

func (a *app) historyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "history STAGE/ROLE/UNIT",
		Short: "What a unit's target was, by whom and since when",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deployments.ParseUnitID(args[0])
			if err != nil {
				return usageError{err}
			}
			store, err := a.quiet(cmd.Context())
			if err != nil {
				return err
			}
			defer store.Close()
			entries, err := fleet.History(cmd.Context(), store, id)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(entries)
			}
			return fleet.WriteHistory(a.stdout, entries, fleet.TableOptions{Width: a.terminal(), Color: a.color()})
		},
	}
	a.jsonFlag(c, "the history")
	return c
}

func (a *app) waitCommand() *cobra.Command {
	var timeout time.Duration
	var commit, ready string
	var progress, postReceive bool
	c := &cobra.Command{
		Use:   "wait [STAGE[/ROLE[/UNIT]]]",
		Short: "Wait until the fleet, or this node, has converged",
		Long: `Waits until all live nodes of the units named run what they should: for CI after a push, with --commit, and for people.
With --ready it asks this node's agent instead, and needs no store: for cloud-init and for scripts on the node.

  kedge wait prod/web --commit $(git rev-parse HEAD) --timeout 10m
  kedge wait --ready 127.0.0.1:7070

With --progress it prints what is still missing, whenever that changes. As a hook of the repo that people push to, it shows them the
rollout that they began until it ends; to interrupt it stops the watching alone. Put this in hooks/post-receive:

  #!/bin/sh
  exec kedge wait --post-receive --timeout 30m

Exit code 0 when converged, 1 when a node refused its release (it says which and why), 3 when the time is over.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, errNotConverged)
			defer cancel()
			if ready != "" {
				return waitReady(ctx, ready)
			}
			filter, err := filterOf(args)
			if err != nil {
				return err
			}
			store, err := a.quiet(ctx)
			if err != nil {
				return err
			}
			defer store.Close()
			var tell func(string)
			if postReceive {
				if commit, err = mirror.Pushed(a.stdin, envOr("KEDGE_BRANCH", "main")); err != nil || commit == "" {
					return err
				}
			}
			if progress || postReceive {
				began := time.Now()
				tell = func(missing string) { fmt.Fprintf(a.stderr, "%4ds  %s\n", int(time.Since(began).Seconds()), missing) }
			}
			err = fleet.Wait(ctx, store, filter, commit, tell)
			if err == nil && tell != nil {
				tell("all nodes run what they should")
			}
			if err != nil && context.Cause(ctx) == errNotConverged {
				return fmt.Errorf("%w: after %s, %w", errNotConverged, timeout, err)
			}
			return err
		},
	}
	f := c.Flags()
	f.DurationVar(&timeout, "timeout", 10*time.Minute, "give up after this long")
	f.StringVar(&commit, "commit", "", "wait until the mirror has taken this commit, or one after it, as well")
	f.BoolVar(&progress, "progress", false, "print what is missing, as it changes")
	f.BoolVar(&postReceive, "post-receive", false, "wait for the commit that was pushed, read from standard input as Git's hook gets it (branch: $KEDGE_BRANCH, or main)")
	f.StringVar(&ready, "ready", "", "`address` of this node's agent (its --listen): wait until /ready says 200")
	return c
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
			return fmt.Errorf("%w: %s", context.Cause(ctx), last)
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// operateCommands are what an operator does; each is a plain write of one key.
func (a *app) operateCommands() []*cobra.Command {
	commands := []*cobra.Command{a.pinCommand(), a.unpinCommand(), a.rollbackCommand()}
	for verb, short := range map[string]string{
		"promote": "Let a rollout go past its canary",
		"pause":   "Stop a rollout where it is",
		"resume":  "Let a paused rollout go on",
		"abort":   "Roll a rollout back, now",
		"retry":   "Try again a release that failed",
	} {
		commands = append(commands, &cobra.Command{
			Use:   verb + " STAGE/ROLE/UNIT",
			Short: short,
			Long:  fmt.Sprintf("%s. The same as: consul kv put %scontrol/STAGE/ROLE/UNIT %s", short, a.prefix, verb),
			Args:  cobra.ExactArgs(1),
			RunE: a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
				if err := fleet.Control(ctx, store, id, verb); err != nil {
					return err
				}
				fmt.Fprintf(a.stderr, "%s: asked the mirror to %s\n", id, verb)
				return nil
			}),
		})
	}
	return commands
}

// onUnit opens the store and reads the unit that the first argument names.
func (a *app) onUnit(f func(context.Context, kv.Store, deployments.UnitID) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		id, err := deployments.ParseUnitID(args[0])
		if err != nil {
			return usageError{err}
		}
		store, err := a.quiet(cmd.Context())
		if err != nil {
			return err
		}
		defer store.Close()
		return f(cmd.Context(), store, id)
	}
}

func (a *app) pinCommand() *cobra.Command {
	var node, reason, by, until string
	c := &cobra.Command{
		Use:   "pin STAGE/ROLE/UNIT POINTER|hold",
		Short: "Override what Git says, for a unit or for one node of it",
		Long: `Writes a pin. Every node of the unit (or, with --node, that one) converges to it at once, and stays until the pin is
removed or its --until has come. "hold" keeps what runs, whatever it is.

  kedge pin prod/web/app s3://acme-releases/web/1.4.1/manifest.yaml@sha256:… --reason "incident 812" --until 2h
  kedge pin prod/web/app hold --node web-3

The same as: consul kv put kedge/pins/STAGE/ROLE/UNIT POINTER`,
		Args: cobra.ExactArgs(2),
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		pin, err := deployments.ParsePin([]byte(args[1]))
		if err != nil {
			return usageError{err}
		}
		pin.Reason, pin.By = reason, by
		if until != "" {
			if pin.Until, err = untilOf(until, time.Now()); err != nil {
				return err
			}
		}
		return a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
			if err := fleet.Pin(ctx, store, id, node, pin); err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "pinned %s; see kedge status %s, and remove it with kedge unpin %s\n", scope(id, node), id, scopeArgs(id, node))
			return nil
		})(cmd, args)
	}
	f := c.Flags()
	f.StringVar(&node, "node", "", "only this node")
	f.StringVar(&reason, "reason", "", "why, for who looks at it later")
	f.StringVar(&by, "by", os.Getenv("USER"), "who")
	f.StringVar(&until, "until", "", "when it ends by itself: a duration (2h) or a time (2026-11-24T09:00:00Z)")
	return c
}

// untilOf reads a duration from now, or an RFC 3339 time.
func untilOf(s string, now time.Time) (time.Time, error) {
	if d, err := time.ParseDuration(s); err == nil {
		if d <= 0 {
			return time.Time{}, usagef("--until %q is not in the future", s)
		}
		return now.Add(d).UTC().Truncate(time.Second), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return time.Time{}, usagef("--until %q: want a duration, as in 2h, or a time, as in 2026-11-24T09:00:00Z", s)
	}
	if !t.After(now) {
		return time.Time{}, usagef("--until %q is in the past", s)
	}
	return t, nil
}

func scope(id deployments.UnitID, node string) string {
	if node == "" {
		return id.String()
	}
	return id.String() + " on " + node
}

func scopeArgs(id deployments.UnitID, node string) string {
	if node == "" {
		return id.String()
	}
	return id.String() + " --node " + node
}

func (a *app) unpinCommand() *cobra.Command {
	var node string
	c := &cobra.Command{
		Use:   "unpin STAGE/ROLE/UNIT",
		Short: "Remove a pin: back to what Git says",
		Args:  cobra.ExactArgs(1),
	}
	c.RunE = a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
		was, err := fleet.Unpin(ctx, store, id, node)
		switch {
		case err != nil:
			return err
		case was:
			fmt.Fprintf(a.stderr, "unpinned %s\n", scope(id, node))
		default:
			fmt.Fprintf(a.stderr, "%s was not pinned\n", scope(id, node))
		}
		return nil
	})
	c.Flags().StringVar(&node, "node", "", "the pin of this node")
	return c
}

func (a *app) rollbackCommand() *cobra.Command {
	var reason, by string
	c := &cobra.Command{
		Use:   "rollback STAGE/ROLE/UNIT",
		Short: "Pin a unit to the last good release before the one that it runs",
		Long: `Pins a unit to the last release that stood before the one that it runs now. The pin goes to all its nodes at once, and each of
them still protects itself by the release's health checks.

Nodes with --signers refuse a release that is older than the one that they have settled on, unless they have --allow-older-pins: they
keep what they run, and kedge status says so. To go back on those, publish the old tree anew, as a new version.`,
		Args: cobra.ExactArgs(1),
	}
	c.RunE = a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
		pin, err := fleet.Rollback(ctx, store, id, reason, by)
		if err != nil {
			return err
		}
		fmt.Fprintf(a.stderr, "pinned %s to %s; once Git says what should run: kedge unpin %s\n", id, pin.Release, id)
		return nil
	})
	c.Flags().StringVar(&reason, "reason", "rollback", "why, for who looks at it later")
	c.Flags().StringVar(&by, "by", os.Getenv("USER"), "who")
	return c
}
