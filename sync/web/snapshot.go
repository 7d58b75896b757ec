package web

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet"
	"kedge/sync/fleet/message"
)

// snapshot is a fleet as read at one time, with the counts that pages show. It doesn't change with time: instead of
// elapsed times it has points in time, from which browsers compute those.
type snapshot struct {
	*fleet.Fleet
	// storeError is why the store can't be read now; empty: it can, or that wasn't checked yet.
	storeError    string
	trend         *trends
	latestChanges *changeCache

	once  sync.Once
	units []*unit // in the order of Fleet.Units

	mu    sync.Mutex
	pages map[string]*rendered
}

// all returns the snapshot's units with their counts, which are computed on first use.
func (s *snapshot) all() []*unit {
	s.once.Do(func() {
		s.units = make([]*unit, len(s.Units))
		for i := range s.Units {
			s.units[i] = summarize(&s.Units[i], s.At)
		}
	})
	return s.units
}

// find returns a unit, or nil.
func (s *snapshot) find(id deployments.UnitID) *unit {
	i, found := slices.BinarySearchFunc(s.all(), id, func(u *unit, id deployments.UnitID) int { return u.ID.Compare(id) })
	if !found {
		return nil
	}
	return s.units[i]
}

// health is a node's condition, in the few kinds that a map distinguishes.
type health int

const (
	healthy health = iota
	busy           // changing, or waiting
	failing
	gone
	healths // the number of kinds
)

// String returns the health's class in the style sheet.
func (h health) String() string { return [...]string{"ok", "busy", "bad", "gone"}[h] }

// Label returns the health's name for people.
func (h health) Label() string { return [...]string{"converged", "on its way", "failing", "gone"}[h] }

func healthOf(n *fleet.Node) health {
	switch n.Shown().Tone {
	case fleet.Good:
		return healthy
	case fleet.Bad:
		return failing
	case fleet.Dim:
		return gone
	}
	return busy
}

// share is how many live nodes run a release. Release is zero in the share of nodes that run nothing, and in the one
// share of all releases without a colour.
type share struct {
	Release deployments.Pointer
	Name    string
	Count   int
	// Class is the release's colour: see unit.colour.
	Class string
}

// othersClass is the class of the releases that have no colour of their own.
const othersClass = "vx"

// maxShares is how many releases of a unit have a colour of their own at most; all others share one.
const maxShares = 5

// unit is a unit with the counts that pages show.
type unit struct {
	*fleet.Unit
	name func(deployments.Pointer) string
	// target is the release that the unit is meant to reach: that of its pin if one is in force that
	// isn't a hold, or else the record's target. Nodes may have to run another release, such as stable
	// once the target was rolled back.
	target deployments.Pointer
	// shares has a share for each release that has a colour, and one for nodes that run nothing, the
	// most common first. The last share is for all other releases together, if any.
	shares  []share
	classes map[deployments.Digest]string
	healths [healths]int
	// states counts live nodes that aren't converged, by their state in words.
	states map[string]int
	// firstError is the error of the first failing or retrying node that has one, and errorNode that
	// node's name.
	firstError, errorNode string
	pinned                bool
	progress              *progress
	problem               *problem
}

// summarize computes the counts of a unit.
func summarize(u *fleet.Unit, now time.Time) *unit {
	s := &unit{Unit: u, name: u.Versions(), states: map[string]int{}, classes: map[deployments.Digest]string{},
		pinned: u.Pinned(now)}
	if u.Record != nil {
		s.target = u.Record.Target
	}
	if s.pinned && !u.Pin.Hold {
		s.target = u.Pin.Release
	}
	counts := map[deployments.Digest]*share{}
	for i := range u.Nodes {
		n := &u.Nodes[i]
		h := healthOf(n)
		s.healths[h]++
		if h == busy || h == failing {
			s.states[stateOf(n)]++
			if (h == failing || n.Report.State == deployments.StateRetrying) && s.firstError == "" {
				s.firstError = fleet.Clean(cmp.Or(n.Report.Error, message.Text(n.Report.Reason, n.Report.Facts)), maxText)
				s.errorNode = n.Name
			}
		}
		if h == gone {
			continue
		}
		r := n.Report.Running
		if counts[r.Digest] == nil {
			name := "nothing"
			if !r.IsZero() {
				name = s.name(r)
			}
			counts[r.Digest] = &share{Release: r, Name: name}
		}
		counts[r.Digest].Count++
	}
	s.colour(counts)
	s.progress = progressOf(s, now)
	s.problem = problemOf(s, now)
	return s
}

