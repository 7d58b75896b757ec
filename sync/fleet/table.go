package fleet

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/mirror"
)

// TableOptions say how a fleet is shown to a person.
type TableOptions struct {
	// Width is the terminal's, in columns; 0: no terminal, so no line is cut or wrapped.
	Width int
	Color bool
	// Nodes shows every node; else those that are not converged or have something to say.
	Nodes bool
}

// WriteTable writes the mirror's state, then each unit with its target, pin, converged nodes and rollout, and below it the nodes that
// need a look.
func WriteTable(w io.Writer, f *Fleet, opt TableOptions) error {
	p := &printer{opt: opt}
	p.mirror(f)
	if len(f.Units) == 0 {
		p.line("", p.paint(dim, "No units."))
	}
	rows := [][]cell{{{"UNIT", dim}, {"TARGET", dim}, {"PIN", dim}, {"CONVERGED", dim}, {"ROLLOUT", dim}}}
	for _, u := range f.Units {
		rows = append(rows, unitRow(u))
	}
	if len(f.Units) > 0 {
		lines := p.align("", p.withBars(rows, f.Units))
		p.raw(lines[0])
		for i, u := range f.Units {
			p.raw(lines[i+1])
			p.unit(f, u)
		}
	}
	shown := map[string]bool{} // below its unit already
	for _, u := range f.Units {
		shown[kv.DesiredKey(u.ID)], shown[kv.PinKey(u.ID)] = true, true
		for key := range f.Errors {
			shown[key] = shown[key] || strings.HasPrefix(key, kv.PinKey(u.ID)+"/")
		}
	}
	rest := slices.DeleteFunc(slices.Sorted(maps.Keys(f.Errors)), func(key string) bool { return shown[key] })
	away, text := unavailable(f)
	rest = slices.DeleteFunc(rest, func(key string) bool { return slices.Contains(away, key) })
	if len(rest) > 0 || text != "" {
		p.raw("")
		if text != "" {
			p.wrap(p.paint(red, "error")+"  ", 7, text, "")
		}
		for _, key := range rest {
			p.wrap(p.paint(red, "error")+"  ", 7, clean(key)+": "+oneLine(f.Errors[key]), "")
		}
	}
	_, err := io.WriteString(w, p.b.String())
	return err
}

// unavailable says in one text which parts of the store can't be read now, and why: mostly it is all of them, for one reason.
func unavailable(f *Fleet) (parts []string, text string) {
	var why string
	for _, kind := range slices.Sorted(maps.Keys(f.Errors)) {
		_, after, is := strings.Cut(f.Errors[kind], kv.ErrUnavailable.Error()+": ")
		if !strings.HasSuffix(kind, "/") || !is {
			continue
		}
		parts = append(parts, kind)
		if i := strings.Index(after, `": `); strings.HasPrefix(after, "Get ") && i > 0 {
			after = after[i+len(`": `):] // which of its URLs it was says nothing here
		}
		why = cmp.Or(why, oneLine(after))
	}
	if len(parts) == 0 {
		return nil, ""
	}
	return parts, "the store can't be read now, so this is what was known last of " + strings.Join(parts, ", ") + ": " + why
}

func (p *printer) mirror(f *Fleet) {
	m := f.Mirror
	if m == nil {
		p.line(p.paint(dim, "mirror")+"  ", "has taken no commit yet")
		p.raw("")
		return
	}
	head := "has taken no commit yet"
	if m.Head != "" {
		head = "at " + clean(short(m.Head))
		if m.Author != "" {
			head += " by " + authorName(m.Author)
		}
		if !m.At.IsZero() {
			head += ", " + ago(f.At.Sub(m.At))
		}
	}
	if m.Holder != "" {
		head += " (" + clean(m.Holder) + ")"
	}
	p.wrap(p.paint(dim, "mirror")+"  ", 8, head, "")
	if f.NoMirror {
		p.wrap("        ", 8, "none runs now: what is pushed or asked for waits until one does; pins are obeyed", red)
	}
	switch {
	case m.Refused != "":
		p.wrap("        "+p.paint(red, "refused ")+clean(short(m.Refused))+": ", 10, strings.TrimSpace(cleanLines(m.Error)), red)
	case m.Error != "":
		p.wrap("        ", 8, strings.TrimSpace(cleanLines(m.Error)), red)
	}
	p.raw("")
}

// convergedColumn is where unitRow counts nodes.
const convergedColumn = 3

// withBars puts a bar before each count of nodes, on terminals where there is room.
func (p *printer) withBars(rows [][]cell, units []Unit) [][]cell {
	if p.opt.Width == 0 {
		return rows
	}
	barred := make([][]cell, len(rows))
	for i, row := range rows {
		barred[i] = slices.Clone(row)
		if i > 0 {
			c := &barred[i][convergedColumn]
			c.text = bar(units[i-1].Converged, units[i-1].Live) + " " + c.text
		}
	}
	if _, total := columns(barred); total > p.opt.Width {
		return rows
	}
	return barred
}

