package policy

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"kedge/deployments"
)

// converge has every live node do what Resolve tells it by a record, and report it; it returns how many changed.
func converge(s *Situation, r deployments.Record) (changed int) {
	pin := Value[deployments.Pin]{}
	if s.Pin != nil {
		pin = *s.Pin
	}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		if n.Gone {
			continue
		}
		d := Resolve(ResolveInputs{Unit: app, Node: n.Name, Now: s.Now, Record: good(r), UnitPin: pin,
			Joined: n.Joined, Running: n.Report.Running, AtDest: FoundNothing,
			Quarantined: n.Report.Quarantined})
		if !d.Target.IsZero() && d.Target != n.Report.Running && !slices.Contains(n.Report.Quarantined, d.Target.Digest) {
			changed++
			n.Report.Running = d.Target
		}
		n.Report.State, n.Report.Want, n.Report.Generation = deployments.StateConverged, d.Target, r.Generation
	}
	return changed
}

// drive lets mirror and nodes go on until nothing changes, and returns the most nodes that changed between two
// writes.
func drive(t *testing.T, s *Situation) (most int, phases []deployments.Phase) {
	t.Helper()
	for range 200 {
		m := Next(*s)
		s.Order = ""
		if p := m.Record.Rollout; p != nil && (len(phases) == 0 || phases[len(phases)-1] != p.Phase) {
			phases = append(phases, p.Phase)
		}
		s.Record = m.Record
		changed := converge(s, m.Record)
		most = max(most, changed)
		if again := Next(*s); changed == 0 && again.Record.Rollout == nil && s.Record.Rollout == nil && again.Record.Joined == s.Record.Joined ||
			changed == 0 && s.Record.Rollout != nil && s.Record.Rollout.Phase == deployments.PhaseRolledBack {
			return most, phases
		} else if !again.Recheck.IsZero() && changed == 0 {
			s.Now = again.Recheck
		}
	}
	t.Fatalf("it does not end: %s", brief(s.Record))
	return 0, nil
}

// pace is a fleet of ten that runs v2, by a rollout with a canary that has ended, two at a time.
func paced10() Situation {
	s := step(0, deployments.PhaseRolling)
	canary(&s)
	there(&s, 10)
	s.Pin = &Value[deployments.Pin]{}
	s.Record = deployments.Record{Target: s.Unit.Release, Stable: s.Unit.Release, Generation: 2, Commit: "c2", Paced: true, Nodes: 10, Joined: 100}
	joined(&s)
	return s
}

func joined(s *Situation) {
	for i := range s.Nodes {
		s.Nodes[i].Joined = uint64(i + 1)
	}
}

func runs(t *testing.T, s *Situation, want deployments.Pointer) {
	t.Helper()
	for i := range s.Nodes {
		if n := &s.Nodes[i]; n.Report.Running != want {
			t.Errorf("%s runs %s, want %s", n.Name, n.Report.Running.URL, want.URL)
		}
	}
}

// Agents of before pins were rolled out go to a pin by themselves. Its rollout ends when they are there.
func TestPinsThatAgentsFollowByThemselves(t *testing.T) {
	t.Parallel()
	v1 := release("v1")
	s := paced10()
	pin := good(deployments.Pin{Release: v1})
	s.Pin = &pin
	s.Record = Next(s).Record
	each(&s, func(u *deployments.UnitReport) {
		u.Running, u.Want, u.Pinned, u.State, u.Generation = v1, v1, true, deployments.StateConverged, s.Record.Generation
	})
	for range 20 {
		s.Record = Next(s).Record
		s.Now = s.Now.Add(time.Minute)
		each(&s, func(u *deployments.UnitReport) { u.Generation = s.Record.Generation })
	}
	if r := s.Record; r.Rollout != nil || r.Pinned == nil || r.Target != v1 {
		t.Errorf("it becomes %s", brief(r))
	}
}

