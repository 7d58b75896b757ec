package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet/message"
)

// Release is a release that a unit has or had, with the version that people know it by.
type Release struct {
	Version string
	Pointer deployments.Pointer
}

// Releases returns the releases of a unit that the store knows, without duplicates. They are, in this order: Git's, the
// record's target, the unit pin's, the history's (newest first), and those that nodes run or ran last. Releases skips a
// history that the token may not read. An unknown unit is an error.
func Releases(ctx context.Context, store kv.Store, id deployments.UnitID) ([]Release, error) {
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil {
		return nil, err
	}
	switch err := f.CheckComplete(); {
	case len(f.Units) > 0:
	case err != nil:
		return nil, err
	default:
		return nil, NoUnit(ctx, store, id)
	}
	history, err := History(ctx, store, id)
	if err != nil && !errors.Is(err, kv.ErrDenied) {
		return nil, err
	}
	u := &f.Units[0]
	var releases []Release
	add := func(p deployments.Pointer) {
		if !p.IsZero() && !slices.ContainsFunc(releases, func(r Release) bool { return r.Pointer == p }) {
			releases = append(releases, Release{u.version(p), p})
		}
	}
	add(u.GitTarget())
	if u.Record != nil {
		add(u.Record.Target)
	}
	if u.Pin != nil {
		add(u.Pin.Release)
	}
	for _, h := range history {
		add(h.Release)
		add(h.Stable)
	}
	for _, n := range u.Nodes {
		add(n.Report.Running)
	}
	return releases, nil
}

// FindRelease returns the one release of a unit, among those of Releases, that has the given
// version. It is an error if none or several have it.
func FindRelease(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	version string,
) (deployments.Pointer, error) {
	releases, err := Releases(ctx, store, id)
	if err != nil {
		return deployments.Pointer{}, err
	}
	var found, versions []string
	var pointer deployments.Pointer
	for _, r := range releases {
		if !slices.Contains(versions, r.Version) {
			versions = append(versions, r.Version)
		}
		if r.Version == version {
			pointer, found = r.Pointer, append(found, r.Pointer.String())
		}
	}
	switch {
	case len(found) == 1:
		return pointer, nil
	case len(found) > 1:
		return pointer, fmt.Errorf("%s had several releases of version %s: name one of\n%s", id, version,
			strings.Join(found, "\n"))
	case len(versions) == 0:
		return pointer, fmt.Errorf("no release of %s is known: give its pointer, URL@sha256:HEX", id)
	}
	return pointer, fmt.Errorf(
		"no release of %s is known by version %s: there are %s; or give its pointer, URL@sha256:HEX",
		id,
		version,
		firstFew(versions),
	)
}

// NodeUnits are the units of one node. Their JSON is the output of kedge node --json.
type NodeUnits struct {
	Node  string     `json:"node"`
	Units []NodeUnit `json:"units"`
}

// NodeUnit is one unit of a node.
type NodeUnit struct {
	ID deployments.UnitID `json:"unit"`
	Node
}

// UnitsOf returns the units of a node, in the fleet's order; none for an unassigned node. It is an error if no report
// and no unit names the node.
func UnitsOf(f *Fleet, node string) (NodeUnits, error) {
	of := NodeUnits{Node: node, Units: []NodeUnit{}}
	for i := range f.Units {
		for _, n := range f.Units[i].Nodes {
			if n.Name == node {
				of.Units = append(of.Units, NodeUnit{f.Units[i].ID, n})
			}
		}
	}
	if len(of.Units) > 0 || slices.ContainsFunc(f.Unassigned, func(u Unassigned) bool { return u.Node == node }) {
		return of, nil
	}
	_, err := FindUnitOfNode(f, node, "")
	return of, err
}

// WriteNode writes a node's units: for each a line with its state and what it runs, followed by
// what is wrong with it.
func WriteNode(w io.Writer, f *Fleet, of NodeUnits, opt TableOptions) error {
	p := &printer{opt: opt}
	if len(of.Units) == 0 {
		p.raw("No unit is meant for " + message.Clean(of.Node) +
			": its stage or its roles may be mistyped. See kedge status.")
	}
	rows := [][]Text{header([]string{"UNIT", "STATE", "RUNS", "FOR"})}
	var notes []string
	for _, n := range of.Units {
		for i := range f.Units {
			if u := &f.Units[i]; u.ID == n.ID {
				row, problem := f.NodeRow(u, &n.Node)
				row[0] = Text{u.ID.String(), Bold}
				rows, notes = append(rows, row), append(notes, p.names(u, problem))
			}
		}
	}
	if len(rows) > 1 {
		for i, line := range p.align("", rows) {
			p.raw(line)
			if i > 0 && notes[i-1] != "" {
				p.wrap("    ", 4, notes[i-1], Warn)
			}
		}
	}
	_, err := io.WriteString(w, p.b.String())
	return err
}

// WorstNode returns the node of a unit that is most likely of interest: the first live one that
// hasn't converged. If all live nodes have, it returns the first of them, and if none is live, the
// first node. A unit without nodes is an error.
func WorstNode(f *Fleet, id deployments.UnitID) (string, error) {
	worst, rank := "", 0
	for _, u := range f.Units {
		for _, n := range u.Nodes {
			r := 1
			switch {
			case !n.Gone && !n.Converged:
				r = 3
			case !n.Gone:
				r = 2
			}
			if u.ID == id && r > rank {
				worst, rank = n.Name, r
			}
		}
	}
	if worst == "" {
		return "", fmt.Errorf("no node of %s has reported: are the agents of %s/%s running?", id, id.Stage, id.Role)
	}
	return worst, nil
}

// Names returns the names of all units and of all nodes, sorted, for the completion of command lines.
func Names(f *Fleet) (units, nodes []string) {
	for _, u := range f.Units {
		units = append(units, u.ID.String())
		for _, n := range u.Nodes {
			nodes = append(nodes, n.Name)
		}
	}
	slices.Sort(nodes)
	return units, slices.Compact(nodes)
}
