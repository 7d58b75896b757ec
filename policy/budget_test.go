package policy

import (
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

const (
	fetching, switching, retrying  = deployments.StateFetching, deployments.StateSwitching, deployments.StateRetrying
	converged, quarantined, refuse = deployments.StateConverged, deployments.StateQuarantined, deployments.StateInvalid
)

// Who takes one of max_unavailable's places. One node of ten runs the target, one is admitted and on its way, and
// there is room for one more: three are admitted then, unless one of those that are not takes the room already.
func TestNextCountsWhoIsInFlight(t *testing.T) {
	t.Parallel()
	v0, v1, v2, v3 := release("v0"), release("v1"), release("v2"), release("v3")
	type report = deployments.UnitReport
	last := func(u report) func(*Situation) { return func(s *Situation) { s.Nodes[9].Report = u } }
	next := func(u report) func(*Situation) { return func(s *Situation) { s.Nodes[2].Report = u } }
	// Both earlier records, of which the last two nodes may still know alone, let them all begin v3.
	replaced := func(back bool, us ...report) func(*Situation) {
		return func(s *Situation) {
			s.Record.Generation = 5
			each(s, func(u *report) { u.Generation = 5 })
			s.Record.Rollout.Superseded = []deployments.Superseded{{Digest: v3.Digest, Cutoff: math.MaxUint64,
				Generation: 3, RollingBack: back}}
			for i, u := range us {
				s.Nodes[9-i].Report = u
			}
		}
	}
	failed := []deployments.Digest{v3.Digest}
	for _, c := range []struct {
		name string
		set  func(*Situation)
		then int
	}{
		{"nobody else", func(*Situation) {}, 3},
		{"a node that fetches", last(report{State: fetching, Running: v1, Generation: 2}), 2},
		{"a node that switches", last(report{State: switching, Running: v1, Generation: 2}), 2},
		{"a node that tries again", last(report{State: retrying, Running: v1, Generation: 2}), 2},
		{"a node that serves nothing since it went back, whatever from", last(report{State: deployments.StateUnhealthy,
			Running: v1, Want: v1, RollingBack: true, Generation: 2}), 2},
		{"not one that is unhealthy by itself", last(report{State: deployments.StateUnhealthy, Running: v1, Want: v1,
			Generation: 2}), 3},
		{"not one that boots, whatever it does", last(report{State: fetching, Generation: 2}), 3},
		{"nor one that has failed on stable", last(report{State: quarantined, Running: v0, Want: v1, Quarantined: []deployments.Digest{v1.Digest}, Generation: 2}), 3},
		{"a node on what no part of the record names, as it goes to stable", last(report{State: converged, Running: v0, Generation: 2}), 2},
		{"not where there is nothing stable to go to", func(s *Situation) {
			s.Record.Stable = deployments.Pointer{}
			last(report{State: converged, Running: v0, Generation: 2})(s)
		}, 3},
		{"a node that is held is no part of it", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable = deployments.Amount{N: 20, Percent: true} // of nine it is two, of eight too
			s.Nodes[1].Report.State = deployments.StateHeld
		}, 4},
		{"a node that is admitted, and runs the target, but is not well", func(s *Situation) { s.Nodes[0].Report.State = switching }, 2},
		{"a node that only seems to be in flight is admitted for nothing", next(report{State: switching, Running: v1, Generation: 2}), 3},
		{"so that the room is left for the one after it", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N = 3
			next(report{State: switching, Running: v1, Generation: 2})(s)
		}, 4},
		{"not where more are in flight than should be", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N = 1
			next(report{State: switching, Running: v1, Generation: 2})(s)
		}, 2},
		{"a node that runs the target already is admitted for nothing", next(report{State: converged, Running: v2, Generation: 2}), 4},
		{"also where there is no room", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N = 1
			next(report{State: converged, Running: v2, Generation: 2})(s)
		}, 3},
		{"a node on which the target has failed, too, and is no failure of those that are admitted", func(s *Situation) {
			next(report{State: quarantined, Running: v1, Want: v2, Generation: 2})(s)
			s.Unit.Rollout.MaxFailures.N = 1 // but of who is admitted then
		}, 4},
		{"a node on which stable has failed takes its place", next(report{State: quarantined, Running: v1, Want: v1, Generation: 2}), 3},
		{"nothing is less than one", func(s *Situation) {
			there(s, 2)
			s.Unit.Rollout.MaxUnavailable = deployments.Amount{Percent: true}
		}, 3},
		{"nothing said is all", func(s *Situation) { s.Unit.Rollout.MaxUnavailable = deployments.Amount{} }, 10},
		{"who hangs, and is borne, gives up its place", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N, s.Unit.Rollout.MaxFailures.N = 1, 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
		}, 3},
		{"but not while there is room", func(s *Situation) {
			s.Unit.Rollout.MaxFailures.N = 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
		}, 3},
		{"and not for who booted since", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N, s.Unit.Rollout.MaxFailures.N = 1, 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
			s.Nodes[0].Report, s.Nodes[0].Started = report{}, ago(time.Minute)
		}, 2},

		{"who hangs without having been admitted takes a place when it is", func(s *Situation) {
			s.Unit.Rollout.MaxFailures.N = 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
			next(report{State: switching, Running: v1, Generation: 2})(s)
		}, 4},
		{"who doesn't hang has one already", func(s *Situation) {
			s.Unit.Rollout.MaxFailures.N = 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
			next(report{State: switching, Running: v1, Generation: 2})(s)
			s.Nodes[2].Started = ago(time.Minute)
		}, 4},
		{"and not the one that is given up", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N, s.Unit.Rollout.MaxFailures.N = 1, 1
			s.Record.Rollout.Since = ago(10 * time.Minute)
			last(report{State: switching, Running: v1, Generation: 2})(s)
			s.Nodes[9].Started = ago(time.Minute)
		}, 2},
		{"a node that stays on a target that was replaced", replaced(false, report{State: converged, Running: v3, Generation: 5}), 3},
		{"also where it knows of no more than that", replaced(false, report{State: converged, Running: v3, Generation: 3}), 3},
		{"not where it may still be told to go back", replaced(true, report{State: converged, Running: v3, Generation: 4}), 2},
		{"nor where it is not well", replaced(false, report{State: switching, Running: v3, Generation: 3}), 2},
		{"nor where it has just restarted", replaced(false, report{State: deployments.StateWaiting, Running: v3, Generation: 3}), 2},
		{"a node that may still begin a target that was replaced", replaced(false, report{State: converged, Running: v1, Generation: 3}), 2},
		{"not where that has failed on it", replaced(false, report{State: quarantined, Running: v1, Quarantined: failed, Generation: 3}), 3},
		{"where it failed before a record that let it try again", replaced(false, report{State: quarantined, Running: v1, Quarantined: failed, Generation: 2}), 2},
		{"where something else has failed", replaced(false, report{State: quarantined, Running: v1, Quarantined: []deployments.Digest{v0.Digest}, Generation: 3}), 2},
		{"where it tries once more what had failed", replaced(false, report{State: converged, Running: v1, Quarantined: failed, Generation: 3}), 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(2, deployments.PhaseRolling)
			there(&s, 1)
			c.set(&s)
			m := Next(s)
			if n := admitted(&s, m.Record); n != c.then {
				t.Errorf("%d admitted, want %d: %s", n, c.then, brief(m.Record))
			}
		})
	}
}

