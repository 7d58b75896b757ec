package policy

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"kedge/deployments"
)

// step is a fleet of ten in the middle of a rollout from v1 to v2, two at a time, as the cases of TestNext find it.
func step(admitted int, phase deployments.Phase) Situation {
	old, target := release("v1"), release("v2")
	s := Situation{
		Now: noon, Commit: "c2",
		Unit: deployments.Unit{ID: app, Release: target, Rollout: &deployments.Rollout{
			MaxUnavailable: deployments.Amount{N: 2}, Deadline: 10 * time.Minute, OnFailure: deployments.Rollback, Approval: deployments.Auto,
		}},
		Record: deployments.Record{Target: target, Stable: old, Generation: 2, Commit: "c2",
			Rollout: &deployments.Progress{Phase: phase, Since: noon.Add(-time.Minute), Promoted: phase == deployments.PhaseRolling}},
	}
	for i := range 10 {
		s.Nodes = append(s.Nodes, Node{Name: fmt.Sprint("n", i), Report: deployments.UnitReport{
			State: deployments.StateConverged, Running: old, Want: old, Generation: 2}})
	}
	slices.SortFunc(s.Nodes, func(a, b Node) int { return cmp.Compare(Rank(a.Name, target.Digest), Rank(b.Name, target.Digest)) })
	if admitted > 0 {
		s.Record.Rollout.Cutoff = Rank(s.Nodes[admitted-1].Name, target.Digest)
	}
	return s
}

// there says that the first nodes run the target.
func there(s *Situation, n int) {
	for i := range n {
		s.Nodes[i].Report.Running, s.Nodes[i].Report.Want = s.Unit.Release, s.Unit.Release
	}
}

func canary(s *Situation) {
	s.Unit.Rollout.Canary, s.Unit.Rollout.Bake = deployments.Amount{N: 1}, 5*time.Minute
}

// held says that a freeze has stopped the rollout.
func held(s *Situation) {
	s.Freeze = FreezeState{Frozen: true, By: "xmas", Wait: true}
	s.Record = Next(*s).Record
}

func ago(d time.Duration) time.Time { return noon.Add(-d) }

// baking says that the canaries have been well for longer than a deadline, and have to be for longer still.
func baking(s *Situation) {
	canary(s)
	there(s, 1)
	s.Unit.Rollout.Bake = time.Hour
	s.Record.Rollout.Since, s.Record.Rollout.HealthySince = ago(40*time.Minute), ago(30*time.Minute)
}

// hangsOnTheWayBack says that two nodes above the cutoff were told to go back long ago, and that those below it run
// the target.
func hangsOnTheWayBack(s *Situation) {
	p := s.Record.Rollout
	p.Since, p.Failed = ago(10*time.Minute), s.Record.Target.Digest
	for i := range s.Nodes {
		u := &s.Nodes[i].Report
		switch rank := Rank(s.Nodes[i].Name, s.Record.Target.Digest); {
		case rank <= p.Cutoff:
			u.Running, u.Want = s.Record.Target, s.Record.Target
		case i >= 8:
			u.Running, u.State = s.Record.Target, deployments.StateSwitching
		}
	}
}

func each(s *Situation, set func(*deployments.UnitReport)) {
	for i := range s.Nodes {
		set(&s.Nodes[i].Report)
	}
}

// nothingServes has the rollout of a first release begin, and every node say that nothing else serves there.
func nothingServes(s *Situation) {
	s.Record = Next(*s).Record
	s.Order = ""
	each(s, func(u *deployments.UnitReport) {
		u.State, u.Want, u.Generation = deployments.StateFetching, s.Unit.Release, s.Record.Generation
	})
}

