package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

// Facts is all that decides what one node should run of one unit: plain data, read by the agent.
type Facts struct {
	Unit deployments.UnitID
	Node string
	Now  time.Time
	// Record, UnitPin and NodePin are what the keys hold.
	Record  Value[deployments.Record]
	UnitPin Value[deployments.Pin]
	NodePin Value[deployments.Pin]
	// Joined is the node's number, as in Report.Joined; 0: it doesn't know it yet.
	Joined uint64
	// Running is the release that is live; zero: none. Quarantined are digests that failed on this node.
	Running     deployments.Pointer
	Quarantined []deployments.Digest
	// Bounds are what this node's configuration allows.
	Bounds Bounds
}

// Value is a key's value after parsing: absent (the zero Value), good, or bad with Err.
type Value[T any] struct {
	Present bool
	Value   T
	Err     error
}

// Action is what an agent does with a unit.
type Action string

const (
	ActRun   Action = "run"   // converge to Target
	ActKeep  Action = "keep"  // change nothing: nothing is desired, or it can't be told, or it isn't allowed
	ActHold  Action = "hold"  // change nothing: a pin says so
	ActStage Action = "stage" // converge to Target (zero: change nothing), and have Stage ready on disk for when this node is admitted
)

// Source is which key decided.
type Source string

const (
	FromNothing Source = "nothing"
	FromNodePin Source = "node pin"
	FromUnitPin Source = "unit pin"
	FromTarget  Source = "target"
	FromStable  Source = "stable"
	// FromRunning is a node that stays on what it runs until it is its turn: its rollout was replaced, or is being rolled back.
	FromRunning Source = "running"
)

// Decision is Resolve's answer, with its reason.
type Decision struct {
	Action Action `json:"action"`
	// Target is what to run; zero for ActKeep and ActHold. Stage is what to have ready as well; mostly zero.
	Target deployments.Pointer `json:"target,omitzero"`
	Stage  deployments.Pointer `json:"stage,omitzero"`
	Source Source              `json:"source"`
	// Why says in one line, for a person, what decided: "unit pin by alice until 14:00Z (incident 812)".
	Why string `json:"why"`
	// Invalid is set where a value didn't parse or isn't allowed: what status shows as an error. It may come with any Action:
	// a bad node pin changes nothing on that node (ActKeep). In JSON it is its text.
	Invalid error `json:"-"`
	// Recheck is when time alone could change the answer (a pin's until); zero: never.
	Recheck time.Time `json:"recheck,omitzero"`
	// Trace is the whole chain, for kedge explain: each step that was looked at, and what it said.
	Trace []Step `json:"trace"`
}

// MarshalJSON gives the decision with Invalid as text.
func (d Decision) MarshalJSON() ([]byte, error) {
	type plain Decision
	invalid := ""
	if d.Invalid != nil {
		invalid = d.Invalid.Error()
	}
	return json.Marshal(struct {
		plain
		Invalid string `json:"invalid,omitempty"`
	}{plain(d), invalid})
}

// Step is one line of a Decision's chain.
type Step struct {
	What string `json:"what"` // "node pin", "record", "admission", "quarantine", …
	Says string `json:"says"`
	// Decides marks the step that decided, Blocks one that stands in the way of what was decided; Unblock says what an operator
	// can do about it, where there is something.
	Decides bool   `json:"decides,omitempty"`
	Blocks  bool   `json:"blocks,omitempty"`
	Unblock string `json:"hint,omitempty"`
}

// Resolve answers what a node should run of a unit: node pin, else unit pin, else the record: target if the node
// is admitted, else stable. It has no side effects, and the same Facts give the same Decision.
//
// A value that is present but doesn't parse changes nothing (ActKeep with Invalid), even where a lower one is good: a typo in
// a pin must not silently mean "no pin". An absent record changes nothing, whatever a pin says: see ErrNoRecord. A quarantined digest is still the Target, with
// its step in the Trace: the agent doesn't run it, and says so.
func Resolve(f Facts) Decision {
	d := Decision{Action: ActKeep, Source: FromNothing}
	decided := d.pin(f, FromNodePin, f.NodePin, f.Unit.String()+"/"+f.Node)
	if d.pin(f, FromUnitPin, f.UnitPin, f.Unit.String()) {
		decided = true
	}
	d.record(f, decided)
	if decided && !f.Record.Present {
		d.Action, d.Target = ActKeep, deployments.Pointer{}
		d.Invalid = first(d.Invalid, fmt.Errorf("pins/%s: %w", f.Unit, ErrNoRecord))
		d.Why = "the " + string(d.Source) + " is for a unit without a record, so nothing changes"
	}
	d.allow(f)
	return d
}

