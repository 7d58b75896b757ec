package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/fleet/message"
)

// Note is one remark about a fleet, a unit or a node. Says is its text. About names its subject in
// a few words, and may be empty.
type Note struct {
	About, Says Text
}

// unavailablePrefixes returns the prefixes that can't be read because the store is unavailable, and
// the reason for the first of them. Usually these are all prefixes, for the same reason.
func unavailablePrefixes(f *Fleet) (parts []string, why string) {
	for _, kind := range slices.Sorted(maps.Keys(f.Errors)) {
		_, after, is := strings.Cut(f.Errors[kind], kv.ErrUnavailable.Error()+": ")
		if !strings.HasSuffix(kind, "/") || !is {
			continue
		}
		parts = append(parts, kind)
		if i := strings.Index(after, `": `); strings.HasPrefix(after, "Get ") && i > 0 {
			after = after[i+len(`": `):] // without the URL, which differs by part
		}
		why = cmp.Or(why, message.OneLine(after))
	}
	return parts, why
}

// doubtfulPrefixes returns the prefixes below which f may be out of date or incomplete, and a text
// that says so. Both results are empty if there are none. Prefixes that the token may not read
// aren't among them.
func doubtfulPrefixes(f *Fleet) (parts []string, text string) {
	parts, why := unavailablePrefixes(f)
	var texts []string
	if len(parts) > 0 {
		texts = append(texts, "the store can't be read now, so this is what was known last of "+
			strings.Join(parts, ", ")+": "+why)
	}
	for _, prefix := range f.incomplete {
		texts = append(texts, prefix+" isn't read, so this may lack what is there: "+message.OneLine(f.Errors[prefix]))
	}
	return append(parts, f.incomplete...), strings.Join(texts, "; ")
}

// IncompleteText returns a text that says which parts of f may be out of date or incomplete, and why. Parts that the
// token may not read don't count. The text is empty if there are no others.
func (f *Fleet) IncompleteText() string {
	_, text := doubtfulPrefixes(f)
	return text
}

// maxFaults bounds the different errors listed for one kind of key, and the keys listed for one error.
const maxFaults = 20

// Faults returns notes on the errors of f that no unit shows, and on the live nodes for whose role there is no unit.
func (f *Fleet) Faults() (all []Note) {
	away, text := doubtfulPrefixes(f)
	if text != "" {
		all = append(all, Note{Text{"error", Bad}, Text{text, Plain}})
	}
	units := map[deployments.UnitID]bool{}
	for _, u := range f.Units {
		units[u.ID] = true
	}
	shown := func(name string) bool { // reports whether a unit, or the note above, shows the error already
		key, err := kv.ParseKey(name)
		return slices.Contains(away, name) ||
			err == nil && (key.Kind == kv.DesiredPrefix || key.Kind == kv.PinsPrefix) && units[key.UnitID()]
	}
	keys := map[string][]string{} // keys by error
	var wrong []string
	each, more := map[string]int{}, 0 // errors by kind, bounded, as one token can write any number
	for _, key := range slices.Sorted(maps.Keys(f.Errors)) {
		if shown(key) {
			continue
		}
		what := message.OneLine(f.Errors[key])
		if kind, _, _ := strings.Cut(key, "/"); keys[what] == nil {
			if each[kind]++; each[kind] > maxFaults {
				more++
				continue
			}
			wrong = append(wrong, what)
		}
		keys[what] = append(keys[what], message.Clean(key))
	}
	for _, what := range wrong {
		named := strings.Join(keys[what][:min(len(keys[what]), maxFaults)], ", ")
		if n := len(keys[what]) - maxFaults; n > 0 {
			named += fmt.Sprintf(" and %d more", n)
		}
		all = append(all, Note{Text{"error", Bad}, Text{named + ": " + what, Plain}})
	}
	if more > 0 {
		all = append(all, Note{Text{"error", Bad}, Text{"errors of " + count(more, "more key") +
			": kedge status --json lists all", Plain}})
	}
	nodes := map[string][]string{} // nodes by stage and role
	for _, n := range f.Unassigned {
		role := n.Stage + "/" + n.Role
		nodes[role] = append(nodes[role], message.Clean(n.Node))
	}
	for _, role := range slices.Sorted(maps.Keys(nodes)) {
		says := fmt.Sprintf(
			"no unit is meant for %s: see whether stage and role of their agents are right, or add %[1]s/UNIT.yaml to Git",
			role,
		)
		all = append(all, Note{Text{firstFew(nodes[role]), Warn}, Text{says, Plain}})
	}
	return all
}