// A unit pin, and its end, move no more nodes at a time than max_unavailable, without gates.
func TestPinsKeepTheBudget(t *testing.T) {
	t.Parallel()
	v1, v2, v3 := release("v1"), release("v2"), release("v3")
	rolledBack := func(s *Situation) {
		s.Unit.Release = v3
		s.Record = deployments.Record{Target: v3, Stable: v2, Generation: 4, Commit: "c3", Paced: true, Nodes: 10, Joined: 100,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolledBack, Failed: v3.Digest}}
		each(s, func(u *deployments.UnitReport) { u.Quarantined, u.Generation = []deployments.Digest{v3.Digest}, 4 })
	}
	for _, c := range []struct {
		name  string
		set   func(*Situation)
		pin   deployments.Pointer
		end   func(*Situation) // how the pin ends
		then  deployments.Pointer
		gates bool
	}{
		{"and back to what was stable", func(*Situation) {}, v1, func(s *Situation) { s.Pin = &Value[deployments.Pin]{} }, v2, false},
		{"by until", func(*Situation) {}, v1, func(s *Situation) { s.Now = s.Pin.Value.Until }, v2, false},
		{"to what Git has named since, by its gates", func(*Situation) {}, v1, func(s *Situation) {
			s.Pin, s.Unit.Release = &Value[deployments.Pin]{}, v3
		}, v3, true},
		{"and back, where what Git names was rolled back: it stays out", rolledBack, v1, func(s *Situation) { s.Pin = &Value[deployments.Pin]{} }, v2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := paced10()
			c.set(&s)
			pin := good(deployments.Pin{Release: c.pin, Until: noon.Add(24 * time.Hour)})
			s.Pin = &pin
			if n := converge(&s, s.Record); n > 0 {
				t.Errorf("%d nodes follow the pin before the mirror", n)
			}
			most, phases := drive(t, &s)
			if runs(t, &s, c.pin); most > 2 || slices.Contains(phases, deployments.PhaseCanary) {
				t.Errorf("%d at a time, by %v", most, phases)
			}
			c.end(&s)
			most, phases = drive(t, &s)
			if runs(t, &s, c.then); most > 2 || slices.Contains(phases, deployments.PhaseCanary) != c.gates || s.Record.Pinned != nil {
				t.Errorf("its end: %d at a time, by %v, %+v", most, phases, s.Record)
			}
		})
	}
}

// A pin with at_once is the nodes' own, and so is one of a unit whose mirror reads no pins.
func TestPinsAtOnce(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*Situation, *deployments.Pin){
		"at_once":            func(_ *Situation, p *deployments.Pin) { p.AtOnce = true },
		"no mirror for pins": func(s *Situation, _ *deployments.Pin) { s.Record.Paced = false },
		"hold":               func(_ *Situation, p *deployments.Pin) { *p = deployments.Pin{Hold: true} },
	} {
		s := paced10()
		p := deployments.Pin{Release: release("v1")}
		set(&s, &p)
		d := Resolve(ResolveInputs{Unit: app, Node: "n1", Now: noon, Record: good(s.Record), UnitPin: good(p),
			Joined: 1, Running: release("v2")})
		if d.Source != FromUnitPin {
			t.Errorf("%s: from %s", name, d.Source)
		}
	}
	s := paced10()
	pin := good(deployments.Pin{Release: release("v1"), AtOnce: true})
	s.Pin = &pin
	s.Record = Next(s).Record // when it ends, nodes are to stay on it until it is their turn
	each(&s, func(u *deployments.UnitReport) { u.Running = release("v1") })
	s.Pin = &Value[deployments.Pin]{}
	if most, _ := drive(t, &s); most > 2 {
		t.Errorf("its end moves %d at a time", most)
	}
	runs(t, &s, release("v2"))
}

// Trouble of the storage delays a rollout, and says so. It stops none, however long it lasts; any other does.
func TestTroubleOfTheStorageDelays(t *testing.T) {
	t.Parallel()
	for _, phase := range []deployments.Phase{deployments.PhaseCanary, deployments.PhaseRolling} {
		s := step(1, phase)
		canary(&s)
		s.Unit.Rollout.MaxUnavailable = deployments.Amount{N: 1}
		u := &s.Nodes[0].Report
		u.State, u.Want, u.Reason, u.Error = deployments.StateRetrying, s.Unit.Release, deployments.ReasonStorageUnavailable, "503"
		s.Now = noon.Add(time.Hour)
		m := Next(s)
		if p := m.Record.Rollout; p == nil || p.Phase != phase || p.Reason != deployments.ReasonStorageUnavailable || p.Facts["node"] != s.Nodes[0].Name {
			t.Errorf("%s: it becomes %s", phase, brief(m.Record))
		}
		s.Record = m.Record
		there(&s, 1)
		u.State, u.Reason, u.Error = deployments.StateConverged, "", ""
		if p := Next(s).Record.Rollout; p == nil || p.Reason == deployments.ReasonStorageUnavailable || p.Phase == deployments.PhaseRollingBack {
			t.Errorf("%s: it has fetched it, and the rollout does not go on: %+v", phase, p)
		}
		s = step(1, phase)
		canary(&s)
		u = &s.Nodes[0].Report
		u.State, u.Want, u.Reason = deployments.StateRetrying, s.Unit.Release, deployments.ReasonDiskFull
		s.Now = noon.Add(time.Hour)
		if m := Next(s); m.Record.Rollout.Phase != deployments.PhaseRollingBack {
			t.Errorf("%s: a full disk: it becomes %s", phase, brief(m.Record))
		}
	}
}

