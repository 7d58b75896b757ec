package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// ResolveInputs are what Resolve decides from, for one unit on one node: plain data, read by the agent.
type ResolveInputs struct {
	Unit deployments.UnitID
	Node string
	Now  time.Time
	// Record, UnitPin and NodePin are the values of three keys: the unit's record, its pin, and its pin for this node.
	Record  Value[deployments.Record]
	UnitPin Value[deployments.Pin]
	NodePin Value[deployments.Pin]
	// Joined is the node's Report.Joined; 0: the agent doesn't know it yet.
	Joined uint64
	// Running is the release that is live; zero: none. Quarantined are the digests that failed on this node.
	Running     deployments.Pointer
	Quarantined []deployments.Digest
	// AtDest is what lies at the dest of the record's target or of its stable release. It matters only while Running is
	// zero.
	AtDest Found
	// Leavable is set if what was at dest before the first release can be put back.
	Leavable bool
	// Booted is set if the machine had just booted when the agent started.
	Booted bool
	// Bounds are what this node's configuration allows.
	Bounds Bounds
}

// Value is a key's parsed value: absent (the zero Value), valid, or invalid with Err.
type Value[T any] struct {
	Present bool
	Value   T
	Err     error
}

// Found is what lies at a unit's dest while no release of the unit runs.
type Found string

const (
	FoundUnknown Found = ""        // nobody has looked yet
	FoundNothing Found = "nothing" // nothing, or an empty directory
	FoundOther   Found = "other"   // something that kedge did not put there, and that may serve
)

// Action is what an agent should do with a unit.
type Action string

const (
	ActRun   Action = "run"   // converge to Target
	ActKeep  Action = "keep"  // change nothing: no release is known that may run here
	ActHold  Action = "hold"  // change nothing: a pin says so
	ActLeave Action = "leave" // go back to what was at dest before the unit's first release
	// converge to Target (zero: change nothing), and stage Stage for when this node's turn comes
	ActRunAndStage Action = "stage"
)

// Source says which key, or which release of the record, decided.
type Source string

const (
	FromNothing Source = "nothing"
	FromNodePin Source = "node pin"
	FromUnitPin Source = "unit pin"
	FromTarget  Source = "target"
	FromStable  Source = "stable"
	// FromRunning means that a node keeps the release that it runs. Its turn has yet to come, there is nothing to go back
	// to, or the unit was removed from Git.
	FromRunning Source = "running"
)

// Decision is Resolve's answer, with its reason.
type Decision struct {
	Action Action `json:"action"`
	// Target is the release to run. It is zero for ActKeep, ActHold and ActLeave, and may be for
	// ActRunAndStage. Stage is a release to stage as well; zero unless Action is ActRunAndStage.
	Target deployments.Pointer `json:"target,omitzero"`
	Stage  deployments.Pointer `json:"stage,omitzero"`
	Source Source              `json:"source"`
	// Reason, with its Facts, is why.
	Reason deployments.Reason `json:"reason"`
	Facts  deployments.Facts  `json:"facts,omitempty"`
	// Invalid is set if a value didn't parse, isn't allowed, or is a pin without a record; status shows it as an error. It
	// may come with any Action: a bad unit pin sets it even if a node pin decides. In JSON it is the error's text.
	Invalid error `json:"-"`
	// Recheck is when time alone could change the answer, as a pin's until; zero: never.
	Recheck time.Time `json:"recheck,omitzero"`
	// Trace lists all steps, for kedge explain: what was looked at, and the result.
	Trace []deployments.Step `json:"trace"`
}

// MarshalJSON returns the decision with Invalid as text.
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

// Resolve decides which release of a unit a node should run. A node pin decides first, then a unit
// pin that isn't Paced, then the record. The record gives the target if the node is admitted. If
// the node isn't, the record gives stable or, until the node's turn, what it runs (FromRunning). If
// a first release is rolled back, the node goes back to what was at dest before (ActLeave). Resolve
// has no side effects, and the same inputs give the same Decision.
//
// If the value that decides doesn't parse, nothing changes (ActKeep with Invalid), even if a value of lower precedence
// is valid. A typo in a pin must not silently mean "no pin". An absent record changes nothing, whatever a pin says: see
// ErrNoRecord. A quarantined digest may be the Target, and the Trace says so: the agent doesn't run it, and reports
// that.
func Resolve(f ResolveInputs) Decision {
	d := Decision{Action: ActKeep, Source: FromNothing, Trace: make([]deployments.Step, 0, 6)}
	decided := d.applyPin(f, FromNodePin, f.NodePin, f.Unit.String()+"/"+f.Node)
	if d.applyPin(f, FromUnitPin, f.UnitPin, f.Unit.String()) {
		decided = true
	}
	d.applyRecord(f, decided)
	if decided && !f.Record.Present {
		d.Action, d.Target = ActKeep, deployments.Pointer{}
		d.Invalid = first(d.Invalid, fmt.Errorf("pins/%s: %w", f.Unit, ErrNoRecord))
		d.Reason, d.Facts = deployments.ReasonNoRecord, deployments.Facts{"pin": string(d.Source)}
	}
	d.checkBounds(f)
	return d
}