// endedWithFailures says that half of the fleet bears a failure, and that the rollout has ended nevertheless.
func endedWithFailures(s *Situation) {
	s.Record.Stable, s.Record.Rollout = s.Unit.Release, nil
	s.Unit.Rollout.MaxFailures.N = 5
	there(s, 5)
	for i := 5; i < 10; i++ {
		u := &s.Nodes[i].Report
		u.State, u.Want, u.Quarantined = deployments.StateQuarantined, s.Unit.Release, []deployments.Digest{s.Unit.Release.Digest}
	}
}

func settled(s *Situation) {
	s.Record = deployments.Record{Target: release("v1"), Generation: 1, Commit: "c1"}
	for i := range s.Nodes {
		s.Nodes[i].Report.Generation = 1
	}
}

func TestNext(t *testing.T) {
	t.Parallel()
	const done = deployments.Phase("")
	const rolling, first, back = deployments.PhaseRolling, deployments.PhaseCanary, deployments.PhaseRollingBack
	const paused, halted = deployments.PhasePaused, deployments.PhaseRolledBack
	const waiting, frozenPhase = deployments.PhasePendingApproval, deployments.PhaseFrozen
	fails := func(s *Situation) {
		there(s, 1)
		s.Nodes[1].Report = deployments.UnitReport{State: deployments.StateQuarantined, Running: release("v1"), Want: s.Unit.Release, Generation: 2, Error: "health"}
	}
	for _, c := range []struct {
		name     string
		admitted int
		phase    deployments.Phase
		set      func(*Situation)
		want     deployments.Phase
		then     int // nodes that are admitted then, where a rollout is under way
		reason   string
	}{
		{"the first release goes to all", 0, rolling, func(s *Situation) {
			s.Record = deployments.Record{}
			each(s, func(u *deployments.UnitReport) { *u = deployments.UnitReport{} })
			nothingServes(s)
		}, done, 0, "first release"},
		{"without rollout every node at once", 0, rolling, func(s *Situation) { settled(s); s.Unit.Rollout = nil }, done, 0, "every node at once"},
		{"a new target starts, as many as the budget", 0, rolling, settled, rolling, 2, "2 of 10"},
		{"a new target starts with canaries", 0, rolling, func(s *Situation) { settled(s); canary(s) }, first, 1, "1 of 1 canary admitted"},
		{"canaries bake", 1, first, func(s *Situation) { canary(s); there(s, 1) }, first, 1, "bake"},
		{"baked canaries let the others go", 1, first, func(s *Situation) { canary(s); there(s, 1); s.Record.Rollout.HealthySince = noon.Add(-5 * time.Minute) }, rolling, 3, "3 of 10"},
		{"manual approval waits", 1, first, func(s *Situation) {
			canary(s)
			there(s, 1)
			s.Unit.Rollout.Approval, s.Record.Rollout.HealthySince = deployments.Manual, noon.Add(-5*time.Minute)
		}, waiting, 1, "waits for promote"},
		{"promote ends the canaries", 1, first, func(s *Situation) { canary(s); there(s, 1); s.Order = "promote" }, rolling, 3, "3 of 10"},
		{"no room, no admission", 2, rolling, func(s *Situation) {}, rolling, 2, ""},
		{"one converged, one admitted", 2, rolling, func(s *Situation) { there(s, 1) }, rolling, 3, "3 of 10"},
		{"all converged ends it", 10, rolling, func(s *Situation) { there(s, 10) }, done, 0, "the rollout is complete"},
		{"a node that leaves in mid-switch is in flight until it is back", 2, rolling, func(s *Situation) {
			there(s, 1)
			s.Unit.Rollout.MaxUnavailable.N = 1
			s.Nodes[1].Gone, s.Nodes[1].Report.State, s.Nodes[1].Report.Want = true, deployments.StateSwitching, s.Unit.Release
		}, rolling, 2, ""},
		{"or its deadline has passed: then it has failed", 2, rolling, func(s *Situation) {
			there(s, 1)
			s.Record.Rollout.Since = ago(10 * time.Minute)
			s.Nodes[1].Gone, s.Nodes[1].Report.State, s.Nodes[1].Report.Want = true, deployments.StateSwitching, s.Unit.Release
		}, back, 10, "gone before it converged"},
		{"a node that deregisters frees its slot", 2, rolling, func(s *Situation) { s.Nodes = s.Nodes[1:] }, rolling, 2, "2 of 9"},
		{"a node that boots above the cutoff runs stable, and takes no slot", 2, rolling, func(s *Situation) {
			there(s, 1)
			s.Nodes[9].Report = deployments.UnitReport{}
		}, rolling, 3, "3 of 10"},
		{"a node that boots below the cutoff is in flight", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Nodes[0].Report = deployments.UnitReport{}
		}, rolling, 3, "3 of 10"},
		{"a pinned node is no part of it", 2, rolling, func(s *Situation) { s.Nodes[0].Report.Pinned = true }, rolling, 3, "2 of 9"},
		{"a fleet that is pinned proves nothing: its rollout waits", 0, first, func(s *Situation) {
			canary(s)
			s.Record.Rollout.HealthySince = ago(5 * time.Minute)
			each(s, func(u *deployments.UnitReport) { u.Pinned = true })
		}, first, 0, "all 10 nodes of the unit are pinned"},
		{"also one that is held in the midst of it", 2, rolling, func(s *Situation) {
			each(s, func(u *deployments.UnitReport) { u.State = deployments.StateHeld })
		}, rolling, 2, "all 10 nodes of the unit are pinned"},
		{"or on the way back", 2, back, func(s *Situation) {
			each(s, func(u *deployments.UnitReport) { u.State = deployments.StateHeld })
		}, back, 2, ""},
		{"a fleet that is gone proves nothing: its rollout waits", 2, rolling, func(s *Situation) {
			for i := range s.Nodes {
				s.Nodes[i].Gone = true
			}
		}, rolling, 2, "10 nodes are gone"},
		{"or on the way back, too", 2, back, func(s *Situation) {
			for i := range s.Nodes {
				s.Nodes[i].Gone = true
			}
		}, back, 2, ""},
		{"a rollout without nodes waits for one", 2, rolling, func(s *Situation) { s.Nodes = nil }, rolling, 0, "waits for a node"},
		{"and begins with its canary when they come", 0, first, func(s *Situation) {
			canary(s)
			nodes := s.Nodes
			s.Nodes = nil
			s.Record = Next(*s).Record
			s.Nodes = nodes
		}, first, 1, "1 of 1 canary"},
		{"a failure rolls back", 2, rolling, fails, back, 10, "1 of 10 nodes failed"},
		{"a release that a node's configuration forbids has failed on it", 2, rolling, func(s *Situation) {
			s.Nodes[1].Report = deployments.UnitReport{State: deployments.StateInvalid, Running: release("v1"), Generation: 2, Error: "is not from"}
		}, back, 10, "is not from"},
		{"one that forbids stable, on a node that is not admitted, has nothing to do with it", 2, rolling, func(s *Situation) {
			there(s, 1)
			s.Nodes[2].Report = deployments.UnitReport{State: deployments.StateInvalid, Running: release("v0"), Generation: 2, Error: "is not from"}
		}, rolling, 3, "3 of 10"},
		{"a failure pauses, where that is asked for", 2, rolling, func(s *Situation) { fails(s); s.Unit.Rollout.OnFailure = deployments.Pause }, paused, 2, "1 of 10 nodes failed"},
		{"max_failures are borne", 2, rolling, func(s *Situation) { fails(s); s.Unit.Rollout.MaxFailures.N = 1 }, rolling, 4, "4 of 10"},
		{"a failure counts on where its node dies", 2, rolling, func(s *Situation) { fails(s); s.Nodes[1].Gone = true }, back, 10, "1 of 9 nodes failed ("},
		{"no progress within the deadline is a failure", 2, rolling, func(s *Situation) { s.Now = noon.Add(time.Hour); s.Nodes[1].Report.State = switching }, back, 10, "not converged in time"},
		{"pause", 2, rolling, func(s *Situation) { s.Order = "pause" }, paused, 2, "paused by an operator"},
		{"paused stays paused", 2, paused, func(s *Situation) { there(s, 2) }, paused, 2, ""},
		{"resume", 2, paused, func(s *Situation) { there(s, 2); s.Record.Rollout.Promoted = true; s.Order = "resume" }, rolling, 4, "4 of 10"},
		{"who hangs on the way back holds up the others until the deadline", 4, back, func(s *Situation) {
			hangsOnTheWayBack(s)
			s.Record.Rollout.Since = ago(9 * time.Minute)
		}, back, 4, ""},
		{"and is left behind then", 4, back, hangsOnTheWayBack, back, 2, ""},
		{"nor is the end held up for it", 0, back, hangsOnTheWayBack, halted, 0, "2 nodes have yet to go back"},
		{"resume in a freeze waits for it to end", 1, paused, func(s *Situation) {
			baking(s)
			s.Freeze, s.Order = FreezeState{Frozen: true, By: "xmas"}, "resume"
		}, frozenPhase, 1, "xmas"},
		{"and bakes then", 1, paused, func(s *Situation) {
			baking(s)
			s.Record.Rollout.HealthySince = ago(2 * time.Hour)
			s.Freeze, s.Order = FreezeState{Frozen: true, By: "xmas"}, "resume"
			s.Record, s.Freeze, s.Order = Next(*s).Record, FreezeState{}, ""
		}, first, 1, "canaries"},
		{"abort", 2, rolling, func(s *Situation) { s.Order = "abort" }, back, 10, "aborted"},
		{"an unknown order changes nothing", 2, rolling, func(s *Situation) { s.Order = "hurry" }, rolling, 2, "changes nothing"},
		{"a rolled back digest stays out", 0, halted, func(s *Situation) { s.Record.Rollout.Failed = s.Unit.Release.Digest }, halted, 0, ""},
		{"retry lets it in again", 0, halted, func(s *Situation) { s.Record.Rollout.Failed = s.Unit.Release.Digest; s.Order = "retry" }, rolling, 2, "2 of 10"},
		{"retry where it has ended, and failed on some, takes them a few at a time", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			s.Order = "retry"
		}, rolling, 7, "7 of 10"},
		{"and bears that they fail again", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			s.Order = "retry"
			s.Record, s.Order = Next(*s).Record, ""
			s.Record.Rollout.Cutoff, s.Unit.Rollout.MaxFailures.N = math.MaxUint64, 0
			each(s, func(u *deployments.UnitReport) { u.Generation = s.Record.Generation })
		}, done, 0, "the rollout is complete"},
		{"but no others", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			s.Order = "retry"
			s.Record, s.Order = Next(*s).Record, ""
			s.Record.Rollout.Cutoff, s.Unit.Rollout.MaxFailures.N = math.MaxUint64, 0
			s.Nodes[4].Report = s.Nodes[5].Report
			each(s, func(u *deployments.UnitReport) { u.Generation = s.Record.Generation })
		}, paused, 10, "6 of 10 nodes failed"},
		{"retry where those that failed take no part, and others have yet to run anything", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			s.Order = "retry"
			s.Nodes[5].Gone, s.Nodes[6].Report.Pinned, s.Nodes[7].Report.State = true, true, deployments.StateHeld
			s.Nodes[8].Report, s.Nodes[9].Report = deployments.UnitReport{}, s.Nodes[0].Report
		}, done, 0, "tried once more"},
		{"retry where it has ended well changes nothing on nodes", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			there(s, 10)
			s.Order = "retry"
		}, done, 0, "tried once more"},
		{"and all at once without a rollout", 0, rolling, func(s *Situation) {
			endedWithFailures(s)
			s.Unit.Rollout, s.Order = nil, "retry"
		}, done, 0, "tried once more"},
		{"back to stable, which has failed on some: they go a few at a time", 0, halted, func(s *Situation) {
			endedWithFailures(s)
			s.Record.Target = release("v3")
			s.Record.Rollout = &deployments.Progress{Phase: halted, Failed: release("v3").Digest}
		}, rolling, 7, "7 of 10"},
		{"Git goes back in mid-rollout, and one that fails on stable keeps no other on what it went back from", 4, rolling, func(s *Situation) {
			there(s, 4)
			v1, v2 := s.Record.Stable, s.Unit.Release
			s.Unit.Release = v1
			s.Record = Next(*s).Record
			s.Record.Rollout.Cutoff = math.MaxUint64
			for i := range s.Nodes {
				u := &s.Nodes[i].Report
				*u = deployments.UnitReport{State: deployments.StateConverged, Running: v1, Want: v1, Generation: s.Record.Generation}
				if i == 0 {
					u.State, u.Running, u.Quarantined, u.Error = deployments.StateQuarantined, v2, []deployments.Digest{v1.Digest}, "health"
				}
			}
		}, done, 0, "the rollout is complete"},
		{"back to stable, which all run", 0, halted, func(s *Situation) {
			s.Unit.Release = s.Record.Stable
		}, done, 0, "every node runs the release"},
		{"a freeze keeps a new target from starting", 0, rolling, func(s *Situation) {
			settled(s)
			s.Freeze = FreezeState{Frozen: true, By: "xmas"}
		}, frozenPhase, 0, "xmas"},
		{"a freeze lets a running rollout finish", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Freeze = FreezeState{Frozen: true, By: "xmas"}
		}, rolling, 4, "4 of 10"},
		{"a freeze makes a running rollout wait, as set", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Freeze = FreezeState{Frozen: true, By: "xmas", Wait: true}
		}, rolling, 2, "xmas"},
		{"promote passes a freeze", 0, frozenPhase, func(s *Situation) {
			s.Freeze = FreezeState{Frozen: true, By: "xmas"}
			s.Order = "promote"
		}, rolling, 2, "2 of 10"},
		{"promote passes a freeze for one that is under way", 2, rolling, func(s *Situation) {
			there(s, 2)
			held(s)
			s.Order = "promote"
		}, rolling, 4, "4 of 10"},
		{"of which the next one is part", 2, rolling, func(s *Situation) {
			there(s, 2)
			held(s)
			s.Order = "promote"
			s.Record, s.Order, s.Freeze.By = Next(*s).Record, "", "easter"
			there(s, 4)
		}, rolling, 6, "6 of 10"},
		{"for canaries, which bake nevertheless", 1, first, func(s *Situation) {
			canary(s)
			there(s, 1)
			held(s)
			s.Order = "promote"
		}, first, 1, "despite a freeze"},
		{"not where it approves of canaries alone", 1, waiting, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval = deployments.Manual
			held(s)
			s.Order = "promote"
		}, rolling, 1, "xmas"},
		{"one that is under way says when its freeze is over", 2, rolling, func(s *Situation) {
			held(s)
			s.Freeze = FreezeState{}
		}, rolling, 2, "goes on after a freeze"},
		{"the first release goes to all, also where promote lets it pass a freeze", 0, frozenPhase, func(s *Situation) {
			canary(s)
			s.Record.Stable = deployments.Pointer{}
			each(s, func(u *deployments.UnitReport) { *u = deployments.UnitReport{} })
			s.Freeze, s.Order = FreezeState{Frozen: true, By: "xmas"}, "promote"
			nothingServes(s)
		}, done, 0, "first release"},
		{"a bake begins anew where a canary was not well in between", 1, first, func(s *Situation) {
			baking(s)
			s.Record.Rollout.Since = ago(time.Minute)
			s.Nodes[0].Report.State = deployments.StateRetrying
			s.Record, s.Now = Next(*s).Record, noon.Add(30*time.Minute)
			s.Nodes[0].Report.State = deployments.StateConverged
		}, first, 1, "bake"},
		{"a canary that restarts in its bake is not late", 1, first, func(s *Situation) {
			baking(s)
			s.Nodes[0].Report.State = deployments.StateWaiting
		}, first, 1, ""},
		{"before it has had its time", 1, first, func(s *Situation) {
			baking(s)
			s.Nodes[0].Report.State = deployments.StateWaiting
			s.Record, s.Now = Next(*s).Record, noon.Add(10*time.Minute)
		}, back, 10, "not converged in time"},
		{"a canary that restarts while it waits for promote bakes again", 1, waiting, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval = deployments.Manual
			s.Nodes[0].Report.State = deployments.StateWaiting
		}, first, 1, "no longer healthy"},
		{"one whose failure is borne does not hold up the bake", 2, first, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.MaxFailures.N = 1
			s.Nodes[1].Report.State = switching
			s.Record.Rollout.HealthySince = ago(time.Hour)
		}, rolling, 3, "3 of 10"},
		{"a fleet that bakes bakes on where one of it restarts", 10, rolling, func(s *Situation) {
			baking(s)
			there(s, 10)
			s.Unit.Rollout.Canary.N = 0
			s.Nodes[0].Report.State, s.Nodes[0].Started = deployments.StateWaiting, ago(time.Minute)
			s.Record, s.Now = Next(*s).Record, noon.Add(30*time.Minute)
			s.Nodes[0].Report.State = deployments.StateConverged
		}, done, 0, "the rollout is complete"},
		{"but not where one is let go from a pin", 10, rolling, func(s *Situation) {
			baking(s)
			there(s, 10)
			s.Unit.Rollout.Canary.N = 0
			s.Nodes[0].Report.State, s.Nodes[0].Report.Running = deployments.StateFetching, release("v1")
			s.Record, s.Now = Next(*s).Record, noon.Add(30*time.Minute)
			there(s, 10)
			s.Nodes[0].Report.State = deployments.StateConverged
		}, rolling, 10, "bake"},
		{"a node that boots into a bake is not late", 2, first, func(s *Situation) {
			baking(s)
			s.Nodes[1] = Node{Name: s.Nodes[1].Name, Started: ago(time.Minute)}
		}, first, 2, ""},
		{"before it has had its time", 2, first, func(s *Situation) {
			baking(s)
			s.Record.Rollout.HealthySince = time.Time{}
			s.Nodes[1] = Node{Name: s.Nodes[1].Name, Started: ago(10 * time.Minute)}
		}, back, 10, "not converged in time"},
		{"who could not say that it has converged, as the store was away, is not late", 2, rolling, func(s *Situation) {
			s.Record.Rollout.Since, s.Seen = ago(time.Hour), ago(time.Minute)
		}, rolling, 2, ""},
		{"before it has had its time since", 2, rolling, func(s *Situation) {
			s.Record.Rollout.Since, s.Seen = ago(time.Hour), ago(10*time.Minute)
			s.Nodes[0].Report.State = switching
		}, back, 10, "not converged in time"},
		{"a bake doesn't end before canaries could say how they are", 1, first, func(s *Situation) {
			canary(s)
			there(s, 1)
			s.Record.Rollout.HealthySince, s.Seen = ago(time.Hour), ago(10*time.Second)
		}, first, 1, "have yet to report how they are"},
		{"which takes them a moment", 1, first, func(s *Situation) {
			canary(s)
			there(s, 1)
			s.Record.Rollout.HealthySince, s.Seen = ago(time.Hour), ago(30*time.Second)
		}, rolling, 3, "3 of 10"},
		{"by a clock that may be off, but not by far", 2, first, func(s *Situation) {
			baking(s)
			s.Record.Rollout.HealthySince = time.Time{}
			s.Nodes[1] = Node{Name: s.Nodes[1].Name, Started: noon.Add(10 * time.Minute)}
		}, back, 10, "not converged in time"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(c.admitted, c.phase)
			c.set(&s)
			m := Next(s)
			if !m.Recheck.IsZero() && !m.Recheck.After(s.Now) {
				t.Errorf("looks again at %v, which has been", m.Recheck)
			}
			phase, admitted := done, 0
			if p := m.Record.Rollout; p != nil {
				phase = p.Phase
				for _, n := range s.Nodes {
					if p.Cutoff == math.MaxUint64 || Rank(n.Name, s.Unit.Release.Digest) <= p.Cutoff {
						admitted++
					}
				}
			}
			if phase != c.want || (c.want != back || c.phase == back) && admitted != c.then || !strings.Contains(says(m), c.reason) {
				t.Errorf("phase %q, %d admitted, %q; want %q, %d, %q", phase, admitted, says(m), c.want, c.then, c.reason)
			}
		})
	}
}

