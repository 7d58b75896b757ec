package web

import (
	"cmp"
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/a-h/templ"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// rendered is a page in HTML, in blocks, so that only changed blocks are sent.
type rendered struct {
	code   int
	key    string // path and query
	title  string
	source string
	tab    string
	live   string
	crumbs []crumb
	// tag distinguishes renderings of a page.
	tag string
	// expires is when a rendering that is cached may be out of date though its snapshot isn't; zero: never.
	expires time.Time
	// html has the HTML of each element, by ID. lists has the IDs of elements that come and go, in order, by the
	// ID of their parent. fixed are the IDs of all others.
	html   map[string]string
	fixed  []string
	lists  map[string][]string
	layout func(*rendered) templ.Component
}

type crumb struct {
	name string
	href templ.SafeURL
	last bool
}

// add renders an element that always exists.
func (r *rendered) add(id string, c templ.Component) {
	r.fixed = append(r.fixed, id)
	r.html[id] = markup(c)
}

// addTo renders an element, and appends it to a list.
func (r *rendered) addTo(list, id string, c templ.Component) {
	r.lists[list] = append(r.lists[list], id)
	r.html[id] = markup(c)
}

// markup returns a component's HTML, without control characters and those that change a line's
// direction. Line breaks stay.
func markup(c templ.Component) string {
	var b strings.Builder
	if err := c.Render(context.Background(), &b); err != nil { // a strings.Builder never fails
		return ""
	}
	return fleet.CleanLines(b.String())
}

func (r *rendered) slot(id string) templ.Component { return templ.Raw(r.html[id]) }

func (r *rendered) list(name string) templ.Component {
	var b strings.Builder
	for _, id := range r.lists[name] {
		b.WriteString(r.html[id])
	}
	return templ.Raw(b.String())
}

// setTag sets r.tag, a hash of the page's elements, code and title, and returns r.
func (r *rendered) setTag() *rendered {
	h := fnv.New64a()
	for _, id := range r.fixed {
		fmt.Fprintf(h, "%s\x00%s\x00", id, r.html[id])
	}
	for _, list := range slices.Sorted(maps.Keys(r.lists)) {
		for _, id := range r.lists[list] {
			fmt.Fprintf(h, "%s\x00%s\x00", id, r.html[id])
		}
	}
	fmt.Fprint(h, r.code, r.title)
	r.tag = fmt.Sprintf("%016x", h.Sum64())
	return r
}

// maxPages bounds the cached pages of one snapshot.
const maxPages = 128

// render returns the page at a path for snapshot s; s is nil if the store wasn't read yet. It
// caches the page in s, until the page expires, if the page stays the same as long as s does.
func (w *Web) render(ctx context.Context, s *snapshot, path string, query url.Values) *rendered {
	f := filterOf(query)
	key := f.address("/" + path)
	if s != nil {
		s.mu.Lock()
		known := s.pages[key]
		s.mu.Unlock()
		if known != nil && (known.expires.IsZero() || time.Now().Before(known.expires)) {
			return known
		}
	}
	r := &rendered{code: http.StatusOK, key: key, source: w.source(), tab: "fleet", html: map[string]string{},
		lists: map[string][]string{}}
	r.live = f.address("/-/live/" + strings.TrimPrefix((&url.URL{Path: "/" + path}).EscapedPath(), "/"))
	lasting := w.draw(ctx, s, r, path, f)
	r.setTag()
	if s != nil && lasting {
		s.mu.Lock()
		if s.pages[key] != nil || len(s.pages) < maxPages {
			s.pages[key] = r
		}
		s.mu.Unlock()
	}
	w.remember(r)
	return r
}

// draw renders the page at path into r. It reports whether the page stays the same as long as the
// snapshot does, or until r.expires.
func (w *Web) draw(ctx context.Context, s *snapshot, r *rendered, path string, f filter) bool {
	segments := strings.FieldsFunc(path, func(c rune) bool { return c == '/' })
	if path == "-/overrides" {
		r.tab, segments = "overrides", nil
	}
	for i, name := range segments {
		r.crumbs = append(r.crumbs, crumb{fleet.Clean(name, 80), templ.SafeURL(pagePath(segments[:i+1]...)),
			i == len(segments)-1})
	}
	name := cmp.Or(strings.Join(segments, "/"), map[string]string{"fleet": "Fleet",
		"overrides": "Pins and freezes"}[r.tab])
	r.title = fleet.Clean(strings.TrimSuffix(name+" · kedge · "+r.source, " · "), 300)
	if s == nil {
		r.setErrorPage(http.StatusServiceUnavailable, nil, notRead)
		return false
	}
	r.add("away", away(s.stale()))
	switch {
	case r.tab == "overrides":
		r.overrides(s.at(time.Now()).overridesOf(w.c.CommitURL))
		return false // windows open and close without a change in the store
	case len(segments) < 3:
		if len(segments) > 0 {
			f.Stage = segments[0]
		}
		if len(segments) > 1 {
			f.Role = segments[1]
		}
		v, known := s.overviewOf(pagePath(segments...), f, w.c.CommitURL)
		if !known {
			r.setErrorPage(http.StatusNotFound, s, "There is no unit of "+strings.Join(segments, "/")+".")
			break
		}
		r.overview(v, s.fleetProblems())
	case len(segments) < 5:
		id := deployments.UnitID{Stage: segments[0], Role: segments[1], Unit: segments[2]}
		u := s.find(id)
		if u == nil {
			_, err := s.Unit(id)
			r.setErrorPage(http.StatusNotFound, s, sentence(err))
			break
		}
		if len(segments) == 3 {
			past := w.history(ctx, u.Unit, s.storeError != "")
			v := s.unitOf(u, pagePath(segments...), f, past, w.c.CommitURL)
			r.unit(v)
			r.expires = past.expires
			return v.Unread == ""
		}
		v, err := s.at(time.Now()).nodeOf(u, segments[3])
		if err != nil {
			r.setErrorPage(http.StatusNotFound, s, sentence(err))
			break
		}
		r.layout = func(r *rendered) templ.Component { return nodeLayout(v, r) }
		r.add("node", nodeView(v))
		return false // it shows elapsed times
	default:
		r.setErrorPage(http.StatusNotFound, s,
			"There is no page here: want /STAGE/ROLE/UNIT/NODE, or the beginning of that.")
	}
	return true
}

// at returns the snapshot as seen at a later time, with the same counts.
func (s *snapshot) at(now time.Time) *snapshot {
	f := *s.Fleet
	f.At = now
	later := &snapshot{Fleet: &f, storeError: s.storeError, trend: s.trend, latestChanges: s.latestChanges, units: s.all()}
	later.once.Do(func() {})
	return later
}

// stale returns why the snapshot may be out of date or incomplete; empty: it isn't, as far as is
// known.
func (s *snapshot) stale() string {
	return fleet.Clean(cmp.Or(s.IncompleteText(), s.storeError), 2*maxText)
}

// waitForMirror says what waits while no mirror runs.
const waitForMirror = "commits, orders, and pins of units with a rollout, wait until one does"

// fleetProblems returns the problems that belong to no unit: of the mirror, of faulty keys, of
// nodes that no unit is for. It leaves out what stale says.
func (s *snapshot) fleetProblems() (all []problem) {
	for _, n := range s.faults() {
		tone := "bad"
		if n.About.Tone == fleet.Warn {
			tone = "warn"
		}
		if n.Says.Text != fleet.Clean(s.IncompleteText(), 2*maxText) {
			all = append(all, problem{Tone: tone, What: n.About.Text, Why: n.Says.Text})
		}
	}
	if m := s.Mirror; m != nil {
		if !s.MirrorRunning {
			all = append(all, problem{Tone: "bad", What: "no mirror runs",
				Why: waitForMirror})
		}
		switch {
		case m.Refused != "":
			all = append(all, problem{Tone: "bad", What: "refused " + commitOf(m.Refused, "").Short, Why: clipLines(m.Error)})
		case m.Error != "":
			all = append(all, problem{Tone: "bad", What: "mirror", Why: clipLines(m.Error)})
		}
	}
	return all
}

// setErrorPage makes r an error page with a text and an HTTP status. s is nil if the store wasn't
// read yet.
func (r *rendered) setErrorPage(code int, s *snapshot, text string) {
	r.code = code
	if s == nil {
		r.add("away", away(""))
	}
	var faults []fleet.Note
	if s != nil {
		faults = s.faults() // they may be the reason
	}
	r.layout = func(r *rendered) templ.Component { return r.slot("message") }
	r.add("message", nothing(text, faults))
}

// addIfEmpty adds a row with a text to a list that has no rows. The text is filtered if the filter may leave rows out,
// or else none.
func (r *rendered) addIfEmpty(list string, f filter, none, filtered string) {
	switch {
	case len(r.lists[list]) > 0:
	case f.active():
		r.addTo(list, "none", noRows(filtered))
	default:
		r.addTo(list, "none", noRows(none))
	}
}

func (r *rendered) overview(v overview, faults []problem) {
	r.layout = func(r *rendered) templ.Component { return overviewLayout(v, r) }
	r.add("totals", totalsView(v.Totals))
	r.add("problems", problemsView(v, faults))
	r.add("found", foundView(v.Nodes))
	r.add("pager", pages(v.Pager))
	r.lists["rows"] = nil
	for _, row := range v.Rows {
		r.addTo("rows", row.Key, unitRowView(row))
	}
	r.addIfEmpty("rows", v.Filter, "No units yet: a mirror takes them from Git (kedge mirror REPO).",
		"No unit passes the filter.")
}

func (r *rendered) unit(v unitPage) {
	r.layout = func(r *rendered) templ.Component { return unitLayout(v, r) }
	r.add("head", unitHead(v))
	r.add("problem", unitProblem(v.Problem))
	r.add("steps", stepsView(v))
	r.add("legend", legendView(v.Map))
	r.add("chart", chartView(v.Chart))
	r.add("facts", factsView(v))
	r.add("pager", pages(v.Pager))
	r.add("history", historyView(v))
	r.lists["cells"], r.lists["rows"] = nil, nil
	for _, row := range v.Map.Rows {
		r.addTo("cells", row.Key, mapRowView(row))
	}
	for _, n := range v.Nodes {
		r.addTo("rows", n.Key, nodeRowView(n))
	}
	r.addIfEmpty("rows", v.Filter, "No node has reported.", "No node passes the filter.")
}

func (r *rendered) overrides(v overrides) {
	r.layout = func(r *rendered) templ.Component { return overridesLayout(v, r) }
	r.add("pins", pinsView(v))
	r.add("frozen", frozenView(v))
	r.add("windows", windowsView(v))
	r.add("mirror", mirrorSection(v))
}

// sentence returns an error's text as a sentence, with a capital and a full stop.
func sentence(err error) string {
	text := fleet.Clean(err.Error(), 2*maxText)
	return strings.ToUpper(text[:1]) + text[1:] + "."
}

// pagePath returns the path of a page.
func pagePath(segments ...string) string {
	path := "/"
	for i, s := range segments {
		if i > 0 {
			path += "/"
		}
		path += url.PathEscape(s)
	}
	return path
}

func unitPath(id deployments.UnitID, more ...string) templ.SafeURL {
	return templ.SafeURL(pagePath(append([]string{id.Stage, id.Role, id.Unit}, more...)...))
}
