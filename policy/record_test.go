package policy

import (
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet/message"
)

// What a step writes, field by field: want changes the record that stood into the one that is expected.
func TestNextWrites(t *testing.T) {
	t.Parallel()
	type record = deployments.Record
	type progress = deployments.Progress
	const rolling, first, back = deployments.PhaseRolling, deployments.PhaseCanary, deployments.PhaseRollingBack
	const paused, halted = deployments.PhasePaused, deployments.PhaseRolledBack
	const waiting, frozenPhase = deployments.PhasePendingApproval, deployments.PhaseFrozen
	v1, v2, v3 := release("v1"), release("v2"), release("v3")
	cutoff := func(s *Situation, n int) uint64 { return Rank(s.Nodes[n-1].Name, v2.Digest) }
	least := func(s *Situation, p deployments.Pointer) uint64 {
		lowest := uint64(math.MaxUint64)
		for _, n := range s.Nodes {
			lowest = min(lowest, Rank(n.Name, p.Digest))
		}
		return lowest
	}
	highest := func(s *Situation, p deployments.Pointer) (rank uint64) {
		for _, n := range s.Nodes {
			rank = max(rank, Rank(n.Name, p.Digest))
		}
		return rank
	}
	same := func(*Situation, *record) {}
	frozen := FreezeState{Frozen: true, By: "xmas", ChangesAt: noon.Add(time.Hour),
		WindowEnds: noon.Add(time.Hour), Wait: true}
	fails := func(s *Situation, i int, why string) {
		s.Nodes[i].Report = deployments.UnitReport{
			State:       quarantined,
			Running:     v1,
			Want:        v2,
			Quarantined: []deployments.Digest{v2.Digest},
			Generation:  2,
			Error:       why,
		}
	}
	for _, c := range []struct {
		name     string
		admitted int
		phase    deployments.Phase
		set      func(*Situation)
		want     func(*Situation, *record)
		says     string
		again    time.Duration // from now; 0: never
	}{
		{"a new target, with all that its unit's file and its commit say", 0, rolling, func(s *Situation) {
			s.Record = record{Target: v1, Stable: release("v0"), Generation: 1, Retry: 3, Commit: "c1", After: []string{"old"}, Drift: deployments.DriftReport}
			each(s, func(u *deployments.UnitReport) { u.Generation = 1 })
			s.Unit.After, s.Unit.Drift, s.Unit.Adopt = []string{"base"}, deployments.DriftHeal, true
		}, func(s *Situation, r *record) {
			*r = record{Target: v2, Stable: v1, Generation: 2, Retry: 3, Commit: "c2", After: []string{"base"}, Drift: deployments.DriftHeal, Adopt: true,
				Rollout: &progress{NoCanary: true, Phase: rolling, Promoted: true, Unproven: true, Since: noon,
					Cutoff: cutoff(s, 2), Message: "2 of 10 nodes admitted"}}
		}, "2 of 10", 10 * time.Minute},
		{"over a bare pointer, which somebody put there", 0, rolling, func(s *Situation) {
			s.Record = record{Target: v1}
			each(s, func(u *deployments.UnitReport) { u.Generation = 0 })
		}, func(s *Situation, r *record) {
			*r = record{Target: v2, Stable: v1, Generation: 1, Commit: "c2",
				Rollout: &progress{NoCanary: true, Phase: rolling, Promoted: true, Since: noon,
					Cutoff: cutoff(s, 2), Message: "2 of 10 nodes admitted"}}
		}, "2 of 10", 10 * time.Minute},
		{"a bare pointer to what Git names as well becomes a record", 0, rolling, func(s *Situation) {
			s.Record = record{Target: v2}
		}, func(s *Situation, r *record) { *r = record{Target: v2, Stable: v2, Generation: 1, Commit: "c2"} },
			"every node runs the release", 0},
		{"after and drift go to nodes at once", 2, rolling, func(s *Situation) { s.Unit.After, s.Unit.Drift = []string{"base"}, deployments.DriftHeal }, func(s *Situation, r *record) {
			r.After, r.Drift = []string{"base"}, deployments.DriftHeal
		}, "", 9 * time.Minute},
		{"the end makes the target stable", 10, rolling, func(s *Situation) { there(s, 10) },
			func(s *Situation, r *record) { r.Stable, r.Rollout = v2, nil }, "the rollout is complete", 0},
		{"all at once are on their way before it has ended", 0, rolling, func(s *Situation) {
			s.Unit.Rollout.MaxUnavailable = deployments.Amount{}
		}, func(s *Situation, r *record) {
			r.Rollout.Cutoff, r.Rollout.Since, r.Rollout.Message = cutoff(s, 10), noon, "10 of 10 nodes admitted"
		}, "10 of 10", 10 * time.Minute},
		{"it has not ended while one is on its way", 10, rolling, func(s *Situation) { there(s, 9) }, same, "", 9 * time.Minute},
		{"it ends without one that hangs, where that is borne", 10, rolling, func(s *Situation) {
			there(s, 9)
			s.Nodes[9].Report.State = switching
			s.Unit.Rollout.MaxFailures.N, s.Record.Rollout.Since = 1, ago(time.Hour)
		}, func(s *Situation, r *record) { r.Stable, r.Rollout = v2, nil }, "the rollout is complete", 0},
		{"all bake, where there are no canaries", 10, rolling, func(s *Situation) {
			there(s, 10)
			s.Unit.Rollout.Bake = 5 * time.Minute
		}, func(s *Situation, r *record) {
			r.Rollout.HealthySince, r.Rollout.Message = noon, "all nodes bake until 2026-11-24 12:05:00Z"
		}, "bake", 5 * time.Minute},
		{"not once more after canaries", 10, rolling, func(s *Situation) {
			canary(s)
			there(s, 10)
		}, func(s *Situation, r *record) { r.Stable, r.Rollout = v2, nil }, "the rollout is complete", 0},

		{"a canary that baked no time has to converge first", 0, first, func(s *Situation) { s.Unit.Rollout.Canary.N = 1 }, func(s *Situation, r *record) {
			r.Rollout.Cutoff, r.Rollout.Since, r.Rollout.Message = cutoff(s, 1), noon, "1 of 1 canary admitted"
		}, "1 of 1 canary admitted", 10 * time.Minute},
		{"it is waited for", 1, first, func(s *Situation) { s.Unit.Rollout.Canary.N = 1 }, same, "", 9 * time.Minute},
		{"also one that can't be admitted for want of room", 1, first, func(s *Situation) {
			there(s, 1)
			s.Unit.Rollout.Canary.N, s.Unit.Rollout.MaxUnavailable.N = 2, 1
			s.Nodes[9].Report.State = switching
		}, same, "", 9 * time.Minute},
		{"but not for others that happen to be on their way", 1, first, func(s *Situation) {
			there(s, 1)
			s.Unit.Rollout.Canary.N = 1
			s.Nodes[9].Report.State = switching
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Promoted, r.Rollout.Since, r.Rollout.Cutoff, r.Rollout.Message = rolling, true, noon, cutoff(s, 2), "2 of 10 nodes admitted"
		}, "2 of 10", 10 * time.Minute},
		{"one that is there begins the bake", 1, first, func(s *Situation) { canary(s); there(s, 1) }, func(s *Situation, r *record) {
			r.Rollout.HealthySince, r.Rollout.Message = noon, "the canaries bake until 2026-11-24 12:05:00Z"
		}, "bake", 5 * time.Minute},
		{"another in the place of one that left begins it anew", 1, first, func(s *Situation) {
			baking(s)
			s.Nodes = s.Nodes[1:]
		}, func(s *Situation, r *record) {
			r.Rollout.HealthySince, r.Rollout.Since, r.Rollout.Cutoff, r.Rollout.Message = time.Time{}, noon, cutoff(s, 1), "1 of 1 canary admitted"
		}, "1 of 1 canary admitted", 10 * time.Minute},
		{"one that restarts begins it anew when it is well again", 1, first, func(s *Situation) {
			baking(s)
			s.Nodes[0].Report.State, s.Nodes[0].Started = deployments.StateWaiting, ago(time.Minute)
		}, func(s *Situation, r *record) {
			r.Rollout.HealthySince, r.Rollout.Since = time.Time{}, noon
			r.Rollout.Message = "the bake begins anew when all are healthy again"
		}, "begins anew", 10 * time.Minute},
		{"one that boots, and is canary by its rank, is waited for", 2, first, func(s *Situation) {
			baking(s)
			s.Nodes[1].Report, s.Nodes[1].Started = deployments.UnitReport{}, ago(time.Minute)
		}, same, "", 9 * time.Minute},
		{"others are not", 1, first, func(s *Situation) {
			baking(s)
			s.Record.Rollout.Message = "the canaries bake until 2026-11-24 12:30:00Z"
			s.Nodes[9].Report.State = switching
		}, same, "bake", 30 * time.Minute},
		{"of a whole fleet one that restarts is waited for", 10, rolling, func(s *Situation) {
			baking(s)
			there(s, 10)
			s.Unit.Rollout.Canary.N, s.Record.Rollout.Cutoff = 0, math.MaxUint64
			s.Nodes[0].Report.State, s.Nodes[0].Started = deployments.StateWaiting, ago(time.Minute)
		}, same, "", 9 * time.Minute},
		{"one that has yet to get there begins the bake anew", 10, rolling, func(s *Situation) {
			baking(s)
			there(s, 9)
			s.Unit.Rollout.Canary.N, s.Record.Rollout.Cutoff = 0, math.MaxUint64
			s.Record.Rollout.Since, s.Record.Rollout.HealthySince = ago(5*time.Minute), ago(4*time.Minute)
		}, func(s *Situation, r *record) {
			r.Rollout.HealthySince, r.Rollout.Since = time.Time{}, noon
			r.Rollout.Message = "the bake begins anew when all are healthy again"
		}, "begins anew", 10 * time.Minute},
		{"what should come first is looked for first", 2, rolling, func(s *Situation) {
			s.Nodes[0].Report, s.Nodes[0].Started = deployments.UnitReport{}, noon
		}, same, "", 9 * time.Minute},
		{"whichever that is", 2, rolling, func(s *Situation) {
			s.Nodes[1].Report, s.Nodes[1].Started = deployments.UnitReport{}, noon
		}, same, "", 9 * time.Minute},
		{"there is one, also where the unit's file asks for none any more", 0, first, func(s *Situation) {}, func(s *Situation, r *record) {
			r.Rollout.Cutoff, r.Rollout.Since, r.Rollout.Message = cutoff(s, 1), noon, "1 of 1 canary admitted"
		}, "1 of 1 canary admitted", 10 * time.Minute},
		{"a unit whose rollout is taken out goes to every node", 1, first, func(s *Situation) { s.Unit.Rollout = nil }, func(s *Situation, r *record) { r.Rollout = nil }, "every node at once", 0},
		{"well canaries wait for promote", 1, first, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval, s.Record.Rollout.HealthySince = deployments.Manual, ago(time.Hour)
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.Message = waiting, noon, "the canaries are healthy: waits for promote"
		}, "waits for promote", 0},
		{"and go on waiting", 1, waiting, func(s *Situation) { baking(s); s.Unit.Rollout.Approval = deployments.Manual }, same, "", 0},
		{"also for one that boots, and is canary by its rank, but not longer than it may take", 2, waiting, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval = deployments.Manual
			s.Nodes[1].Report, s.Nodes[1].Started = deployments.UnitReport{}, ago(time.Minute)
		}, same, "", 9 * time.Minute},
		{"whatever failed, where the unit's rollout is taken out", 1, waiting, func(s *Situation) {
			baking(s)
			fails(s, 0, "health")
			s.Unit.Rollout = nil
		}, func(s *Situation, r *record) { r.Rollout = nil }, "every node at once", 0},
		{"unless no more is asked for", 1, waiting, func(s *Situation) { baking(s) }, func(s *Situation, r *record) {
			*r.Rollout = progress{Phase: rolling, Promoted: true, Since: noon, Cutoff: cutoff(s, 3), Message: "3 of 10 nodes admitted"}
		}, "3 of 10", 10 * time.Minute},

		{"a failure turns back, and the digest is not forgotten", 2, rolling, func(s *Situation) {
			there(s, 1)
			fails(s, 1, "health")
			s.Record.Rollout.Forced = true
		}, func(s *Situation, r *record) {
			r.Generation = 3
			r.Rollout = &progress{Phase: back, Since: noon, Failed: v2.Digest, Forced: true, Message: "1 of 10 nodes failed (" + s.Nodes[1].Name + ": health), at most 0 may",
				Superseded: []deployments.Superseded{{Digest: v2.Digest, Cutoff: cutoff(s, 2), Generation: 2}}}
		}, "1 of 10", 10 * time.Minute},
		{"of a canary, which went back by itself", 1, first, func(s *Situation) { canary(s); fails(s, 0, "health") }, func(s *Situation, r *record) {
			r.Generation = 3
			r.Rollout = &progress{Phase: halted, Since: noon, Failed: v2.Digest, Message: "rolled back: 1 of 10 nodes failed (" + s.Nodes[0].Name + ": health), at most 0 may"}
		}, "1 of 10", 0},
		{"and of one while it waits for promote", 1, waiting, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval = deployments.Manual
			fails(s, 0, "health")
		}, func(s *Situation, r *record) {
			r.Generation = 3
			r.Rollout = &progress{Phase: halted, Since: noon, Failed: v2.Digest, Message: "rolled back: 1 of 10 nodes failed (" + s.Nodes[0].Name + ": health), at most 0 may"}
		}, "1 of 10", 0},
		{"the end of the way back halts, and remembers why", 0, back, func(s *Situation) {
			s.Record.Rollout.Failed, s.Record.Rollout.Reason = v2.Digest, deployments.ReasonAborted
			s.Record.Rollout.Superseded = []deployments.Superseded{{Digest: v2.Digest, Cutoff: 1}}
		}, func(s *Situation, r *record) {
			r.Rollout = &progress{Phase: halted, Since: noon, Failed: v2.Digest, Message: "rolled back: aborted by an operator"}
		}, "rolled back: aborted", 0},
		{"each step on the way back has its time", 10, back, func(s *Situation) {
			s.Record.Rollout.Failed = v2.Digest
			there(s, 10)
		}, func(s *Situation, r *record) { r.Rollout.Cutoff, r.Rollout.Since = cutoff(s, 8), noon }, "", 10 * time.Minute},
		{"what hangs on the way back is asked for again when it should have come", 0, back, func(s *Situation) {
			s.Record.Rollout.Failed = v2.Digest
			s.Nodes[9].Report.Running, s.Nodes[9].Report.State = v2, switching
		}, same, "", 9 * time.Minute},
		{"a halted rollout stands", 0, halted, func(s *Situation) { s.Record.Rollout.Failed, s.Record.Rollout.Message = v2.Digest, "rolled back: x" }, same, "", 0},
		{"also where its digest is published once more, elsewhere", 0, halted, func(s *Situation) {
			s.Record.Rollout.Failed, s.Record.Rollout.Message = v2.Digest, "rolled back: x"
			s.Unit.Release.URL = "s3://acme/again/manifest.yaml"
		}, same, "", 0},
		{"and what is left behind by it is no part of the next", 0, halted, func(s *Situation) {
			s.Record.Rollout.Failed, s.Unit.Release = v2.Digest, v3
			s.Nodes[9].Report.Running = v2
			s.Freeze = FreezeState{Frozen: true, By: "xmas"}
		}, func(s *Situation, r *record) {
			r.Target, r.Generation, r.Rollout = v3, 3, &progress{NoCanary: true, Phase: frozenPhase, Since: noon,
				Reason: deployments.ReasonFrozen, Message: frozenBy(FreezeState{Frozen: true, By: "xmas"})}
		}, "xmas", 0},

		{"pause", 1, first, func(s *Situation) { canary(s); s.Order = "pause" }, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.Message = paused, noon, "paused by an operator"
		}, "paused", 0},
		{"pause where it is paused", 1, paused, func(s *Situation) { s.Order = "pause" }, same, "paused already", 0},
		{"resume, to bake", 1, paused, func(s *Situation) { canary(s); there(s, 1); s.Order = "resume" }, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.HealthySince, r.Rollout.Message = first, noon, noon, "resumed by an operator"
		}, "resumed", 5 * time.Minute},
		{"which begins anew, as nobody looked meanwhile", 1, paused, func(s *Situation) {
			baking(s)
			s.Record.Rollout.HealthySince, s.Order = ago(2*time.Hour), "resume"
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.HealthySince, r.Rollout.Message = first, noon, noon, "resumed by an operator"
		}, "resumed", time.Hour},
		{"resume, past the canaries, bears what has failed", 4, paused, func(s *Situation) {
			canary(s)
			there(s, 2)
			fails(s, 2, "health")
			fails(s, 3, "health")
			s.Record.Rollout.Promoted, s.Unit.Rollout.MaxUnavailable.N, s.Order = true, 1, "resume"
			s.Nodes[9].Report.State = switching
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.Tolerated, r.Rollout.Message = rolling, noon, 2, "resumed by an operator"
		}, "resumed", 10 * time.Minute},
		{"resume where it is not paused", 2, rolling, func(s *Situation) { s.Order = "resume" }, same, "is not paused", 9 * time.Minute},
		{"promote", 1, first, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.MaxUnavailable.N, s.Order = 1, "promote"
			s.Nodes[9].Report.State = switching
		}, func(s *Situation, r *record) {
			*r.Rollout = progress{Phase: rolling, Promoted: true, Since: noon, Cutoff: cutoff(s, 1), Message: "promoted by an operator"}
		}, "promoted", 10 * time.Minute},
		{"promote where it waits for that", 1, waiting, func(s *Situation) {
			baking(s)
			s.Unit.Rollout.Approval, s.Unit.Rollout.MaxUnavailable.N, s.Order = deployments.Manual, 1, "promote"
			s.Nodes[9].Report.State = switching
		}, func(s *Situation, r *record) {
			*r.Rollout = progress{Phase: rolling, Promoted: true, Since: noon, Cutoff: cutoff(s, 1), Message: "promoted by an operator"}
		}, "promoted", 10 * time.Minute},
		{"promote, as another release comes: that one has canaries of its own", 1, first, func(s *Situation) {
			baking(s)
			s.Unit.Release, s.Order = v3, "promote"
			each(s, func(u *deployments.UnitReport) { u.Running = v2 }) // and are to stay there
		}, func(s *Situation, r *record) {
			r.Target, r.Generation = v3, 3
			superseded := []deployments.Superseded{{Digest: v2.Digest, Cutoff: cutoff(s, 1), Generation: 2}}
			r.Rollout = &progress{Phase: first, Since: noon, SupersededCutoff: least(s, v3),
				Message: "1 of 1 canary admitted", Superseded: superseded}
		}, "the order was for a rollout that has been replaced", 10 * time.Minute},
		{"pause, as another release comes, keeps that one from starting", 0, rolling, func(s *Situation) {
			settled(s)
			s.Order = "pause"
		}, func(s *Situation, r *record) {
			*r = record{Target: v2, Stable: v1, Generation: 2, Commit: "c2",
				Rollout: &progress{NoCanary: true, Phase: paused, Promoted: true, Since: noon,
					Message: "paused by an operator"}}
		}, "paused", 0},
		{"promote where it is paused", 1, paused, func(s *Situation) { canary(s); s.Order = "promote" }, same, "resume it first", 0},
		{"promote where it goes on", 2, rolling, func(s *Situation) { s.Order = "promote" }, same, "goes on already", 9 * time.Minute},
		{"an order without a rollout", 10, rolling, func(s *Situation) { s.Record.Rollout, s.Order = nil, "abort" }, same, "no rollout is under way", 0},
		{"an order to what is rolled back", 0, halted, func(s *Situation) {
			s.Record.Rollout.Failed, s.Order = v2.Digest, "abort"
		}, same, "the release was rolled back: name another", 0},
		{"an order to what is being rolled back", 0, back, func(s *Situation) {
			s.Nodes[9].Report.Running, s.Nodes[9].Report.State = v2, switching
			s.Record.Rollout.Failed, s.Order = v2.Digest, "resume"
		}, same, "is being rolled back", 9 * time.Minute},
		{"retry of what is being rolled back", 0, back, func(s *Situation) {
			s.Nodes[9].Report.Running, s.Nodes[9].Report.State = v2, switching
			s.Record.Rollout.Failed, s.Order = v2.Digest, "retry"
		}, same, "changes nothing", 9 * time.Minute},
		{"retry of what was rolled back", 0, halted, func(s *Situation) {
			s.Record.Rollout.Failed, s.Record.Rollout.Forced, s.Order, s.Freeze = v2.Digest, true, "retry", frozen
			s.Unit.Rollout.Canary.N = 1
		}, func(s *Situation, r *record) {
			r.Generation, r.Retry = 3, 1
			r.Rollout = &progress{Phase: first, Since: noon, Forced: true, Cutoff: cutoff(s, 1), Message: "1 of 1 canary admitted"}
		}, "1 of 1 canary admitted", 10 * time.Minute},
		{"retry of what is under way", 2, rolling, func(s *Situation) {
			there(s, 2)
			canary(s)
			s.Order = "retry"
		}, func(s *Situation, r *record) {
			r.Generation, r.Retry = 3, 1
			r.Rollout = &progress{Phase: first, Since: noon, Cutoff: cutoff(s, 1), Message: "1 of 1 canary admitted",
				Superseded: []deployments.Superseded{{Digest: v2.Digest, Cutoff: cutoff(s, 2), Generation: 2}}}
		}, "1 of 1 canary admitted", 10 * time.Minute},
		{"an order that isn't one leaves the reason as it was", 2, rolling,
			func(s *Situation) { s.Record.Rollout.Message, s.Order = "x", "hurry" }, same, "no such order", 9 * time.Minute},
		{"abort where there is nothing to go back to", 2, rolling, func(s *Situation) {
			s.Record.Stable, s.Order = deployments.Pointer{}, "abort"
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.Message = paused, noon, "aborted by an operator; there is nothing to go back to"
		}, "nothing to go back to", 0},
		{"nor may what Git took back be gone back from", 2, rolling, func(s *Situation) {
			s.Record.Stable, s.Order = v2, "abort"
		}, func(s *Situation, r *record) {
			r.Rollout.Phase, r.Rollout.Since, r.Rollout.Message = paused, noon, "aborted by an operator; there is nothing to go back to"
		}, "nothing to go back to", 0},

		{"a freeze keeps a unit without a rollout from starting", 0, rolling, func(s *Situation) { settled(s); s.Unit.Rollout, s.Freeze = nil, frozen }, func(s *Situation, r *record) {
			*r = record{Target: v2, Stable: v1, Generation: 2, Commit: "c2",
				Rollout: &progress{NoCanary: true, Phase: frozenPhase, Since: noon,
					Reason: deployments.ReasonFrozen, Message: frozenBy(frozen)}}
		}, "xmas until 2026-11-24 13:00Z", time.Hour},
		{"and a first release", 0, rolling, func(s *Situation) { s.Record, s.Freeze = record{}, frozen }, func(s *Situation, r *record) {
			*r = record{Target: v2, Generation: 1, Joined: 1, Commit: "c2",
				Rollout: &progress{NoCanary: true, Phase: frozenPhase, Since: noon,
					Reason: deployments.ReasonFrozen, Message: frozenBy(frozen)}}
		}, "xmas", time.Hour},
		{"while it lasts", 0, frozenPhase, func(s *Situation) { s.Freeze = frozen }, func(s *Situation, r *record) {
			r.Rollout.Reason, r.Rollout.Message = deployments.ReasonFrozen, frozenBy(frozen)
		}, "xmas", time.Hour},
		{"then a first release goes to all", 0, frozenPhase, func(s *Situation) {
			s.Record.Stable = deployments.Pointer{}
			each(s, func(u *deployments.UnitReport) { *u = deployments.UnitReport{} })
			nothingServes(s)
		}, func(s *Situation, r *record) { r.Rollout, r.Nodes = nil, 10 }, "first release", 0},
		{"a canary waits for its end, where running rollouts do, but not longer than its nodes may take", 1, first, func(s *Situation) { canary(s); s.Freeze = frozen }, func(s *Situation, r *record) {
			r.Rollout.Reason, r.Rollout.Message = deployments.ReasonFrozen, frozenBy(frozen)
		}, "xmas", 9 * time.Minute},
		{"the others do, too", 2, rolling, func(s *Situation) { there(s, 2); s.Freeze = frozen }, func(s *Situation, r *record) {
			r.Rollout.Reason, r.Rollout.Message, r.Rollout.HealthySince = deployments.ReasonFrozen, frozenBy(frozen), noon
		}, "xmas", time.Hour},
		{"and go on waiting, without a word", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Freeze, s.Record.Rollout.HealthySince = frozen, ago(30*time.Second)
			s.Record.Rollout.Reason, s.Record.Rollout.Message = deployments.ReasonFrozen, frozenBy(frozen)
		}, same, "xmas", time.Hour},
		{"where a node that is let go from a pin is not late", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Freeze, s.Record.Rollout.Since = frozen, ago(time.Hour)
			s.Now = ago(30 * time.Minute)
			s.Record, s.Now = Next(*s).Record, noon
			s.Nodes[0].Report.Running, s.Nodes[0].Report.State = v1, fetching
		}, func(s *Situation, r *record) { r.Rollout.Since, r.Rollout.HealthySince = noon, time.Time{} }, "xmas", 10 * time.Minute},
		{"not what an operator forced", 2, rolling, func(s *Situation) { there(s, 2); s.Freeze, s.Record.Rollout.Forced = frozen, true }, func(s *Situation, r *record) {
			r.Rollout.Cutoff, r.Rollout.Since, r.Rollout.Message = cutoff(s, 4), noon, "4 of 10 nodes admitted"
		}, "4 of 10", 10 * time.Minute},
		{"nor what Git took back", 2, rolling, func(s *Situation) {
			there(s, 2)
			s.Freeze, s.Record.Stable = frozen, v2
			s.Record.Rollout.Superseded = []deployments.Superseded{{Digest: v1.Digest}}
		}, func(s *Situation, r *record) {
			r.Rollout.Cutoff, r.Rollout.Since, r.Rollout.Message = cutoff(s, 4), noon, "4 of 10 nodes admitted"
		}, "4 of 10", 10 * time.Minute},
		{"what Git takes back needs no canaries, and waits for no freeze", 2, rolling, func(s *Situation) {
			s.Unit.Release, s.Freeze = v1, frozen
			canary(s)
			s.Nodes[0].Report.Running = v2
		}, func(s *Situation, r *record) {
			r.Target, r.Generation = v1, 3
			r.Rollout = &progress{Phase: rolling, Promoted: true, Since: noon, Cutoff: highest(s, v1), Message: "10 of 10 nodes admitted",
				Superseded: []deployments.Superseded{{Digest: v2.Digest, Cutoff: cutoff(s, 2), Generation: 2}}}
		}, "10 of 10", 10 * time.Minute},
		{"promote lets one start in a freeze, by its canaries", 0, frozenPhase, func(s *Situation) {
			canary(s)
			s.Freeze, s.Order = frozen, "promote"
		}, func(s *Situation, r *record) {
			*r.Rollout = progress{Phase: first, Forced: true, Since: noon, Cutoff: cutoff(s, 1), Message: "1 of 1 canary admitted"}
		}, "1 of 1 canary admitted", 10 * time.Minute},

		{"a step by a clock that went back counts from now on", 2, rolling, func(s *Situation) { s.Record.Rollout.Since = noon.Add(24 * time.Hour) }, func(s *Situation, r *record) {
			r.Rollout.Since = noon
		}, "", 10 * time.Minute},
		{"a deadline of the unit's own", 2, rolling, func(s *Situation) {
			s.Unit.Rollout.Deadline, s.Record.Rollout.Since = 20*time.Minute, ago(15*time.Minute)
		}, same, "", 5 * time.Minute},
		{"and none", 2, rolling, func(s *Situation) { s.Unit.Rollout.Deadline = 0 }, same, "", 9 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(c.admitted, c.phase)
			c.set(&s)
			want := s.Record
			if p := want.Rollout; p != nil {
				copied := *p
				want.Rollout = &copied
			}
			m := Next(s)
			c.want(&s, &want)
			if p := m.Record.Rollout; p != nil {
				if p.Reason != "" {
					p.Message = message.Rollout(p)
				}
				p.Reason, p.Facts = "", nil // Message is made from them
			}
			if want.Rollout != nil {
				if want.Rollout.Message == "" && want.Rollout.Reason != "" {
					want.Rollout.Message = message.Rollout(want.Rollout)
				}
				want.Rollout.Reason, want.Rollout.Facts = "", nil
			}
			m.Record.Nodes, want.Nodes, m.Record.Claim = 0, 0, 0
			if !reflect.DeepEqual(m.Record, want) {
				t.Errorf("it becomes\n%+v\n%+v, want\n%+v\n%+v", m.Record, m.Record.Rollout, want, want.Rollout)
			}
			if !strings.Contains(says(m), c.says) {
				t.Errorf("says %q, want %q", says(m), c.says)
			}
			again := time.Duration(0)
			if !m.Recheck.IsZero() {
				again = m.Recheck.Sub(noon)
			}
			if again != c.again {
				t.Errorf("looks again in %v, want %v", again, c.again)
			}
		})
	}
}

