package policy

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet/message"
)

var (
	app  = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	noon = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
)

// release makes up a pointer.
func release(name string) deployments.Pointer {
	var d deployments.Digest
	copy(d[:], name)
	return deployments.Pointer{URL: "s3://acme/web/" + name + "/manifest.yaml", Digest: d}
}

func good[T any](v T) Value[T] { return Value[T]{Present: true, Value: v} }
func bad[T any]() Value[T]     { return Value[T]{Present: true, Err: errors.New("a typo")} }

func TestResolve(t *testing.T) {
	t.Parallel()
	type pin = deployments.Pin
	type record = deployments.Record
	type progress = deployments.Progress
	v1, v2, v3 := release("v1"), release("v2"), release("v3")
	none := deployments.Pointer{}
	git := record{Target: v2, Stable: v1, Generation: 4, Commit: "1a2b3c4d5e6f"}
	in := func(p progress) Value[record] {
		r := git
		r.Rollout = &p
		return good(r)
	}
	rank := Rank("n1", v2.Digest)
	rolling := progress{Phase: deployments.PhaseRolling, Cutoff: rank}
	orphaned := func(p progress) Value[record] { r := in(p); r.Value.Orphaned = true; return r }
	firstBack := good(record{Target: v2, Generation: 1, Rollout: &progress{Phase: deployments.PhaseRolledBack}})
	failed := []deployments.Digest{v1.Digest}
	replaced := []deployments.Superseded{{Digest: v3.Digest, Cutoff: 7}}
	for _, c := range []struct {
		name          string
		f             ResolveInputs
		action        Action
		target, stage deployments.Pointer
		source        Source
		why           string
		invalid       string
		recheck       time.Time
	}{
		{"nothing", ResolveInputs{}, ActKeep, none, none, FromNothing, "no record", "", time.Time{}},
		{"a record", ResolveInputs{Record: good(git)}, ActRun, v2, none, FromTarget, "Git commit 1a2b3c4", "", time.Time{}},
		{"a bare pointer", ResolveInputs{Record: good(record{Target: v1})},
			ActRun, v1, none, FromTarget, "written by hand", "", time.Time{}},
		{"a bad record", ResolveInputs{Record: bad[record]()},
			ActKeep, none, none, FromNothing, "doesn't parse", "record: a typo", time.Time{}},
		{"a unit pin",
			ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3, By: "alice", Reason: "incident 812",
				Until: noon.Add(2 * time.Hour)})},
			ActRun, v3, none, FromUnitPin, "unit pin by alice until 2026-11-24 14:00Z (incident 812)", "", noon.Add(2 * time.Hour)},
		{"a pin until another day",
			ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3, Until: noon.Add(24 * time.Hour)})},
			ActRun, v3, none, FromUnitPin, "until 2026-11-25 12:00Z", "", noon.Add(24 * time.Hour)},
		{"a pin that ended", ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3, Until: noon})},
			ActRun, v2, none, FromTarget, "Git", "", time.Time{}},
		{"a node pin above a unit pin",
			ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3}), NodePin: good(pin{Release: v1})},
			ActRun, v1, none, FromNodePin, "node pin", "", time.Time{}},
		{"a node pin that ended above a unit pin",
			ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3}),
				NodePin: good(pin{Release: v1, Until: noon.Add(-1)})},
			ActRun, v3, none, FromUnitPin, "unit pin", "", time.Time{}},
		{"a unit pin without a record", ResolveInputs{Running: v1, UnitPin: good(pin{Release: v3})},
			ActKeep, none, none, FromUnitPin, "without a record", "has no record", time.Time{}},
		{"a node pin without a record", ResolveInputs{NodePin: good(pin{Release: v3})},
			ActKeep, none, none, FromNodePin, "without a record", "has no record", time.Time{}},
		{"a hold without a record", ResolveInputs{UnitPin: good(pin{Hold: true})},
			ActKeep, none, none, FromUnitPin, "without a record", "has no record", time.Time{}},
		{"a hold", ResolveInputs{Record: good(git), NodePin: good(pin{Hold: true, By: "bob"})},
			ActHold, none, none, FromNodePin, "node pin by bob", "", time.Time{}},
		{"a bad node pin above what is good",
			ResolveInputs{Record: good(git), UnitPin: good(pin{Release: v3}), NodePin: bad[pin]()},
			ActKeep, none, none, FromNodePin, "doesn't parse", "node pin: a typo", time.Time{}},
		{"a bad unit pin above a good record", ResolveInputs{Record: good(git), UnitPin: bad[pin]()},
			ActKeep, none, none, FromUnitPin, "doesn't parse", "unit pin: a typo", time.Time{}},
		{"a good node pin above what is bad",
			ResolveInputs{Record: bad[record](), UnitPin: bad[pin](), NodePin: good(pin{Release: v1})},
			ActRun, v1, none, FromNodePin, "node pin", "unit pin: a typo", time.Time{}},
		{"admitted", ResolveInputs{Record: in(progress{Phase: deployments.PhaseCanary, Cutoff: rank})},
			ActRun, v2, none, FromTarget, "Git", "", time.Time{}},
		{"not admitted", ResolveInputs{Record: in(progress{Phase: deployments.PhaseCanary, Cutoff: rank - 1})},
			ActRunAndStage, v1, v2, FromStable, "until this node is admitted", "", time.Time{}},
		{"not admitted, and nothing stable",
			ResolveInputs{Record: good(record{Target: v2, Generation: 1, Rollout: &progress{Phase: deployments.PhaseFrozen}})},
			ActRunAndStage, none, v2, FromTarget, "waits", "", time.Time{}},
		{"admitted, on what the record doesn't name", ResolveInputs{Running: v3, Record: in(rolling)},
			ActRunAndStage, v1, v2, FromStable, "the stable release first", "", time.Time{}},
		{"admitted, where something else serves", ResolveInputs{AtDest: FoundOther, Record: in(rolling)},
			ActRunAndStage, v1, v2, FromStable, "the stable release first", "", time.Time{}},
		{"admitted, on what the record doesn't name, and stable failed there",
			ResolveInputs{Running: v3, Quarantined: failed, Record: in(rolling)}, ActRun, v2, none, FromTarget, "Git",
			"", time.Time{}},
		{"admitted, on a target that was replaced", ResolveInputs{Running: v3,
			Record: in(progress{Phase: deployments.PhaseRolling, Cutoff: rank, Superseded: replaced})},
			ActRun, v2, none, FromTarget, "Git", "", time.Time{}},
		{"admitted, on what the record doesn't name, and nothing is stable", ResolveInputs{Running: v3,
			Record: good(record{Target: v2, Generation: 1, Rollout: &rolling})},
			ActRun, v2, none, FromTarget, "", "", time.Time{}},
		{"not admitted, on the target", ResolveInputs{Running: v2, Record: in(progress{Phase: deployments.PhaseRolling})},
			ActRun, v2, none, FromTarget, "runs already", "", time.Time{}},
		{"not admitted, on a target that was replaced",
			ResolveInputs{Running: v3, Record: in(progress{Phase: deployments.PhaseRolling, Superseded: replaced})},
			ActRunAndStage, v3, v2, FromRunning, "superseded", "", time.Time{}},
		{"rolled back, its turn to come",
			ResolveInputs{Running: v2, Record: in(progress{Phase: deployments.PhaseRollingBack, Cutoff: rank})},
			ActRun, v2, none, FromRunning, "turn", "", time.Time{}},
		{"rolled back, its turn",
			ResolveInputs{Running: v2, Record: in(progress{Phase: deployments.PhaseRollingBack, Cutoff: rank - 1})},
			ActRun, v1, none, FromStable, "rolled back", "", time.Time{}},
		{"rolled back before it began",
			ResolveInputs{Running: v1, Record: in(progress{Phase: deployments.PhaseRollingBack, Cutoff: rank})},
			ActRun, v1, none, FromStable, "rolled back", "", time.Time{}},
		{"halted", ResolveInputs{Running: v2, Record: in(progress{Phase: deployments.PhaseRolledBack})},
			ActRun, v1, none, FromStable, "rolled back", "", time.Time{}},
		{"not admitted, and stable failed here",
			ResolveInputs{Running: v3, Quarantined: failed, Record: in(progress{Phase: deployments.PhaseRolling})},
			ActRunAndStage, none, v2, FromStable, "failed on this node", "", time.Time{}},
		{"not admitted, and stable, which runs, had failed here",
			ResolveInputs{Running: v1, Quarantined: failed, Record: in(progress{Phase: deployments.PhaseRolling})},
			ActRunAndStage, v1, v2, FromStable, "until this node is admitted", "", time.Time{}},
		{"not admitted, and stable failed here, where nothing runs",
			ResolveInputs{Quarantined: failed, Record: in(progress{Phase: deployments.PhaseRolling})},
			ActRunAndStage, v1, v2, FromStable, "until this node is admitted", "", time.Time{}},
		{"halted, and stable failed here",
			ResolveInputs{Running: v3, Quarantined: failed, Record: in(progress{Phase: deployments.PhaseRolledBack})},
			ActKeep, none, none, FromStable, "failed on this node", "", time.Time{}},
		{"rolled back, its turn, and stable failed here",
			ResolveInputs{Running: v2, Quarantined: failed, Record: in(progress{Phase: deployments.PhaseRollingBack})},
			ActRun, v1, none, FromStable, "rolled back", "", time.Time{}},
		{"admitted, and orphaned since", ResolveInputs{Running: v1, Record: orphaned(rolling)},
			ActRun, v1, none, FromRunning, "no longer in Git", "", time.Time{}},
		{"on its way, and orphaned since", ResolveInputs{Running: v2, Record: orphaned(rolling)},
			ActRun, v2, none, FromTarget, "Git", "", time.Time{}},
		{"orphaned, where nothing runs", ResolveInputs{Record: orphaned(progress{Phase: deployments.PhaseRolling})},
			ActRunAndStage, v1, v2, FromStable, "until this node is admitted", "", time.Time{}},
		{"rolled back, with nothing to go back to", ResolveInputs{Running: v2, Record: firstBack}, ActRun, v2, none,
			FromRunning, "none to go back to", "", time.Time{}},
		{"rolled back, with what was there before kedge", ResolveInputs{Running: v2, Leavable: true, Record: firstBack},
			ActLeave, none, none, FromStable, "goes back to what was there before kedge", "", time.Time{}},
		{"rolled back, and back at what was there before", ResolveInputs{AtDest: FoundOther, Record: firstBack},
			ActKeep, none, none, FromStable, "keeps what was there before kedge", "", time.Time{}},
		{"stable from the right place, the target from elsewhere",
			ResolveInputs{Running: v1, Bounds: Bounds{Sources: []string{v1.URL}},
				Record: in(progress{Phase: deployments.PhaseRolling})},
			ActRun, v1, none, FromStable, "until this node is admitted", "is not from", time.Time{}},
		{"stable failed here, the target from elsewhere",
			ResolveInputs{Running: v3, Quarantined: failed, Bounds: Bounds{Sources: []string{v1.URL}},
				Record: in(progress{Phase: deployments.PhaseRolling})},
			ActKeep, none, none, FromStable, "failed on this node", "is not from", time.Time{}},
		{"stable from elsewhere, the target from the right place",
			ResolveInputs{Running: v3, Bounds: Bounds{Sources: []string{v2.URL}},
				Record: in(progress{Phase: deployments.PhaseRolling})},
			ActKeep, none, none, FromStable, "may not be used", "is not from", time.Time{}},
		{"from elsewhere", ResolveInputs{Record: good(git), Bounds: Bounds{Sources: []string{"s3://acme/other"}}},
			ActKeep, none, none, FromTarget, "may not be used", "is not from s3://acme/other", time.Time{}},
		{"from the right place", ResolveInputs{Record: good(git), Bounds: Bounds{Sources: []string{"s3://acme/web/"}}},
			ActRun, v2, none, FromTarget, "Git", "", time.Time{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.f.Unit, c.f.Node, c.f.Now = app, "n1", noon
			d := Resolve(c.f)
			if d.Action != c.action || d.Target != c.target || d.Stage != c.stage || d.Source != c.source || !d.Recheck.Equal(c.recheck) {
				t.Errorf("%s %v, stage %v, from %s, recheck %v; want %s %v, stage %v, from %s, recheck %v",
					d.Action, d.Target, d.Stage, d.Source, d.Recheck, c.action, c.target, c.stage, c.source, c.recheck)
			}
			if why := message.Decision(d.Reason, d.Facts); !strings.Contains(why, c.why) || why == "" {
				t.Errorf("why %q, want %q in it", why, c.why)
			}
			if (d.Invalid == nil) != (c.invalid == "") || d.Invalid != nil && !strings.Contains(d.Invalid.Error(), c.invalid) {
				t.Errorf("invalid %v, want %q in it", d.Invalid, c.invalid)
			}
			deciding := 0
			for _, s := range d.Trace {
				if s.Decides {
					deciding++
				}
			}
			if deciding != 1 {
				t.Errorf("%d steps decide: %+v", deciding, d.Trace)
			}
		})
	}
}

