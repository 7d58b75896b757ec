package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/kv"
	"kedge/sync/fleet"
	"kedge/sync/git"
)

func (a *app) jsonFlag(c *cobra.Command, what string) {
	c.Flags().BoolVar(&a.json, "json", false, "print "+what+" as JSON")
}

func (a *app) printJSON(v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := a.stdout.Write(safetext.JSON(b.Bytes()))
	return err
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
			store, err := a.quiet()
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
				if err := fleet.WriteTable(a.stdout, f, opt); err != nil {
					return err
				}
				if err := fleet.Missing(cmd.Context(), store, f, filter); err != nil {
					a.tell("%v", err)
				}
				return nil
			}
			switch {
			case a.json:
				err = fleet.Watch(cmd.Context(), store, filter, func(f *fleet.Fleet) { json.NewEncoder(a.stdout).Encode(f) })
			case opt.Width > 0:
				err = a.watchOnScreen(cmd.Context(), store, filter, func(w io.Writer, f *fleet.Fleet, width int) {
					opt.Width = width
					fleet.WriteTable(w, f, opt)
				})
			default:
				err = fleet.Watch(cmd.Context(), store, filter, func(f *fleet.Fleet) { fleet.WriteTable(a.stdout, f, opt) })
			}
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
			store, err := a.quiet()
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
			if len(entries) == 0 {
				f, err := fleet.Read(cmd.Context(), store, fleet.Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
				if err == nil && len(f.Units) == 0 {
					return fleet.NoUnit(cmd.Context(), store, id)
				}
			}
			return fleet.WriteHistory(a.stdout, entries, fleet.TableOptions{Width: a.terminal(), Color: a.color()})
		},
	}
	a.jsonFlag(c, "the history")
	return c
}

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
			err = fleet.Wait(ctx, store, filter, fleet.Waiting{Commit: commit, Push: postReceive, Patience: patience, Tell: tell})
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
	f.DurationVar(&patience, "patience", 30*time.Second, "give up when the store is out of reach for this long; 0: only when --timeout is over")
	f.BoolVar(&postReceive, "post-receive", false, "wait for the commit that was pushed, read from standard input as Git's hook gets it (branch: $KEDGE_BRANCH, or main)")
	f.StringVar(&ready, "ready", "", "`address` of this node's agent (its --listen): wait until /ready says 200")
	return c
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

// operateCommands are what an operator does; each is a plain write of one key.
func (a *app) operateCommands() []*cobra.Command {
	commands := []*cobra.Command{a.pinCommand(), a.unpinCommand(), a.rollbackCommand()}
	for verb, what := range map[string][2]string{
		"promote": {"Let a rollout go past its canary", "also where it waits for approval; or let it pass a freeze that it waits for"},
		"pause":   {"Stop a rollout where it is", "nodes stay on what they run, until resume or abort"},
		"resume":  {"Let a paused rollout go on", "the failures that there are now are borne"},
		"abort":   {"Roll a rollout back, now", "to the stable release, as many nodes at a time as max_unavailable allows"},
		"retry":   {"Try again a release that failed", "a rollout that was rolled back begins anew, nodes that went back try it once more"},
	} {
		commands = append(commands, &cobra.Command{
			Use:   verb + " STAGE/ROLE/UNIT",
			Short: what[0],
			Long: fmt.Sprintf(`%s: %s.

Writes the order, waits some seconds until the mirror has taken it, and says what came of it. An order that would change nothing is
refused with the reason.

The same as: consul kv put %scontrol/STAGE/ROLE/UNIT %s

Exit code 0 when it was done, 1 when it changes nothing, 3 when no mirror has taken it yet: it stays, and is done when one comes.`, what[0], what[1], a.prefix, verb),
			Args: cobra.ExactArgs(1),
			RunE: a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
				return a.order(ctx, store, id, verb)
			}),
		})
	}
	return commands
}

// orderWithin is how long the mirror gets to take an order while somebody waits for it.
const orderWithin = 5 * time.Second

func (a *app) order(ctx context.Context, store kv.Store, id deployments.UnitID, verb string) error {
	was, err := fleet.Control(ctx, store, id, verb)
	if err != nil {
		return err
	}
	outcome, err := fleet.Outcome(ctx, store, id, verb, was, orderWithin)
	if errors.Is(err, fleet.ErrNotTaken) {
		return hintError{inTime{err}, fmt.Sprintf("it waits at control/%s, and is done when a mirror runs that has the unit in Git: see kedge status", id)}
	}
	if err != nil {
		return err
	}
	a.tell("%s: %s", id, outcome)
	if pinned := fleet.Pinned(ctx, store, id); pinned != "" {
		a.tell("  %s", pinned)
	}
	return nil
}

// inTime makes the exit code 3, as errNotConverged does.
type inTime struct{ error }

func (e inTime) Is(target error) bool { return target == errNotConverged }

// onUnit opens the store and reads the unit that the first argument names.
func (a *app) onUnit(f func(context.Context, kv.Store, deployments.UnitID) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		id, err := deployments.ParseUnitID(args[0])
		if err != nil {
			return usageError{err}
		}
		store, err := a.quiet()
		if err != nil {
			return err
		}
		defer store.Close()
		return f(cmd.Context(), store, id)
	}
}

