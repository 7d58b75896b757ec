package fleet

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"kedge/deployments"
	"kedge/policy"
)

// Explain answers why a node runs what it runs of a unit.
func Explain(f *Fleet, id deployments.UnitID, node string) (policy.Decision, error) {
	u, n, err := f.find(id, node)
	if err != nil {
		return policy.Decision{}, err
	}
	return policy.Resolve(f.facts(u, *n)), nil
}

// find gives a unit, and what one of its nodes reports.
func (f *Fleet) find(id deployments.UnitID, node string) (*Unit, *Node, error) {
	i := slices.IndexFunc(f.Units, func(u Unit) bool { return u.ID == id })
	if i < 0 {
		return nil, nil, fmt.Errorf("no unit %s: nothing in the store speaks of it; see kedge status", id)
	}
	u := &f.Units[i]
	j := slices.IndexFunc(u.Nodes, func(n Node) bool { return n.Name == node })
	if j < 0 {
		var names []string
		for _, n := range u.Nodes {
			names = append(names, n.Name)
		}
		if len(names) == 0 {
			return nil, nil, fmt.Errorf("no node %s: no node of %s/%s has ever reported; is its agent running, with this stage and role?", node, id.Stage, id.Role)
		}
		const shown = 10
		more := ""
		if len(names) > shown {
			more = fmt.Sprintf(" and %d more", len(names)-shown)
			names = names[:shown]
		}
		return nil, nil, fmt.Errorf("no node %s of %s has reported: there are %s%s", node, id, strings.Join(names, ", "), more)
	}
	return u, &u.Nodes[j], nil
}

// WriteExplain writes a decision's whole chain, and what the node says of itself.
func WriteExplain(w io.Writer, f *Fleet, id deployments.UnitID, node string, d policy.Decision, opt TableOptions) error {
	u, n, err := f.find(id, node)
	if err != nil {
		return err
	}
	p := &printer{opt: opt}
	verdict := map[policy.Action]string{policy.ActKeep: "keeps what it runs", policy.ActHold: "holds what it runs"}[d.Action]
	if verdict == "" {
		verdict = "should run " + name(*u, d.Target)
	}
	p.line(p.paint(bold, id.String()), " on "+p.paint(bold, clean(node))+" "+verdict)
	p.wrap("  because  ", 11, oneLine(d.Why), "")
	if d.Invalid != nil {
		p.wrap("  "+p.paint(red, "but")+"      ", 11, oneLine(d.Invalid.Error()), red)
	}
	if moved := pastPin(u, n, d.Source); moved != "" {
		p.wrap("  besides  ", 11, moved, "")
	}
	if u.Order != "" {
		p.wrap("  order    ", 11, u.Order+", which the mirror has yet to take", "")
	}
	if !d.Stage.IsZero() {
		p.wrap("  staged   ", 11, "has "+name(*u, d.Stage)+" ready for when it is admitted", "")
	}
	if !d.Recheck.IsZero() {
		p.wrap("  until    ", 11, d.Recheck.UTC().Format("2006-01-02 15:04:05 UTC"), "")
	}
	p.raw("")
	p.raw(p.paint(dim, "What was looked at, in order; > decided"))
	wide := 0
	for _, s := range d.Trace {
		wide = max(wide, utf8.RuneCountInString(clean(s.What)))
	}
	for _, s := range d.Trace {
		mark := "  "
		if s.Decides {
			mark = p.paint(green, ">") + " "
		}
		what := clean(s.What)
		p.wrap(mark+what+strings.Repeat(" ", wide-utf8.RuneCountInString(what)+2), wide+4, oneLine(s.Says), "")
		if s.Unblock != "" {
			p.wrap(strings.Repeat(" ", wide+4)+p.paint(yellow, "to change it: "), wide+6, oneLine(s.Unblock), "")
		}
	}
	p.raw("")
	p.raw(p.paint(dim, "What the node reports"))
	p.report(f, u, n)
	_, err = io.WriteString(w, p.b.String())
	return err
}

// pastPin says how far Git has moved past the pin that decided over n; empty: none did.
func pastPin(u *Unit, n *Node, from policy.Source) string {
	this := func(other Node) bool { return other.Name == n.Name }
	switch pin, own := u.Pins[n.Name]; {
	case from == policy.FromNodePin && own:
		return gitStory(*u, pin, this)
	case from == policy.FromUnitPin && u.Pin != nil:
		return gitStory(*u, *u.Pin, this)
	}
	return ""
}

func (p *printer) report(f *Fleet, u *Unit, n *Node) {
	r := n.Report
	state := stateCell(*n)
	if n.Gone {
		state.text = "gone: its session has ended; what follows is what it said last"
	}
	rows := [][2]string{{"state", p.paint(state.style, state.text)}}
	add := func(what, says string) {
		if says != "" {
			rows = append(rows, [2]string{what, says})
		}
	}
	if !r.Since.IsZero() {
		add("since", r.Since.UTC().Format("2006-01-02 15:04:05 UTC")+", "+ago(f.At.Sub(r.Since)))
	}
	add("runs", name(*u, r.Running))
	if r.Want != n.Want && !r.Want.IsZero() && !n.Want.IsZero() {
		add("wants", name(*u, r.Want)+": it has yet to see the newest")
	}
	if r.Why != n.Why {
		add("why", oneLine(r.Why))
	}
	for _, d := range r.Quarantined {
		add("failed", d.Short()+" failed here, and stays out until another is named, or kedge retry "+u.ID.String())
	}
	add("error", oneLine(r.Error))
	add("differs", clean(strings.Join(r.Drift, ", ")))
	for _, row := range rows {
		p.wrap(fmt.Sprintf("  %-9s", row[0]), 11, row[1], "")
	}
}
