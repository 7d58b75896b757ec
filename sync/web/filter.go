package web

import (
	"cmp"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// filter selects units, or a unit's nodes. It is the query of a page's URL.
type filter struct {
	Stage, Role, State string
	// Query is a search: words that must all match, such as web-1, stage:prod, version:1.4.
	Query string
	Page  int // from 1
}

// maxQuery bounds a search, in characters.
const maxQuery = 200

func filterOf(q url.Values) filter {
	page, _ := strconv.Atoi(q.Get("page"))
	return filter{
		Stage: fleet.Clean(q.Get("stage"), 63), Role: fleet.Clean(q.Get("role"), 63), State: fleet.Clean(q.Get("state"), 24),
		Query: fleet.Clean(q.Get("q"), maxQuery), Page: min(max(1, page), 1000),
	}
}

// values returns the filter as URL parameters.
func (f filter) values() url.Values {
	v := url.Values{}
	for name, value := range map[string]string{"stage": f.Stage, "role": f.Role, "state": f.State, "q": f.Query} {
		if value != "" {
			v.Set(name, value)
		}
	}
	if f.Page > 1 {
		v.Set("page", strconv.Itoa(f.Page))
	}
	return v
}

// address returns a page's URL with the filter.
func (f filter) address(path string) string {
	if v := f.values().Encode(); v != "" {
		return path + "?" + v
	}
	return path
}

// active reports whether the filter may leave anything out.
func (f filter) active() bool { return f.Stage+f.Role+f.State+f.Query != "" }

// States of units that a filter can select, in addition to the states of nodes.
const (
	stateWrong     = "wrong"
	stateRollout   = "rollout"
	stateFrozen    = "frozen"
	statePinned    = "pinned"
	stateBehind    = "behind"
	stateConverged = "converged"
)

var unitStates = []string{stateWrong, stateRollout, stateFrozen, statePinned, stateBehind, stateConverged}

// is reports whether a unit is in the given one of unitStates. For any other state, it reports whether a live node that
// isn't converged is in that state.
func (u *unit) is(state string) bool {
	switch state {
	case stateWrong:
		return u.problem != nil
	case stateRollout:
		return u.progress != nil
	case stateFrozen:
		return u.frozen()
	case statePinned:
		return u.pinned || len(u.Pins) > 0
	case stateBehind:
		return u.Converged < u.Live
	case stateConverged:
		return u.Live > 0 && u.Converged == u.Live
	}
	return u.states[state] > 0
}

// frozen reports whether a freeze window delays a unit's rollout.
func (u *unit) frozen() bool {
	return u.progress != nil && (u.progress.Phase == deployments.PhaseFrozen ||
		u.Record.Rollout.Reason == deployments.ReasonFrozen)
}

// takes reports whether a unit passes the filter.
func (f filter) takes(u *unit) bool {
	if f.Stage != "" && f.Stage != u.ID.Stage || f.Role != "" && f.Role != u.ID.Role || f.State != "" && !u.is(f.State) {
		return false
	}
	for word := range strings.FieldsSeq(strings.ToLower(f.Query)) {
		if !u.matches(word) {
			return false
		}
	}
	return true
}

// cutWord divides a word of the search into its kind, such as stage, and its value. kind is empty
// for a plain word. A colon at the word's end is dropped.
func cutWord(word string) (kind, value string) {
	kind, value, _ = strings.Cut(word, ":")
	if value == "" {
		return "", kind
	}
	return kind, value
}

// matches reports whether a unit matches a word of the search.
func (u *unit) matches(word string) bool {
	kind, value := cutWord(word)
	has := func(s string) bool { return strings.Contains(strings.ToLower(s), value) }
	version := func() bool {
		return slices.ContainsFunc(u.shares, func(s share) bool { return has(s.Name) }) || has(u.name(u.target))
	}
	node := func() bool { return slices.ContainsFunc(u.Nodes, func(n fleet.Node) bool { return has(n.Name) }) }
	switch kind {
	case "stage":
		return has(u.ID.Stage)
	case "role":
		return has(u.ID.Role)
	case "unit":
		return has(u.ID.Unit)
	case "version":
		return version()
	case "node":
		return node()
	case "state":
		return u.is(value)
	}
	return has(u.ID.String()) || version() || node()
}

// takesNode reports whether one of a unit's nodes passes the filter.
func (f filter) takesNode(u *unit, n *fleet.Node) bool {
	if f.State != "" && f.State != stateOf(n) && f.State != healthOf(n).String() {
		return false
	}
	for word := range strings.FieldsSeq(strings.ToLower(f.Query)) {
		if !u.matchesNode(n, word) {
			return false
		}
	}
	return true
}

// matchesNode reports whether one of a unit's nodes matches a word of the search. A word that
// chooses units matches all nodes of such a unit.
func (u *unit) matchesNode(n *fleet.Node, word string) bool {
	kind, value := cutWord(word)
	has := func(s string) bool { return strings.Contains(strings.ToLower(s), value) }
	runs := ""
	if !n.Report.Running.IsZero() {
		runs = u.name(n.Report.Running)
	}
	switch kind {
	case "stage", "role", "unit":
		return u.matches(word)
	case "version":
		return has(runs)
	case "node":
		return has(n.Name)
	case "state":
		return stateOf(n) == value
	}
	return has(n.Name) || has(runs)
}

// pageRows is how many rows a page lists: each has at most two links, and a page should have at most 200 stops of
// the Tab key.
const pageRows = 75

// pager says which page of a list is shown.
type pager struct {
	From, To, All  int    // the first row shown (from 1), the last, and how many rows there are
	Previous, Next string // addresses; empty: there is none
}

// paged returns the rows of the filter's page, and what to show about the other pages. A page number beyond the last
// page selects the last page. path is the list's URL path.
func paged[T any](rows []T, f filter, path string) ([]T, pager) {
	pages := max(1, (len(rows)+pageRows-1)/pageRows)
	f.Page = min(f.Page, pages)
	from := (f.Page - 1) * pageRows
	to := min(len(rows), from+pageRows)
	p := pager{From: min(from+1, to), To: to, All: len(rows)}
	turn := func(by int) string {
		other := f
		other.Page += by
		return other.address(path)
	}
	if f.Page > 1 {
		p.Previous = turn(-1)
	}
	if f.Page < pages {
		p.Next = turn(1)
	}
	return rows[from:to], p
}

// maxOptions bounds the options of a selection, the chosen one aside.
const maxOptions = 100

// options returns the first maxOptions distinct values of a field, and the chosen one, sorted.
func options(units []*unit, chosen string, field func(deployments.UnitID) string) []string {
	seen := map[string]bool{}
	var all []string
	for _, u := range units {
		if v := field(u.ID); !seen[v] && len(all) < maxOptions {
			seen[v] = true
			all = append(all, v)
		}
	}
	if chosen != "" && !seen[chosen] {
		all = append(all, chosen)
	}
	slices.SortFunc(all, cmp.Compare[string])
	return all
}