// stateOf returns the first word of a node's state: details that differ by node follow it.
func stateOf(n *fleet.Node) string {
	text, _, _ := strings.Cut(n.Shown().Text, " ")
	return fleet.Clean(text, 24)
}

// colour sets u.shares and u.classes from counts. The target gets the class v0, the stable release
// v1, the most common others v2 to v4, and nodes that run nothing vn. All other releases share vx.
func (u *unit) colour(counts map[deployments.Digest]*share) {
	all := make([]*share, 0, len(counts))
	for _, c := range counts {
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b *share) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Name, b.Name),
			strings.Compare(a.Release.Digest.String(), b.Release.Digest.String()))
	})
	stable := deployments.Digest{}
	if u.Record != nil {
		stable = u.Record.Stable.Digest
	}
	next := 2
	rest := share{Class: othersClass}
	kinds := 0
	for _, c := range all {
		switch d := c.Release.Digest; {
		case c.Release.IsZero():
			c.Class = "vn"
		case d == u.target.Digest:
			c.Class = "v0"
		case d == stable:
			c.Class = "v1"
		case next < maxShares:
			c.Class = fmt.Sprintf("v%d", next)
			next++
		default:
			rest.Count += c.Count
			kinds++
			continue
		}
		u.classes[c.Release.Digest] = c.Class
		u.shares = append(u.shares, *c)
	}
	if kinds > 0 {
		rest.Name = plural2(kinds, "other")
		u.shares = append(u.shares, rest)
	}
}

// class returns the CSS class, and so the colour, of the release that a node runs; vg if the node is gone.
func (u *unit) class(n *fleet.Node) string {
	if n.Gone {
		return "vg"
	}
	return cmp.Or(u.classes[n.Report.Running.Digest], othersClass)
}

// progress is how far a rollout has come, in numbers of nodes.
type progress struct {
	Phase deployments.Phase
	Label string
	// Following is the number of live nodes that follow the rollout. Admitted, Converged and Failed
	// count some of them. While nodes go back, and afterwards, Converged counts converged nodes
	// that don't run the target.
	Admitted, Converged, Failed, Following int
	Since                                  time.Time
	// ExpectedEnd is when the phase is expected to end, according to the mirror or estimated from the trend; zero:
	// unknown.
	ExpectedEnd time.Time
}

// back reports whether nodes go back to the stable release, or have done so.
func (p *progress) back() bool {
	return p.Phase == deployments.PhaseRollingBack || p.Phase == deployments.PhaseRolledBack
}

// tone returns the style of a phase.
func (p *progress) tone() string {
	switch p.Phase {
	case deployments.PhaseRollingBack, deployments.PhaseRolledBack:
		return "bad"
	case deployments.PhasePaused, deployments.PhasePendingApproval:
		return "warn"
	case deployments.PhaseFrozen:
		return "cold"
	}
	return "info"
}

var phaseLabels = map[deployments.Phase]string{
	deployments.PhaseCanary: "canary", deployments.PhasePendingApproval: "awaits approval",
	deployments.PhaseFrozen:  "frozen",
	deployments.PhaseRolling: "rolling", deployments.PhasePaused: "paused", deployments.PhaseRollingBack: "going back",
	deployments.PhaseRolledBack: "rolled back",
}