func (a *app) pinCommand() *cobra.Command {
	var node, reason, by, until string
	var force, atOnce bool
	c := &cobra.Command{
		Use:   "pin STAGE/ROLE/UNIT POINTER|hold",
		Short: "Override what Git says, for a unit or for one node of it",
		Long: `Writes a pin. The nodes of the unit (or, with --node, that one) converge to it, and stay until the pin is removed or its
--until has come. "hold" keeps what runs, whatever it is. Where the unit has a rollout, the mirror admits its nodes within
max_unavailable; with --at-once, and where it has none, every node follows as soon as it sees the pin.

  kedge pin prod/web/app s3://acme-releases/app/1.4.1/manifest.yaml@sha256:… \
      --reason "incident 812" --until 2h
  kedge pin prod/web/app hold --node web-3

The same as: consul kv put kedge/pins/STAGE/ROLE/UNIT POINTER`,
		Args: cobra.ExactArgs(2),
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		pin, err := deployments.ParsePin([]byte(args[1]))
		if err != nil {
			return usageError{err}
		}
		pin.Reason, pin.By, pin.AtOnce = reason, by, atOnce || pin.AtOnce
		if until != "" {
			if pin.Until, err = untilOf(until, time.Now()); err != nil {
				return err
			}
		}
		return a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
			if !force {
				if err := fleet.CheckRecord(ctx, store, id); err != nil {
					return hintError{fmt.Errorf("pin: %w", err), "no node runs anything by the pin of a unit without a record; to write it all the same: --force"}
				}
			}
			notes := fleet.PinNotes(ctx, store, id, node, pin.AtOnce)
			if err := fleet.Pin(ctx, store, id, node, pin); err != nil {
				return err
			}
			a.tell("pinned %s", scope(id, node))
			if reason == "" {
				notes = append(notes, "no --reason: nobody who looks at it later knows why")
			}
			for _, note := range append(notes, "see kedge status "+id.String(), "to remove it: kedge unpin "+scopeArgs(id, node)) {
				a.tell("  %s", note)
			}
			return nil
		})(cmd, args)
	}
	f := c.Flags()
	f.StringVar(&node, "node", "", "only this node")
	f.StringVar(&reason, "reason", "", "why, for who looks at it later")
	byFlag(f, &by)
	f.BoolVar(&atOnce, "at-once", false, "every node as soon as it sees the pin, whatever max_unavailable says")
	f.BoolVar(&force, "force", false, "also where the unit has no record")
	f.StringVar(&until, "until", "", "when it ends by itself: in 2h or 3d, or at \"2026-11-24 09:00 Europe/Berlin\" or 2026-11-24T08:00:00Z")
	return c
}

func byFlag(f *pflag.FlagSet, by *string) {
	f.StringVar(by, "by", person(), "who (default: you)")
	f.Lookup("by").DefValue = "" // the manual is the same for everyone
}

// person is who types, for people who look at it later.
func person() string {
	for _, name := range []string{"SUDO_USER", "USER", "LOGNAME"} {
		if v := os.Getenv(name); v != "" {
			return v
		}
	}
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return ""
}

// untilOf reads a duration from now, also in days, or a time with its zone.
func untilOf(s string, now time.Time) (time.Time, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok && err != nil {
		var n int
		if n, err = strconv.Atoi(days); err == nil {
			d = time.Duration(n) * 24 * time.Hour
		}
	}
	if err == nil {
		if d <= 0 {
			return time.Time{}, usagef("--until %q is not in the future", s)
		}
		return now.Add(d).UTC().Truncate(time.Second), nil
	}
	t, err := deployments.ParseUntil(s)
	if err != nil {
		return time.Time{}, usagef("--until %q: want a duration, as in 2h or 3d, or a time with its zone, as in \"2026-11-24 09:00 Europe/Berlin\" or 2026-11-24T08:00:00Z", s)
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
		notes := fleet.PinNotes(ctx, store, id, node, false)
		was, err := fleet.Unpin(ctx, store, id, node)
		switch {
		case err != nil:
			return err
		case was:
			a.tell("unpinned %s", scope(id, node))
			if follows := fleet.Follows(ctx, store, id, node); follows != "" {
				notes = append(slices.DeleteFunc(notes, func(s string) bool { return strings.HasPrefix(s, "the unit is pinned") }), follows)
			}
		default:
			a.tell("%s was not pinned", scope(id, node))
		}
		for _, note := range notes {
			a.tell("  %s", note)
		}
		return nil
	})
	c.Flags().StringVar(&node, "node", "", "the pin of this node")
	return c
}

func (a *app) rollbackCommand() *cobra.Command {
	var reason, by string
	var atOnce bool
	c := &cobra.Command{
		Use:   "rollback STAGE/ROLE/UNIT",
		Short: "Pin a unit to the last good release before the one that it runs",
		Long: `Pins a unit to the last release that stood before the one that it runs now. Each node still protects itself by the release's
health checks. Where the unit has a rollout, the mirror admits its nodes within max_unavailable, unless --at-once is given.

Nodes with --signers refuse a release that is older than the one that they have settled on, unless they have --allow-older-pins: they
keep what they run, and kedge status says so. To go back on those, publish the old tree anew, as a new version.`,
		Args: cobra.ExactArgs(1),
	}
	c.RunE = a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
		pin, err := fleet.Rollback(ctx, store, id, fleet.RollbackOptions{Reason: reason, By: by, AtOnce: atOnce})
		if err != nil {
			return err
		}
		a.tell("pinned %s to %s", id, pin.Release)
		if already := fleet.RunsAlready(ctx, store, id, pin.Release); already != "" {
			a.tell("  %s", already)
		}
		a.tell("  once Git says what should run: kedge unpin %s", id)
		return nil
	})
	c.Flags().BoolVar(&atOnce, "at-once", false, "every node as soon as it sees the pin, whatever max_unavailable says")
	c.Flags().StringVar(&reason, "reason", "rollback", "why, for who looks at it later")
	byFlag(c.Flags(), &by)
	return c
}
