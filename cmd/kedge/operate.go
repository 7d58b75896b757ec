package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet"
)

// operateCommands returns the commands of operators. Each writes or deletes one key.
func (a *app) operateCommands() []*cobra.Command {
	commands := []*cobra.Command{a.pinCommand(), a.unpinCommand(), a.rollbackCommand()}
	for verb, what := range map[string][2]string{
		"promote": {
			"Let a rollout go past its canary",
			"also if it waits for approval; if a freeze holds it up, only the freeze is lifted",
		},
		"pause": {
			"Stop a rollout where it is",
			"no further node begins, until resume or abort; those that have begun finish",
		},
		"resume": {"Let a paused rollout go on", "it tolerates the failures that there are now"},
		"abort": {
			"Roll a rollout back, now",
			"to the release before it, within max_unavailable; a first release is only paused, unless " +
				"something else served before it",
		},
		"retry": {
			"Try again a release that failed",
			"a rollout that is under way, paused or rolled back begins anew; otherwise the nodes on which it " +
				"failed try it once more",
		},
	} {
		order := deployments.Order{Verb: deployments.Verb(verb)}
		c := &cobra.Command{
			Use:   verb + " STAGE/ROLE/UNIT",
			Short: what[0],
			Long: fmt.Sprintf(`%s: %s.

Writes the order, waits some seconds until the mirror has taken it, and says what came of it. An order that would
change nothing is refused with the reason. kedge history shows who gave the order, and why.

Without kedge: consul kv put %scontrol/STAGE/ROLE/UNIT %s (history then names nobody)

Exit code 0 when it was done, 1 when it changes nothing, 3 when no mirror has taken it yet: it stays, and is done
when one comes.`, what[0], what[1], a.keyPrefix(), verb),
			Args: cobra.ExactArgs(1),
			RunE: a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
				return a.order(ctx, store, id, order)
			}),
		}
		c.Flags().StringVar(&order.Reason, "reason", "", "why, for who looks at it later")
		byFlag(c.Flags(), &order.By)
		a.jsonFlag(c, "what came of it")
		commands = append(commands, a.completeArgs(c, wantUnit))
	}
	return commands
}

// keyPrefix returns what every key in Consul begins with.
func (a *app) keyPrefix() string {
	return strings.TrimSuffix(cmp.Or(a.prefix, kv.DefaultPrefix), "/") + "/"
}

// orderWithin is how long a command waits for the mirror to take an order.
const orderWithin = 5 * time.Second

func (a *app) order(ctx context.Context, store kv.Store, id deployments.UnitID, order deployments.Order) error {
	was, err := fleet.SendOrder(ctx, store, id, order)
	if err != nil {
		return err
	}
	outcome, err := fleet.AwaitOutcome(ctx, store, id, order, was, orderWithin)
	if errors.Is(err, fleet.ErrNotTaken) {
		return hintError{
			notInTime{err},
			fmt.Sprintf("the order waits at control/%s, and is done when a mirror runs that has the unit in Git: "+
				"see kedge status", id),
		}
	}
	if err != nil {
		return err
	}
	return a.printOutcome(OrderOutcome{Unit: id, Order: string(order.Verb), Outcome: outcome},
		fmt.Sprintf("%s: %s", id, outcome), fleet.PinnedNote(ctx, store, id))
}

// OrderOutcome is the result of an order, of a pin or of its end, as JSON.
type OrderOutcome struct {
	Unit deployments.UnitID `json:"unit"`
	// Node is the one node that a pin or unpin was for; empty: all nodes of the unit.
	Node string `json:"node,omitempty"`
	// Order is promote, pause, resume, abort, retry, pin, unpin or rollback.
	Order string `json:"order"`
	// Outcome describes the result in words.
	Outcome string `json:"outcome"`
	// Pin is the pin that was written; nil: none was.
	Pin *deployments.Pin `json:"pin,omitempty"`
	// Notes say in words what else to know, and what to do next.
	Notes []string `json:"notes"`
}