// What has been stable lately goes without gates, unless the unit's file forbids it; and within max_unavailable.
func TestFastLaneBack(t *testing.T) {
	t.Parallel()
	for _, fast := range []bool{true, false} {
		s := paced10()
		s.Unit.Release, s.Unit.Rollout.FastBack, s.StableBefore = release("v1"), fast, []deployments.Digest{release("v1").Digest}
		s.Unit.Rollout.Approval = deployments.Auto
		if fast {
			s.Freeze, s.Unit.Rollout.Approval = FreezeState{Frozen: true, Wait: true, By: "xmas"}, deployments.Manual
		}
		most, phases := drive(t, &s)
		if runs(t, &s, release("v1")); most > 2 || slices.Contains(phases, deployments.PhaseCanary) == fast {
			t.Errorf("fast_back %v: %d at a time, by %v", fast, most, phases)
		}
	}
}

// Whoever comes back waits for its turn, however many they are, and whether the rollout goes on, goes back, or has
// ended.
func TestNodesThatComeBackWaitForTheirTurn(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(*Situation){
		"ended":   func(s *Situation) { s.Unit.Release = s.Record.Target },
		"rolling": func(s *Situation) { s.Unit.Release = release("v3") },
		"a stable one": func(s *Situation) {
			s.Unit.Release, s.Record.Target, s.Record.Stable = release("v2"), release("v2"), release("v2")
		},
	} {
		s := paced10()
		set(&s)
		s.Record = Next(s).Record
		for i := range s.Nodes {
			if i != 4 { // all others were away, and run what was long ago
				s.Nodes[i].Joined, s.Nodes[i].Report.Running = uint64(200+i), release("v0")
			}
		}
		if most, _ := drive(t, &s); most > 2 {
			t.Errorf("%s: %d at a time", name, most)
		}
		runs(t, &s, s.Unit.Release)
	}
}

// A list of nodes that is short, by keys that were deleted or nodes that are away, neither ends a rollout nor
// opens its cutoff.
func TestAShortListIsNotTheFleet(t *testing.T) {
	t.Parallel()
	for name, shorten := range map[string]func(*Situation){
		"deleted": func(s *Situation) { s.Nodes = s.Nodes[:1] },
		"away": func(s *Situation) {
			for i := 1; i < 10; i++ {
				s.Nodes[i].Gone = true
			}
		},
	} {
		s := step(1, deployments.PhaseRolling)
		there(&s, 1)
		s.Record.Nodes = 10
		shorten(&s)
		m := Next(s)
		if p := m.Record.Rollout; p == nil || p.Cutoff == everyRank || m.Reason != deployments.ReasonNodesMissing ||
			m.Recheck.IsZero() {
			t.Errorf("%s: %s %v", name, m.Reason, brief(m.Record))
			continue
		}
		s.Record, s.Now = m.Record, m.Recheck
		if m = Next(s); m.Record.Rollout != nil {
			t.Errorf("%s: once it has stood: %s", name, brief(m.Record))
		}
	}
}

// Nodes whose keys in status/ were deleted act on the record as before: while they may not have put them back, whoever
// is listed still is let go by the room that is left once all the others have theirs.
func TestWhoIsNotListedTakesRoom(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		phase deployments.Phase
		list  func(all []Node) []Node
	}{
		"none is listed":                 {deployments.PhaseRolling, func(all []Node) []Node { return nil }},
		"the next one is":                {deployments.PhaseRolling, func(all []Node) []Node { return all[2:3] }},
		"one that is there is":           {deployments.PhaseRolling, func(all []Node) []Node { return all[:1] }},
		"the next one is, in the canary": {deployments.PhaseCanary, func(all []Node) []Node { return all[2:3] }},
		"one that is yet to be told is": {deployments.PhaseRolling, func(all []Node) []Node {
			all[9].Joined = 2
			return all[9:]
		}},
		"all but those in flight are": {deployments.PhaseRolling, func(all []Node) []Node { return all[2:] }},
	} {
		for _, saw := range []bool{true, false} { // the mirror saw them leave, or leads since
			notListed(t, fmt.Sprintf("%s, seen: %v", name, saw), c.phase, c.list, saw)
		}
	}
}

