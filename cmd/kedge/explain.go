package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent"
	"kedge/sync/agent/statedir"
	"kedge/sync/fleet"
)

func (a *app) explainCommand() *cobra.Command {
	var stateDir string
	c := &cobra.Command{
		Use:   "explain NODE/UNIT | STAGE/ROLE/UNIT [NODE] | [ROLE/]UNIT",
		Short: "Why a node runs what it runs, and what would change it",
		Long: `Prints the whole chain that decides: Git, the node's pin, the unit's pin, the record, its
rollout (a freeze, canaries, a bake, an approval), the node's turn in it, what failed on the node, and what the node
itself says against it. ">" marks the step that decided, "!" one that is in the way; below each that an operator can
change stands how.

NODE/UNIT, as in web-1/app, will do where only one of the node's units has that name. STAGE/ROLE/UNIT without NODE
explains the first live node that isn't as it should be, or else the first.

UNIT alone, as root, asks the agent of this machine, which needs no store: what it goes by, how old that is, and
what it makes of it. If two roles of this machine have such a unit, give ROLE/UNIT. A role of this machine comes
before a node of that name.

With --json a program reads the same: "decides", "blocks" and "hint" of every step in "trace".`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, id, node, d, err := a.explain(cmd.Context(), args, stateDir)
			if err != nil {
				return err
			}
			if a.json {
				explanation, err := fleet.ExplanationOf(f, id, node, d)
				if err != nil {
					return err
				}
				return cmp.Or(a.printJSON(explanation), f.CheckComplete())
			}
			opt := fleet.TableOptions{Width: a.terminal(), Color: a.color()}
			return cmp.Or(fleet.WriteExplain(a.stdout, f, id, node, d, opt), f.CheckComplete())
		},
	}
	c.Flags().StringVar(&stateDir, "state-dir", envOr("KEDGE_STATE_DIR", agent.DefaultStateDir),
		"state `directory` of this machine's agent, for [ROLE/]UNIT")
	a.jsonFlag(c, "the decision")
	return a.completeArgs(c, wantUnit, wantNode)
}

// explain returns the decision d that args ask for, about the unit id on node, and the fleet f from
// which d was made. If args name no node, explain takes the worst node, and says so unless --json
// is given. For UNIT alone, and for ROLE/UNIT of a role that this machine has, it asks the agent of
// this machine, whose state directory is stateDir.
func (a *app) explain(ctx context.Context, args []string, stateDir string) (
	f *fleet.Fleet, id deployments.UnitID, node string, d fleet.Decision, err error,
) {
	slashes := strings.Count(args[0], "/")
	switch {
	case len(args) == 1 && slashes == 0:
		if err = deployments.CheckSegment("unit", args[0]); err != nil {
			return f, id, node, d, usageError{err}
		}
		status, err := localStatus(ctx, stateDir)
		if err != nil {
			return f, id, node, d, err
		}
		f, id, d, err = fleet.Local(status, args[0], time.Now())
		return f, id, status.Node, d, err
	case len(args) == 1 && slashes == 1:
		unit := ""
		node, unit, _ = strings.Cut(args[0], "/")
		if err = errors.Join(deployments.CheckSegment("node", node), deployments.CheckSegment("unit", unit)); err != nil {
			return f, id, node, d, usageError{err}
		}
		if status, err := localStatus(ctx, stateDir); err == nil {
			if _, isRole := status.Roles[node]; isRole {
				f, id, d, err = fleet.Local(status, args[0], time.Now())
				return f, id, status.Node, d, err
			}
		}
		if f, err = a.readToExplain(ctx, fleet.Filter{}, unit); err != nil {
			return f, id, node, d, err
		}
		if id, err = fleet.FindUnitOfNode(f, node, unit); err != nil {
			return f, id, node, d, notFound(f, err)
		}
	default:
		if id, err = deployments.ParseUnitID(args[0]); err != nil {
			return f, id, node, d, usageError{err}
		}
		if f, err = a.readToExplain(ctx, fleet.Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit}, id.Unit); err != nil {
			return f, id, node, d, err
		}
		if len(args) == 2 {
			node = args[1]
		} else if node, err = fleet.WorstNode(f, id); err != nil {
			return f, id, node, d, notFound(f, err)
		} else if !a.json {
			a.printMessage("%s on %s, one of %s; another: kedge explain %s NODE", id, node,
				count(len(f.Units[0].Nodes), "node"), id)
		}
	}
	d, err = fleet.Explain(f, id, node)
	return f, id, node, d, notFound(f, err)
}

// notFound returns err, which is nil or says that something isn't in f. If a part of f wasn't read,
// the error says that, too.
func notFound(f *fleet.Fleet, err error) error {
	if unread := f.CheckComplete(); err != nil && unread != nil {
		return fmt.Errorf("%w; but %w", err, unread)
	}
	return err
}

// readToExplain reads the part of the fleet that filter selects. If filter names a unit that doesn't exist, that is an
// error. If the store is away, the error says how to ask the node itself about unit.
func (a *app) readToExplain(ctx context.Context, filter fleet.Filter, unit string) (*fleet.Fleet, error) {
	store, err := a.openExisting()
	if err != nil {
		return nil, err
	}
	defer store.Close()
	f, err := fleet.Read(ctx, store, filter)
	switch {
	case errors.Is(err, kv.ErrUnavailable):
		local := "the node's own agent can answer without the store; on the node, as root: kedge explain " + unit
		return nil, hintError{err, strings.TrimPrefix(a.storeHint(err)+"\n", "\n") + local}
	case err == nil && len(f.Units) == 0 && filter.Unit != "" && f.CheckComplete() != nil:
		return nil, f.CheckComplete()
	case err == nil && len(f.Units) == 0 && filter.Unit != "":
		return nil, fleet.NoUnit(ctx, store, deployments.UnitID{Stage: filter.Stage, Role: filter.Role, Unit: filter.Unit})
	}
	return f, err
}

// localStatus returns the status of this machine's agent, which it asks at the socket in stateDir.
func localStatus(ctx context.Context, stateDir string) (s policy.NodeStatus, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	socket := statedir.SocketPath(stateDir)
	client := http.Client{
		Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", socket)
			},
		},
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/status", nil)
	if err != nil {
		return s, err
	}
	answer, err := client.Do(r)
	switch {
	case errors.Is(err, os.ErrPermission):
		return s, hintError{fmt.Errorf("the agent's socket %s: %w", socket, os.ErrPermission), "ask as root"}
	case err != nil:
		return s, hintError{
			fmt.Errorf("no agent answers at %s: %w", socket, errors.Unwrap(err)),
			"does kedge-agent run on this machine, with this --state-dir? For another node: kedge explain NODE/UNIT",
		}
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return s, fmt.Errorf("the agent at %s answers %s", socket, answer.Status)
	}
	if err := json.NewDecoder(io.LimitReader(answer.Body, 16<<20)).Decode(&s); err != nil {
		return s, fmt.Errorf("the agent's answer at %s: %w", socket, err)
	}
	return s, nil
}