// CommitTaken reports whether the mirror's state names a commit that a mirror has taken. It returns
// false, too, if that state can't be read.
func (f *Fleet) CommitTaken() bool { return f.Mirror != nil && f.Mirror.Head != "" }

// MirrorNotes returns notes on the mirror: its state, the agents' versions if they differ, its error, and freeze
// windows. A note's text may have several lines.
func (f *Fleet) MirrorNotes() []Note {
	about := Text{"mirror", Dim}
	m := f.Mirror
	switch {
	case m == nil && cmp.Or(f.Errors[kv.MirrorPrefix], f.Errors[kv.MirrorKey]) != "":
		return []Note{{about, Text{"its state can't be read: see the error below", Warn}}}
	case m == nil:
		return []Note{{about, Text{"has taken no commit yet", Plain}}}
	}
	head := "has taken no commit yet"
	if m.Head != "" {
		head = "at " + message.Clean(short(m.Head))
		if m.Author != "" {
			head += " by " + AuthorName(m.Author)
		}
		if !m.At.IsZero() {
			head += ", " + ago(f.At.Sub(m.At))
		}
	}
	if m.Holder != "" {
		head += " (" + message.Clean(m.Holder) + ")"
	}
	all := []Note{{about, Text{head, Plain}}}
	if f.mirrorStopped() {
		all = append(all,
			Note{Says: Text{"no mirror runs now: commits, orders, and pins of units with a rollout, wait until one does", Bad}})
	}
	if len(f.Agents) > 1 {
		all = append(all, Note{Says: Text{"agents: " + f.agentVersions(), Plain}})
	}
	switch wrong := (Text{strings.TrimSpace(CleanLines(m.Error)), Bad}); {
	case m.Refused != "":
		all = append(all, Note{Text{"refused " + message.Clean(short(m.Refused)) + ":", Bad}, wrong})
	case m.Error != "":
		all = append(all, Note{Says: wrong})
	}
	return append(all, f.freezeNotes()...)
}

// agentVersions returns in words how many live nodes run each version of the agent, the most common version first.
func (f *Fleet) agentVersions() string {
	all := 0
	for _, n := range f.Agents {
		all += n
	}
	versions := slices.SortedFunc(maps.Keys(f.Agents), func(a, b string) int {
		return cmp.Or(cmp.Compare(f.Agents[b], f.Agents[a]), cmp.Compare(a, b))
	})
	for i, version := range versions {
		versions[i] = fmt.Sprintf("%d of %s run %s", f.Agents[version], count(all, "node"), message.Clean(version))
	}
	return firstFew(versions)
}

// Columns are the headings of Row's cells.
var Columns = []string{"UNIT", "TARGET", "RUNS", "PIN", "CONVERGED", "ROLLOUT"}

// runsColumn is the index in Row of the releases that nodes run, convergedColumn that of the count of converged nodes.
const runsColumn, convergedColumn = 2, 4

// Row returns one unit's cells, under Columns.
func (f *Fleet) Row(u *Unit) []Text {
	target, pin, phase := Text{"-", Dim}, Text{"-", Dim}, Text{"-", Dim}
	name := u.Versions()
	if u.Record != nil {
		target = Text{name(u.GitTarget()), Plain}
	}
	nodes := 0
	for _, p := range u.Pins {
		if !p.Expired(f.At) {
			nodes++
		}
	}
	switch {
	case u.Pinned(f.At) && u.Pin.Hold:
		pin = Text{"hold", Warn}
	case u.Pinned(f.At):
		pin = Text{name(u.Pin.Release), Warn}
	case nodes > 0:
		pin = Text{count(nodes, "node"), Warn}
	}
	state := Text{fmt.Sprintf("%d/%d", u.Converged, u.Live), Good}
	if u.Converged < u.Live {
		state.Tone = Warn
	}
	if u.Live == 0 {
		state.Tone = Dim
	}
	if u.Gone > 0 {
		state.Text += fmt.Sprintf(", %d gone", u.Gone)
	}
	if u.Record != nil && u.Record.Rollout != nil {
		phase = Text{message.Phase(u.Record.Rollout.Phase), Warn}
		if r := u.Record.Rollout.Phase; r == deployments.PhaseRolledBack || r == deployments.PhaseRollingBack {
			phase.Tone, target.Tone = Bad, Bad
		}
	}
	if u.orphaned() {
		phase = Text{"orphaned", Warn}
	}
	return []Text{{u.ID.String(), Bold}, target, u.runs(name), pin, state, phase}
}