func notListed(t *testing.T, name string, phase deployments.Phase, list func(all []Node) []Node, saw bool) {
	s := step(2, phase) // both are in flight
	all := s
	s.Record.Nodes, s.Record.Joined = 10, 1
	s.Unit.Rollout.Canary.N = 2
	s.Nodes = list(all.Nodes)
	left := noon.Add(-time.Second)
	if s.Listed = left; saw {
		s.Listed, s.Left = noon.Add(-time.Hour), slices.Repeat([]time.Time{left}, len(all.Nodes)-len(s.Nodes))
	}
	m := Next(s)
	if n := admitted(&all, m.Record); n > 2 || m.Record.Joined > 1 {
		t.Errorf("%s: %d admitted, told up to %d: %s", name, n, m.Record.Joined, brief(m.Record))
	}
	if len(s.Nodes) > 0 && (m.Recheck.IsZero() || m.Recheck.After(left.Add(shortList))) {
		t.Errorf("%s: it looks again at %v", name, m.Recheck)
	}
	s.Now = left.Add(shortList) // those that live are listed again by then
	if m = Next(s); len(s.Nodes) == 8 && admitted(&all, m.Record) == 2 {
		t.Errorf("%s: nobody goes any more: %s", name, brief(m.Record))
	}
}

// A record that begins while nodes are not listed applies to none that it didn't apply to before: they may have come
// back with releases that it doesn't name, and would go from these to stable at once.
func TestANewRecordIsNotForWhoIsNotListed(t *testing.T) {
	t.Parallel()
	s := step(2, deployments.PhaseRolling)
	s.Record.Nodes, s.Record.Joined = 10, 12
	s.Unit.Release = release("next")
	for i := range s.Nodes {
		s.Nodes[i].Joined = uint64(i + 10)
	}
	left := noon.Add(-time.Second)
	s.Nodes, s.Listed, s.Left = s.Nodes[9:], noon.Add(-time.Hour), slices.Repeat([]time.Time{left}, 9)
	m := Next(s)
	if r := m.Record; r.Target != s.Unit.Release || r.Joined != 12 {
		t.Errorf("while nodes are not listed: told up to %d: %s", r.Joined, brief(r))
	}
	s.Now = left.Add(shortList)
	m = Next(s)
	if r := m.Record; r.Target != s.Unit.Release || r.Joined != 19 {
		t.Errorf("once they have left: told up to %d: %s", r.Joined, brief(r))
	}
}

// A node that waits in mid-deployment is out of service, and takes room; one that waits and has nothing to change
// doesn't.
func TestWhoWaitsInMidDeploymentTakesRoom(t *testing.T) {
	t.Parallel()
	for _, where := range []int{0, 5} { // admitted, and going by an earlier record
		s := step(1, deployments.PhaseRolling)
		there(&s, 1)
		s.Unit.Rollout.MaxUnavailable.N = 1
		u := &s.Nodes[where].Report
		u.State, u.Want, u.Running = deployments.StateWaiting, s.Unit.Release, release("v1")
		if m := Next(s); admitted(&s, m.Record) != 1 {
			t.Errorf("node %d waits in mid-deployment, and others go: %s", where, brief(m.Record))
		}
		u.Want = u.Running
		u.State = deployments.StateConverged
		if where > 0 {
			if m := Next(s); admitted(&s, m.Record) != 2 {
				t.Errorf("node %d is where it should be, and nobody goes: %s", where, brief(m.Record))
			}
		}
	}
}

// A node that died long ago holds no rollout up, and one that died just now does so for a deadline. A fleet that was
// scaled in by a few waits only until nobody can have been overlooked.
func TestTheDeadHoldNoRolloutUp(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		lose func(*Situation)
		want time.Duration
	}{
		"died yesterday": {func(s *Situation) { s.Nodes[9].Gone, s.Nodes[9].GoneSince = true, ago(24*time.Hour) }, 0},
		"died just now":  {func(s *Situation) { s.Nodes[9].Gone, s.Nodes[9].GoneSince = true, s.Now }, 10 * time.Minute},
		"scaled in":      {func(s *Situation) { s.Nodes = s.Nodes[:8] }, 2 * time.Minute},
	} {
		s := step(10, deployments.PhaseRolling)
		there(&s, 9)
		s.Record.Nodes = 10
		c.lose(&s)
		m := Next(s)
		if ended := m.Record.Rollout == nil; ended != (c.want == 0) || !ended && !m.Recheck.Equal(s.Now.Add(c.want)) {
			t.Errorf("%s: ended %v, looks again at %v, want after %v: %s", name, ended, m.Recheck, c.want, brief(m.Record))
		}
	}
}

