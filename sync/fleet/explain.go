package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// Decision is a policy.Decision in words. Its Trace has the steps of policy.Decision.Trace in
// words, and adds what policy doesn't know: the store, Git, the node's place in the rollout, and
// what the node reports.
type Decision struct {
	policy.Decision
	Message string
	Trace   []Step
}

// Step is one step of a Decision's Trace, in words.
type Step = deployments.StepStatus

// Explain returns the decision that says what a node should run of a unit, with the steps that led to it. It is an
// error if f doesn't have the unit, or the unit doesn't have the node.
func Explain(f *Fleet, id deployments.UnitID, node string) (Decision, error) {
	u, n, err := f.find(id, node)
	if err != nil {
		return Decision{}, err
	}
	resolved := policy.Resolve(f.resolveInputs(u, *n))
	d := Decision{Decision: resolved, Message: message.Decision(resolved.Reason, resolved.Facts)}
	if s, bad := storeStep(f, id); bad {
		d.Trace = append(d.Trace, s)
	}
	d.Trace = append(d.Trace, gitStep(f))
	for _, s := range message.Trace(id, node, resolved.Trace) {
		if s.What == "admission" && s.Decides && u.Record.Rollout != nil && s.Reason != deployments.ReasonOrphaned {
			s.Message = join(s.Message, placeInRollout(u, n))
		}
		d.Trace = append(d.Trace, s)
	}
	d.Trace = append(d.Trace, nodeStep(u, n, d))
	return d, nil
}

// FindUnitOfNode returns the ID of a node's unit by the last part of the ID: prod/web/app for app.
// It is an error if the node has no such unit, or several in different roles, or if no unit has the
// node.
func FindUnitOfNode(f *Fleet, node, unit string) (deployments.UnitID, error) {
	var found, others []string
	var id deployments.UnitID
	for _, u := range f.Units {
		if !slices.ContainsFunc(u.Nodes, func(n Node) bool { return n.Name == node }) {
			continue
		}
		if !slices.Contains(others, u.ID.Unit) {
			others = append(others, u.ID.Unit)
		}
		if u.ID.Unit == unit {
			id = u.ID
			found = append(found, u.ID.String()+" "+node)
		}
	}
	switch {
	case len(found) == 1:
		return id, nil
	case len(found) > 1:
		return id, fmt.Errorf("%s has several units called %s: want %s", node, unit, strings.Join(found, " or "))
	case len(others) > 0:
		return id, fmt.Errorf("no unit %s on %s: there are %s", unit, node, firstFew(others))
	}
	var names []string
	for _, u := range f.Units {
		for _, n := range u.Nodes {
			names = append(names, n.Name)
		}
	}
	if near := deployments.Nearest(node, slices.Values(names)); near != "" {
		return id, fmt.Errorf("no node %s has reported: did you mean %s?", node, near)
	}
	slices.Sort(names)
	if names = slices.Compact(names); len(names) == 0 {
		return id, fmt.Errorf("no node %s has reported, and no other has: are the agents running?", node)
	}
	return id, fmt.Errorf("no node %s has reported: there are %s", node, firstFew(names))
}

// Unit returns the unit with the given ID. If there is none, the error names a similar one, or those that there are.
func (f *Fleet) Unit(id deployments.UnitID) (*Unit, error) {
	i := slices.IndexFunc(f.Units, func(u Unit) bool { return u.ID == id })
	if i < 0 {
		return nil, noUnit(f, id.String())
	}
	return &f.Units[i], nil
}

// find returns the unit id, and its node of the given name. If either is missing, the error names similar ones.
func (f *Fleet) find(id deployments.UnitID, node string) (*Unit, *Node, error) {
	u, err := f.Unit(id)
	if err != nil {
		return nil, nil, err
	}
	j := slices.IndexFunc(u.Nodes, func(n Node) bool { return n.Name == node })
	if j < 0 {
		var names []string
		for _, n := range u.Nodes {
			names = append(names, n.Name)
		}
		switch near := deployments.Nearest(node, slices.Values(names)); {
		case len(names) == 0:
			return nil, nil, fmt.Errorf(
				"no node %s: no node of %s/%s has ever reported; is its agent running, with this stage and role?",
				node,
				id.Stage,
				id.Role,
			)
		case near != "" && len(names) == 1:
			return nil, nil, fmt.Errorf("%s has no node %s: did you mean %s?", id, node, near)
		case near != "":
			return nil, nil, fmt.Errorf("%s has no node %s: did you mean %s? there are %s", id, node, near,
				firstFew(names))
		}
		return nil, nil, fmt.Errorf("%s has no node %s: there are %s", id, node, firstFew(names))
	}
	return u, &u.Nodes[j], nil
}