// Attention returns a copy of f with only those units that need attention, and how many units it left out. It leaves
// out a unit without notes if every listed node that isn't gone is converged and has no problem.
func (f *Fleet) Attention() (some *Fleet, fine int) {
	copied := *f
	copied.Units = slices.DeleteFunc(slices.Clone(f.Units), func(u Unit) bool {
		return len(f.Notes(&u)) == 0 && !slices.ContainsFunc(u.Nodes, func(n Node) bool {
			_, problem := f.NodeRow(&u, &n)
			return !n.Gone && (!n.Converged || problem != "")
		})
	})
	return &copied, len(f.Units) - len(copied.Units)
}

// Notes returns the remarks on one of f's units, in addition to its Row.
func (f *Fleet) Notes(u *Unit) (all []Note) {
	add := func(about string, t Tone, says string, st Tone) {
		all = append(all, Note{Text{about, t}, Text{says, st}})
	}
	if u.Pin != nil {
		story := pinDetails(*u.Pin, f.At)
		moved := gitAheadText(u, *u.Pin, func(n Node) bool { return !u.hasOwnPin(n.Name, f.At) })
		if s := join(story, moved); s != "" {
			add("pinned", Plain, s, Plain)
		}
	}
	pinned := slices.Sorted(maps.Keys(u.Pins))
	if len(pinned) > maxNodes { // pins of existing nodes come first
		nodes := map[string]bool{}
		for _, n := range u.Nodes {
			nodes[n.Name] = true
		}
		slices.SortStableFunc(pinned, func(a, b string) int {
			switch {
			case nodes[a] == nodes[b]:
				return 0
			case nodes[a]:
				return -1
			}
			return 1
		})
	}
	for _, node := range pinned[:min(len(pinned), maxNodes)] {
		pin := u.Pins[node]
		moved := gitAheadText(u, pin, func(n Node) bool { return n.Name == node })
		add(message.Clean(node)+" pinned", Plain, join(strings.TrimSpace(pinTarget(u, pin)+" "+pinDetails(pin, f.At)),
			moved), Plain)
	}
	if n := len(pinned) - maxNodes; n > 0 {
		add(fmt.Sprintf("and %d more", n), Plain, "pins of single nodes: kedge status "+u.ID.String()+" --json", Plain)
	}
	if u.Order != "" {
		add("order:", Plain, u.Order+", which the mirror has yet to take", Warn)
	}
	if says := f.pendingPin(u); says != "" {
		add("pin:", Plain, says, Warn)
	}
	if u.orphaned() && u.Record.Rollout == nil {
		add("orphaned:", Warn,
			"its file is no longer in Git; nodes keep what they run, until a unit that Git names takes its dest",
			Plain)
	}
	if says := u.RolloutReason(); says != "" {
		add("rollout:", Plain, says, Plain)
	}
	if next := u.Next(f.At); next != "" {
		add("next:", Warn, next, Plain)
	}
	if u.Error != "" {
		add("error", Bad, message.OneLine(u.Error), Plain)
	}
	return all
}

// RolloutReason returns why a unit's rollout is in its phase; empty: no rollout is under way, or it has no reason.
func (u *Unit) RolloutReason() string {
	if u.Record == nil || u.Record.Rollout == nil {
		return ""
	}
	return message.OneLine(message.Rollout(u.Record.Rollout))
}

// NodeRow returns the cells of one of a unit's nodes: its name, its state, what it runs, and how long it has been in
// that state. problem joins the node's error, its drift from the release, and how dest compares with the release;
// empty: there is nothing to say.
func (f *Fleet) NodeRow(u *Unit, n *Node) (row []Text, problem string) {
	r := n.Report
	problem = message.OneLine(r.Error)
	if len(r.Drift) > 0 {
		problem = join(problem, "differs from its release: "+message.Clean(strings.Join(r.Drift, ", ")))
	}
	problem = join(problem, comparedText(r))
	runs := "runs nothing"
	switch {
	case r.State == "":
		runs = message.OneLine(n.Message)
	case r.Reason == deployments.ReasonRestored:
		runs = message.Text(r.Reason, r.Facts)
	case r.OtherServes:
		runs = "runs something else"
	}
	if !r.Running.IsZero() {
		runs = "runs " + u.Release(r.Running)
	}
	since := ""
	if !r.Since.IsZero() {
		since = brief(f.At.Sub(r.Since))
	}
	return []Text{{message.Clean(n.Name), Plain}, n.Shown(), {runs, Plain}, {since, Dim}}, problem
}