// admitted is how many nodes a record admits.
func admitted(s *Situation, r deployments.Record) (n int) {
	for _, node := range s.Nodes {
		if r.Rollout == nil || Rank(node.Name, s.Unit.Release.Digest) <= r.Rollout.Cutoff {
			n++
		}
	}
	return n
}

// Who is let go on the way back, one at a time: the last three of ten run the target still, and are told so highest
// rank first.
func TestNextCountsOnTheWayBack(t *testing.T) {
	t.Parallel()
	v0, v1, v2 := release("v0"), release("v1"), release("v2")
	type report = deployments.UnitReport
	const halted = -1
	stuck := report{State: quarantined, Running: v2, Want: v1, Quarantined: []deployments.Digest{v1.Digest}, Generation: 2}
	backSick := report{State: deployments.StateUnhealthy, Running: v1, Want: v1, RollingBack: true, Generation: 2}
	for _, c := range []struct {
		name string
		set  func(*Situation)
		stay int
	}{
		{"the last goes", func(*Situation) {}, 9},
		{"the others wait while it is on its way", func(s *Situation) {
			s.Record.Rollout.Cutoff = Rank(s.Nodes[8].Name, v2.Digest)
			s.Nodes[9].Report = report{State: switching, Running: v2, Want: v1, Generation: 2}
		}, 9},
		{"also before it says so", func(s *Situation) { s.Record.Rollout.Cutoff = Rank(s.Nodes[8].Name, v2.Digest) }, 9},
		{"the next goes", func(s *Situation) {
			s.Record.Rollout.Cutoff = Rank(s.Nodes[8].Name, v2.Digest)
			s.Nodes[9].Report.Running = v1
		}, 8},
		{"one on which stable has failed takes no place", func(s *Situation) { s.Nodes[9].Report = stuck }, 8},
		{"one that may not run what it does goes in its turn", func(s *Situation) {
			s.Nodes[9].Report = report{State: refuse, Running: v2, Generation: 2}
		}, 9},
		{"one that has changed course, and switches, takes a place", func(s *Situation) {
			s.Nodes[0].Report = report{State: switching, Running: v1, Want: v1, Generation: 2}
		}, 10},
		{"one on what no part of the record names, too", func(s *Situation) { s.Nodes[0].Report.Running = v0 }, 10},
		{"one that went back by itself, and serves nothing yet, too",
			func(s *Situation) { s.Nodes[0].Report = backSick }, 10},
		{"for as long as a deadline, which no step for others prolongs", func(s *Situation) {
			s.Nodes[0].Report, s.Nodes[0].UnhealthySince = backSick, ago(10*time.Minute)
		}, 9},
		{"also where its agent has just gone", func(s *Situation) {
			s.Nodes[0].Report, s.Nodes[0].Gone, s.Nodes[0].GoneSince = backSick, true, ago(time.Second)
		}, 10},
		{"not one that is unhealthy by itself", func(s *Situation) {
			s.Nodes[0].Report = backSick
			s.Nodes[0].Report.RollingBack = false
		}, 9},
		{"it is not over before that serves", func(s *Situation) {
			each(s, func(u *report) { u.Running = v1 })
			s.Record.Rollout.Cutoff = 0
			s.Nodes[9].Report = backSick
		}, 0},
		{"who seems to be on its way is told so for nothing", func(s *Situation) {
			s.Nodes[9].Report.State = switching
		}, 9},
		{"so that there is room for another, where two may go", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N = 2
			s.Nodes[9].Report.State = switching
		}, 8},
		{"not where more are on their way than should be", func(s *Situation) {
			s.Nodes[0].Report.State, s.Nodes[9].Report.State = switching, switching
		}, 10},
		{"who hangs gives up its place", func(s *Situation) {
			s.Record.Rollout.Cutoff, s.Record.Rollout.Since = Rank(s.Nodes[8].Name, v2.Digest), ago(10*time.Minute)
		}, 8},
		{"not so who has just restarted, which is told so for nothing", func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable.N = 2
			s.Record.Rollout.Cutoff, s.Record.Rollout.Since = Rank(s.Nodes[8].Name, v2.Digest), ago(10*time.Minute)
			s.Nodes[8].Report.State, s.Nodes[8].Started = switching, ago(time.Minute)
		}, 0}, // so that the third goes as well
		{"when none is left it is over", func(s *Situation) { each(s, func(u *report) { u.Running = v1 }) }, halted},
		{"not before the last is there", func(s *Situation) {
			each(s, func(u *report) { u.Running = v1 })
			s.Record.Rollout.Cutoff = 0
			s.Nodes[9].Report.Running, s.Nodes[9].Report.State = v2, switching
		}, 0},
		{"nor while one has to wait for another", func(s *Situation) {
			each(s, func(u *report) { u.Running = v1 })
			s.Unit.Rollout.MaxUnavailable.N = 1
			s.Nodes[0].Report.Running = v2
			s.Nodes[9].Report.State = switching
		}, 10},
		{"but without those on which stable has failed", func(s *Situation) {
			each(s, func(u *report) { u.Running = v1 })
			s.Record.Rollout.Cutoff = 0
			s.Nodes[9].Report = stuck
		}, halted},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(10, deployments.PhaseRollingBack)
			s.Unit.Rollout.MaxUnavailable.N = 1
			s.Record.Rollout.Failed = v2.Digest
			for i := range s.Nodes {
				if i >= 7 {
					s.Nodes[i].Report.Running = v2
				}
			}
			c.set(&s)
			m := Next(s)
			stay := admitted(&s, m.Record)
			if m.Record.Rollout.Phase == deployments.PhaseRolledBack {
				stay = halted
			}
			if stay != c.stay {
				t.Errorf("%d may stay, want %d: %s", stay, c.stay, brief(m.Record))
			}
		})
	}
}