// What a rollout that is replaced leaves in its successor's Superseded: releases that nodes run, or may yet begin.
func TestNextRemembersWhatItReplaced(t *testing.T) {
	t.Parallel()
	type over = []deployments.Superseded
	type report = deployments.UnitReport
	v0, v1, v2 := release("v0"), release("v1"), release("v2")
	all := uint64(math.MaxUint64)
	replaced := func(o ...deployments.Superseded) func(*Situation) {
		return func(s *Situation) { s.Record.Rollout.Superseded = o }
	}
	node := func(i int, u report) func(*Situation) { return func(s *Situation) { s.Nodes[i].Report = u } }
	phase := func(p deployments.Phase) func(*Situation) { return func(s *Situation) { s.Record.Rollout.Phase = p } }
	lower := Rank("n0", v0.Digest)
	for _, c := range []struct {
		name string
		set  []func(*Situation)
		want func(own deployments.Superseded) over
	}{
		{"its own target, as far as it had come", nil, func(own deployments.Superseded) over { return over{own} }},
		{"not one that had admitted nobody", []func(*Situation){func(s *Situation) { s.Record.Rollout.Cutoff = 0 }}, func(deployments.Superseded) over { return nil }},
		{"unless somebody runs it", []func(*Situation){func(s *Situation) { s.Record.Rollout.Cutoff = 0 }, node(7, report{State: converged, Running: v2, Generation: 2})},
			func(own deployments.Superseded) over { return over{{Digest: v2.Digest, Generation: 2}} }},
		{"nor one whose nodes are all gone", []func(*Situation){func(s *Situation) { s.Nodes[0].Gone, s.Nodes[1].Gone = true, true }}, func(deployments.Superseded) over { return nil }},
		{"unless one that is gone ran it", []func(*Situation){func(s *Situation) { s.Nodes[0].Gone, s.Nodes[1].Gone = true, true }, node(0, report{Running: v2})},
			func(own deployments.Superseded) over { return over{own} }},
		{"what it replaced itself, where a node runs that", []func(*Situation){replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: 1, Generation: 1}), node(7, report{State: converged, Running: v0, Generation: 2})},
			func(own deployments.Superseded) over {
				return over{own, {Digest: v0.Digest, Cutoff: 1, Generation: 1}}
			}},
		{"or wants it", []func(*Situation){replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: all, Generation: 1}), node(7, report{State: switching, Running: v1, Want: v0, Generation: 2})},
			func(own deployments.Superseded) over {
				return over{own, {Digest: v0.Digest, Cutoff: all, Generation: 1}}
			}},
		{"or may yet begin it, by a record that it read", []func(*Situation){replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: all, Generation: 1}), node(7, report{State: converged, Running: v1, Generation: 1})},
			func(own deployments.Superseded) over {
				return over{own, {Digest: v0.Digest, Cutoff: all, Generation: 1}}
			}},
		{"else it is forgotten", []func(*Situation){replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: all, Generation: 1})}, func(own deployments.Superseded) over { return over{own} }},
		{"also where those that it had not admitted know of nothing newer", []func(*Situation){replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: lower - 1, Generation: 1}),
			func(s *Situation) {
				for i := range s.Nodes {
					if s.Nodes[i].Name == "n0" {
						s.Nodes[i].Report.Generation = 1
					}
				}
			}}, func(own deployments.Superseded) over { return over{own} }},
		{"on the way back: that nodes go back, and what had been admitted before", []func(*Situation){phase(deployments.PhaseRollingBack), replaced(deployments.Superseded{Digest: v2.Digest, Cutoff: 5, Generation: 1}),
			node(7, report{State: converged, Running: v2, Generation: 2})},
			func(deployments.Superseded) over {
				return over{{Digest: v2.Digest, Cutoff: 5, Generation: 1, RollingBack: true}}
			}},
		{"that it was so before", []func(*Situation){
			replaced(deployments.Superseded{Digest: v0.Digest, Cutoff: 1, RollingBack: true}),
			node(7, report{State: converged, Running: v0, Generation: 2})},
			func(own deployments.Superseded) over {
				return over{own, {Digest: v0.Digest, Cutoff: 1, RollingBack: true}}
			}},
		{"the same target twice: what came further, and last", []func(*Situation){
			replaced(deployments.Superseded{Digest: v2.Digest, Cutoff: all, Generation: 1, RollingBack: true}),
			node(7, report{State: converged, Running: v2, Generation: 2})},
			func(own deployments.Superseded) over {
				return over{{Digest: v2.Digest, Cutoff: all, Generation: 2, RollingBack: true}}
			}},
		{"whichever goes first", []func(*Situation){phase(deployments.PhaseRollingBack), replaced(deployments.Superseded{Digest: v2.Digest, Cutoff: 3, Generation: 1}, deployments.Superseded{Digest: v2.Digest, Cutoff: 4, Generation: 2}),
			node(7, report{State: converged, Running: v2, Generation: 2})},
			func(own deployments.Superseded) over {
				return over{{Digest: v2.Digest, Cutoff: 4, Generation: 2, RollingBack: true}}
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := step(2, deployments.PhaseRolling)
			own := deployments.Superseded{Digest: v2.Digest, Cutoff: s.Record.Rollout.Cutoff, Generation: 2}
			for _, set := range c.set {
				set(&s)
			}
			s.Unit.Release = release("v9")
			// so that the next goes no further; it would wait for the way back to end, so there it goes on
			s.Freeze = FreezeState{Frozen: s.Record.Rollout.Phase != deployments.PhaseRollingBack}
			m := Next(s)
			if got, want := m.Record.Rollout.Superseded, c.want(own); !reflect.DeepEqual(got, want) {
				t.Errorf("over\n%+v, want\n%+v", got, want)
			}
		})
	}
}

