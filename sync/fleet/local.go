package fleet

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// Local is Explain without the store: it takes the decision from s, the status of a node's own
// agent, read at the time at. It also returns the unit's ID, and a Fleet of this unit on this node.
// The steps named store say how current the agent's view was. unit is ROLE/UNIT, or UNIT if only
// one role has a unit of that name. Any other name is an error.
func Local(s policy.NodeStatus, unit string, at time.Time) (*Fleet, deployments.UnitID, Decision, error) {
	var found, all []deployments.UnitID
	for role, r := range s.Roles {
		for name := range r.Units {
			id := deployments.UnitID{Stage: s.Stage, Role: role, Unit: name}
			all = append(all, id)
			if unit == name || unit == role+"/"+name {
				found = append(found, id)
			}
		}
	}
	switch {
	case len(all) == 0:
		return nil, deployments.UnitID{}, Decision{}, fmt.Errorf("no unit %s on this node: it has none yet", unit)
	case len(found) == 0:
		return nil, deployments.UnitID{}, Decision{},
			fmt.Errorf("no unit %s on this node: there are %s", unit, firstFew(unitNames(all)))
	case len(found) > 1:
		return nil, deployments.UnitID{}, Decision{}, fmt.Errorf(
			"several roles of this node have a unit %s: want one of %s",
			unit,
			firstFew(unitNames(found)),
		)
	}
	id := found[0]
	report, said := s.Roles[id.Role].Units[id.Unit], s.Decisions[id.Role+"/"+id.Unit]
	d := Decision{Message: said.Message, Decision: policy.Decision{
		Action: said.Action, Target: said.Target, Stage: said.Stage,
		Source: said.Source, Reason: said.Reason, Facts: said.Facts, Recheck: said.Recheck}}
	if said.Invalid != "" {
		d.Invalid = errors.New(said.Invalid)
	}
	n := Node{
		Name:      s.Node,
		Report:    report,
		Converged: converged(d.Decision, report),
		Want:      said.Target,
		Message:   said.Message,
	}
	u := Unit{ID: id, Nodes: []Node{n}}
	f := &Fleet{At: at, Units: []Unit{u}, Unassigned: []Unassigned{}}
	for _, source := range s.Sources {
		if role := id.Stage + "/" + id.Role + "/"; strings.HasSuffix(source.Prefix, role) {
			d.Trace = append(d.Trace, sourceStep(source, at))
		}
	}
	d.Trace = append(d.Trace, said.Trace...)
	d.Trace = append(d.Trace, nodeStep(&u, &n, d))
	return f, id, d, nil
}

// sourceStep returns a step that says how current a node's view of a prefix of the store is.
func sourceStep(s policy.SourceStatus, at time.Time) Step {
	step := Step{What: "store", Message: message.Clean(s.Prefix) + " from " + message.Clean(s.From) + ", up to date"}
	if s.Error == "" {
		return step
	}
	step.Blocks, step.Hint = true, "see why the store can't be read; meanwhile the node goes on with what it knows"
	step.Message = message.Clean(s.Prefix) + " from " + message.Clean(s.From)
	if !s.Since.IsZero() {
		step.Message += " of " + s.Since.UTC().Format("2006-01-02 15:04:05 UTC")
	}
	if !s.ErrorSince.IsZero() {
		step.Message += ", and may have been out of date for " + brief(at.Sub(s.ErrorSince))
	}
	step.Message += ": " + message.OneLine(s.Error)
	return step
}

// unitNames returns units as ROLE/UNIT, sorted.
func unitNames(units []deployments.UnitID) (names []string) {
	for _, id := range units {
		names = append(names, id.Role+"/"+id.Unit)
	}
	slices.Sort(names)
	return names
}
