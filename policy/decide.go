package policy

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
)

func rank(node string, target deployments.Digest) uint64 {
	h := sha256.New()
	h.Write(target[:])
	h.Write([]byte(node))
	return max(1, binary.BigEndian.Uint64(h.Sum(nil)))
}

func resolve(f Facts) Decision {
	var d Decision
	note := func(what, says string) { d.Trace = append(d.Trace, Step{What: what, Says: says}) }
	decide := func(what, says, unblock string) {
		d.Trace = append(d.Trace, Step{What: what, Says: says, Decides: true, Unblock: unblock})
		d.Why = says
	}
	for _, p := range []struct {
		what   string
		source Source
		pin    Value[deployments.Pin]
		remove string
	}{
		{"node pin", FromNodePin, f.NodePin, fmt.Sprintf("kedge unpin %s --node %s", f.Unit, f.Node)},
		{"unit pin", FromUnitPin, f.UnitPin, fmt.Sprintf("kedge unpin %s", f.Unit)},
	} {
		switch {
		case !p.pin.Present:
			note(p.what, "there is none")
		case p.pin.Err != nil:
			d.Action, d.Source, d.Invalid = ActKeep, p.source, fmt.Errorf("%s: %w", p.what, p.pin.Err)
			decide(p.what, p.what+" doesn't parse: nothing is changed", "write it again, or "+p.remove)
			return d
		case !p.pin.Value.Until.IsZero() && !f.Now.Before(p.pin.Value.Until):
			note(p.what, "ended "+clock(p.pin.Value.Until))
		default:
			d.Source, d.Recheck = p.source, p.pin.Value.Until
			says := p.what + describe(p.pin.Value)
			if p.pin.Value.Hold {
				d.Action = ActHold
				decide(p.what, "hold: "+says, p.remove)
				return d
			}
			d.Action, d.Target = ActRun, p.pin.Value.Release
			decide(p.what, says, p.remove)
			return check(f, d)
		}
	}
	r := f.Record.Value
	switch {
	case !f.Record.Present:
		d.Action, d.Source = ActKeep, FromNothing
		decide("record", "nothing is desired: what runs stays", "name a release in the deployments repo")
		return d
	case f.Record.Err != nil:
		d.Action, d.Source, d.Invalid = ActKeep, FromNothing, fmt.Errorf("record: %w", f.Record.Err)
		decide("record", "the record doesn't parse: nothing is changed", "the mirror writes it again from Git; without one, write a pointer")
		return d
	}
	git := "desired by a person"
	if r.Commit != "" {
		git = "Git, commit " + r.Commit[:min(12, len(r.Commit))]
	}
	if r.Rollout == nil || rank(f.Node, r.Target.Digest) <= r.Rollout.Cutoff {
		d.Action, d.Target, d.Source = ActRun, r.Target, FromTarget
		if r.Rollout != nil {
			git += fmt.Sprintf(", admitted (%s)", r.Rollout.Phase)
		}
		decide("record", git, "")
		return check(f, d)
	}
	says := fmt.Sprintf("%s is rolling out (%s), and this node is not admitted yet", git, r.Rollout.Phase)
	if r.Stable.IsZero() {
		d.Action, d.Source, d.Stage = ActKeep, FromStable, r.Target
		decide("admission", says+"; there is no stable release before it", "wait, or kedge promote "+f.Unit.String())
		return d
	}
	d.Action, d.Target, d.Stage, d.Source = ActStage, r.Stable, r.Target, FromStable
	decide("admission", says, "wait, or kedge promote "+f.Unit.String())
	return check(f, d)
}

// check holds a decision against what this node's configuration allows, and notes quarantine.
func check(f Facts, d Decision) Decision {
	for _, p := range []deployments.Pointer{d.Target, d.Stage} {
		if !p.IsZero() && !f.Bounds.AllowsSource(p.URL) {
			d.Action, d.Target, d.Stage = ActKeep, deployments.Pointer{}, deployments.Pointer{}
			d.Invalid = fmt.Errorf("%s is not below any of the sources that this node's configuration allows (%s)", p.URL, strings.Join(f.Bounds.Sources, ", "))
			d.Trace = append(d.Trace, Step{What: "sources", Says: d.Invalid.Error(), Decides: true, Unblock: "publish below one of them, or change the agent's sources"})
			return d
		}
	}
	if slices.Contains(f.Quarantined, d.Target.Digest) {
		d.Trace = append(d.Trace, Step{What: "quarantine", Says: "this release failed on this node before, and is not tried again",
			Unblock: fmt.Sprintf("push another release, or kedge retry %s", f.Unit)})
	}
	return d
}

// AllowsSource reports whether a release may come from url.
func (b Bounds) AllowsSource(url string) bool {
	return len(b.Sources) == 0 || slices.ContainsFunc(b.Sources, func(prefix string) bool { return deployments.UnderPrefix(url, prefix) })
}

func describe(p deployments.Pin) string {
	var b strings.Builder
	if p.By != "" {
		b.WriteString(" by " + p.By)
	}
	if !p.Until.IsZero() {
		b.WriteString(" until " + clock(p.Until))
	}
	if p.Reason != "" {
		b.WriteString(" (" + p.Reason + ")")
	}
	return b.String()
}

func clock(t time.Time) string { return t.UTC().Format("2006-01-02 15:04Z") }