func TestQuarantineIsShown(t *testing.T) {
	t.Parallel()
	v1 := release("v1")
	d := Resolve(ResolveInputs{Unit: app, Node: "n1", Now: noon, Record: good(deployments.Record{Target: v1}),
		Quarantined: []deployments.Digest{v1.Digest}})
	last := d.Trace[len(d.Trace)-1]
	if d.Target != v1 || last.What != "quarantine" || last.Reason != deployments.ReasonQuarantined {
		t.Errorf("target %v, last step %+v", d.Target, last)
	}
}

// A quarantine is told of, and in the way, where it keeps the node from what it is to run or to have ready, and
// nowhere else.
func TestQuarantineInTheWay(t *testing.T) {
	t.Parallel()
	v1, v2 := release("v1"), release("v2")
	rolling := good(deployments.Record{Target: v2, Stable: v1, Rollout: &deployments.Progress{Phase: deployments.PhaseRolling}})
	for _, c := range []struct {
		name string
		f    ResolveInputs
		want bool
	}{
		{"the target failed here",
			ResolveInputs{Record: good(deployments.Record{Target: v2}), Running: v1,
				Quarantined: []deployments.Digest{v2.Digest}}, true},
		{"it runs all the same",
			ResolveInputs{Record: good(deployments.Record{Target: v2}), Running: v2,
				Quarantined: []deployments.Digest{v2.Digest}}, false},
		{"what is to come failed here",
			ResolveInputs{Record: rolling, Running: v1, Quarantined: []deployments.Digest{v2.Digest}}, true},
		{"something else did",
			ResolveInputs{Record: rolling, Running: v1, Quarantined: []deployments.Digest{release("v0").Digest}}, false},
	} {
		c.f.Unit, c.f.Node, c.f.Now = app, "n1", noon
		trace := Resolve(c.f).Trace
		if got := slices.ContainsFunc(trace, func(s deployments.Step) bool { return s.What == "quarantine" && s.Reason != "" }); got != c.want {
			t.Errorf("%s: told: %v, want %v: %+v", c.name, got, c.want, trace)
		}
	}
}