// ErrNoRecord is what Decision.Invalid wraps for a valid pin without a record. Whoever may write only pins can't make a
// node run a unit that nobody desires.
var ErrNoRecord = errors.New("the unit has no record, and a pin counts only for a unit that has one")

func (d *Decision) note(s deployments.Step) { d.Trace = append(d.Trace, s) }

// decide adds the deciding step, and makes its reason the decision's.
func (d *Decision) decide(s deployments.Step) {
	s.Decides = true
	d.Reason, d.Facts = s.Reason, s.Facts
	d.note(s)
}

// applyPin evaluates one pin, and reports whether it decides. An invalid pin decides, too: nothing
// changes. If a pin of higher precedence has decided, applyPin only adds this pin to the trace, and
// its error to Invalid.
func (d *Decision) applyPin(f ResolveInputs, from Source, v Value[deployments.Pin], key string) bool {
	step := deployments.Step{What: string(from)}
	above := d.decidedBy()
	switch {
	case !v.Present:
		d.note(step)
		return false
	case v.Err != nil:
		err := fmt.Errorf("%s: %w", from, v.Err)
		d.Invalid = first(d.Invalid, err)
		step.Reason, step.Facts = deployments.ReasonInvalidPin,
			deployments.Facts{"pin": string(from), "key": "pins/" + key, "error": v.Err.Error()}
		if above != "" {
			d.note(step)
			return false
		}
		d.Source = from
		d.decide(step)
		return true
	}

	p := v.Value
	step.Facts = pinFacts(from, p)
	switch {
	case from == FromUnitPin && above == "" && f.Record.Err == nil && Paced(f.Record.Value, p) && !p.Expired(f.Now):
		step.Reason = deployments.ReasonPinPaced
		d.note(step)
		return false
	case p.Expired(f.Now):
		step.Reason = deployments.ReasonExpired
		d.note(step)
		return false
	case above != "":
		step.Reason, step.Facts = deployments.ReasonOutranked, step.Facts.With("outranked_by", above)
		d.note(step)
		return false
	}
	d.Source, d.Recheck = from, p.Until
	d.Action, d.Target, step.Reason = ActRun, p.Release, deployments.ReasonPinned
	if p.Hold {
		d.Action, step.Reason = ActHold, deployments.ReasonHeld
	}
	d.decide(step)
	return true
}

// pinFacts returns a pin's facts: whether it is a node's or a unit's, its release, who set it, until when and why. A
// pin that holds has no release.
func pinFacts(from Source, p deployments.Pin) deployments.Facts {
	facts := deployments.Facts{"pin": string(from)}
	set := func(name, value string) {
		if value != "" {
			facts[name] = value
		}
	}
	set("by", p.By)
	set("reason", p.Reason)
	if !p.Hold {
		set("release", p.Release.String())
	}
	if !p.Until.IsZero() {
		set("until", p.Until.UTC().Format(time.RFC3339))
	}
	return facts
}

// Paced reports whether the mirror rolls out a unit pin, as the record's target. If it doesn't, nodes follow the pin by
// themselves.
func Paced(r deployments.Record, p deployments.Pin) bool { return r.Paced && !p.AtOnce && !p.Hold }

// decidedBy returns the name of the step that has decided; empty: none has yet.
func (d *Decision) decidedBy() string {
	for _, s := range d.Trace {
		if s.Decides {
			return s.What
		}
	}
	return ""
}

// applyRecord evaluates the record. If decided is set, a pin has decided already, and the record is
// only added to the trace, and its error to Invalid.
func (d *Decision) applyRecord(f ResolveInputs, decided bool) {
	v, step := f.Record, deployments.Step{What: "record"}
	add := d.decide
	if decided {
		add = d.note
	}
	switch {
	case !v.Present:
		step.Reason = deployments.ReasonNoRecord
		step.Blocks = decided
		add(step)
		return
	case v.Err != nil:
		d.Invalid = first(d.Invalid, fmt.Errorf("record: %w", v.Err))
		step.Reason = deployments.ReasonInvalidRecord
		if errors.Is(v.Err, deployments.ErrTooOld) {
			step.Reason = deployments.ReasonAgentTooOld
		}
		step.Facts = deployments.Facts{"key": "desired/" + f.Unit.String(), "error": v.Err.Error()}
		add(step)
		return
	}

	r := v.Value
	step.Reason, step.Facts = deployments.ReasonTarget, origin(r).With("release", r.Target.String())
	if !decided {
		d.note(step)
		d.decideAdmission(f, r)
		return
	}
	step.Facts = step.Facts.With("outranked_by", d.decidedBy())
	d.note(step)
	if r.Rollout != nil {
		facts := progressFacts(r).With("outranked_by", d.decidedBy())
		d.note(deployments.Step{What: "rollout", Reason: r.Rollout.Reason, Facts: facts})
	}
}