// A canary that is away is missed for a deadline before there is another, and nothing bakes meanwhile.
func TestAMissingCanaryIsMissed(t *testing.T) {
	t.Parallel()
	s := step(1, deployments.PhaseCanary)
	canary(&s)
	there(&s, 1)
	s.Record.Rollout.HealthySince = ago(4 * time.Minute)
	s.Nodes[0].Gone, s.Nodes[0].GoneSince = true, s.Now
	m := Next(s)
	if admitted(&s, m.Record) != 1 || !m.Record.Rollout.HealthySince.IsZero() {
		t.Fatalf("at once: %s", brief(m.Record))
	}
	s.Record, s.Now = m.Record, noon.Add(9*time.Minute)
	if m = Next(s); admitted(&s, m.Record) != 1 || m.Record.Rollout.Phase != deployments.PhaseCanary {
		t.Errorf("while it is missed: %s", brief(m.Record))
	}
	s.Now = noon.Add(10 * time.Minute)
	if m = Next(s); admitted(&s, m.Record) != 2 {
		t.Errorf("after its deadline: %s", brief(m.Record))
	}
}

// The fix of a release that hangs everywhere takes its canary, and then needs no room for nodes that are out of
// service anyway.
func TestBrokenNodesTakeNoRoom(t *testing.T) {
	t.Parallel()
	s := step(0, deployments.PhaseRolling)
	canary(&s)
	s.Unit.Rollout.MaxUnavailable.N = 1
	s.Record = deployments.Record{Target: release("v1"), Stable: release("v0"), Generation: 1, Commit: "c1"} // every node at once
	each(&s, func(u *deployments.UnitReport) {
		u.State, u.Running, u.Want, u.Generation = switching, release("v0"), release("v1"), 1
	})
	s.Order = ""
	m := Next(s)
	if admitted(&s, m.Record) != 1 || !m.Record.Rollout.Unproven {
		t.Fatalf("the canary: %s", brief(m.Record))
	}
	each(&s, func(u *deployments.UnitReport) { u.Generation = 2 })
	there(&s, 1)
	s.Nodes[0].Report.State = converged
	s.Record, s.Order = m.Record, "promote"
	if m = Next(s); admitted(&s, m.Record) != 10 {
		t.Errorf("after promote %d are admitted: %s", admitted(&s, m.Record), brief(m.Record))
	}
}

// A push during a canary moves the earlier canary first.
func TestTheEarlierCanaryGoesFirst(t *testing.T) {
	t.Parallel()
	s := step(1, deployments.PhaseCanary)
	canary(&s)
	there(&s, 1)
	s.Unit.Release = release("v3")
	s.Record = Next(s).Record
	each(&s, func(u *deployments.UnitReport) { u.Generation = 3 })
	s.Record = Next(s).Record
	earlier := s.Nodes[0].Name
	converge(&s, s.Record)
	for _, n := range s.Nodes {
		if got := n.Report.Running == release("v3"); got != (n.Name == earlier) {
			t.Errorf("%s, of which %s was the canary, runs %s", n.Name, earlier, n.Report.Running.URL)
		}
	}
	if most, _ := drive(t, &s); most > 2 {
		t.Error(fmt.Sprint(most, " at a time"))
	}
	runs(t, &s, release("v3"))
}

// A first release, or one whose records were lost, goes by the rollout to nodes where something serves, and at
// once to those that run nothing.
func TestTheFirstReleaseKeepsWhatServes(t *testing.T) {
	t.Parallel()
	s := step(0, deployments.PhaseRolling)
	canary(&s)
	s.Record = deployments.Record{}
	joined(&s)
	s.Nodes[9].Report = deployments.UnitReport{}
	s.Record = Next(s).Record
	heardFirst(t, s, func(u *deployments.UnitReport) bool { return u.Running.IsZero() })
	s.Nodes[9].Report = deployments.UnitReport{Generation: s.Record.Generation}
	m := Next(s)
	if p := m.Record.Rollout; p == nil || p.Phase != deployments.PhaseCanary || admitted(&s, m.Record) != 1 {
		t.Fatalf("it begins as %s", brief(m.Record))
	}
	empty := s.Nodes[9].Name
	if n := converge(&s, m.Record); n != 2 || s.Nodes[9].Report.Running != s.Unit.Release {
		t.Errorf("%d nodes change; %s, which ran nothing, runs %q", n, empty, s.Nodes[9].Report.Running.URL)
	}
	s.Record = m.Record
	if most, _ := drive(t, &s); most > 2 {
		t.Errorf("%d at a time", most)
	}
	runs(t, &s, s.Unit.Release)
}

