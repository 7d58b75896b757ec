package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"

	"github.com/spf13/cobra"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet"
)

func (a *app) jsonFlag(c *cobra.Command, what string) {
	c.Flags().BoolVar(&a.json, "json", false, "print "+what+" as JSON")
}

// printJSON prints v as indented JSON, with a line end. If v itself is a nil slice, it prints []
// instead of null.
func (a *app) printJSON(v any) error {
	if list := reflect.ValueOf(v); list.Kind() == reflect.Slice && list.IsNil() {
		v = reflect.MakeSlice(list.Type(), 0, 0).Interface()
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return err
	}
	_, err := a.stdout.Write(safetext.JSON(b.Bytes()))
	return err
}

// filterOf parses STAGE, STAGE/ROLE or STAGE/ROLE/UNIT. Without an argument the filter selects all units.
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
	var watch, nodes, attention bool
	c := &cobra.Command{
		Use:   "status [STAGE[/ROLE[/UNIT]]]",
		Short: "What every unit should run, and which nodes do",
		Long: `Shows each unit's target, its pin, how many nodes are converged, and which are not and why. A node that is gone (its Consul
session has ended) is counted on its own. Exit code 0, however the fleet is: see kedge wait for a check.
Exit code 1 if all or a part of it could not be read: it shows the rest, and names the part.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			filter, err := filterOf(args)
			if err != nil {
				return err
			}
			store, err := a.openExisting()
			if err != nil {
				return err
			}
			defer store.Close()
			opt := fleet.TableOptions{Width: a.terminal(), Color: a.color(), AllNodes: nodes}
			shown := func(f *fleet.Fleet) *fleet.Fleet {
				if attention {
					f, opt.LeftOut = f.Attention()
				}
				return f
			}
			write := func(w io.Writer, f *fleet.Fleet) error {
				f = shown(f)
				return fleet.WriteTable(w, f, opt)
			}
			if !watch {
				f, err := fleet.Read(cmd.Context(), store, filter)
				if err != nil {
					return err
				}
				if a.json {
					return cmp.Or(a.printJSON(shown(f)), f.CheckComplete())
				}
				if err := cmp.Or(write(a.stdout, f), f.CheckComplete()); err != nil {
					return err
				}
				if err := fleet.CheckSelected(cmd.Context(), store, f, filter); err != nil {
					a.printMessage("%v", err)
				}
				return nil
			}
			switch {
			case a.json:
				err = fleet.Watch(cmd.Context(), store, filter, func(f *fleet.Fleet) {
					if line, err := json.Marshal(shown(f)); err == nil {
						a.stdout.Write(append(safetext.JSON(line), '\n'))
					}
				})
			case opt.Width > 0:
				err = a.watchOnScreen(cmd.Context(), store, filter, func(w io.Writer, f *fleet.Fleet, width int) {
					opt.Width = width
					write(w, f)
				})
			default:
				err = fleet.Watch(cmd.Context(), store, filter, func(f *fleet.Fleet) { write(a.stdout, f) })
			}
			if errors.Is(err, context.Canceled) {
				return nil
			}
			return err
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on, and show every change")
	c.Flags().BoolVarP(&attention, "attention", "a", false,
		"only the units that are pinned, rolling out or in trouble")
	c.Flags().BoolVarP(&nodes, "nodes", "n", false, "show every node, not only those that aren't converged")
	a.jsonFlag(c, "the fleet")
	return a.completeArgs(c, wantPart)
}

func (a *app) historyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "history STAGE/ROLE/UNIT",
		Short: "What a unit's target was, by whom and since when",
		Long: `Shows the generations of a unit, the newest first: what it was told to run, and what led to that.` +
			` Below each stand
the pins and orders of its time, with who and why: pins of the unit and of single nodes, with their ends.` +
			` Times are when the
mirror saw it. A pin that came and went between two looks of the mirror, or while none ran, leaves no trace.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deployments.ParseUnitID(args[0])
			if err != nil {
				return usageError{err}
			}
			store, err := a.openExisting()
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
				if err == nil && len(f.Units) == 0 && f.CheckComplete() == nil {
					return fleet.NoUnit(cmd.Context(), store, id)
				}
			}
			return fleet.WriteHistory(a.stdout, entries, fleet.TableOptions{Width: a.terminal(), Color: a.color()})
		},
	}
	a.jsonFlag(c, "the history")
	return a.completeArgs(c, wantUnit)
}