func TestDecisionAsJSON(t *testing.T) {
	t.Parallel()
	data, err := json.Marshal(Resolve(ResolveInputs{Unit: app, Node: "n1", Now: noon, NodePin: bad[deployments.Pin]()}))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"action":"keep"`, `"invalid":"node pin: a typo"`, `"source":"node pin"`, `"decides":true`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("%s lacks %s", data, want)
		}
	}
	if strings.Contains(string(data), "target") {
		t.Errorf("%s names a target", data)
	}
}

func TestRank(t *testing.T) {
	t.Parallel()
	a, b := release("a").Digest, release("b").Digest
	if Rank("n1", a) == Rank("n2", a) || Rank("n1", a) == Rank("n1", b) {
		t.Error("ranks don't depend on node and target alone")
	}
}

func TestBoundsOnSources(t *testing.T) {
	t.Parallel()
	b := Bounds{Sources: []string{"s3://acme/web", "https://example.com/r/"}}
	for url, want := range map[string]bool{
		"s3://acme/web/1/manifest.yaml":       true,
		"https://example.com/r/1.yaml":        true,
		"s3://acme/webx/1/manifest.yaml":      false,
		"s3://acme/web/../other/m.yaml":       false,
		"s3://acme/web/%2e%2e/other/m.yaml":   false,
		"s3://acme/web//m.yaml":               false,
		"s3://acme/web/./m.yaml":              false,
		"s3://acme/web/%2f/m.yaml":            false,
		"s3://acme2/web/m.yaml":               false,
		"https://example.com.evil.org/r/1":    false,
		"https://example.com/r/1?x=/../other": false,
		"https://example.com/r\\..\\1":        false,
	} {
		if err := b.CheckSource(url); (err == nil) != want {
			t.Errorf("%s: %v, want allowed: %v", url, err, want)
		}
	}
}

// A rollout that has nothing to go back to says so: there is no stable release, or it is the target
// itself.
func TestRolloutStepSaysThatThereIsNoWayBack(t *testing.T) {
	t.Parallel()
	serving := deployments.Progress{Phase: deployments.PhasePaused, Serving: true}
	for name, c := range map[string]struct {
		stable   deployments.Pointer
		progress deployments.Progress
		want     string
	}{
		"first release":               {deployments.Pointer{}, deployments.Progress{}, "true"},
		"first, where something runs": {deployments.Pointer{}, serving, ""},
		"a release before":            {release("1"), deployments.Progress{}, ""},
		"retried, and stable":         {release("2"), deployments.Progress{}, "true"},
	} {
		r := deployments.Record{Target: release("2"), Stable: c.stable, Rollout: &c.progress}
		if got := progressFacts(r)["first"]; got != c.want {
			t.Errorf("%s: first is %q, want %q", name, got, c.want)
		}
	}
}