// ErrNoRecord is Decision.Invalid of a pin that has no record beside it. Whoever may write pins alone can't bring a
// node to run a unit that nobody desires.
var ErrNoRecord = errors.New("the unit has no record, and a pin counts only for a unit that has one")

func (d *Decision) note(s Step) { d.Trace = append(d.Trace, s) }

// pin looks at one pin, and reports whether it decides. A lower pin than the one that decided is only shown.
func (d *Decision) pin(f Facts, from Source, v Value[deployments.Pin], key string) bool {
	what := string(from)
	over := d.decidedBy()
	unpin := "kedge unpin " + f.Unit.String()
	if from == FromNodePin {
		unpin += " --node " + f.Node
	}
	switch {
	case !v.Present:
		d.note(Step{What: what, Says: "none"})
		return false
	case v.Err != nil:
		err := fmt.Errorf("%s: %w", what, v.Err)
		d.Invalid = first(d.Invalid, err)
		d.note(Step{What: what, Says: fmt.Sprintf("pins/%s: %v", key, v.Err), Decides: over == "", Unblock: "write it anew, or remove it: " + unpin})
		if over == "" {
			d.Source, d.Why = from, "the "+what+" doesn't parse, so nothing changes"
		}
		return over == ""
	}
	p := v.Value
	if from == FromUnitPin && over == "" && paced(f.Record, p) && !p.Expired(f.Now) {
		d.note(Step{What: what, Says: p.Release.String() + sayPin(p, f.Now) + ": the mirror rolls it out, within max_unavailable",
			Unblock: "at once on every node: kedge pin " + f.Unit.String() + " " + p.Release.String() + " --at-once"})
		return false
	}
	story := sayPin(p, f.Now)
	says := p.Release.String() + story
	if p.Hold {
		says = "hold" + story
	}
	if p.Expired(f.Now) {
		d.note(Step{What: what, Says: says + ": it has ended"})
		return false
	}
	if over != "" {
		d.note(Step{What: what, Says: says + ": the " + over + " goes before it"})
		return false
	}
	d.Source, d.Why, d.Recheck = from, what+story, p.Until
	d.Action, d.Target = ActRun, p.Release
	if p.Hold {
		d.Action, says = ActHold, says+": keeps what runs"
	}
	d.note(Step{What: what, Says: says, Decides: true, Unblock: unpin})
	return true
}

// paced reports whether a unit pin is the mirror's to roll out, as the record's target.
func paced(record Value[deployments.Record], p deployments.Pin) bool {
	return record.Present && record.Err == nil && record.Value.Paced && !p.AtOnce && !p.Hold
}

// decidedBy names the step that decided so far.
func (d *Decision) decidedBy() string {
	for _, s := range d.Trace {
		if s.Decides {
			return s.What
		}
	}
	return ""
}

// record looks at the record. decided: a pin went before it, and the record is only shown.
func (d *Decision) record(f Facts, decided bool) {
	v := f.Record
	switch {
	case !v.Present:
		if !decided {
			d.Why = "there is no record, so nothing changes"
		}
		d.note(Step{What: "record", Says: "none", Decides: !decided, Blocks: decided, Unblock: "add " + f.Unit.String() + ".yaml to the deployments repo, or put a pointer at desired/" + f.Unit.String()})
		return
	case v.Err != nil:
		d.Invalid = first(d.Invalid, fmt.Errorf("record: %w", v.Err))
		if !decided {
			d.Why = "the record doesn't parse, so nothing changes"
		}
		d.note(Step{What: "record", Says: fmt.Sprintf("desired/%s: %v", f.Unit, v.Err), Decides: !decided,
			Unblock: "the mirror, where one runs, writes it anew; else write it by hand"})
		return
	}
	r := v.Value
	if !decided {
		d.note(Step{What: "record", Says: sayRecord(r)})
		d.admission(f, r)
		return
	}
	d.note(Step{What: "record", Says: sayRecord(r) + ": the " + d.decidedBy() + " goes before it"})
	if r.Rollout != nil {
		d.note(Step{What: "rollout", Says: sayProgress(r.Rollout)})
	}
}