// A push while nodes are on the way: those that may still act on the record before count against the budget of the
// next.
func TestNextSupersedes(t *testing.T) {
	t.Parallel()
	s := step(2, deployments.PhaseRolling)
	was := s.Record
	s.Unit.Release = release("v3")
	m := Next(s)
	p := m.Record.Rollout
	if m.Record.Target != release("v3") || m.Record.Stable != was.Stable || m.Record.Generation != 3 || p == nil {
		t.Fatalf("record %+v, want v3 over v1 as generation 3", m.Record)
	}
	if want := (deployments.Superseded{Digest: was.Target.Digest, Cutoff: was.Rollout.Cutoff, Generation: was.Generation}); len(p.Superseded) != 1 || p.Superseded[0] != want || p.Cutoff != 0 {
		t.Fatalf("over %+v, cutoff %d; want %+v, and nobody admitted yet", p.Superseded, p.Cutoff, want)
	}
	s.Record = m.Record
	for i := range s.Nodes { // they know of it, and have stayed where they were
		s.Nodes[i].Report.Generation = 3
	}
	if m = Next(s); m.Record.Rollout.Cutoff == 0 {
		t.Error("nobody is admitted although all know of the new target")
	}
}

// A bake that began, and a step that was made, by a clock that has gone back since then count from now on.
func TestNextAfterTheClockWentBack(t *testing.T) {
	t.Parallel()
	s := step(1, deployments.PhaseCanary)
	canary(&s)
	there(&s, 1)
	s.Record.Rollout.Since, s.Record.Rollout.HealthySince = noon.Add(24*time.Hour), noon.Add(24*time.Hour)
	m := Next(s)
	if m.Record.Rollout.Phase != deployments.PhaseCanary || !m.Recheck.Equal(noon.Add(5*time.Minute)) {
		t.Fatalf("it is %s, and looks again at %v", brief(m.Record), m.Recheck)
	}
	s.Record, s.Now = m.Record, m.Recheck
	if m = Next(s); m.Record.Rollout.Phase != deployments.PhaseRolling {
		t.Errorf("after the bake it is %s", brief(m.Record))
	}
}