// A record names at most MaxSuperseded targets that it replaced: before it names another, nodes come together on
// stable.
func TestNextReplacedTooOften(t *testing.T) {
	t.Parallel()
	crowded := func(others int) Situation { // beside the target, nodes run that many which it replaced
		s := step(2, deployments.PhaseRolling)
		there(&s, 1)
		s.Unit.Release = release("v9")
		for i := range others {
			o := release("w" + string(rune('a'+i)))
			s.Record.Rollout.Superseded = append(s.Record.Rollout.Superseded, deployments.Superseded{Digest: o.Digest})
			s.Nodes[9-i].Report.Running = o
		}
		return s
	}
	s := crowded(deployments.MaxSuperseded - 1)
	if m := Next(s); m.Record.Target != release("v9") || len(m.Record.Rollout.Superseded) != deployments.MaxSuperseded {
		t.Errorf("as many as fit: %s", brief(m.Record))
	}
	s = crowded(deployments.MaxSuperseded)
	m := Next(s)
	if r := m.Record; r.Target != s.Record.Target || r.Generation != 3 ||
		r.Rollout.Phase != deployments.PhaseRollingBack ||
		r.Rollout.Failed != s.Record.Target.Digest {
		t.Fatalf("one more: %s", brief(r))
	}
	for i := range s.Nodes { // all know of it, and none has gone back yet
		s.Nodes[i].Report.Generation = 3
	}
	s.Record = m.Record
	if m = Next(s); m.Record.Generation != 3 || m.Record.Rollout.Phase != deployments.PhaseRollingBack {
		t.Errorf("on the way back: %s", brief(m.Record))
	}
	for i := range s.Nodes {
		s.Nodes[i].Report.Running = release("v1")
	}
	s.Record = m.Record
	if m = Next(s); m.Record.Target != release("v9") || m.Record.Generation != 4 {
		t.Errorf("when they are together: %s", brief(m.Record))
	}
	s = crowded(deployments.MaxSuperseded)
	s.Record.Stable = s.Record.Target
	if m = Next(s); m.Record.Rollout.Phase != deployments.PhaseRolling || m.Record.Generation != 2 {
		t.Errorf("where they come together already: %s", brief(m.Record))
	}
	s.Record.Rollout.Phase, s.Order = deployments.PhasePaused, "resume"
	if m = Next(s); m.Record.Rollout.Phase != deployments.PhaseRolling {
		t.Errorf("where that was paused: %s", brief(m.Record))
	}
}
