package web

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet"
)

// unitPage is the page of one unit.
type unitPage struct {
	Path    string
	Row     unitRow
	Problem *problem
	// Freeze says until when the unit's rollouts are frozen, or from when they will be; "": not within fleet.FreezeAhead,
	// or Steps say so.
	Freeze   string
	Notes    []fleet.Note
	Steps    []step
	Releases []releaseLine
	Map      nodeMap
	Chart    chart
	Commands []command
	Filter   filter
	States   []counted
	Nodes    []nodeRow
	Pager    pager
	History  []historyRow
	// Unread is why the history could not be read.
	Unread string
}

// step is a phase of a rollout, with what it waits for.
type step struct {
	Name string
	// State is done, now, failed or todo.
	State       string
	Note        string
	Since       time.Time
	ExpectedEnd time.Time
}

// releaseLine is a release that a unit goes to, or may go back to.
type releaseLine struct {
	What, Name, Class string
	Pointer           string
}

// command is a command line and what it does.
type command struct{ Does, Line string }

// nodeRow is one of a unit's nodes in one line.
type nodeRow struct {
	Key, Name   string
	ID          deployments.UnitID
	Tone, State string
	Runs, Class string
	Since       time.Time
	Problem     string
	Pinned      bool
}

// historyRow is one generation of a unit.
type historyRow struct {
	Generation int64
	At         time.Time
	Release    string
	Digest     string
	Commit     commitView
	Author     string
	Subject    string
	Notes      []string
	Failed     bool
}

// maxNotes bounds the notes on the page of a unit or a node, as each pinned node has one.
const maxNotes = 30

// unitOf returns the page of one unit.
func (s *snapshot) unitOf(u *unit, path string, f filter, past *unitHistory, commitURL string) unitPage {
	v := unitPage{
		Path: path, Filter: f, Row: s.row(u, commitURL), Problem: u.problem, Freeze: fleet.Clean(s.FreezeOf(u.ID), maxText),
	}
	for _, n := range s.Notes(u.Unit) {
		if n.About.Text == "next:" && u.problem != nil {
			continue // the problem shows it already
		}
		n.About.Text = strings.TrimSuffix(n.About.Text, ":")
		n.Says.Text = fleet.Clean(u.Names(n.Says.Text), maxLines)
		if v.Notes = append(v.Notes, n); len(v.Notes) == maxNotes {
			break
		}
	}
	v.Steps = stepsOf(u, v.Row.Progress)
	v.Releases = releasesOf(u)
	v.Map = mapOf(u)
	v.Chart = chartOf(u, s.trend.of(u.ID), s.At)
	v.Commands = commandsOf(u)
	var rows []*fleet.Node
	states := map[string]int{}
	for i := range u.Nodes {
		n := &u.Nodes[i]
		if len(states) < maxOptions || states[stateOf(n)] > 0 {
			states[stateOf(n)]++
		}
		if f.takesNode(u, n) {
			rows = append(rows, n)
		}
	}
	for state, n := range states {
		v.States = append(v.States, counted{state, n})
	}
	slices.SortFunc(v.States, func(a, b counted) int { return strings.Compare(a.Name, b.Name) })
	slices.SortStableFunc(rows, func(a, b *fleet.Node) int { return urgency(a) - urgency(b) })
	some, pager := paged(rows, f, path)
	v.Pager = pager
	for _, n := range some {
		v.Nodes = append(v.Nodes, s.nodeRow(u, n))
	}
	if past != nil {
		v.Unread = past.err
		for _, h := range past.entries {
			v.History = append(v.History, historyOf(u, h, commitURL))
		}
	}
	return v
}

// urgency returns a node's rank in a list: 0 for failing nodes, then changing, converged and gone ones.
func urgency(n *fleet.Node) int {
	switch healthOf(n) {
	case failing:
		return 0
	case busy:
		return 1
	case gone:
		return 3
	}
	return 2
}

func (s *snapshot) nodeRow(u *unit, n *fleet.Node) nodeRow {
	cells, problemText := s.NodeRow(u.Unit, n)
	_, pinned := u.Pins[n.Name]
	runs := "nothing"
	if !n.Report.Running.IsZero() {
		runs = u.name(n.Report.Running)
	}
	return nodeRow{
		Key: "n:" + n.Name, Name: n.Name, ID: u.ID, Tone: healthOf(n).String(), State: fleet.Clean(cells[1].Text, 24),
		Runs: runs, Class: u.class(n), Since: n.Report.Since, Problem: fleet.Clean(u.Names(problemText), maxText),
		Pinned: pinned,
	}
}

func historyOf(u *unit, h deployments.History, commitURL string) historyRow {
	var notes []string
	for _, note := range fleet.HistoryNotes(h) {
		notes = append(notes, fleet.Clean(u.Names(note.Text), 2*maxText))
	}
	row := historyRow{
		Generation: h.Generation, At: h.At, Release: u.name(h.Release), Digest: h.Release.Digest.Short()[:8],
		Commit: commitOf(h.Commit, commitURL), Author: fleet.Clean(fleet.AuthorName(h.Author), 32),
		Subject: fleet.Clean(h.Subject, maxText), Notes: notes,
		Failed: !h.Failed.IsZero() && h.Failed == h.Release.Digest,
	}
	if pin, ok := fleet.PinOf(h); ok {
		row.Commit, row.Author, row.Subject = commitView{}, fleet.Clean(pin.By, 32), "pinned"
	}
	return row
}

