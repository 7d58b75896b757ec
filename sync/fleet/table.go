package fleet

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet/message"
)

// TableOptions say how a fleet is shown to a person.
type TableOptions struct {
	// Width is the terminal's width in columns; 0: no terminal, so no line is cut or wrapped.
	Width int
	Color bool
	// AllNodes shows every node. Without it, a unit shows at most maxNodes nodes: live ones that aren't
	// converged or have a problem.
	AllNodes bool
	// LeftOut is how many units were left out of the fleet because they need no attention.
	LeftOut int
}

// WriteTable writes the mirror's state, then each unit with its target, pin, converged nodes and
// rollout, followed by the nodes that need attention. The errors that no unit shows come last.
func WriteTable(w io.Writer, f *Fleet, opt TableOptions) error {
	p := &printer{opt: opt}
	for _, n := range f.MirrorNotes() {
		head, indent := strings.Repeat(" ", 8), 8
		switch {
		case n.About.Tone == Dim:
			head = p.paint(Dim, n.About.Text) + "  "
		case n.About.Text != "":
			head, indent = head+p.paint(n.About.Tone, n.About.Text)+" ", 10
		}
		p.wrap(head, indent, n.Says.Text, n.Says.Tone)
	}
	p.raw("")
	switch {
	case len(f.Units) > 0:
		rows := [][]Text{header(Columns)}
		for i := range f.Units {
			rows = append(rows, f.Row(&f.Units[i]))
		}
		lines := p.align("", p.withBars(rows, f.Units), 0) // a unit's name is cut last: it is what people type
		p.raw(lines[0])
		for i := range f.Units {
			p.raw(lines[i+1])
			p.unit(f, &f.Units[i])
		}
		if opt.LeftOut > 0 {
			need := "need"
			if opt.LeftOut == 1 {
				need = "needs"
			}
			p.raw(p.paint(Dim, fmt.Sprintf("and %d more, which %s no attention", opt.LeftOut, need)))
		}
	case opt.LeftOut == 1:
		p.raw(p.paint(Good, "The one unit needs no attention."))
	case opt.LeftOut > 0:
		p.raw(p.paint(Good, fmt.Sprintf("None of %d units needs attention.", opt.LeftOut)))
	default:
		p.raw(p.paint(Dim, "No units."))
		if f.Mirror == nil && !f.MirrorRunning && f.Errors[kv.MirrorPrefix] == "" {
			p.wrap("", 0, "Next, start a mirror of the deployments repo: kedge mirror REPO\n"+
				"The steps are in kedge help install. If a mirror runs already, it has another --prefix, or another Consul.", Plain)
		}
	}
	for i, n := range f.Faults() {
		if i == 0 {
			p.raw("")
		}
		p.wrap(p.paint(n.About.Tone, n.About.Text)+"  ", 7, n.Says.Text, n.Says.Tone)
	}
	_, err := io.WriteString(w, p.b.String())
	return err
}

func header(columns []string) (row []Text) {
	for _, c := range columns {
		row = append(row, Text{c, Dim})
	}
	return row
}

// withBars returns rows with a bar before each count of converged nodes. It returns rows unchanged
// if the terminal has no room for the bars, or if the output is no terminal.
func (p *printer) withBars(rows [][]Text, units []Unit) [][]Text {
	if p.opt.Width == 0 {
		return rows
	}
	barred := make([][]Text, len(rows))
	for i, row := range rows {
		barred[i] = slices.Clone(row)
		if i > 0 {
			c := &barred[i][convergedColumn]
			c.Text = bar(units[i-1].Converged, units[i-1].Live) + " " + c.Text
		}
	}
	if _, total := columns(barred); total > p.opt.Width {
		return rows
	}
	return barred
}

// bar draws n of all, in eight characters. It is full only if n is all, and empty only if n is 0.
// If all is 0, it is blank.
func bar(n, all int) string {
	const long = 8
	full := 0
	switch {
	case all == 0:
		return strings.Repeat(" ", long)
	case n > 0:
		full = max(1, n*long/all)
	}
	return strings.Repeat("█", full) + strings.Repeat("░", long-full)
}

// unit writes what belongs below a unit's row: its notes, and the nodes that need attention or, with opt.Nodes, all
// nodes.
func (p *printer) unit(f *Fleet, u *Unit) {
	for _, n := range f.Notes(u) {
		p.wrap("  "+p.paint(n.About.Tone, n.About.Text)+" ", 4, keepCommandsWhole(n.Says.Text), n.Says.Tone)
	}
	var rows [][]Text
	var notes []string
	more := 0
	for i := range u.Nodes {
		n := &u.Nodes[i]
		if n.Gone && !p.opt.AllNodes {
			continue
		}
		row, problem := f.NodeRow(u, n)
		if !p.opt.AllNodes && n.Converged && problem == "" {
			continue
		}
		if len(rows) == maxNodes && !p.opt.AllNodes {
			more++
			continue
		}
		rows = append(rows, row)
		notes = append(notes, p.names(u, problem))
	}
	same := 1 // consecutive nodes with the same note
	for i, line := range p.align("  ", rows, 0) {
		p.raw(line)
		switch _, tail, _ := strings.Cut(notes[i], ": "); {
		case i+1 < len(notes) && notes[i+1] == notes[i] && notes[i] != "":
			same++
			continue
		// the note on the pin or the record says it already
		case notes[i] == "" || tail != "" && strings.Contains(message.OneLine(u.Error), tail):
		case same == 2:
			p.wrap("    ", 4, "both: "+notes[i], Warn)
		case same > 2:
			p.wrap("    ", 4, fmt.Sprintf("all %d: %s", same, notes[i]), Warn)
		default:
			p.wrap("    ", 4, notes[i], Warn)
		}
		same = 1
	}
	if more > 0 {
		p.raw(p.paint(Dim, fmt.Sprintf("  and %d more: kedge status %s --nodes", more, u.ID)))
	}
}

// maxNodes bounds the nodes that a unit shows, unless TableOptions.Nodes asks for all, and its pins
// of single nodes that are listed.
const maxNodes = 20

// WriteHistory writes a unit's generations, one per line, each followed by its notes.
func WriteHistory(w io.Writer, history []deployments.History, opt TableOptions) error {
	p := &printer{opt: opt}
	if len(history) == 0 {
		p.raw("No history: no mirror has written this unit.")
		_, err := io.WriteString(w, p.b.String())
		return err
	}
	rows := [][]Text{header(HistoryColumns)}
	for _, h := range history {
		rows = append(rows, HistoryRow(h))
	}
	for i, line := range p.align("", rows, 0, 1, 2, 3) {
		p.raw(line)
		if i == 0 {
			continue
		}
		for _, note := range HistoryNotes(history[i-1]) {
			p.wrap("     ", 7, note.Text, note.Tone)
		}
	}
	_, err := io.WriteString(w, p.b.String())
	return err
}