// allow checks the result against the bounds, and notes a quarantine.
func (d *Decision) allow(f Facts) {
	for _, p := range []*deployments.Pointer{&d.Target, &d.Stage} {
		if p.IsZero() {
			continue
		}
		err := f.Bounds.CheckSource(p.URL)
		if err == nil {
			continue
		}
		err = fmt.Errorf("%w on this node", err)
		d.Invalid = first(d.Invalid, err)
		d.note(Step{What: "bounds", Says: err.Error(), Blocks: true, Unblock: "publish to an allowed place, or extend sources in the agent's configuration"})
		if p == &d.Target {
			d.Action, d.Target, d.Stage = ActKeep, deployments.Pointer{}, deployments.Pointer{}
			d.Why += ", but its release may not be used on this node"
			return
		}
		d.Stage = deployments.Pointer{}
		if d.Action = ActRun; d.Target.IsZero() {
			d.Action = ActKeep
		}
	}
	d.quarantine(f)
}

// quarantine notes what failed on this node of what it should run, have ready, or would run without its pin.
func (d *Decision) quarantine(f Facts) {
	clear := true
	for _, p := range []deployments.Pointer{d.Target, d.Stage} {
		if !p.IsZero() && p.Digest != f.Running.Digest && slices.Contains(f.Quarantined, p.Digest) {
			clear = false
			d.note(Step{What: "quarantine", Says: p.String() + " failed on this node, and isn't tried again by itself", Blocks: p == d.Target,
				Unblock: "name another release in Git, or kedge retry " + f.Unit.String()})
		}
	}
	r := f.Record.Value.Target
	named := !r.IsZero() && r != d.Target && r != d.Stage && r.Digest != f.Running.Digest && slices.Contains(f.Quarantined, r.Digest)
	switch pinned := d.Source == FromNodePin || d.Source == FromUnitPin; {
	case named && pinned:
		d.note(Step{What: "quarantine", Says: r.String() + ", which the record names, failed on this node", Unblock: "before you unpin, name another release in Git"})
	case named:
		d.note(Step{What: "quarantine", Says: r.String() + ", which the record names, failed on this node"})
	case clear && !d.Target.IsZero():
		d.note(Step{What: "quarantine", Says: "none"})
	}
}

func first(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// sayPin is a pin's story in words, to follow what it names.
func sayPin(p deployments.Pin, now time.Time) string {
	var s strings.Builder
	if p.By != "" {
		s.WriteString(" by " + p.By)
	}
	if !p.Until.IsZero() {
		s.WriteString(" until " + sayTime(p.Until, now))
	}
	if p.Reason != "" {
		s.WriteString(" (" + p.Reason + ")")
	}
	return s.String()
}

// sayTime leaves out the day where it is now's.
func sayTime(t, now time.Time) string {
	t = t.UTC()
	if y, m, d := now.UTC().Date(); t.Year() == y && t.Month() == m && t.Day() == d {
		return t.Format("15:04Z")
	}
	return t.Format("2006-01-02 15:04Z")
}

func sayRecord(r deployments.Record) string {
	s := r.Target.String() + " of " + sayOrigin(r)
	if r.Commit == "" {
		s = r.Target.String() + ", written by hand"
	}
	if r.Generation > 0 {
		s += fmt.Sprintf(", generation %d", r.Generation)
	}
	if r.Orphaned {
		s += "; orphaned: its file is no longer in Git"
	}
	return s
}

// sayOrigin says who wrote a record.
func sayOrigin(r deployments.Record) string {
	if r.Commit == "" {
		return "a record written by hand"
	}
	return "Git commit " + r.Commit[:min(7, len(r.Commit))]
}