// What counts against max_failures. Of ten nodes the first runs the target, and the second is admitted and on its way.
func TestNextCountsFailures(t *testing.T) {
	t.Parallel()
	v1, v2 := release("v1"), release("v2")
	type report = deployments.UnitReport
	is := func(i int, u report) func(*Situation) { return func(s *Situation) { s.Nodes[i].Report = u } }
	gone := func(i int, u report) func(*Situation) {
		return func(s *Situation) { s.Nodes[i].Gone, s.Nodes[i].Report = true, u }
	}
	failed := report{State: quarantined, Running: v1, Want: v2, Generation: 2, Error: "health"}
	sickBack := report{State: deployments.StateUnhealthy, Running: v1, Want: v2, Failed: v2.Digest, Generation: 2,
		Error: "health, and 503"}
	with := func(u report, more func(*report)) report { more(&u); return u }
	// All but the first two are admitted, too, and two of them have failed.
	two := func(limit deployments.Amount, more func(*Situation)) func(*Situation) {
		return func(s *Situation) {
			there(s, 10)
			s.Nodes[3].Report, s.Nodes[6].Report = failed, failed
			s.Record.Rollout.Cutoff, s.Unit.Rollout.MaxFailures = math.MaxUint64, limit
			more(s)
		}
	}
	late := func(s *Situation) {
		s.Record.Rollout.Since = ago(10 * time.Minute)
		s.Nodes[1].Report.State = fetching
	}
	for _, c := range []struct {
		name string
		set  func(*Situation)
		says string // "": it goes on
	}{
		{"nothing", func(*Situation) {}, ""},
		{"one on which it failed", is(1, failed), "1 of 10 nodes failed (NODE1: health), at most 0 may"},
		{"one that refuses it", is(1, report{State: refuse, Want: v2, Generation: 2, Error: "no signature"}), "1 of 10 nodes failed (NODE1: no signature)"},
		{"one that doesn't say why", is(1, report{State: quarantined, Want: v2, Generation: 2}), "1 of 10 nodes failed (NODE1: quarantined)"},
		{"not by an earlier record", is(1, report{State: quarantined, Want: v2, Generation: 1}), ""},
		{"nor where it is not admitted", is(2, failed), ""},
		{"one that dies while it switches, before it has had its time", gone(1, report{State: switching, Want: v2, Generation: 2}), ""},
		{"after it has had its time", func(s *Situation) {
			gone(1, report{State: switching, Want: v2, Generation: 2})(s)
			s.Record.Rollout.Since = ago(10 * time.Minute)
		}, "1 of 9 nodes failed (NODE1: gone before it converged)"},
		{"which counts from when it left", func(s *Situation) {
			gone(1, report{State: switching, Want: v2, Generation: 2})(s)
			s.Record.Rollout.Since, s.Nodes[1].GoneSince = ago(10*time.Minute), ago(time.Minute)
		}, ""},
		{"one that runs it, and is unhealthy", is(1, report{State: deployments.StateUnhealthy, Running: v2, Want: v2, Generation: 2, Error: "http: 503"}),
			"1 of 10 nodes failed (NODE1: http: 503)"},
		{"one that was there, and became so", is(0, report{State: deployments.StateUnhealthy, Running: v2, Want: v2, Generation: 2, Error: "http: 503"}),
			"1 of 10 nodes failed (NODE0: http: 503)"},
		{"not one that is unhealthy on what it ran before", is(5, report{State: deployments.StateUnhealthy, Running: v1, Want: v1, Generation: 2}), ""},
		{"one that went back, and serves nothing yet", is(1, sickBack), "1 of 10 nodes failed (NODE1: health, and 503)"},
		{"not by an earlier record's target", is(1, with(sickBack, func(u *report) { u.Failed = v1.Digest })), ""},
		{"nor before it knows of the retry", is(1, with(sickBack, func(u *report) { u.Generation = 1 })), ""},
		{"nor where it is not admitted any more", is(2, sickBack), ""},
		{"or dies then", gone(1, sickBack), "1 of 9 nodes failed (NODE1: health, and 503)"},
		{"or after it failed", gone(1, failed), "1 of 9 nodes failed (NODE1: health)"},
		{"not one that was there", gone(1, report{State: converged, Running: v2, Want: v2, Generation: 2}), ""},
		{"nor one that was yet to be told", gone(1, report{State: converged, Running: v1, Want: v1, Generation: 2}), ""},
		{"nor one that went by an earlier record", gone(1, report{State: switching, Want: v2, Generation: 1}), ""},
		{"nor one that is not admitted", gone(2, report{State: switching, Want: v2, Generation: 2}), ""},
		{"all, whatever may", func(s *Situation) {
			s.Unit.Rollout.MaxFailures = deployments.Amount{N: 100, Percent: true}
			s.Record.Rollout.Cutoff = everyRank
			each(s, func(u *deployments.UnitReport) { *u = failed })
		}, "10 of 10 nodes failed (NODE0: health)"},
		{"two where one may", two(deployments.Amount{N: 1}, func(*Situation) {}), "2 of 10 nodes failed (NODE3: health), at most 1 may"},
		{"two where two may", two(deployments.Amount{N: 2}, func(*Situation) {}), ""},
		{"two where a tenth may", two(deployments.Amount{N: 10, Percent: true}, func(*Situation) {}), "at most 1 may"},
		{"two where a tenth may, and a bit", two(deployments.Amount{N: 11, Percent: true}, func(*Situation) {}), ""},
		{"of those that live", two(deployments.Amount{N: 11, Percent: true}, func(s *Situation) { s.Nodes[8].Gone = true }), "2 of 9 nodes failed (NODE3: health), at most 1 may"},
		{"beside those that an operator bore", two(deployments.Amount{N: 1}, func(s *Situation) { s.Record.Rollout.Tolerated = 1 }), ""},
		{"one that is late", late, "1 of 10 nodes failed (NODE1: not converged in time, fetching), at most 0 may"},
		{"not one that says that it is well, and has yet to notice", func(s *Situation) { late(s); s.Nodes[1].Report.State = converged }, ""},
		{"nor one that was waited for, and begins by now", func(s *Situation) {
			late(s)
			s.Record.Rollout.Reason = deployments.ReasonUnaware
			s.Record.Rollout.Facts = deployments.Facts{"node": s.Nodes[1].Name}
		}, ""},
		{"nor one whose storage is back", func(s *Situation) {
			late(s)
			s.Record.Rollout.Reason = deployments.ReasonStorageUnavailable
			s.Record.Rollout.Facts = deployments.Facts{"node": s.Nodes[1].Name}
		}, ""},
		{"but one beside it", func(s *Situation) {
			late(s)
			s.Record.Rollout.Reason = deployments.ReasonUnaware
			s.Record.Rollout.Facts = deployments.Facts{"node": s.Nodes[2].Name}
		}, "1 of 10 nodes failed (NODE1: not converged in time, fetching), at most 0 may"},
		{"and says why", func(s *Situation) {
			late(s)
			s.Nodes[1].Report.State, s.Nodes[1].Report.Error = retrying, "no route to S3"
		}, "(NODE1: not converged in time, no route to S3)"},
		{"or nothing at all", func(s *Situation) { late(s); s.Nodes[1].Report = report{} },
			"(NODE1: not converged in time, no report about the unit)"},
		{"not before it is", func(s *Situation) { s.Record.Rollout.Since = ago(10*time.Minute - 1) }, ""},
		{"nor one that was not asked to hurry", func(s *Situation) {
			late(s)
			there(s, 2)
			s.Nodes[1].Report.State, s.Nodes[2].Report.State = converged, switching
		}, ""},
		{"all that are late", func(s *Situation) {
			late(s)
			s.Unit.Rollout.MaxFailures.N = 1
			s.Nodes[0].Report.State = retrying
		}, "2 of 10 nodes failed (NODE0: not converged in time, retrying), at most 1 may"},
		{"and not more than those", func(s *Situation) {
			late(s)
			s.Unit.Rollout.MaxFailures.N = 2
			s.Nodes[0].Report.State = retrying
		}, ""},
		{"beside those on which it failed", func(s *Situation) {
			late(s)
			s.Unit.Rollout.MaxFailures.N = 1
			s.Nodes[0].Report = failed
		}, "2 of 10 nodes failed (NODE0: health), at most 1 may"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(2, deployments.PhaseRolling)
			there(&s, 1)
			c.set(&s)
			m := Next(s)
			want := c.says
			for i := range s.Nodes {
				want = strings.ReplaceAll(want, fmt.Sprint("NODE", i), s.Nodes[i].Name)
			}
			turned := m.Record.Rollout != nil && m.Record.Rollout.Phase == deployments.PhaseRollingBack
			if turned != (want != "") || turned && !strings.Contains(saysRollout(m.Record), want) {
				t.Errorf("want %q: %s", want, brief(m.Record))
			}
		})
	}
}
