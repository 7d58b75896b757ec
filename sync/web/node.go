package web

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// nodePage is the page of one unit on one node.
type nodePage struct {
	ID        deployments.UnitID
	Node      string
	Summary   string
	Tone      string
	State     string
	Gone      bool
	Since     time.Time
	Units     []nodeUnit
	MoreUnits int
	Notes     []fleet.Note
	Steps     []traceStep
	Report    []fleet.Note
	Health    healthView
	// Commands are commands to run for this node alone: to change its pin, or to explain its state.
	Commands []command
}

// nodeUnit is one of a node's units.
type nodeUnit struct {
	ID          deployments.UnitID
	Tone, State string
	Runs, Class string
	Here        bool
}

// traceStep is one step of a decision.
type traceStep struct {
	What, Mark, Tone, Says, Next string
}

// healthView is the health check that fails on a node; zero: none does.
type healthView struct {
	Failing bool
	Check   string
	Error   string
	Since   time.Time
}

// maxNodeUnits bounds the listed units of a node.
const maxNodeUnits = 60

// nodeOf returns the page of a unit on a node. If the unit has no such node, the error names nodes that it has, if any.
func (s *snapshot) nodeOf(u *unit, name string) (nodePage, error) {
	d, err := fleet.Explain(s.Fleet, u.ID, name)
	if err != nil {
		return nodePage{}, err
	}
	told, err := fleet.ExplainNode(s.Fleet, u.ID, name, d)
	if err != nil {
		return nodePage{}, err
	}
	i, _ := slices.BinarySearchFunc(u.Nodes, name, func(n fleet.Node,
		name string) int {
		return strings.Compare(n.Name, name)
	})
	n := &u.Nodes[i]
	v := nodePage{
		ID: u.ID, Node: name, Summary: fleet.Clean(u.Names(told.Summary), maxText), Tone: healthOf(n).String(),
		Gone:  told.Gone,
		State: fleet.Clean(n.Shown().Text, 24), Since: n.Report.Since,
		Notes: notesOf(u, told.Notes), Report: notesOf(u, told.Report),
	}
	for _, t := range told.Trace {
		step := traceStep{What: fleet.Clean(t.What, 63), Says: fleet.Clean(u.Names(t.Message), maxLines),
			Next: fleet.Clean(t.Hint, maxText)}
		switch {
		case t.Decides:
			step.Mark, step.Tone = "decided", "ok"
		case t.Blocks:
			step.Mark, step.Tone = "in the way", "bad"
		}
		v.Steps = append(v.Steps, step)
	}
	if r := n.Report; r.Reason == deployments.ReasonUnhealthy || r.State == deployments.StateUnhealthy {
		v.Health = healthView{true, fleet.Clean(r.Facts["check"], maxText), fleet.Clean(cmp.Or(r.Facts["error"],
			r.Error), maxText), r.Since}
	}
	v.Units, v.MoreUnits = s.unitsOn(name, u.ID)
	id := u.ID.String()
	_, pinned := u.Pins[name]
	if pinned {
		v.Commands = append(v.Commands, command{"end this node's pin", "kedge unpin " + id + " --node " + name})
	} else if u.Record != nil {
		v.Commands = append(v.Commands, command{"keep what this node runs",
			"kedge pin " + id + " hold --node " + name + " --reason WHY"})
	}
	v.Commands = append(v.Commands, command{"show this in a terminal", "kedge explain " + id + " " + name})
	return v, nil
}

// unitsOn returns at most maxNodeUnits units of the node called name, and how many more it has. here is the unit whose
// page is shown.
func (s *snapshot) unitsOn(name string, here deployments.UnitID) (units []nodeUnit, more int) {
	for _, u := range s.all() {
		i, found := slices.BinarySearchFunc(u.Nodes, name, func(n fleet.Node,
			name string) int {
			return strings.Compare(n.Name, name)
		})
		if !found {
			continue
		}
		if len(units) == maxNodeUnits {
			more++
			continue
		}
		row := s.nodeRow(u, &u.Nodes[i])
		units = append(units, nodeUnit{u.ID, row.Tone, row.State, row.Runs, row.Class, u.ID == here})
	}
	return units, more
}

// notesOf returns at most maxNotes of notes, with their texts cut, and pointers replaced by the releases' names.
func notesOf(u *unit, notes []fleet.Note) (all []fleet.Note) {
	for _, n := range notes {
		n.About.Text = fleet.Clean(strings.TrimSuffix(n.About.Text, ":"), 80)
		n.Says.Text = fleet.Clean(u.Names(n.Says.Text), maxLines)
		if all = append(all, n); len(all) == maxNotes {
			break
		}
	}
	return all
}