// storeStep returns a step that says which parts of the store could not be read, as everything else may then be wrong.
// The second result is false if all were read.
func storeStep(f *Fleet, id deployments.UnitID) (Step, bool) {
	away, text := doubtfulPrefixes(f)
	if text != "" {
		hint := "see why the store can't be read, then look again; nodes go on with what they know"
		if len(f.incomplete) > 0 {
			hint = "remove the keys that don't belong there, if any, then look again; on the node, as root, its agent " +
				"answers: kedge explain " + id.Unit
		}
		return Step{What: "store", Message: text, Blocks: true, Hint: hint}, true
	}
	var says []string
	for _, key := range slices.Sorted(maps.Keys(f.Errors)) {
		if strings.HasSuffix(key, "/") && !slices.Contains(away, key) {
			says = append(says, key+": "+f.Errors[key])
		}
	}
	return Step{
		What:    "store",
		Message: strings.Join(says, "; "),
		Blocks:  true,
		Hint:    "look again with a token that may read all of it",
	}, len(says) > 0
}

// gitStep returns the step about Git: the commit that the mirror is at, and what is wrong with the mirror.
func gitStep(f *Fleet) Step {
	s := Step{What: "Git"}
	m := f.Mirror
	if m == nil || m.Head == "" {
		s.Message = "no mirror has taken a commit"
		if m != nil && m.Error != "" {
			s.Message, s.Blocks = s.Message+": "+message.OneLine(m.Error), true
		}
		return s
	}
	s.Message = "the mirror is at " + message.Clean(short(m.Head))
	if m.Author != "" {
		s.Message += " by " + AuthorName(m.Author)
	}
	if !m.At.IsZero() {
		s.Message += ", " + ago(f.At.Sub(m.At))
	}
	switch {
	case f.mirrorStopped():
		s.Message += "; no mirror runs now, so newer commits, orders, and pins of units with a rollout, wait"
		s.Blocks = true
		s.Hint = "start kedge mirror; until then nodes still obey pins of single nodes, hold pins, and pins with --at-once"
	case m.Refused != "":
		s.Message, s.Blocks = s.Message+"; it refused "+message.Clean(short(m.Refused))+": "+message.OneLine(m.Error), true
		s.Hint = "correct what the error names, and push again; to find most errors before a push, in a clone: " +
			"kedge check --releases"
	case m.Error != "":
		s.Message, s.Blocks = s.Message+"; "+message.OneLine(m.Error), true
	}
	return s
}

// placeInRollout returns in words a node's place in a rollout. Live nodes that follow the record
// are admitted by rank, and go back in reverse order. The text is empty if the node is gone, pinned
// or held, if it may go back already, or if the rollback is complete.
func placeInRollout(u *Unit, n *Node) string {
	p := u.Record.Rollout
	if p.Phase == deployments.PhaseRolledBack {
		return ""
	}
	rank := func(name string) uint64 { return policy.Rank(name, u.Record.Target.Digest) }
	mine := rank(n.Name)
	place, all, admitted, before := 1, 0, 0, 0
	for _, other := range u.Nodes {
		if other.Gone || other.PinnedOrHeld() {
			continue
		}
		r := rank(other.Name)
		all++
		if r <= p.Cutoff {
			admitted++
		}
		if r < mine {
			place++
		}
		if r > mine && r <= p.Cutoff {
			before++
		}
	}
	switch {
	case n.Gone || n.PinnedOrHeld():
		return ""
	case p.Phase == deployments.PhaseRollingBack && mine <= p.Cutoff && before == 0:
		return "it is next"
	case p.Phase == deployments.PhaseRollingBack && mine <= p.Cutoff:
		return fmt.Sprintf("%d of %s go back before it", before, count(all, "live node"))
	case p.Phase == deployments.PhaseRollingBack:
		return ""
	}
	return fmt.Sprintf("%s in line of %s, %d admitted", ordinal(place), count(all, "live node"), admitted)
}

func ordinal(n int) string {
	suffix := "th"
	switch {
	case n%100 >= 11 && n%100 <= 13:
	case n%10 == 1:
		suffix = "st"
	case n%10 == 2:
		suffix = "nd"
	case n%10 == 3:
		suffix = "rd"
	}
	return fmt.Sprintf("%d%s", n, suffix)
}