// Who looks at a rollout that a freeze has stopped is told how it passes.
func TestPromoteInAFreeze(t *testing.T) {
	t.Parallel()
	s := step(2, deployments.PhaseRolling)
	held(&s)
	if reason, _ := Refusal("promote", s.Record); reason != "" || !s.Record.Rollout.HeldUp() {
		t.Errorf("promote is refused: %s", reason)
	}
	s.Order = "promote"
	s.Record = Next(s).Record
	if reason, _ := Refusal("promote", s.Record); reason != deployments.ReasonRollingAlready || s.Record.Rollout.HeldUp() {
		t.Errorf("once it is let go: %s", reason)
	}
}

// While it is not known whether reports are out of date, they could be so at any time: that must not be written
// anew each time.
func TestNextWritesOnceWhileTheStoreMayBeAway(t *testing.T) {
	t.Parallel()
	s := step(1, deployments.PhaseCanary)
	canary(&s)
	there(&s, 1)
	s.Record.Rollout.HealthySince, s.Seen = ago(time.Hour), s.Now
	s.Record = Next(s).Record
	s.Now = noon.Add(time.Second)
	s.Seen = s.Now
	if m := Next(s); !reflect.DeepEqual(m.Record, s.Record) || !m.Recheck.Equal(s.Now.Add(reportWithin)) {
		t.Errorf("%s, once more after %v", brief(m.Record), m.Recheck.Sub(s.Now))
	}
}