// progressOf returns how far the rollout in u's record has come, even after it was rolled back;
// nil: there is none.
func progressOf(u *unit, now time.Time) *progress {
	if u.Record == nil || u.Record.Rollout == nil {
		return nil
	}
	r := u.Record.Rollout
	p := &progress{Phase: r.Phase, Label: cmp.Or(phaseLabels[r.Phase], fleet.Clean(string(r.Phase), 24)), Since: r.Since}
	if r.Phase == deployments.PhaseCanary && !r.HealthySince.IsZero() {
		p.Label = "baking"
	}
	target := u.Record.Target.Digest
	failed := target
	if !r.Failed.IsZero() {
		failed = r.Failed
	}
	for i := range u.Nodes {
		n := &u.Nodes[i]
		if n.Gone || n.PinnedOrHeld() && (p.back() || !followsPin(u.Record, n)) {
			continue
		}
		p.Following++
		if policy.Rank(n.Name, target) <= r.Cutoff {
			p.Admitted++
		}
		on := n.Report.Running.Digest == target
		switch {
		case slices.Contains(n.Report.Quarantined, failed), on && n.Report.State == deployments.StateUnhealthy:
			p.Failed++
		case on != p.back() && n.Report.State == deployments.StateConverged:
			p.Converged++
		}
	}
	if until, err := time.Parse("2006-01-02 15:04:05Z", r.Facts["until"]); err == nil {
		p.ExpectedEnd = until
	} else if until, err := time.Parse(time.RFC3339, r.Facts["until"]); err == nil {
		p.ExpectedEnd = until
	}
	if !p.ExpectedEnd.After(now) {
		p.ExpectedEnd = time.Time{}
	}
	return p
}

// followsPin reports whether a pinned node takes the release of a unit pin that the
// mirror rolls out: the rollout waits for the node.
func followsPin(r *deployments.Record, n *fleet.Node) bool {
	return r.Pinned != nil && n.Report.State != deployments.StateHeld && n.Report.Want.Digest == r.Target.Digest
}

// problem is the worst problem of a unit, or one that belongs to no unit.
type problem struct {
	ID   deployments.UnitID
	Tone string // bad or warn
	What string
	Why  string
	Next string
}

// rolloutReason returns why a unit's rollout is in its phase; empty: there is no rollout or no
// reason. It leaves out the phase's name at the beginning, as pages show it before.
func (u *unit) rolloutReason() string {
	why := fleet.Clean(u.RolloutReason(), maxText)
	if u.progress == nil {
		return why
	}
	return strings.TrimPrefix(why, u.progress.Label+": ")
}

// problemOf returns what is wrong with a unit; nil: nothing that needs attention.
func problemOf(u *unit, now time.Time) *problem {
	p := &problem{ID: u.ID, Tone: "bad", Next: fleet.Clean(u.Next(now), maxText)}
	live := 0
	for h, n := range u.healths {
		if health(h) != gone {
			live += n
		}
	}
	why := u.rolloutReason()
	switch {
	case u.Error != "":
		p.What, p.Why = "does not parse", fleet.Clean(u.Error, maxText)
	case u.progress != nil && u.progress.back():
		p.What, p.Why = u.progress.Label, why
	case u.healths[failing] > 0:
		p.What = fmt.Sprintf("%d of %d %s", u.healths[failing], live, failingStates(u))
		p.Why = strings.TrimSuffix(fmt.Sprintf("%s: %s", u.errorNode, u.firstError), ": ")
	case u.progress != nil && (u.progress.Phase == deployments.PhasePaused ||
		u.progress.Phase == deployments.PhasePendingApproval):
		p.Tone, p.What, p.Why = "warn", u.progress.Label, why
	case u.Record != nil && policy.IsOrphaned(*u.Record):
		p.Tone, p.What, p.Why = "warn", "its file is gone from Git", ""
	case u.states[string(deployments.StateRetrying)] > 0:
		p.Tone, p.What = "warn", fmt.Sprintf("%d of %d retrying", u.states[string(deployments.StateRetrying)], live)
		p.Why = strings.TrimSuffix(fmt.Sprintf("%s: %s", u.errorNode, u.firstError), ": ")
	case live == 0 && u.healths[gone] > 0 && u.Record != nil:
		p.Tone, p.What = "warn", "no live node"
		p.Why = fmt.Sprintf("%d gone", u.healths[gone])
	default:
		return nil
	}
	return p
}

// failingStates returns the failing states that nodes of u are in, as a list for people.
func failingStates(u *unit) string {
	var names []string
	for _, state := range []deployments.State{deployments.StateUnhealthy, deployments.StateQuarantined,
		deployments.StateInvalid} {
		if u.states[string(state)] > 0 {
			names = append(names, string(state))
		}
	}
	return strings.Join(names, ", ")
}

// maxText bounds untrusted text in a list, in characters.
const maxText = 240
