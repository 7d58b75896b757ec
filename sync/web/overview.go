package web

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/a-h/templ"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet"
)

// overview is the page of all units, or of those that a filter selects.
type overview struct {
	Path     string
	Filter   filter
	Stages   []string
	Roles    []string
	Totals   totals
	Problems []problem
	// MoreProblems is how many problems are not in Problems.
	MoreProblems int
	Nodes        []foundNode
	Rows         []unitRow
	Pager        pager
}

// totals are counts over the whole fleet.
type totals struct {
	Units, Wrong, Rollouts, Pinned int
	Live, Converged, Gone          int
	Agents                         []counted
	Mirror                         mirrorView
}

// counted is a label with a count.
type counted struct {
	Name  string
	Count int
}

// mirrorView is the mirror's state. If Known isn't set, there is none or it can't be read, and only
// Running is meaningful.
type mirrorView struct {
	Holder  string
	Running bool
	Known   bool
	Commit  commitView
	Author  string
	At      time.Time
	Refused commitView
	Error   string
}

// commitView is a commit, with a link if the dashboard knows the URL of commits.
type commitView struct {
	Short, Hash string
	URL         templ.SafeURL
}

// foundNode is a node of a unit that a search found.
type foundNode struct {
	Name  string
	ID    deployments.UnitID
	Tone  string
	State string
}

// unitRow is one unit in one line.
type unitRow struct {
	Key       string
	ID        deployments.UnitID
	Tone      string
	Bar       []share
	Live      int
	Converged int
	Gone      int
	Failing   int
	Target    string
	Progress  *progress
	Pin       string
	PinUntil  time.Time
	NodePins  int
	Change    change
	Commit    commitView
}

// maxProblems and maxFound bound what is listed above the units.
const (
	maxProblems = 12
	maxFound    = 12
)

// overviewOf returns the page of the units that pass a filter. The result is false if path isn't /
// and no unit has the filter's stage and role.
func (s *snapshot) overviewOf(path string, f filter, commitURL string) (overview, bool) {
	v := overview{Path: path, Filter: f, Totals: s.totals(commitURL)}
	v.Stages = options(s.all(), f.Stage, func(id deployments.UnitID) string { return id.Stage })
	v.Roles = options(s.all(), f.Role, func(id deployments.UnitID) string { return id.Role })
	var some []*unit
	known := path == "/"
	for _, u := range s.all() {
		known = known || f.Stage == u.ID.Stage && (f.Role == "" || f.Role == u.ID.Role)
		if f.takes(u) {
			some = append(some, u)
		}
	}
	v.Problems, v.MoreProblems = problems(some)
	v.Nodes = findNodes(some, f.Query)
	rows, pager := paged(some, f, path)
	v.Pager = pager
	for _, u := range rows {
		v.Rows = append(v.Rows, s.row(u, commitURL))
	}
	return v, known
}

// problems returns the worst problems of some units, at most maxProblems, and how many more there
// are.
func problems(units []*unit) (worst []problem, more int) {
	for _, tone := range []string{"bad", "warn"} {
		for _, u := range units {
			switch {
			case u.problem == nil || u.problem.Tone != tone:
			case len(worst) < maxProblems:
				worst = append(worst, *u.problem)
			default:
				more++
			}
		}
	}
	return worst, more
}

// findNodes returns at most maxFound nodes whose names contain one of the words of a query. It
// passes over units whose STAGE/ROLE/UNIT contains one of the words. Words like stage:prod don't
// count, except node:NAME.
func findNodes(units []*unit, query string) (nodes []foundNode) {
	var words []string
	for word := range strings.FieldsSeq(strings.ToLower(query)) {
		if kind, value := cutWord(word); (kind == "" || kind == "node") && value != "" {
			words = append(words, value)
		}
	}
	if len(words) == 0 {
		return nil
	}
	for _, u := range units {
		if slices.ContainsFunc(words, func(w string) bool { return strings.Contains(strings.ToLower(u.ID.String()), w) }) {
			continue // the search meant the unit itself
		}
		for i := range u.Nodes {
			n := &u.Nodes[i]
			if !slices.ContainsFunc(words, func(w string) bool { return strings.Contains(strings.ToLower(n.Name), w) }) {
				continue
			}
			if nodes = append(nodes, foundNode{n.Name, u.ID, healthOf(n).String(), stateOf(n)}); len(nodes) == maxFound {
				return nodes
			}
		}
	}
	return nodes
}