// What Refusal says of an order is what Next does with it.
func TestRefusedOrdersChangeNothing(t *testing.T) {
	t.Parallel()
	for _, phase := range []deployments.Phase{"", deployments.PhaseCanary, deployments.PhasePendingApproval, deployments.PhaseRolling, deployments.PhasePaused,
		deployments.PhaseRollingBack, deployments.PhaseRolledBack} {
		for _, verb := range append([]deployments.Verb{"hurry"}, deployments.Verbs()...) {
			order := string(verb)
			s := step(2, phase)
			s.Unit.Rollout.Approval = deployments.Manual
			switch phase {
			case "":
				s.Record.Rollout = nil
			case deployments.PhasePendingApproval:
				s.Record.Rollout.HealthySince = noon
			case deployments.PhaseRollingBack, deployments.PhaseRolledBack:
				s.Record.Rollout.Failed = s.Unit.Release.Digest
			}
			without := Next(s)
			s.Order = order
			m := Next(s)
			why, _ := Refusal(order, s.Record)
			same := reflect.DeepEqual(m.Record, without.Record)
			if (why != "") != same || why != "" && (m.Reason != why || !m.Refused) || (m.OrderReason == "") != (why != "") {
				t.Errorf("%s while %q: refused %q, and Next says %q, did %q, and changes nothing: %v", order, phase, why, m.Reason,
					m.OrderReason, same)
			}
		}
	}
}