// Next returns what an operator can do about a unit if its rollout waits or has stopped, if it is
// orphaned, or if its nodes fail; empty: nothing. For a pinned unit the text is empty, too, unless
// the mirror rolls out the pin and that rollout is paused or rolled back.
func (u *Unit) Next(now time.Time) string {
	switch p := rollout(u, now); {
	case u.Record == nil:
		return ""
	case u.Pinned(now) && p != nil && (p.Phase == deployments.PhasePaused || p.Phase == deployments.PhaseRolledBack):
		return "kedge unpin " + u.ID.String() + ", or pin another release"
	case u.Pinned(now):
		return ""
	}
	if next := message.RolloutHint(u.ID, *u.Record); next != "" || u.Record.Rollout != nil {
		return next
	}
	some := func(state deployments.State) bool {
		return slices.ContainsFunc(u.Nodes, func(n Node) bool { return !n.Gone && n.Report.State == state })
	}
	switch {
	case some(deployments.StateQuarantined):
		return message.Hint(u.ID, "", deployments.ReasonTooManyFailed)
	case some(deployments.StateUnhealthy):
		return message.Hint(u.ID, "", deployments.ReasonUnhealthy)
	}
	return ""
}

// Shown returns a node's state in words.
func (n *Node) Shown() Text {
	r := n.Report
	switch {
	case n.Gone:
		return Text{"gone", Dim}
	case r.State == "":
		return Text{"unknown", Warn}
	case n.Converged:
		return Text{string(r.State), Good}
	case r.State == deployments.StateConverged && r.Running.Digest == n.Want.Digest:
		return Text{"converged", Warn} // but a value is invalid, or the record is older than the last that the node followed
	case r.State == deployments.StateConverged:
		return Text{"outdated", Warn} // it has yet to learn what it should run
	case r.State == deployments.StateFetching && r.Total > 0:
		return Text{fmt.Sprintf("fetching %d%%", min(100, r.Fetched*100/r.Total)), Warn}
	case r.State == deployments.StateQuarantined || r.State == deployments.StateInvalid || r.State == deployments.StateUnhealthy:
		return Text{message.Clean(string(r.State)), Bad}
	}
	return Text{message.Clean(string(r.State)), Warn}
}

func pinTarget(u *Unit, p deployments.Pin) string {
	if p.Hold {
		return "hold"
	}
	return u.Release(p.Release)
}

func pinDetails(p deployments.Pin, now time.Time) string {
	var s []string
	if p.By != "" {
		s = append(s, "by "+message.OneLine(p.By))
	}
	if !p.Until.IsZero() {
		s = append(s, "until "+p.Until.UTC().Format("2006-01-02 15:04 UTC"))
	}
	if p.Expired(now) {
		s[len(s)-1] += ", which has ended"
	}
	if p.Reason != "" {
		s = append(s, "("+message.OneLine(p.Reason)+")")
	}
	return strings.Join(s, " ")
}

// gitAheadText returns in words how many releases Git is ahead of the release that pin names;
// empty: unknown. For a hold pin it returns the largest such number among the releases of the live
// nodes for which holds returns true.
func gitAheadText(u *Unit, pin deployments.Pin, holds func(Node) bool) string {
	pinned := []deployments.Pointer{pin.Release}
	if pin.Hold {
		pinned = running(u, holds)
	}
	moved, known := 0, false
	for _, p := range pinned {
		if n, ok := u.GitAhead[p]; ok {
			moved, known = max(moved, n), true
		}
	}
	switch {
	case !known:
		return ""
	case moved == 0:
		return "Git says the same"
	}
	return "Git is " + count(moved, "release") + " ahead"
}

// AuthorName returns an author's name without the mail address that may follow it.
func AuthorName(author string) string {
	name, _, _ := strings.Cut(message.OneLine(author), " <")
	return name
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// brief formats a duration in one unit: whole seconds, minutes, hours (up to 47) or days.
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