// releasesOf returns the releases that a unit goes to, or may go back to.
func releasesOf(u *unit) (lines []releaseLine) {
	add := func(what string, p deployments.Pointer) {
		p.URL = safetext.URLs(p.URL) // whoever may see the page may not be allowed to fetch a signed URL
		if p.IsZero() || slices.ContainsFunc(lines, func(l releaseLine) bool { return l.Pointer == p.String() }) {
			return
		}
		class := u.classes[p.Digest]
		if class == "" {
			class = map[string]string{"target": "v0", "pin": "v0", "stable": "v1"}[what]
		}
		lines = append(lines, releaseLine{what, u.name(p), class, fleet.Clean(p.String(), 2048)})
	}
	if u.pinned {
		add("pin", u.Pin.Release)
	}
	if r := u.Record; r != nil {
		add("target", u.GitTarget())
		add("stable", r.Stable)
	}
	return lines
}

// stepsOf returns the phases of a unit's rollout, whose progress is p; nil if p is nil.
func stepsOf(u *unit, p *progress) []step {
	if p == nil {
		return nil
	}
	r := u.Record.Rollout
	reason := u.rolloutReason()
	admitted := fmt.Sprintf("%d of %d admitted", p.Admitted, p.Following)
	passed := func(name string) step { return step{Name: name, State: "done"} }
	now := func(name, note string) step {
		return step{Name: name, State: "now", Note: note, Since: p.Since, ExpectedEnd: p.ExpectedEnd}
	}
	todo := func(name string) step { return step{Name: name, State: "todo"} }
	failed := step{Name: "Rollout", State: "failed", Note: reason}
	switch p.Phase {
	case deployments.PhaseRolledBack:
		return []step{failed, passed("Going back"), {Name: "Rolled back", State: "failed", Since: p.Since,
			Note: "stays on stable"}}
	case deployments.PhaseRollingBack:
		back := fmt.Sprintf("%d of %d on stable", p.Converged, p.Following)
		return []step{failed, now("Going back", back), todo("Rolled back")}
	}
	if r.SkipsGates || u.Record.Stable == u.Record.Target { // no gates
		name := "Rolling"
		if u.Record.Pinned != nil {
			name = "Rolling the pin"
		}
		if p.Phase == deployments.PhasePaused {
			return []step{now("Paused", reason), todo(name), todo("Everywhere")}
		}
		return []step{now(name, admitted), todo("Everywhere")}
	}
	var ahead, behind []step // the gates before the rolling
	if !r.NoCanary {
		ahead, behind = []step{todo("Canary"), todo("Bake")}, []step{passed("Canary"), passed("Bake")}
	}
	switch p.Phase {
	case deployments.PhaseFrozen:
		return slices.Concat([]step{now("Freeze", reason)}, ahead, []step{todo("Rolling"), todo("Everywhere")})
	case deployments.PhaseCanary:
		if r.HealthySince.IsZero() {
			return []step{now("Canary", admitted), todo("Bake"), todo("Rolling"), todo("Everywhere")}
		}
		bake := now("Bake", "healthy so far")
		bake.Since = r.HealthySince
		return []step{passed("Canary"), bake, todo("Rolling"), todo("Everywhere")}
	case deployments.PhasePendingApproval:
		return []step{passed("Canary"), passed("Bake"), now("Approval", "waits for kedge promote"), todo("Rolling"),
			todo("Everywhere")}
	case deployments.PhasePaused:
		paused, rest := []step{now("Paused", reason)}, []step{todo("Rolling"), todo("Everywhere")}
		if r.Promoted {
			return slices.Concat(behind, paused, rest)
		}
		return slices.Concat(paused, ahead, rest)
	}
	return slices.Concat(behind, []step{now("Rolling", admitted), todo("Everywhere")})
}

// commandsOf returns commands that would change something about a unit now, at most 8.
func commandsOf(u *unit) (all []command) {
	id := u.ID.String()
	add := func(does, line string) { all = append(all, command{does, line}) }
	if u.pinned {
		add("end the pin", "kedge unpin "+id)
	}
	if p := u.progress; p != nil {
		abort := func(does string) {
			if u.Record.CanGoBack() { // otherwise abort only pauses the rollout
				add(does, "kedge abort "+id)
			}
		}
		switch p.Phase {
		case deployments.PhaseCanary, deployments.PhasePendingApproval, deployments.PhaseFrozen:
			add("go on without waiting", "kedge promote "+id)
			abort("abort the rollout")
		case deployments.PhaseRolling:
			add("stop the rollout where it is", "kedge pause "+id)
			abort("abort the rollout, and go back")
		case deployments.PhasePaused:
			add("go on", "kedge resume "+id)
			abort("abort the rollout, and go back")
		case deployments.PhaseRollingBack:
			if u.Record.Rollout.WaitsForRollback() {
				add("start what Git names, despite the freeze", "kedge promote "+id)
			}
		case deployments.PhaseRolledBack:
			add("try this release once more", "kedge retry "+id)
		}
	} else if u.healths[failing] > 0 {
		add("try once more where it failed", "kedge retry "+id)
	}
	if u.Record != nil && !u.pinned {
		add("keep what runs, whatever Git says", "kedge pin "+id+" hold --reason WHY")
		add("go back to the release before", "kedge rollback "+id)
	}
	for _, node := range u.pinnedNodes() {
		if add("end the pin of "+node, "kedge unpin "+id+" --node "+node); len(all) >= 8 {
			break
		}
	}
	return all
}

// pinnedNodes returns the nodes that have pins of their own, sorted.
func (u *unit) pinnedNodes() []string {
	var names []string
	for node := range u.Pins {
		names = append(names, fleet.Clean(node, 63))
	}
	slices.Sort(names)
	return names
}