// An order that the mirror takes while the pin doesn't parse is gone, and did nothing: its history must say so.
func TestInvalidPinRefusesOrders(t *testing.T) {
	t.Parallel()
	for _, verb := range append([]deployments.Verb{""}, deployments.Verbs()...) {
		s := step(2, deployments.PhaseRolling)
		s.Pin, s.Order = &Value[deployments.Pin]{Present: true, Err: errors.New("hodl")}, string(verb)
		m := Next(s)
		if m.Refused != (verb != "") || m.Reason != deployments.ReasonInvalidPin || m.OrderReason != "" ||
			!reflect.DeepEqual(m.Record, s.Record) {
			t.Errorf("%q: refused %t, %s %s", verb, m.Refused, m.Reason, m.OrderReason)
		}
	}
}

// Whatever nodes and settings say, the record that quotes them is one that nodes take, and its history fits a
// transaction.
func TestReasonsAreBounded(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", 100<<10)
	for name, set := range map[string]func(*Situation){
		"a node's error": func(s *Situation) {
			s.Nodes[1].Report = deployments.UnitReport{State: deployments.StateQuarantined, Running: release("v1"), Want: s.Unit.Release, Generation: 2, Error: long}
		},
		"a node's state": func(s *Situation) {
			s.Nodes[1].Report.State, s.Record.Rollout.Since = deployments.State(long), ago(time.Hour)
		},
		"a window": func(s *Situation) { s.Freeze = FreezeState{Frozen: true, Wait: true, By: long, Reason: long} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := step(2, deployments.PhaseRolling)
			there(&s, 1)
			set(&s)
			m := Next(s)
			if text := saysRollout(m.Record); len(text) > 1000 || !strings.Contains(text, "éé...") || !utf8.ValidString(text) {
				t.Errorf("a reason of %d bytes: %.100s", len(text), text)
			}
		})
	}
}