// A first release onto nodes that run nothing of the unit, but where something else serves, goes by its gates. Who
// has yet to look at dest waits, and those where nothing lies there go at once.
func TestTheFirstReleaseKeepsWhatSomethingElseServes(t *testing.T) {
	t.Parallel()
	s := step(0, deployments.PhaseRolling)
	canary(&s)
	s.Record = deployments.Record{}
	joined(&s)
	each(&s, func(u *deployments.UnitReport) { *u = deployments.UnitReport{State: deployments.StateWaiting} })
	s.Record = Next(s).Record
	heardFirst(t, s, func(*deployments.UnitReport) bool { return true })
	each(&s, func(u *deployments.UnitReport) { u.Generation = s.Record.Generation })
	// by the unit's former name
	s.Nodes[9].Report.State, s.Nodes[9].Report.OtherServes = deployments.StateSwitching, true
	if s.Unit.Rollout.MaxUnavailable = (deployments.Amount{N: 1}); admitted(&s, Next(s).Record) > 0 {
		t.Errorf("while one node is out of service it becomes %s", brief(Next(s).Record))
	}
	s.Unit.Rollout.MaxUnavailable = deployments.Amount{N: 2}
	s.Nodes[9].Report.State = deployments.StateWaiting
	s.Record = Next(s).Record
	decide := func(i int, found Found) Decision {
		return Resolve(ResolveInputs{Unit: app, Node: s.Nodes[i].Name, Now: s.Now, Joined: s.Nodes[i].Joined,
			Record: good(s.Record),
			AtDest: found})
	}
	for found, want := range map[Found]deployments.Pointer{FoundUnknown: {}, FoundOther: {}, FoundNothing: s.Unit.Release} {
		if d := decide(9, found); d.Target != want || want.IsZero() && d.Stage != s.Unit.Release {
			t.Errorf("found %q: it runs %q and stages %q", found, d.Target.URL, d.Stage.URL)
		}
	}
	if d := decide(0, FoundOther); d.Target != s.Unit.Release {
		t.Errorf("the canary runs %q", d.Target.URL)
	}

	serve := func(i int) { // in its turn, or waiting for it
		u := &s.Nodes[i].Report
		d := decide(i, FoundOther)
		*u = deployments.UnitReport{State: deployments.StateWaiting, Want: d.Target, Generation: s.Record.Generation,
			OtherServes: true}
		if !d.Target.IsZero() {
			u.State = deployments.StateSwitching
		}
	}
	for i := range s.Nodes {
		serve(i)
	}
	s.Record = Next(s).Record
	if p := s.Record.Rollout; p == nil || !p.Serving || p.Phase != deployments.PhaseCanary || admitted(&s, s.Record) != 1 {
		t.Fatalf("where something serves it becomes %s", brief(s.Record))
	}
	there(&s, 1)
	s.Nodes[0].Report.State, s.Nodes[0].Report.OtherServes = deployments.StateConverged, false
	s.Record = Next(s).Record
	s.Now = s.Now.Add(5 * time.Minute)
	for s.Record.Rollout != nil {
		before := s.Record
		if s.Record = Next(s).Record; admitted(&s, s.Record) == admitted(&s, before) && s.Record.Rollout != nil {
			t.Fatalf("it does not go on: %s", brief(s.Record))
		}
		changing := 0
		for i := range s.Nodes {
			if u := &s.Nodes[i].Report; u.Running.IsZero() {
				if serve(i); u.State == deployments.StateSwitching {
					changing++
				}
			}
		}
		if changing > 2 {
			t.Errorf("%d change at a time", changing)
		}
		s.Record = Next(s).Record
		for i := range s.Nodes {
			if u := &s.Nodes[i].Report; u.State == deployments.StateSwitching {
				u.State, u.Running, u.OtherServes = deployments.StateConverged, s.Unit.Release, false
			}
		}
	}
	if s.Record.Stable != s.Unit.Release {
		t.Errorf("it ends as %s", brief(s.Record))
	}
}

// heardFirst checks that the rollout of a first release admits no node before those that have not reported have, or
// had the time to.
func heardFirst(t *testing.T, s Situation, silent func(*deployments.UnitReport) bool) {
	t.Helper()
	m := Next(s)
	if p := m.Record.Rollout; m.Reason != deployments.ReasonUnheard || admitted(&s, m.Record) > 0 || m.Recheck.IsZero() {
		t.Errorf("before all nodes have reported: %s, %s, again at %v", m.Reason, brief(m.Record), m.Recheck)
	} else if !m.Recheck.Equal(p.Since.Add(reportWithin)) {
		t.Errorf("it waits until %v, %s after it began", m.Recheck, m.Recheck.Sub(p.Since))
	}
	s.Now = m.Recheck
	if m := Next(s); admitted(&s, m.Record) != 1 {
		t.Errorf("once they have had the time: %s", brief(m.Record))
	}
	s.Nodes = slices.Clone(s.Nodes)
	for i := range s.Nodes {
		s.Nodes[i].Gone = silent(&s.Nodes[i].Report) && i > 0
	}
	s.Now = s.Now.Add(-reportWithin)
	s.Nodes[0].Report.Generation = s.Record.Generation
	if m := Next(s); m.Reason == deployments.ReasonUnheard {
		t.Errorf("it waits for nodes that are gone: %s", brief(m.Record))
	}
}