// origin returns facts about a record: its commit, or that its target comes from a pin; its generation; whether its
// unit was removed from Git. A record written by hand has neither commit nor generation.
func origin(r deployments.Record) deployments.Facts {
	facts := deployments.Facts{}
	switch {
	case byPin(r):
		facts["by_pin"] = "true"
	case r.Commit != "":
		facts["commit"] = safetext.Prefix(r.Commit, 7)
	}
	if r.Generation > 0 {
		facts["generation"] = fmt.Sprint(r.Generation)
	}
	if r.Orphaned {
		facts["orphaned"] = "true"
	}
	return facts
}

// byPin reports whether a record's target comes from a unit pin, and isn't the release that Git names.
func byPin(r deployments.Record) bool { return r.Pinned != nil && r.Target != r.Pinned.Target }

// progressFacts returns the facts of a record's rollout, its phase, whether it is a pin's, and
// whether it has nothing to go back to, as a first release. They include Message only if the mirror
// that wrote the record gave no reason code.
func progressFacts(r deployments.Record) deployments.Facts {
	p := r.Rollout
	facts := p.Facts.With("phase", string(p.Phase))
	if byPin(r) {
		facts["by_pin"] = "true"
	}
	if !r.CanGoBack() {
		facts["first"] = "true"
	}
	coded := p.Reason != "" && (p.Reason != deployments.ReasonOrphaned || p.Facts["was"] != "")
	if !coded && p.Message != "" {
		facts["message"] = p.Message
	}
	if !p.HealthySince.IsZero() {
		facts["baking"] = "true"
	}
	if p.Forced {
		facts["forced"] = "true"
	}
	return facts
}

// checkBounds takes releases that the bounds forbid out of the decision. If Target is forbidden,
// nothing is to change. If only Stage is, nothing is staged. Unless Target was forbidden,
// checkBounds then calls noteQuarantine.
func (d *Decision) checkBounds(f ResolveInputs) {
	for _, p := range []*deployments.Pointer{&d.Target, &d.Stage} {
		if p.IsZero() {
			continue
		}
		err := f.Bounds.CheckSource(p.URL)
		if err == nil {
			continue
		}
		err = fmt.Errorf("not allowed on this node: %w", err)
		d.Invalid = first(d.Invalid, err)
		step := deployments.Step{What: "bounds", Reason: deployments.ReasonSourceNotAllowed, Blocks: true,
			Facts: deployments.Facts{"url": p.URL, "error": err.Error()}}
		d.note(step)
		if p == &d.Target {
			d.Action, d.Target, d.Stage = ActKeep, deployments.Pointer{}, deployments.Pointer{}
			d.Reason, d.Facts = step.Reason, step.Facts
			return
		}
		d.Stage = deployments.Pointer{}
		if d.Action = ActRun; d.Target.IsZero() {
			d.Action = ActKeep
		}
	}
	d.noteQuarantine(f)
}

// noteQuarantine adds to the trace which releases failed on the node, among those that it should
// run or stage and the record's target. It leaves out the release that runs. If none failed and
// there is a Target, it adds an empty step.
func (d *Decision) noteQuarantine(f ResolveInputs) {
	quarantineStep := func(p deployments.Pointer, namedBy string) deployments.Step {
		facts := deployments.Facts{"release": p.String()}
		if namedBy != "" {
			facts["named_by"] = namedBy
		}
		return deployments.Step{What: "quarantine", Reason: deployments.ReasonQuarantined, Facts: facts}
	}
	clear := true
	for _, p := range []deployments.Pointer{d.Target, d.Stage} {
		if !p.IsZero() && p.Digest != f.Running.Digest && slices.Contains(f.Quarantined, p.Digest) {
			clear = false
			s := quarantineStep(p, "")
			s.Blocks = p == d.Target
			if p == d.Target && (d.Source == FromNodePin || d.Source == FromUnitPin ||
				p == f.Record.Value.Target && byPin(f.Record.Value)) {
				s.Facts["pinned"] = "true"
			}
			d.note(s)
		}
	}
	r := f.Record.Value.Target
	named := !r.IsZero() && r != d.Target && r != d.Stage && r.Digest != f.Running.Digest &&
		slices.Contains(f.Quarantined, r.Digest)
	switch pinned := d.Source == FromNodePin || d.Source == FromUnitPin; {
	case named && pinned:
		s := quarantineStep(r, "record")
		s.Facts["pinned"] = "true"
		d.note(s)
	case named:
		d.note(quarantineStep(r, "record"))
	case clear && !d.Target.IsZero():
		d.note(deployments.Step{What: "quarantine"})
	}
}

func first(a, b error) error {
	if a != nil {
		return a
	}
	return b
}