// printOutcome prints an outcome: as JSON, or for people as a line followed by those notes that aren't empty.
func (a *app) printOutcome(t OrderOutcome, line string, notes ...string) error {
	t.Notes = slices.DeleteFunc(append([]string{}, notes...), func(note string) bool { return note == "" })
	if a.json {
		return a.printJSON(t)
	}
	a.printMessage("%s", line)
	for _, note := range t.Notes {
		a.printMessage("  %s", note)
	}
	return nil
}

// notInTime is an error that counts as errNotConverged for errors.Is, and so leads to exit code 3.
type notInTime struct{ error }

func (e notInTime) Is(target error) bool { return target == errNotConverged }

// onUnit returns a function for cobra.Command.RunE. It parses the first argument as a unit, opens the store, and calls
// f with these.
func (a *app) onUnit(f func(context.Context, kv.Store, deployments.UnitID) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		id, err := deployments.ParseUnitID(args[0])
		if err != nil {
			return usageError{err}
		}
		store, err := a.openExisting()
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
		Use:   "pin STAGE/ROLE/UNIT VERSION|POINTER|hold",
		Short: "Override what Git says, for a unit or for one node of it",
		Long: `Writes a pin. The nodes of the unit (or, with --node, that one) converge to it, and stay
until the pin is removed or its --until has come. "hold" keeps what runs, whatever it is. If the unit has a rollout,
its pin to a release is rolled out within max_unavailable. Otherwise, and with hold, --node or --at-once, a node
follows as soon as it sees the pin.

A VERSION is looked up among the releases that the unit had; kedge history lists them.

  kedge pin prod/web/app 1.4.1 --reason "incident 812" --until 2h
  kedge pin prod/web/app s3://acme-releases/app/1.4.1/manifest.yaml@sha256:… \
      --reason "incident 812" --until 2h
  kedge pin prod/web/app hold --node web-3

Without kedge: consul kv put ` + a.keyPrefix() + `pins/STAGE/ROLE/UNIT[/NODE] POINTER`,
		Args: cobra.ExactArgs(2),
	}
	c.RunE = func(cmd *cobra.Command, args []string) error {
		pin, err := deployments.ParsePin([]byte(args[1]))
		version := ""
		if err != nil {
			if deployments.CheckSegment("version", args[1]) != nil {
				return usageError{err}
			}
			pin, version = deployments.Pin{}, args[1]
		}
		pin.Reason, pin.By, pin.AtOnce = reason, by, atOnce || pin.AtOnce
		if until != "" {
			if pin.Until, err = untilOf(until, time.Now()); err != nil {
				return err
			}
		}
		return a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) (err error) {
			if version != "" {
				if pin.Release, err = fleet.FindRelease(ctx, store, id, version); err != nil {
					return fmt.Errorf("pin: %w", err)
				}
			}
			if !force {
				if err := fleet.CheckRecord(ctx, store, id); err != nil {
					return hintError{
						fmt.Errorf("pin: %w", err),
						"no node runs anything by the pin of a unit without a record; to write it all the same: --force",
					}
				}
			}
			notes := fleet.PinNotes(ctx, store, id, node, &pin)
			if err := fleet.Pin(ctx, store, id, node, pin); err != nil {
				return err
			}
			line := "pinned " + scope(id, node)
			if version != "" {
				line += " to " + pin.Release.String()
			}
			if reason == "" {
				notes = append(notes, "no --reason: whoever sees this pin later won't know why it is there")
			}
			notes = append(notes, "see kedge status "+id.String(), "to remove it: kedge unpin "+scopeArgs(id, node))
			return a.printOutcome(OrderOutcome{Unit: id, Node: node, Order: "pin", Outcome: "pinned", Pin: &pin}, line, notes...)
		})(cmd, args)
	}
	f := c.Flags()
	f.StringVar(&node, "node", "", "only this node")
	f.StringVar(&reason, "reason", "", "why, for who looks at it later")
	byFlag(f, &by)
	f.BoolVar(&atOnce, "at-once", false, "every node as soon as it sees the pin, whatever max_unavailable says")
	f.BoolVar(&force, "force", false, "also where the unit has no record")
	f.StringVar(&until, "until", "",
		"when it ends by itself: in 2h or 3d, or at \"2026-11-24 09:00 Europe/Berlin\" or 2026-11-24T08:00:00Z")
	a.jsonFlag(c, "the pin")
	return a.completeArgs(c, wantUnit, wantRelease)
}