// nodeStep returns the step that says what the node reports about the decision: it may be gone,
// behind, or not allowed to follow.
func nodeStep(u *Unit, n *Node, d Decision) Step {
	r := n.Report
	s := Step{What: "node", Blocks: true}
	reportError := message.OneLine(r.Error)
	if d.Invalid != nil && reportError == message.OneLine(d.Invalid.Error()) {
		reportError = "" // another step says it already
	}
	// A node that has nothing to do for a new generation doesn't report that it knows the generation.
	idle := r.State == deployments.StateConverged && r.Want == d.Target
	behind := u.Record != nil && !r.Pinned && !idle && r.Generation < u.Record.Generation &&
		(d.Source == policy.FromTarget || d.Source == policy.FromStable || d.Source == policy.FromRunning)
	switch {
	case n.Gone:
		s.Message, s.Hint = "gone: its session in the store has ended",
			"see whether the machine, its agent and its Consul agent run"
	case r.State == "":
		s.Message, s.Hint = join(n.Message, reportError), "see whether its agent runs, with this stage and role"
	case behind:
		s.Message = fmt.Sprintf("has yet to see generation %d: it knows %d", u.Record.Generation, r.Generation)
		s.Hint = "if that lasts, see whether its agent reaches the store: read its log, or run on the node, as root: kedge " +
			"explain " + u.ID.Unit
	case r.Want != d.Target && r.State != deployments.StateInvalid && d.Action != policy.ActHold:
		s.Message = "has yet to see this decision: it still aims at " + cmp.Or(r.Want.String(), "nothing")
		s.Hint = "if that lasts, see whether its agent reaches the store: read its log, or run on the node, as root: kedge " +
			"explain " + u.ID.Unit
	case r.Reason == deployments.ReasonUnsigned:
		s.What, s.Message, s.Hint = "signature", cmp.Or(reportError, message.Text(r.Reason, r.Facts)), message.Hint(u.ID,
			n.Name, r.Reason)
	case r.State == deployments.StateUnhealthy:
		s.Message = join("fails its health checks", cmp.Or(reportError, message.Text(r.Reason, r.Facts)))
		s.Hint = message.Hint(u.ID, n.Name, deployments.ReasonUnhealthy)
	case r.State == deployments.StateInvalid && reportError != "":
		s.Message, s.Hint = "refuses it: "+reportError, cmp.Or(message.Hint(u.ID, n.Name, r.Reason),
			"correct what the error names: in the release, in Git, or in this node's configuration")
	case r.State == deployments.StateRetrying:
		s.Message = strings.TrimSuffix("can't get there yet, and tries again: "+reportError, ": ")
		s.Hint = message.Hint(u.ID, n.Name, r.Reason)
	case r.State == deployments.StateQuarantined:
		s.Message = cmp.Or(reportError, "quarantined")
	case r.State == deployments.StateWaiting && !d.Target.IsZero():
		s.Message = join("waits: "+cmp.Or(message.OneLine(r.Message), "for another unit"), reportError)
		if r.Reason == deployments.ReasonDependency {
			s.Message = join(cmp.Or(message.OneLine(r.Facts["error"]), message.Text(r.Reason, r.Facts)), reportError)
		}
	case r.State == deployments.StateConverged && reportError != "":
		s.Message = "runs it, but: " + reportError
		if !d.Stage.IsZero() {
			s.Message = "can't stage the next release ahead of its turn: " + reportError
		}
	default:
		s.Blocks = false
		if s.Message = "reports no error"; r.State == deployments.StateInvalid {
			s.Message = "refuses it, for the reason above"
		}
		if r.State == deployments.StateFetching || r.State == deployments.StateSwitching {
			s.Message = "on its way: " + n.Shown().Text
		}
		if u.Record != nil && r.Generation > 0 && r.Generation == u.Record.Generation && !r.Pinned {
			s.Message += fmt.Sprintf(", and has seen generation %d", r.Generation)
		}
		s.Message = join(s.Message, reportError)
	}
	return s
}

// gitAheadOfPin returns in words how many releases Git is ahead of the pin that decided for n. It
// is empty if no pin decided, or if the number is unknown.
func gitAheadOfPin(u *Unit, n *Node, from policy.Source) string {
	this := func(other Node) bool { return other.Name == n.Name }
	switch pin, own := u.Pins[n.Name]; {
	case from == policy.FromNodePin && own:
		return gitAheadText(u, pin, this)
	case from == policy.FromUnitPin && u.Pin != nil:
		return gitAheadText(u, *u.Pin, this)
	}
	return ""
}

// Explanation is a decision, and the report of its node. Its JSON is the output of kedge explain --json.
type Explanation struct {
	Unit      deployments.UnitID     `json:"unit"`
	Node      string                 `json:"node"`
	Action    policy.Action          `json:"action"`
	Target    deployments.Pointer    `json:"target,omitzero"`
	Stage     deployments.Pointer    `json:"stage,omitzero"`
	Source    policy.Source          `json:"source"`
	Reason    deployments.Reason     `json:"reason,omitempty"`
	Facts     deployments.Facts      `json:"facts,omitempty"`
	Message   string                 `json:"message"`
	Invalid   string                 `json:"invalid,omitempty"`
	Recheck   time.Time              `json:"recheck,omitzero"`
	Converged bool                   `json:"converged"`
	Gone      bool                   `json:"gone,omitempty"`
	Order     string                 `json:"order,omitempty"`
	Trace     []Step                 `json:"trace"`
	Report    deployments.UnitReport `json:"report"`
}

// ExplanationOf returns the Explanation for a decision of Explain or Local. It is an error if f lacks the unit's node.
func ExplanationOf(f *Fleet, id deployments.UnitID, node string, d Decision) (Explanation, error) {
	u, n, err := f.find(id, node)
	if err != nil {
		return Explanation{}, err
	}
	e := Explanation{
		Unit:      id,
		Node:      node,
		Action:    d.Action,
		Target:    d.Target,
		Stage:     d.Stage,
		Source:    d.Source,
		Reason:    d.Reason,
		Facts:     d.Facts,
		Message:   d.Message,
		Recheck:   d.Recheck,
		Converged: n.Converged,
		Gone:      n.Gone,
		Order:     u.Order,
		Trace:     d.Trace,
		Report:    n.Report,
	}
	if d.Invalid != nil {
		e.Invalid = d.Invalid.Error()
	}
	return e, nil
}