// A first release that fails on its canary, where something else serves, goes no further; and no node takes it.
func TestTheFirstReleaseStopsWhereItFails(t *testing.T) {
	t.Parallel()
	s := firstRelease10(t)
	u := &s.Nodes[0].Report
	u.State, u.Want = deployments.StateQuarantined, s.Unit.Release
	u.Quarantined = []deployments.Digest{s.Unit.Release.Digest}
	s.Record = Next(s).Record
	p := s.Record.Rollout
	if p == nil || p.Phase != deployments.PhaseRollingBack && p.Phase != deployments.PhaseRolledBack ||
		p.Reason != deployments.ReasonTooManyFailed || p.Failed != s.Unit.Release.Digest {
		t.Fatalf("it becomes %s", brief(s.Record))
	}
	each(&s, func(u *deployments.UnitReport) { u.Generation = s.Record.Generation })
	if s.Record = Next(s).Record; s.Record.Rollout.Phase != deployments.PhaseRolledBack {
		t.Fatalf("it ends as %s", brief(s.Record))
	}
	for i := range s.Nodes[1:] {
		for _, found := range []Found{FoundOther, FoundNothing} {
			d := Resolve(ResolveInputs{Unit: app, Node: s.Nodes[i+1].Name, Now: s.Now, Record: good(s.Record), AtDest: found})
			if !d.Target.IsZero() || d.Action != ActKeep {
				t.Errorf("%s, where %s is at dest, takes it: %s", s.Nodes[i+1].Name, found, d.Reason)
			}
		}
	}
	s.Unit.Release = release("v3") // and the next one is a first release again
	if s.Record = Next(s).Record; s.Record.Rollout.Phase != deployments.PhaseCanary || !s.Record.Stable.IsZero() {
		t.Errorf("the next one begins as %s", brief(s.Record))
	}
}

// firstRelease10 is a first release on ten nodes where something else serves, admitted to one.
func firstRelease10(t *testing.T) Situation {
	s := step(0, deployments.PhaseRolling)
	canary(&s)
	s.Record = deployments.Record{}
	joined(&s)
	each(&s, func(u *deployments.UnitReport) { *u = deployments.UnitReport{} })
	s.Record = Next(s).Record
	each(&s, func(u *deployments.UnitReport) {
		u.State, u.OtherServes, u.Generation = deployments.StateWaiting, true, s.Record.Generation
	})
	if s.Record = Next(s).Record; !s.Record.Rollout.Serving || admitted(&s, s.Record) != 1 {
		t.Fatalf("it begins as %s", brief(s.Record))
	}
	return s
}

// A first release that stops late leaves the nodes that run it well, as many at a time as the budget allows, for what
// was there before. Those that keep nothing of that, as old agents do, stay; so does who returns, until there is room.
func TestTheFirstReleaseThatStopsLateIsLeft(t *testing.T) {
	t.Parallel()
	s := firstRelease10(t)
	s.Record.Rollout.Phase, s.Record.Rollout.Cutoff = deployments.PhaseRolling, everyRank
	each(&s, func(u *deployments.UnitReport) {
		*u = deployments.UnitReport{State: deployments.StateConverged, Running: s.Unit.Release, Want: s.Unit.Release,
			Generation: s.Record.Generation, Leavable: true}
	})
	s.Nodes[0].Report.State = deployments.StateUnhealthy
	s.Nodes[1].Report.Leavable = false
	s.Nodes[2].Gone, s.Nodes[2].GoneSince = true, s.Now
	resolve := func(n *Node) Decision {
		return Resolve(ResolveInputs{Unit: app, Node: n.Name, Now: s.Now, Joined: n.Joined, Record: good(s.Record),
			Running: n.Report.Running, Leavable: n.Report.Leavable, AtDest: FoundOther})
	}
	most, turns := 0, 0
	for ; turns < 20; turns++ {
		m := Next(s)
		if turns > 0 && m.Record.Generation == s.Record.Generation && m.Record.Rollout.Phase == deployments.PhaseRolledBack {
			s.Record = m.Record
			break
		}
		s.Record = m.Record
		leaving := 0
		for i := range s.Nodes {
			n := &s.Nodes[i]
			if n.Gone {
				continue
			}
			d := resolve(n)
			n.Report.Generation, n.Report.Want = s.Record.Generation, d.Target
			switch {
			case d.Action == ActLeave && n.Report.State == deployments.StateSwitching: // and is done
				n.Report = deployments.UnitReport{State: deployments.StateWaiting, OtherServes: true,
					Generation: s.Record.Generation}
			case d.Action == ActLeave:
				n.Report.State = deployments.StateSwitching
				leaving++
			case n.Report.State == deployments.StateUnhealthy: // in service or not: it takes no more room than it did
			case d.Target != n.Report.Running:
				t.Fatalf("%s runs %q, and is to run %q: %s", n.Name, n.Report.Running.URL, d.Target.URL, d.Reason)
			}
		}
		most = max(most, leaving)
	}
	if p := s.Record.Rollout; p == nil || p.Phase != deployments.PhaseRolledBack || most > 2 || most == 0 {
		t.Fatalf("after %d turns, at most %d at a time: %s", turns, most, brief(s.Record))
	}
	for i := range s.Nodes {
		n := &s.Nodes[i]
		want := ActKeep
		if i == 1 || i == 2 {
			want = ActRun
		}
		if d := resolve(n); i != 2 && (d.Action != want || d.Target != n.Report.Running) {
			t.Errorf("%s is to %s %q: %s", n.Name, d.Action, d.Target.URL, d.Reason)
		}
	}
	back := &s.Nodes[2] // returns, and is told in its turn
	back.Gone, back.GoneSince, back.Joined = false, time.Time{}, s.Record.Joined+5
	if d := resolve(back); s.Record.Joined > 0 && (d.Action != ActRun || d.Target != back.Report.Running) {
		t.Errorf("who returns is to %s %q: %s", d.Action, d.Target.URL, d.Reason)
	}
	s.Record = Next(s).Record
	if d := resolve(back); d.Action != ActLeave {
		t.Errorf("who returned is to %s %q: %s, by %s", d.Action, d.Target.URL, d.Reason, brief(s.Record))
	}
}

