package web

import (
	"context"
	"fmt"
	"html"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// builder puts a page together.
type builder struct{ b strings.Builder }

// markup is HTML already.
type markup string

// add formats as fmt does; every argument that isn't markup is escaped.
func (p *builder) add(format string, args ...any) {
	for i, a := range args {
		switch a.(type) {
		case markup, int, int64:
		default:
			args[i] = html.EscapeString(fleet.CleanLines(fmt.Sprint(a)))
		}
	}
	fmt.Fprintf(&p.b, format, args...)
}

// render is what add adds.
func render(format string, args ...any) markup {
	p := &builder{}
	p.add(format, args...)
	return markup(p.b.String())
}

// classes are the tones' names in the style sheet.
var classes = [...]markup{fleet.Plain: "plain", fleet.Bold: "bold", fleet.Dim: "dim", fleet.Good: "good", fleet.Warn: "warn", fleet.Bad: "bad"}

// to is the path of a page.
func to(segments ...string) markup {
	path := ""
	for _, s := range segments {
		path += "/" + url.PathEscape(s)
	}
	return markup(html.EscapeString(path))
}

func unitPath(id deployments.UnitID, more ...string) markup {
	return to(append([]string{id.Stage, id.Role, id.Unit}, more...)...)
}

// document is a whole page around its main part.
func document(path, main string) string {
	p := &builder{}
	segments := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	title := "kedge"
	if len(segments) > 0 {
		title = strings.Join(segments, "/") + " · kedge"
	}
	p.add(`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>%s</title>
<link rel="icon" href="/-/kedge.svg">
<link rel="stylesheet" href="/-/kedge.css">
<script src="/-/kedge.js" defer></script>
<noscript><meta http-equiv="refresh" content="10"></noscript>
</head>
<body>
<header><nav><a href="/">kedge</a>`, title)
	for i, s := range segments {
		p.add(` / <a href="%s">%s</a>`, to(segments[:i+1]...), s)
	}
	p.add(`</nav><span id="state"></span></header>
<main id="main">%s</main>
</body>
</html>
`, markup(main))
	return p.b.String()
}

// draw gives the main part of the page at a path: of all units, those of a stage or role, one unit, or one of its nodes.
func (w *Web) draw(ctx context.Context, path string, f *fleet.Fleet, known *past) (code int, main string) {
	p := &builder{}
	segments := strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
	missing := func(why any) (int, string) {
		p.notes(nil, f.Faults()) // which may be the reason
		p.add(`<p class="bad">%s</p>`, why)
		return http.StatusNotFound, p.b.String()
	}
	switch {
	case f == nil:
		p.add(`<p class="bad">%s</p>`, notRead)
		return http.StatusServiceUnavailable, p.b.String()
	case len(segments) < 3:
		segments = append(segments, "", "")
		some := fleet.Filter{Stage: segments[0], Role: segments[1]}.Units(f)
		if len(some) == 0 && segments[0] != "" {
			return missing("no unit of " + strings.TrimSuffix(segments[0]+"/"+segments[1], "/"))
		}
		p.fleet(f, some)
	case len(segments) < 5:
		id := deployments.UnitID{Stage: segments[0], Role: segments[1], Unit: segments[2]}
		u, err := f.Unit(id)
		if err != nil {
			return missing(err)
		}
		if len(segments) == 3 {
			known.of(ctx, w.c.Store, u)
			p.unit(f, u, known)
			break
		}
		if err := p.node(f, u, segments[3]); err != nil {
			return missing(err)
		}
	default:
		return missing("no page here: want /STAGE/ROLE/UNIT/NODE, or the beginning of that")
	}
	return http.StatusOK, p.b.String()
}

func text(t fleet.Text) markup {
	return render(`<span class="%s">%s</span>`, classes[t.Tone], t.Text)
}

// notes are a list of what is told about what.
func (p *builder) notes(u *fleet.Unit, all []fleet.Note) {
	if len(all) == 0 {
		return
	}
	p.add(`<dl>`)
	for _, n := range all {
		says := n.Says
		if u != nil {
			says.Text = u.Names(says.Text)
		}
		p.add(`<dt>%s</dt><dd>%s</dd>`, text(n.About), text(says))
	}
	p.add(`</dl>`)
}

// fleet draws some of f's units, each with its nodes and what is wrong with them.
func (p *builder) fleet(f *fleet.Fleet, some []*fleet.Unit) {
	p.notes(nil, f.Faults())
	p.notes(nil, f.MirrorNotes())
	if len(some) == 0 {
		p.add(`<p class="dim">No units.</p>`)
	}
	for _, u := range some {
		p.add(`<section><h2><a href="%s">%s</a></h2>`, unitPath(u.ID), u.ID)
		p.summary(f, u)
		p.tiles(u)
		p.notes(u, f.Notes(u))
		p.nodes(f, u, mostTroubled, func(n *fleet.Node, beside string) bool { return !n.Gone && (!n.Converged || beside != "") })
		p.add(`</section>`)
	}
}

// summary is a unit's row of kedge status, without its name.
func (p *builder) summary(f *fleet.Fleet, u *fleet.Unit) {
	p.add(`<p class="summary">`)
	for i, t := range f.Row(u) {
		if i > 0 && t.Text != "-" {
			p.add(`<span><small>%s</small> %s</span> `, strings.ToLower(fleet.Columns[i]), text(t))
		}
	}
	p.add(`</p>`)
}

const (
	// mostTiles is of how many nodes each gets a tile of its own; of more, a bar shows how many are in which state.
	mostTiles = 500
	// mostTroubled nodes of a unit are told of in a list of units, and mostNodes on its own page.
	mostTroubled = 20
	mostNodes    = 2000
)

func (p *builder) tiles(u *fleet.Unit) {
	if len(u.Nodes) <= mostTiles {
		p.add(`<p class="tiles">`)
		for i := range u.Nodes {
			n := &u.Nodes[i]
			shown := n.Shown()
			p.add(`<a class="%s" href="%s" title="%s: %s"></a>`, classes[shown.Tone], unitPath(u.ID, n.Name), n.Name, shown.Text)
		}
		p.add(`</p>`)
		return
	}
	counts := map[fleet.Tone]int{}
	for i := range u.Nodes {
		counts[u.Nodes[i].Shown().Tone]++
	}
	p.add(`<svg class="bar" viewBox="0 0 %d 1" preserveAspectRatio="none" role="img" aria-label="%d of %d converged">`, len(u.Nodes), u.Converged, u.Live)
	x := 0
	for _, t := range []fleet.Tone{fleet.Good, fleet.Warn, fleet.Bad, fleet.Dim} {
		p.add(`<rect class="%s" x="%d" width="%d" height="1"/>`, classes[t], x, counts[t])
		x += counts[t]
	}
	p.add(`</svg>`)
}

// nodes lists a unit's nodes, at most so many: those that the first test takes, then those that the next takes of the rest.
func (p *builder) nodes(f *fleet.Fleet, u *fleet.Unit, most int, tests ...func(n *fleet.Node, beside string) bool) {
	rows := make([][]string, len(tests))
	shown := 0
	for i := range u.Nodes {
		n := &u.Nodes[i]
		row, beside := f.NodeRow(u, n)
		which := slices.IndexFunc(tests, func(takes func(*fleet.Node, string) bool) bool { return takes(n, beside) })
		if which < 0 {
			continue
		}
		if shown++; len(rows[which]) == most {
			continue
		}
		line := &builder{}
		line.add(`<tr><td><a href="%s">%s</a></td>`, unitPath(u.ID, n.Name), row[0].Text)
		for _, t := range row[1:] {
			line.add(`<td>%s</td>`, text(t))
		}
		line.add(`<td class="wide warn">%s</td></tr>`, u.Names(beside))
		rows[which] = append(rows[which], line.b.String())
	}
	if shown == 0 {
		return
	}
	all := slices.Concat(rows...)
	all = all[:min(len(all), most)]
	p.add(`<table>%s</table>`, markup(strings.Join(all, "")))
	if shown > len(all) {
		p.add(`<p class="dim">and %d more</p>`, shown-len(all))
	}
}

// firstProse is the column of a history from which on people wrote what stands there.
const firstProse = 5

// unit draws all there is of one unit.
func (p *builder) unit(f *fleet.Fleet, u *fleet.Unit, known *past) {
	p.notes(nil, f.Faults())
	p.add(`<h1>%s</h1>`, u.ID)
	p.summary(f, u)
	p.tiles(u)
	p.notes(u, f.Notes(u))
	if r := u.Record; r != nil {
		p.add(`<dl><dt>target</dt><dd><code>%s</code></dd>`, r.Target)
		if !r.Stable.IsZero() && r.Stable != r.Target {
			p.add(`<dt>stable</dt><dd><code>%s</code></dd>`, r.Stable)
		}
		p.add(`<dt>generation</dt><dd>%d</dd>`, r.Generation)
		if r.Commit != "" {
			p.add(`<dt>commit</dt><dd><code>%s</code></dd>`, r.Commit)
		}
		p.add(`</dl>`)
	}
	p.add(`<h2>Nodes</h2>`)
	if len(u.Nodes) == 0 {
		p.add(`<p class="dim">None has reported.</p>`)
	}
	p.nodes(f, u, mostNodes,
		func(n *fleet.Node, beside string) bool { return n.Gone || !n.Converged || beside != "" },
		func(*fleet.Node, string) bool { return true })
	p.add(`<h2>History</h2>`)
	switch {
	case known.err != nil:
		p.add(`<p class="bad">%s</p>`, known.err)
	case len(known.rows) == 0:
		p.add(`<p class="dim">None: no mirror has written this unit.</p>`)
	default:
		p.add(`<table><tr>`)
		for _, c := range fleet.HistoryColumns {
			p.add(`<th>%s</th>`, strings.ToLower(c))
		}
		p.add(`</tr>`)
		for _, row := range known.rows {
			p.add(`<tr>`)
			for i, t := range row {
				class := markup("")
				if i >= firstProse {
					class = ` class="wide"`
				}
				p.add(`<td%s>%s</td>`, class, text(t))
			}
			p.add(`</tr>`)
		}
		p.add(`</table>`)
	}
}

// node draws why one node runs what it runs.
func (p *builder) node(f *fleet.Fleet, u *fleet.Unit, name string) error {
	d, err := fleet.Explain(f, u.ID, name)
	if err != nil {
		return err
	}
	t, err := fleet.Tell(f, u.ID, name, d)
	if err != nil {
		return err
	}
	p.add(`<h1>%s <small>on</small> %s</h1><p>It %s.</p>`, u.ID, name, u.Names(t.Verdict))
	p.notes(u, t.Notes)
	p.add(`<h2>What was looked at, in order</h2><table>`)
	for _, s := range t.Trace {
		mark, class := "", markup("plain")
		switch {
		case s.Decides:
			mark, class = "decided", "good"
		case s.Blocks:
			mark, class = "in the way", "bad"
		}
		p.add(`<tr><td>%s</td><td class="%s">%s</td><td class="wide">%s%s</td></tr>`, s.What, class, mark, u.Names(s.Says), unblock(s))
	}
	head := "What it reports"
	if t.Gone {
		head = "What it reported last"
	}
	p.add(`</table><h2>%s</h2>`, head)
	p.notes(u, t.Report)
	return nil
}

func unblock(s fleet.Step) markup {
	if s.Hint == "" {
		return ""
	}
	return render(`<br/><span class="warn">to change it:</span> %s`, s.Hint)
}