// bar shows n of all. It is full only where n is all, and empty only where n is 0.
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

func unitRow(u Unit) []cell {
	target, pin, phase := cell{"-", dim}, cell{"-", dim}, cell{"-", dim}
	if u.Record != nil {
		target = cell{name(u, u.Record.Target), plain}
	}
	switch {
	case u.Pin != nil:
		pin = cell{pinName(u, *u.Pin), yellow}
	case len(u.Pins) > 0:
		pin = cell{count(len(u.Pins), "node"), yellow}
	}
	state := cell{fmt.Sprintf("%d/%d", u.Converged, u.Live), green}
	if u.Converged < u.Live {
		state.style = yellow
	}
	if u.Live == 0 {
		state.style = dim
	}
	if u.Gone > 0 {
		state.text += fmt.Sprintf(", %d gone", u.Gone)
	}
	if u.Record != nil && u.Record.Rollout != nil {
		phase = cell{clean(policy.SayPhase(u.Record.Rollout.Phase)), yellow}
		if r := u.Record.Rollout.Phase; r == deployments.PhaseHalted || r == deployments.PhaseBack {
			phase.style = red
		}
	}
	return []cell{{u.ID.String(), bold}, target, pin, state, phase}
}

// unit writes what is to be said below a unit's row.
func (p *printer) unit(f *Fleet, u Unit) {
	if u.Pin != nil {
		story := pinStory(*u.Pin, f.At)
		moved := gitStory(u, *u.Pin, func(n Node) bool { _, own := u.Pins[n.Name]; return !own })
		if s := join(story, moved); s != "" {
			p.wrap("  pinned ", 4, s, "")
		}
	}
	for _, node := range slices.Sorted(maps.Keys(u.Pins)) {
		pin := u.Pins[node]
		moved := gitStory(u, pin, func(n Node) bool { return n.Name == node })
		p.wrap("  "+clean(node)+" pinned ", 4, join(strings.TrimSpace(pinName(u, pin)+" "+pinStory(pin, f.At)), moved), "")
	}
	if u.Order != "" {
		p.wrap("  order:  ", 4, u.Order+", which the mirror has yet to take", yellow)
	}
	if u.Record != nil && u.Record.Rollout != nil && u.Record.Rollout.Reason != "" {
		p.wrap("  rollout: ", 4, oneLine(u.Record.Rollout.Reason), "")
	}
	if next := todo(u); next != "" {
		p.wrap("  "+p.paint(yellow, "next: "), 4, oneWord(next), "")
	}
	if u.Error != "" {
		p.wrap("  "+p.paint(red, "error")+"  ", 4, oneLine(u.Error), "")
	}
	var rows [][]cell
	var notes []string
	more := 0
	for _, n := range u.Nodes {
		r := n.Report
		note := p.names(&u, oneLine(r.Error))
		if len(r.Drift) > 0 {
			note = join(note, "differs from its release: "+clean(strings.Join(r.Drift, ", ")))
		}
		if !p.opt.Nodes && (n.Gone || n.Converged && note == "") {
			continue
		}
		if len(rows) == mostNodes && !p.opt.Nodes {
			more++
			continue
		}
		runs := "runs nothing"
		if r.State == "" {
			runs = oneLine(n.Why)
		}
		if !r.Running.IsZero() {
			runs = "runs " + name(u, r.Running)
		}
		since := ""
		if !r.Since.IsZero() {
			since = brief(f.At.Sub(r.Since))
		}
		rows = append(rows, []cell{{clean(n.Name), plain}, stateCell(n), {runs, plain}, {since, dim}})
		notes = append(notes, note)
	}
	same := 1 // nodes in a row that say the same
	for i, line := range p.align("  ", rows) {
		p.raw(line)
		switch _, tail, _ := strings.Cut(notes[i], ": "); {
		case i+1 < len(notes) && notes[i+1] == notes[i] && notes[i] != "":
			same++
			continue
		case notes[i] == "" || tail != "" && strings.Contains(oneLine(u.Error), tail): // told already, of the pin or the record
		case same == 2:
			p.wrap("    ", 4, "both: "+notes[i], yellow)
		case same > 2:
			p.wrap("    ", 4, fmt.Sprintf("all %d: %s", same, notes[i]), yellow)
		default:
			p.wrap("    ", 4, notes[i], yellow)
		}
		same = 1
	}
	if more > 0 {
		p.raw(p.paint(dim, fmt.Sprintf("  and %d more: kedge status %s --nodes", more, u.ID)))
	}
}

// todo says what an operator can do about a unit that stands; empty: nothing.
func todo(u Unit) string {
	if u.Record == nil || u.Pin != nil {
		return ""
	}
	if next := policy.Unblock(u.ID, *u.Record); next != "" || u.Record.Rollout != nil {
		return next
	}
	if slices.ContainsFunc(u.Nodes, func(n Node) bool { return !n.Gone && n.Report.State == deployments.StateQuarantined }) {
		return "push a better release, or try this one again: kedge retry " + u.ID.String()
	}
	return ""
}

