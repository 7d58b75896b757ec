package fleet

import (
	"cmp"
	"io"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// NodeExplanation is the answer of kedge explain in words, for one unit on one node.
type NodeExplanation struct {
	Summary string // what should run, and whether it does
	// Notes are the decision's reason, and other facts about the unit on this node.
	Notes []Note
	// Trace lists the steps of the decision, in order.
	Trace []Step
	// Report is what the node reports or, if it is gone, reported last.
	Report []Note
	Gone   bool
}

// ExplainNode puts a decision of Explain or Local in words. It is an error if f lacks the unit's
// node. Notes and Trace may contain whole pointers: Unit.Names shortens them.
func ExplainNode(f *Fleet, id deployments.UnitID, node string, d Decision) (NodeExplanation, error) {
	u, n, err := f.find(id, node)
	if err != nil {
		return NodeExplanation{}, err
	}
	t := NodeExplanation{Summary: summarize(u, n, d), Trace: d.Trace, Report: reported(f, u, n, d), Gone: n.Gone}
	add := func(about, says string) { t.Notes = append(t.Notes, Note{Text{about, Plain}, Text{says, Plain}}) }
	add("because", message.OneLine(d.Message))
	if d.Invalid != nil && !mentions(d, d.Invalid.Error(), func(s Step) bool { return s.Decides || s.Blocks }) {
		t.Notes = append(t.Notes, Note{Text{"but", Bad}, Text{message.OneLine(d.Invalid.Error()), Bad}})
	}
	if moved := gitAheadOfPin(u, n, d.Source); moved != "" {
		add("besides", moved)
	}
	if freeze := f.FreezeOf(id); freeze != "" {
		add("freeze", freeze)
	}
	if u.Order != "" {
		add("order", u.Order+", which the mirror has yet to take")
	}
	if says := f.pendingPin(u); says != "" {
		add("pin", says)
	}
	if !d.Stage.IsZero() {
		// The last report may be from before the release was staged.
		ready := " is to be staged on the node's disk before its turn comes"
		if n.Report.Staged == d.Stage.Digest {
			ready = " is staged on the node's disk, for its turn"
		}
		add("staged", u.Release(d.Stage)+ready)
	}
	if !d.Recheck.IsZero() {
		add("until", d.Recheck.UTC().Format("2006-01-02 15:04:05 UTC")+", in "+brief(d.Recheck.Sub(f.At)))
	}
	return t, nil
}

// WriteExplain writes a decision in words: its summary, notes and steps, and what the node reports.
func WriteExplain(w io.Writer, f *Fleet, id deployments.UnitID, node string, d Decision, opt TableOptions) error {
	t, err := ExplainNode(f, id, node, d)
	if err != nil {
		return err
	}
	u, err := f.Unit(id)
	if err != nil {
		return err
	}
	p := &printer{opt: opt}
	notes := func(all []Note) {
		for _, n := range all {
			head := "  " + p.paint(n.About.Tone, n.About.Text) + strings.Repeat(" ",
				max(0, 9-utf8.RuneCountInString(n.About.Text)))
			p.wrap(head, 11, p.names(u, keepCommandsWhole(n.Says.Text)), n.Says.Tone)
		}
	}
	p.wrap(p.paint(Bold, id.String())+" on "+p.paint(Bold, message.Clean(node))+" ", 2, t.Summary, Plain)
	notes(t.Notes)
	p.raw("")
	legend := "What was looked at, in order; > decided"
	if slices.ContainsFunc(t.Trace, func(s Step) bool { return s.Blocks }) {
		legend += ", ! is in the way"
	}
	p.raw(p.paint(Dim, legend))
	wide := 0
	for _, s := range t.Trace {
		wide = max(wide, utf8.RuneCountInString(message.Clean(s.What)))
	}
	for _, s := range t.Trace {
		mark := "  "
		switch {
		case s.Decides:
			mark = p.paint(Good, ">") + " "
		case s.Blocks:
			mark = p.paint(Bad, "!") + " "
		}
		what := message.Clean(s.What)
		p.wrap(mark+what+strings.Repeat(" ", wide-utf8.RuneCountInString(what)+2), wide+4,
			p.names(u, message.OneLine(s.Message)), Plain)
		if s.Hint != "" {
			head := strings.Repeat(" ", wide+4) + p.paint(Warn, "to change it: ")
			p.wrap(head, wide+6, keepCommandsWhole(message.OneLine(s.Hint)), Plain)
		}
	}
	p.raw("")
	head := "What the node reports"
	if t.Gone {
		head = "What the node reported last"
	}
	p.raw(p.paint(Dim, head))
	notes(t.Report)
	_, err = io.WriteString(w, p.b.String())
	return err
}

// summarize returns in a few words what should run, and whether it runs.
func summarize(u *Unit, n *Node, d Decision) string {
	running := n.Report.Running
	runs := "runs " + u.Release(running)
	switch {
	case running.IsZero() && n.Report.OtherServes:
		runs = "runs something else"
	case running.IsZero():
		runs = "runs nothing"
	}
	switch {
	case n.Gone:
		last := "is gone, and ran " + cmp.Or(u.Release(running), "nothing")
		if d.Target.IsZero() || d.Target.Digest == running.Digest {
			return last
		}
		return last + "; it should run " + u.Release(d.Target) + " when it is back"
	case d.Action == policy.ActHold && !running.IsZero():
		return "holds what it runs: " + u.Release(running)
	case d.Action == policy.ActHold:
		return "holds what it runs: nothing"
	case d.Action == policy.ActLeave:
		return "should go back to what was there before kedge, and " + runs
	case d.Target.IsZero() && running.IsZero():
		return runs
	case d.Target.IsZero():
		return "keeps what it runs: " + u.Release(running)
	case running.Digest == d.Target.Digest && n.Report.State == deployments.StateConverged:
		return runs + ", as it should"
	case running.Digest == d.Target.Digest && n.Report.State == deployments.StateUnhealthy:
		return runs + ", as it should, and is unhealthy"
	}
	return "should run " + u.Release(d.Target) + ", and " + runs
}

func anyStep(Step) bool { return true }

// mentions reports whether d's trace has a step that contains text, or the part of text after its
// first colon. It examines only steps for which some returns true.
func mentions(d Decision, text string, some func(Step) bool) bool {
	text = message.OneLine(text)
	_, tail, _ := strings.Cut(text, ": ") // a step may leave out the prefix
	return slices.ContainsFunc(d.Trace, func(s Step) bool {
		says := message.OneLine(s.Message)
		return some(s) && (strings.Contains(says, text) || tail != "" && strings.Contains(says, tail))
	})
}

var pointers = regexp.MustCompile(`[a-z0-9]+://[^\s"]+@sha256:[0-9a-f]{64}`)

// Names replaces the pointers in a text by the releases' short names.
func (u *Unit) Names(text string) string {
	return pointers.ReplaceAllStringFunc(text, func(s string) string {
		pointer, err := deployments.ParsePointer(s)
		if err != nil {
			return s
		}
		return u.Release(pointer)
	})
}

// names replaces pointers as Unit.Names does if the output is a terminal, where they would fill lines. Piped output
// keeps pointers.
func (p *printer) names(u *Unit, text string) string {
	if p.opt.Width == 0 {
		return text
	}
	return u.Names(text)
}

var commands = regexp.MustCompile(`kedge [a-z]+ [^,;]+`)

// keepCommandsWhole joins the words of each command in a text, so that wrap doesn't break a command
// that people copy.
func keepCommandsWhole(text string) string {
	return commands.ReplaceAllStringFunc(text, func(s string) string {
		command, next, ends := strings.Cut(s, ". ")
		command = strings.ReplaceAll(command, " ", unbroken)
		if !ends {
			return command
		}
		return command + ". " + keepCommandsWhole(next)
	})
}

// reported returns what a node reports, without what d's trace says already.
func reported(f *Fleet, u *Unit, n *Node, d Decision) (all []Note) {
	r := n.Report
	state := n.Shown()
	if n.Gone { // the trace says that already
		state = Text{cmp.Or(message.Clean(string(r.State)), "unknown"), Dim}
	}
	all = []Note{{Text{"state", Plain}, state}}
	add := func(what, says string) {
		if says != "" {
			all = append(all, Note{Text{what, Plain}, Text{says, Plain}})
		}
	}
	if !r.Since.IsZero() {
		add("since", r.Since.UTC().Format("2006-01-02 15:04:05 UTC")+", "+ago(f.At.Sub(r.Since)))
	}
	if r.Running.IsZero() {
		add("runs", "nothing")
	} else {
		add("runs", u.Release(r.Running))
	}
	if r.Want != n.Want && !r.Want.IsZero() && !mentions(d, r.Want.String(), anyStep) {
		add("wants", u.Release(r.Want))
	}
	if r.Message != n.Message && r.State == deployments.StateWaiting && !n.Gone && !mentions(d, r.Message, anyStep) {
		add("reason", message.OneLine(r.Message))
	}
	var quarantined []string
	for _, q := range r.Quarantined {
		if slices.ContainsFunc(d.Trace,
			func(s Step) bool { return s.What == "quarantine" && strings.Contains(s.Message, q.String()) }) {
			continue
		}
		failed := q.Short()[:8]
		if u.Record != nil && u.Record.Target.Digest == q {
			failed = u.Release(u.Record.Target)
		}
		quarantined = append(quarantined, failed)
	}
	if len(quarantined) > 0 {
		again := "not tried again here until Git names it anew, or you run kedge retry " + u.ID.String()
		add("failed", strings.Join(quarantined, ", ")+": "+again)
	}
	if !mentions(d, r.Error, anyStep) {
		add("error", message.OneLine(r.Error))
	}
	add("differs", message.Clean(strings.Join(r.Drift, ", ")))
	add("dest", comparedText(r))
	for _, line := range r.Errors[:min(len(r.Errors), deployments.MaxLoggedErrors)] {
		add("logged", line.At.UTC().Format("2006-01-02 15:04:05 UTC")+", "+ago(f.At.Sub(line.At))+": "+
			message.OneLine(line.Text))
	}
	return all
}