// A store that lost the record of a first release that was rolled back sends nobody there again; one that lost all
// begins it anew by its gates, while nodes keep what was there before.
func TestTheFirstReleaseThatWasRolledBackIsLost(t *testing.T) {
	t.Parallel()
	s := firstRelease10(t)
	h := deployments.History{Generation: 3, Release: s.Unit.Release, Failed: s.Unit.Release.Digest}
	s.Record = FromHistory(s.Unit, h, s.Now)
	if m := Next(s); m.Record.Rollout == nil || m.Record.Rollout.Failed != s.Unit.Release.Digest {
		t.Errorf("from its history it becomes %s", brief(m.Record))
	}
	for i := range s.Nodes[:6] {
		s.Nodes[i].Report = deployments.UnitReport{State: deployments.StateConverged, Running: s.Unit.Release,
			Want: s.Unit.Release, Generation: 2, Leavable: true}
	}
	s.Record = Rebuild(s.Unit, "c", s.Nodes, 0, s.Now)
	if m := Next(s); m.Record.Rollout == nil || m.Record.Rollout.Phase != deployments.PhaseCanary {
		t.Errorf("from reports it becomes %s", brief(m.Record))
	}
	s.Nodes[9].Report.Quarantined = []deployments.Digest{s.Unit.Release.Digest}
	s.Record = Rebuild(s.Unit, "c", s.Nodes, 0, s.Now)
	if m := Next(s); m.Record.Rollout == nil || m.Record.Rollout.Failed != s.Unit.Release.Digest {
		t.Errorf("from reports of a failure it becomes %s", brief(m.Record))
	}
}

// Where a first release was rolled back, a pin's release becomes stable for all only once it has been rolled out:
// if the pin ends earlier, nodes go on serving what was there before.
func TestAPinThatEndsEarlyOverAFailedFirstReleaseIsNotStable(t *testing.T) {
	t.Parallel()
	for _, ended := range []bool{false, true} {
		s := paced10()
		joined(&s)
		failed, pin := s.Unit.Release, release("v7")
		s.Record = deployments.Record{Target: pin, Generation: 4, Commit: "c2", Paced: true, Nodes: 10, Joined: 100,
			Pinned: &deployments.Pinned{Target: failed, Claim: 1, Failed: failed.Digest}}
		if !ended {
			s.Record.Rollout = &deployments.Progress{Phase: deployments.PhaseRolling, SkipsGates: true, Since: noon}
		}
		s.Pin = new(Value[deployments.Pin])
		each(&s, func(u *deployments.UnitReport) {
			*u = deployments.UnitReport{State: deployments.StateWaiting, OtherServes: true, Generation: 4}
			if ended {
				*u = deployments.UnitReport{State: deployments.StateConverged, Running: pin, Want: pin, Generation: 4}
			}
		})
		r := Next(s).Record
		if r.Rollout == nil || r.Rollout.Failed != failed.Digest || r.Stable.IsZero() == ended {
			t.Errorf("ended %v: it becomes %s", ended, brief(r))
		}
	}
}