func byFlag(f *pflag.FlagSet, by *string) {
	f.StringVar(by, "by", person(), "who (default: you)")
	f.Lookup("by").DefValue = "" // so that the manual is the same for everyone
}

// person returns who runs the command, for the history; empty if that is unknown.
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

// untilOf parses a pin's end: a duration from now, also in days, or a time with its zone. An end that isn't in the
// future is an error.
func untilOf(s string, now time.Time) (time.Time, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok && err != nil {
		var n int
		const day = 24 * time.Hour
		n, err = strconv.Atoi(days)
		if d = time.Duration(n) * day; d/day != time.Duration(n) {
			err = strconv.ErrRange
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
		return time.Time{}, usagef(
			"--until %q: want a duration, as in 2h or 3d, or a time with its zone, as in \"2026-11-24 09:00 Europe/Berlin\" or 2026-11-24T08:00:00Z",
			s,
		)
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
		Long: `Removes the pin of a unit or, with --node, of one node: the unit's pin counts there then, if
it has one. Without --node, the pins that nodes have of their own stay. If the unit has a rollout, its nodes go back
within max_unavailable, and only while a mirror runs.`,
		Args: cobra.ExactArgs(1),
	}
	c.RunE = a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
		notes := fleet.PinNotes(ctx, store, id, node, nil)
		was, err := fleet.Unpin(ctx, store, id, node)
		line, outcome := "unpinned "+scope(id, node), "unpinned"
		switch {
		case err != nil:
			return err
		case was:
			if follows := fleet.AfterUnpinNote(ctx, store, id, node); follows != "" {
				notes = append(
					slices.DeleteFunc(notes, func(s string) bool { return strings.HasPrefix(s, "the unit itself is pinned") }),
					follows,
				)
			}
		default:
			line, outcome = scope(id, node)+" was not pinned", "was not pinned"
		}
		return a.printOutcome(OrderOutcome{Unit: id, Node: node, Order: "unpin", Outcome: outcome}, line, notes...)
	})
	c.Flags().StringVar(&node, "node", "", "the pin of this node")
	a.jsonFlag(c, "what came of it")
	return a.completeArgs(c, wantUnit)
}

func (a *app) rollbackCommand() *cobra.Command {
	var reason, by string
	var atOnce bool
	c := &cobra.Command{
		Use:   "rollback STAGE/ROLE/UNIT",
		Short: "Pin a unit to the last good release before the one that it runs",
		Long: `Pins a unit to the newest release, older than the one that Git or its pin names, that has not
failed. Each node still protects itself by the release's health checks. Where the unit has a rollout, the mirror
admits its nodes within max_unavailable, unless --at-once is given.

Nodes with --signers refuse a release that was made before their version floor, unless they have --allow-older-pins:
they keep what they run, and kedge status says so. To go back on those, publish the old tree anew, as a new version.`,
		Args: cobra.ExactArgs(1),
	}
	c.RunE = a.onUnit(func(ctx context.Context, store kv.Store, id deployments.UnitID) error {
		pin, err := fleet.Rollback(ctx, store, id, fleet.RollbackOptions{Reason: reason, By: by, AtOnce: atOnce})
		if err != nil {
			return err
		}
		return a.printOutcome(OrderOutcome{Unit: id, Order: "rollback", Outcome: "pinned", Pin: &pin},
			fmt.Sprintf("pinned %s to %s", id, pin.Release), fleet.RunsAlreadyNote(ctx, store, id, pin.Release),
			"once Git names a good release: kedge unpin "+id.String())
	})
	c.Flags().BoolVar(&atOnce, "at-once", false, "every node as soon as it sees the pin, whatever max_unavailable says")
	c.Flags().StringVar(&reason, "reason", "rollback", "why, for who looks at it later")
	byFlag(c.Flags(), &by)
	a.jsonFlag(c, "the pin")
	return a.completeArgs(c, wantUnit)
}
