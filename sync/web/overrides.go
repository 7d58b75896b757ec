package web

import (
	"maps"
	"slices"
	"time"

	"kedge/deployments"
	"kedge/sync/fleet"
)

// overrides is the page of what overrides Git: pins, orders and freezes, with their authors.
type overrides struct {
	Pins     []pinRow
	MorePins int
	Orders   []orderRow
	Frozen   []frozenRow
	// Windows are the freeze windows of kedge.yaml. MoreWindows is how many are not listed.
	Windows     []windowRow
	MoreWindows int
	Mirror      mirrorView
	Faults      []fleet.Note
}

// pinRow is one pin.
type pinRow struct {
	ID      deployments.UnitID
	Node    string
	Release string
	By      string
	Reason  string
	Until   time.Time
	Expired bool
	AtOnce  bool
	// Nodes is how many live nodes the unit has, for a pin of the unit, even if some have pins of
	// their own. For a node's pin it is 1, even if that node is gone.
	Nodes        int
	UnpinCommand string
}

// orderRow is an order that the mirror has yet to take.
type orderRow struct {
	ID    deployments.UnitID
	Order string
}

// frozenRow is a rollout that a freeze window delays.
type frozenRow struct {
	ID             deployments.UnitID
	Window, Reason string
	ThawsAt        time.Time
	// Never is set if no window will open that lets the rollout go on.
	Never          bool
	PromoteCommand string
}

// maxOverrides bounds the pins, the orders and the frozen rollouts that are listed.
const maxOverrides = 80

// overridesOf returns the page of what overrides Git. Its pins are sorted by their end; those
// without an end come last.
func (s *snapshot) overridesOf(commitURL string) overrides {
	v := overrides{Mirror: s.mirror(commitURL), Faults: s.faults()}
	for _, u := range s.all() {
		if u.Pin != nil {
			v.Pins = append(v.Pins, s.pinRow(u, *u.Pin, ""))
		}
		for _, node := range slices.Sorted(maps.Keys(u.Pins)) {
			v.Pins = append(v.Pins, s.pinRow(u, u.Pins[node], node))
		}
		if u.Order != "" && len(v.Orders) < maxOverrides {
			v.Orders = append(v.Orders, orderRow{u.ID, fleet.Clean(u.Order, 24)})
		}
		if u.frozen() && len(v.Frozen) < maxOverrides {
			f := u.Record.Rollout.Facts
			v.Frozen = append(v.Frozen, frozenRow{
				ID: u.ID, Window: fleet.Clean(f["window"], 80), Reason: fleet.Clean(f["reason"], maxText),
				ThawsAt: u.progress.ExpectedEnd, Never: f["opens"] == "never", PromoteCommand: "kedge promote " + u.ID.String(),
			})
		}
	}
	v.Windows, v.MoreWindows = s.windowsOf()
	never := func(t time.Time) time.Time {
		if t.IsZero() {
			return time.Unix(1<<40, 0)
		}
		return t
	}
	slices.SortStableFunc(v.Pins, func(a, b pinRow) int { return never(a.Until).Compare(never(b.Until)) })
	v.MorePins = max(0, len(v.Pins)-maxOverrides)
	v.Pins = v.Pins[:len(v.Pins)-v.MorePins]
	return v
}

func (s *snapshot) pinRow(u *unit, p deployments.Pin, node string) pinRow {
	r := pinRow{
		ID: u.ID, Node: fleet.Clean(node, 63), Release: "hold", By: fleet.Clean(p.By, 40),
		Reason: fleet.Clean(p.Reason, maxText),
		Until:  p.Until, Expired: p.Expired(s.At), AtOnce: p.AtOnce, Nodes: u.Live,
		UnpinCommand: "kedge unpin " + u.ID.String(),
	}
	if !p.Hold {
		r.Release = u.name(p.Release)
	}
	if node != "" {
		r.Nodes, r.UnpinCommand = 1, r.UnpinCommand+" --node "+r.Node
	}
	return r
}

// maxFaults bounds the errors and other notes of Fleet.Faults that are listed.
const maxFaults = 20

// faults returns the first maxFaults notes of Fleet.Faults, with their texts cut.
func (s *snapshot) faults() []fleet.Note {
	all := s.Faults()
	all = all[:min(len(all), maxFaults)]
	for i := range all {
		all[i].About.Text = fleet.Clean(all[i].About.Text, maxText)
		all[i].Says.Text = fleet.Clean(all[i].Says.Text, 2*maxText)
	}
	return all
}
