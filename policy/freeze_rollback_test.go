package policy

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet/message"
)

// goingBack is a fleet of ten whose first four still run v2, which is rolled back to v1, two at a time, when Git names
// v3 in a freeze.
func goingBack() Situation {
	s := step(4, deployments.PhaseRollingBack)
	there(&s, 4)
	p := s.Record.Rollout
	p.Failed, p.Reason = s.Record.Target.Digest, deployments.ReasonTooManyFailed
	p.Facts = deployments.Facts{"node": "n0", "failed": "1", "of": "10", "limit": "0", "error": "health"}
	s.Unit.Release, s.Commit = release("v3"), "c3"
	s.Freeze = FreezeState{Frozen: true, By: "xmas", ChangesAt: noon.Add(24 * time.Hour)}
	s.Pin = &Value[deployments.Pin]{}
	return s
}

// A new target that a freeze holds up doesn't end a rollback: nodes would stay on the failed release for as long.
func TestARollbackGoesOnWhileWhatComesNextIsFrozen(t *testing.T) {
	t.Parallel()
	const done = deployments.Phase("")
	const rolling, first, back = deployments.PhaseRolling, deployments.PhaseCanary, deployments.PhaseRollingBack
	const halted, frozen = deployments.PhaseRolledBack, deployments.PhaseFrozen
	v0, v1, v2, v3, v4 := release("v0"), release("v1"), release("v2"), release("v3"), release("v4")
	none := deployments.Pointer{}
	waits := func(s *Situation) { s.Record = Next(*s).Record }
	onStable := func(s *Situation) { each(s, func(u *deployments.UnitReport) { u.Running, u.Want = v1, v1 }) }
	order := func(verb string) func(*Situation) {
		return func(s *Situation) { waits(s); s.Order = verb }
	}
	// hanging says that all were told to go back at a time, and the last one of them still tries to.
	hanging := func(at time.Time) func(*Situation) {
		return func(s *Situation) {
			onStable(s)
			s.Record.Rollout.Cutoff, s.Record.Rollout.Since = 0, at
			s.Nodes[0].Report.Running, s.Nodes[0].Report.State = v2, deployments.StateSwitching
		}
	}
	forward := func(set func(*Situation)) func(*Situation) { // one of the four has failed, and no mirror has seen it
		return func(s *Situation) {
			*s.Record.Rollout = deployments.Progress{Phase: rolling, Promoted: true, Since: ago(time.Minute),
				Cutoff: s.Record.Rollout.Cutoff}
			s.Nodes[0].Report = deployments.UnitReport{State: deployments.StateQuarantined, Running: v1, Want: v2,
				Generation: 2, Error: "health"}
			if set != nil {
				set(s)
			}
		}
	}
	pinAborted := func(s *Situation) {
		s.Record.Pinned = &deployments.Pinned{Target: v1, Stable: v0}
	}
	pinMeanwhile := func(s *Situation) { // its rollout has come as far as two nodes when it ends
		s.Record.Pinned = &deployments.Pinned{Target: v2, Stable: v1, Failed: v2.Digest, Claim: 2}
		s.Record.Target, s.Record.Generation = v0, 4
		s.Record.Rollout = &deployments.Progress{Phase: rolling, Promoted: true, SkipsGates: true, Since: ago(time.Minute),
			Superseded: []deployments.Superseded{{Digest: v2.Digest, RollingBack: true}}}
		each(s, func(u *deployments.UnitReport) { u.Generation = 4 })
		s.Nodes[8].Report.Running, s.Nodes[9].Report.Running = v0, v0
	}
	for _, c := range []struct {
		name   string
		set    func(*Situation)
		target deployments.Pointer
		want   deployments.Phase
		next   deployments.Pointer
		says   string // by the record's rollout or, for an order, by the transition
	}{
		{"a push in a freeze waits", func(*Situation) {}, v2, back, v3, "1 of 10 nodes failed (n0: health), at most 0 may; " +
			"the release that Git names now starts when the freeze ends"},
		{"whatever gates it has besides", func(s *Situation) {
			canary(s)
			s.Unit.Rollout.Approval = deployments.Manual
		}, v2, back, v3, "starts when the freeze ends"},
		{"and where each node goes at once", func(s *Situation) { s.Unit.Rollout = nil }, v2, back, v3, ""},
		{"until the rollback has ended", func(s *Situation) { waits(s); onStable(s) }, v3, frozen, none, "xmas"},
		{"also where that is seen together with the push", onStable, v3, frozen, none, "xmas"},
		{"or the freeze", func(s *Situation) { waits(s); s.Freeze = FreezeState{} }, v3, rolling, none, ""},
		{"then it goes through its gates", func(s *Situation) {
			waits(s)
			canary(s)
			s.Freeze = FreezeState{}
		}, v3, first, none, ""},
		{"without a freeze it begins at once", func(s *Situation) { s.Freeze = FreezeState{} }, v3, rolling, none, ""},
		{"another push takes its place", func(s *Situation) { waits(s); s.Unit.Release = v4 }, v2, back, v4, ""},
		{"Git goes back to stable", func(s *Situation) { waits(s); s.Unit.Release = v1 }, v1, rolling, none, ""},
		{"Git goes back to what failed", func(s *Situation) {
			waits(s)
			s.Unit.Release = v2
		}, v2, back, none, "at most 0 may"},
		{"Git goes back to what was stable before", func(s *Situation) {
			waits(s)
			s.Unit.Release, s.Unit.Rollout.FastBack, s.StableBefore = v0, true, []deployments.Digest{v0.Digest}
		}, v0, rolling, none, ""},
		{"a pin goes first", func(s *Situation) {
			waits(s)
			pin := good(deployments.Pin{Release: v0})
			s.Pin = &pin
		}, v0, rolling, none, ""},
		{"a pin whose rollout is aborted ends", pinAborted, v2, back, v3, "starts when the freeze ends"},
		{"and its nodes are back", func(s *Situation) { pinAborted(s); waits(s); onStable(s) }, v3, frozen, none, "xmas"},
		{"a pin that came in between ends, and nodes have yet to go back", pinMeanwhile, v2, back, v3, "the end of the pin"},
		{"they go on with that", func(s *Situation) { pinMeanwhile(s); waits(s) }, v2, back, v3, "the end of the pin"},
		{"it ends when none of them runs what failed", func(s *Situation) {
			pinMeanwhile(s)
			for i := range 8 {
				s.Nodes[i].Report.Running, s.Nodes[i].Report.Want = v1, v1
			}
			s.Record.Rollout.Superseded = nil
		}, v3, frozen, none, "xmas"},
		{"promote starts it", order("promote"), v3, rolling, none, "started by an operator, despite a freeze"},
		{"by its canary", func(s *Situation) {
			canary(s)
			order("promote")(s)
		}, v3, first, none, "started by an operator"},
		{"also at the end of a pin", func(s *Situation) {
			pinAborted(s)
			order("promote")(s)
		}, v3, rolling, none, "despite a freeze"},
		{"but not one that nobody has seen yet", func(s *Situation) {
			s.Order = "promote"
		}, v2, back, v3, "look at the new one first"},
		{"nor one that came since", func(s *Situation) {
			order("promote")(s)
			s.Unit.Release = v4
		}, v2, back, v4, "look at the new one first"},
		{"abort changes nothing", order("abort"), v2, back, v3, "is being rolled back"},
		{"nor does pause", order("pause"), v2, back, v3, "is being rolled back"},
		{"nor retry", order("retry"), v2, back, v3, "retry when that is done"},
		{"a fleet that is gone waits", func(s *Situation) {
			for i := range s.Nodes {
				s.Nodes[i].Gone = true
			}
		}, v2, back, v3, ""},
		{"a fleet that is held waits", func(s *Situation) {
			each(s, func(u *deployments.UnitReport) { u.State = deployments.StateHeld })
		}, v2, back, v3, ""},
		{"who is dead doesn't hold it up", func(s *Situation) {
			onStable(s)
			s.Nodes[0].Gone, s.Nodes[0].Report.Running = true, v2
		}, v3, frozen, none, "xmas"},
		{"nor who can't go back", func(s *Situation) {
			onStable(s)
			s.Record.Rollout.Cutoff = 0
			s.Nodes[0].Report = deployments.UnitReport{State: deployments.StateQuarantined, Running: v2, Want: v1, Generation: 2,
				Quarantined: []deployments.Digest{v1.Digest}}
		}, v3, frozen, none, "xmas"},
		{"who hangs does until its deadline", hanging(ago(9 * time.Minute)), v2, back, v3, ""},
		{"and no longer", hanging(ago(10 * time.Minute)), v3, frozen, none, "xmas"},
		{"a rollout that has failed by then is rolled back", forward(nil), v2, back, v3, "1 of 10 nodes failed"},
		{"not one whose failures are borne", forward(func(s *Situation) {
			s.Unit.Rollout.MaxFailures.N = 1
		}), v3, frozen, none, "xmas"},
		{"nor one that would be paused", forward(func(s *Situation) {
			s.Unit.Rollout.OnFailure = deployments.Pause
		}), v3, frozen, none, "xmas"},
		{"what was rolled back before stays out", func(s *Situation) {
			onStable(s)
			s.Unit.Release = v2
		}, v2, halted, none, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := goingBack()
			c.set(&s)
			m := Next(s)
			phase, next, text := done, none, saysRollout(m.Record)
			if p := m.Record.Rollout; p != nil {
				phase, next = p.Phase, p.Next
			}
			switch {
			case m.Refused:
				text = says(m)
			case s.Order != "":
				text = message.Transition(m.OrderReason, m.OrderFacts)
			}
			if phase != c.want || m.Record.Target != c.target || next != c.next || !strings.Contains(text, c.says) {
				t.Errorf("%s, then %q: %q; want %s of %s, then %q: %q", brief(m.Record), next.URL, text, c.want, c.target.URL,
					c.next.URL, c.says)
			}
			if next.IsZero() {
				return
			}
			if m.Recheck.IsZero() || m.Recheck.After(s.Freeze.ChangesAt) {
				t.Errorf("looks again at %v, not at the freeze's end", m.Recheck)
			}
			// Another mirror reads the record, and decides the same.
			value, err := json.Marshal(m.Record)
			if err != nil {
				t.Fatal(err)
			}
			if s.Record, err = deployments.ParseRecord(value); err != nil {
				t.Fatal(err)
			}
			if again := Next(s).Record; s.Order == "" && !reflect.DeepEqual(again, m.Record) {
				t.Errorf("another mirror: %s, from %s", brief(again), brief(m.Record))
			}
		})
	}
}

// Nodes go back within the budget while the target that Git names waits, no record says that this one was rolled back,
// and it starts when the freeze ends.
func TestAFreezeKeepsNoNodeOnWhatFailed(t *testing.T) {
	t.Parallel()
	s := goingBack()
	var phases []deployments.Phase
	for range 20 {
		m := Next(s)
		if phases = append(phases, m.Record.Rollout.Phase); m.Record.Rollout.Phase == deployments.PhaseFrozen {
			s.Record = m.Record
			break
		}
		s.Record = m.Record
		if changed := converge(&s, s.Record); changed > 2 {
			t.Fatalf("%d nodes go back at a time", changed)
		}
	}
	runs(t, &s, release("v1"))
	if r := s.Record; r.Target != release("v3") || r.Stable != release("v1") || r.Generation != 3 || r.Commit != "c3" ||
		slices.Contains(phases, deployments.PhaseRolledBack) {
		t.Fatalf("%s, by %v", brief(r), phases)
	}
	converge(&s, s.Record)
	runs(t, &s, release("v1"))
	s.Now, s.Freeze = s.Freeze.ChangesAt, FreezeState{}
	drive(t, &s)
	runs(t, &s, release("v3"))
}