func (s *snapshot) totals(commitURL string) totals {
	t := totals{Units: len(s.Units), Mirror: s.mirror(commitURL)}
	for _, u := range s.all() {
		if u.is(stateWrong) {
			t.Wrong++
		}
		if u.is(stateRollout) {
			t.Rollouts++
		}
		if u.is(statePinned) {
			t.Pinned++
		}
		t.Live, t.Converged, t.Gone = t.Live+u.Live, t.Converged+u.Converged, t.Gone+u.Gone
	}
	for _, version := range slices.SortedFunc(maps.Keys(s.Agents), func(a, b string) int {
		return cmp.Or(cmp.Compare(s.Agents[b], s.Agents[a]), cmp.Compare(a, b))
	}) {
		t.Agents = append(t.Agents, counted{fleet.Clean(version, 24), s.Agents[version]})
	}
	if len(t.Agents) > 3 {
		rest := counted{Name: "others"}
		for _, c := range t.Agents[2:] {
			rest.Count += c.Count
		}
		t.Agents = append(t.Agents[:2], rest)
	}
	return t
}

func (s *snapshot) mirror(commitURL string) mirrorView {
	m := s.Mirror
	if m == nil {
		return mirrorView{Running: s.MirrorRunning}
	}
	return mirrorView{
		Holder: fleet.Clean(m.Holder, 63), Running: s.MirrorRunning, Known: true, Commit: commitOf(m.Head, commitURL),
		Author: fleet.Clean(fleet.AuthorName(m.Author), 40), At: m.At, Refused: commitOf(m.Refused, commitURL),
		Error: clipLines(m.Error),
	}
}

// commitOf returns a commit's view, with a link if commitURL is set and the hash, which isn't trusted, is valid.
func commitOf(hash, commitURL string) commitView {
	c := commitView{Short: fleet.Clean(safetext.Prefix(hash, 8), 8), Hash: fleet.Clean(hash, 64)}
	if commitURL == "" || len(hash) < 7 || strings.Trim(hash, "0123456789abcdef") != "" {
		return c
	}
	c.URL = templ.SafeURL(strings.ReplaceAll(commitURL, "{commit}", hash))
	return c
}

// maxLines bounds a long text, such as the mirror's error: clipLines counts bytes, fleet.Clean characters.
const maxLines = 2000

func clipLines(s string) string {
	s = strings.TrimSpace(fleet.CleanLines(safetext.Prefix(s, maxLines)))
	return s
}

func (s *snapshot) row(u *unit, commitURL string) unitRow {
	r := unitRow{
		Key: "u:" + u.ID.String(), ID: u.ID, Bar: u.shares, Live: u.Live, Converged: u.Converged, Gone: u.Gone,
		Failing: u.healths[failing],
		Target:  "–", Progress: u.progress, NodePins: len(u.Pins), Change: s.latestChanges.of(u.Unit), Tone: "ok",
	}
	switch {
	case u.problem != nil:
		r.Tone = u.problem.Tone
	case u.progress != nil:
		r.Tone = u.progress.tone()
	case u.Live == 0:
		r.Tone = "none"
	case u.Converged < u.Live:
		r.Tone = "info"
	}
	if !u.target.IsZero() {
		r.Target = u.name(u.target)
	}
	if u.progress != nil && u.progress.ExpectedEnd.IsZero() && u.progress.Phase == deployments.PhaseRolling {
		moving := *u.progress
		moving.ExpectedEnd = estimateEnd(s.trend.of(u.ID), u.target.Digest, moving.Following).Truncate(5 * time.Second)
		r.Progress = &moving
	}
	if u.pinned {
		if r.PinUntil = u.Pin.Until; u.Pin.Hold {
			r.Pin = "hold"
		} else {
			r.Pin = u.name(u.Pin.Release)
		}
	}
	r.Commit = commitOf(r.Change.Commit, commitURL)
	r.Change.Author = fleet.Clean(r.Change.Author, 24)
	return r
}

// percent formats n as a percentage of all, rounded down; – if all is 0. It returns <1%, not 0%, unless n is 0.
func percent(n, all int) string {
	switch p := 0; {
	case all == 0:
		return "–"
	case n == all:
		return "100%"
	default:
		p = n * 100 / all
		if p == 0 && n > 0 {
			return "<1%"
		}
		return fmt.Sprintf("%d%%", p)
	}
}