// mostNodes of a unit are shown where not all are asked for.
const mostNodes = 20

func stateCell(n Node) cell {
	r := n.Report
	switch {
	case n.Gone:
		return cell{"gone", dim}
	case r.State == "":
		return cell{"unknown", yellow}
	case n.Converged:
		return cell{string(r.State), green}
	case r.State == deployments.StateConverged && r.Running == n.Want:
		return cell{"converged", yellow} // a value that nothing follows doesn't parse
	case r.State == deployments.StateConverged:
		return cell{"outdated", yellow} // it has yet to see what it should run
	case r.State == deployments.StateFetching && r.Total > 0:
		return cell{fmt.Sprintf("fetching %d%%", min(100, r.Fetched*100/r.Total)), yellow}
	case r.State == deployments.StateQuarantined || r.State == deployments.StateInvalid:
		return cell{clean(string(r.State)), red}
	}
	return cell{clean(string(r.State)), yellow}
}

// name is a release as people know it: its version, as a node that runs it reports it or else as its URL's path has it, and the
// beginning of its digest.
func name(u Unit, p deployments.Pointer) string {
	if p.IsZero() {
		return "-"
	}
	version := ""
	for _, n := range u.Nodes {
		if n.Report.Running == p && n.Report.Version != "" {
			version = clean(n.Report.Version)
			break
		}
	}
	if version == "" {
		dir, file := path.Split(p.URL)
		version = strings.TrimSuffix(file, path.Ext(file))
		if parent := path.Base(dir); strings.HasPrefix(file, "manifest.") && parent != "." && parent != "/" {
			version = parent
		}
		version = clean(version)
	}
	return clip(version, 24) + " " + p.Digest.Short()[:8]
}

func pinName(u Unit, p deployments.Pin) string {
	if p.Hold {
		return "hold"
	}
	return name(u, p.Release)
}

func pinStory(p deployments.Pin, now time.Time) string {
	var s []string
	if p.By != "" {
		s = append(s, "by "+oneLine(p.By))
	}
	switch {
	case p.Until.IsZero():
	case p.Until.After(now):
		s = append(s, "until "+p.Until.UTC().Format("2006-01-02 15:04 UTC"))
	default:
		s = append(s, "until "+p.Until.UTC().Format("2006-01-02 15:04 UTC")+", which is over")
	}
	if p.Reason != "" {
		s = append(s, "("+oneLine(p.Reason)+")")
	}
	return strings.Join(s, " ")
}

// gitStory says how far Git has moved past what a pin names, or holds on the nodes that it is for.
func gitStory(u Unit, pin deployments.Pin, holds func(Node) bool) string {
	kept := []deployments.Pointer{pin.Release}
	if pin.Hold {
		kept = running(&u, holds)
	}
	moved, known := 0, false
	for _, p := range kept {
		if n, ok := u.GitPast[p]; ok {
			moved, known = max(moved, n), true
		}
	}
	switch {
	case !known:
		return ""
	case moved == 0:
		return "Git says the same"
	}
	return "Git has named " + count(moved, "release") + " since"
}

// WriteHistory writes a unit's generations, one a line.
func WriteHistory(w io.Writer, history []mirror.History, opt TableOptions) error {
	p := &printer{opt: opt}
	if len(history) == 0 {
		p.raw("No history: no mirror has written this unit.")
		_, err := io.WriteString(w, p.b.String())
		return err
	}
	rows := [][]cell{{{"GEN", dim}, {"SINCE", dim}, {"RELEASE", dim}, {"COMMIT", dim}, {"AUTHOR", dim}, {"SUBJECT", dim}}}
	for _, h := range history {
		at := "-"
		if !h.At.IsZero() {
			at = h.At.UTC().Format("2006-01-02 15:04")
		}
		rows = append(rows, []cell{
			{strconv.FormatInt(h.Generation, 10), plain}, {at, plain}, {name(Unit{}, h.Release), bold}, {clean(h.Commit[:min(8, len(h.Commit))]), plain},
			{authorName(h.Author), plain}, {oneLine(h.Subject), dim},
		})
	}
	for i, line := range p.align("", rows, 0, 1, 2, 3) {
		p.raw(line)
		if i > 0 && history[i-1].Note != "" {
			p.wrap("     ", 5, oneLine(history[i-1].Note), yellow)
		}
	}
	_, err := io.WriteString(w, p.b.String())
	return err
}

// authorName is an author without the address.
func authorName(author string) string {
	name, _, _ := strings.Cut(oneLine(author), " <")
	return name
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// brief is a duration in its largest unit.
func brief(d time.Duration) string {
	switch d = max(0, d); {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours())/24)
}

func ago(d time.Duration) string { return brief(d) + " ago" }
