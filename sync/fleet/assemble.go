package fleet

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet/message"
	"kedge/sync/fleet/reports"
)

// Assemble computes a Fleet as of now from a store's entries; it has no side effects. A key or a value that it can't
// parse becomes one of the Errors. Units that only pins or reports name are included, up to maxReportOnly for each
// role.
func Assemble(entries []kv.Entry, now time.Time) *Fleet { return new(assembler).assemble(entries, now) }

// assembler computes one Fleet after the other from successive views of a store. It parses only those reports and pins
// that changed.
type assembler struct {
	reports   reports.Reader
	pins      kv.ParseCache[deployments.Pin]
	maxListed int // bounds the nodes that a role's units list, summed over the units; 0: reports.MaxRole
}

func (m *assembler) assemble(entries []kv.Entry, now time.Time) *Fleet {
	a := assembly{
		fleet:     &Fleet{At: now, Units: []Unit{}, Unassigned: []Unassigned{}, Errors: map[string]string{}},
		units:     map[deployments.UnitID]*Unit{},
		reporters: map[deployments.RoleID][]reporter{},
		orders:    map[deployments.UnitID]kv.Entry{},
		histories: map[deployments.UnitID][]deployments.History{},
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Key, kv.MirrorPrefix) {
			a.mirror(e)
			continue
		}
		key, err := kv.ParseKey(e.Key)
		if err != nil {
			a.addError(e.Key, err)
			continue
		}
		switch key.Kind {
		case kv.DesiredPrefix:
			a.desired(e, key)
		case kv.PinsPrefix:
			a.pins = append(a.pins, keyed{e, key})
		case kv.ControlPrefix:
			a.orders[key.UnitID()] = e
		case kv.HistoryPrefix:
			a.histories[key.UnitID()] = append(a.histories[key.UnitID()], readHistory(e))
		}
	}
	for _, r := range m.reports.Read(entries) {
		a.report(r)
	}
	for role, reporters := range a.reporters {
		for _, r := range reporters {
			for name := range r.units {
				if deployments.CheckSegment("unit", name) == nil {
					a.noteReported(role.Unit(name), r.name)
				}
			}
		}
	}
	a.addReportOnly()
	m.pins, a.parsePin = m.pins.Next(len(a.pins), deployments.ParsePin)
	a.takePins()
	for id, e := range a.orders {
		a.addOrder(id, e)
	}
	a.countAgentsAndUnassigned()
	a.dropExcessNodes(cmp.Or(m.maxListed, reports.MaxRole))
	a.fleet.Units = []Unit{}
	for _, id := range slices.SortedFunc(maps.Keys(a.units), deployments.UnitID.Compare) {
		u := a.units[id]
		a.nodes(u)
		u.GitAhead = gitAhead(u, a.histories[id], now)
		a.fleet.Units = append(a.fleet.Units, *u)
	}
	return a.fleet
}

type assembly struct {
	fleet     *Fleet
	units     map[deployments.UnitID]*Unit
	reporters map[deployments.RoleID][]reporter
	// pins, orders and histories are joined to their units at the end.
	pins   []keyed
	orders map[deployments.UnitID]kv.Entry
	// reportOnly maps each unit that reports name but that has no record to a node whose report
	// names it.
	reportOnly map[deployments.UnitID]string
	histories  map[deployments.UnitID][]deployments.History
	// hidden counts the live nodes of each role that units don't list, as there are too many.
	hidden   map[deployments.RoleID]int
	parsePin func(kv.Entry) (deployments.Pin, error)
}

type keyed struct {
	kv.Entry
	key kv.Key
}

// reporter is a node of a role.
type reporter struct {
	name  string
	agent string
	gone  bool
	units map[string]deployments.UnitReport
	err   error // why its report can't be used; nil: it can
	// joined is deployments.Report.Joined.
	joined uint64
}

func (a *assembly) unit(id deployments.UnitID) *Unit {
	u := a.units[id]
	if u == nil {
		u = &Unit{ID: id, Nodes: []Node{}}
		a.units[id] = u
	}
	return u
}

// maxReportOnly bounds, for each role, how many units without a record are shown because reports
// name them, and how many because only pins do. Such units were removed from Git, or invented: a
// token can write any number of them.
const maxReportOnly = 20

// noteReported adds a unit to reportOnly, with a node whose report names it, unless the unit has a
// record.
func (a *assembly) noteReported(id deployments.UnitID, node string) {
	if a.units[id] == nil {
		if a.reportOnly == nil {
			a.reportOnly = map[deployments.UnitID]string{}
		}
		a.reportOnly[id] = max(a.reportOnly[id], node)
	}
}

// addReportOnly adds the units in reportOnly, at most maxReportOnly of each role. For a role that has more it adds an
// error that says how many.
func (a *assembly) addReportOnly() {
	shown, more, nodes := map[deployments.RoleID]int{}, map[deployments.RoleID]int{}, map[deployments.RoleID]string{}
	for _, id := range slices.SortedFunc(maps.Keys(a.reportOnly), deployments.UnitID.Compare) {
		role := id.RoleID()
		if shown[role]++; shown[role] <= maxReportOnly {
			a.unit(id)
			continue
		}
		more[role]++
		nodes[role] = max(nodes[role], a.reportOnly[id])
	}
	for role, n := range more {
		a.addRoleError(role, fmt.Errorf("reports name %s without a record, such as the report of node %s: "+
			"see whether that node's agent is yours", count(n, "more unit"), nodes[role]))
	}
}

// someKeys is appended to a role's prefix to get the key in Fleet.Errors of an error about some of the role's keys. An
// error at the prefix alone says that the prefix can't be read.
const someKeys = "*"

// takePins adds the pins to their units. Of the units that only pins name it adds at most maxReportOnly for each role,
// as an operator's token can invent any number. For pins of further units it adds an error that says how many they are.
func (a *assembly) takePins() {
	shown, more := map[deployments.RoleID]int{}, map[deployments.RoleID]int{}
	slices.SortFunc(a.pins, func(x, y keyed) int { return cmp.Compare(x.Key, y.Key) })
	for _, e := range a.pins {
		id := e.key.UnitID()
		role := id.RoleID()
		if a.units[id] == nil {
			if shown[role]++; shown[role] > maxReportOnly {
				more[role]++
				continue
			}
		}
		a.pin(e.Entry, e.key)
	}
	for role, n := range more {
		a.addError(kv.RolePrefix(kv.PinsPrefix, role.Stage, role.Role)+someKeys,
			fmt.Errorf("%s of units without a record: delete the keys, as they pin nothing", count(n, "more pin")))
	}
}

// maxUnitErrors bounds Unit.Error, in bytes: once it is that long, no more errors of node pins are
// added. Fleet.Errors has each of them under its key, too.
const maxUnitErrors = 4 << 10

// addRoleError adds an error about a role's reports, unless the role has the same error already.
func (a *assembly) addRoleError(role deployments.RoleID, err error) {
	key := kv.RolePrefix(kv.StatusPrefix, role.Stage, role.Role) + someKeys
	if was := a.fleet.Errors[key]; !strings.Contains(was, err.Error()) {
		a.fleet.Errors[key] = join(was, err.Error())
	}
}

func (a *assembly) addError(key string, err error) { a.fleet.Errors[key] = err.Error() }

func (a *assembly) desired(e kv.Entry, key kv.Key) {
	u := a.unit(key.UnitID())
	record, err := deployments.ParseRecord(e.Value)
	if err != nil {
		a.addError(e.Key, err)
		u.Error = join(u.Error, "record: "+err.Error())
		return
	}
	u.Record = &record
}

func (a *assembly) pin(e kv.Entry, key kv.Key) {
	u, node := a.unit(key.UnitID()), key.Node
	pin, err := a.parsePin(e)
	switch {
	case err != nil && node != "":
		a.addError(e.Key, err)
		if len(u.Error) < maxUnitErrors {
			u.Error = join(u.Error, "pin of "+node+": "+err.Error())
		}
	case err != nil:
		a.addError(e.Key, err)
		u.Error = join(u.Error, "pin: "+err.Error())
	case node != "":
		if u.Pins == nil {
			u.Pins = map[string]deployments.Pin{}
		}
		u.Pins[node] = pin
	default:
		u.Pin = &pin
	}
}

// addOrder adds an order to its unit. An order that the mirror will never take is an error, as it would wait for ever.
func (a *assembly) addOrder(id deployments.UnitID, e kv.Entry) {
	order, err := deployments.ParseOrder(e.Value)
	u := a.units[id]
	switch {
	case err != nil:
		a.addError(e.Key, fmt.Errorf("%w; write a valid order, or delete the key", err))
	case u == nil || u.Record == nil:
		a.addError(e.Key, fmt.Errorf("an order to %s a unit without a valid record: delete the key", order.Verb))
	default:
		u.Order = string(order.Verb)
	}
}

func (a *assembly) report(r reports.Report) {
	n := reporter{
		name: r.Key.Node, agent: r.Report.Agent, gone: r.Entry.Session == "", units: r.Report.Units, err: r.Err,
		joined: r.Report.Joined,
	}
	switch {
	case errors.Is(n.err, reports.ErrTooMuch):
		a.addRoleError(r.Key.Role, fmt.Errorf("%w: see which nodes report, and whether their agents are yours", n.err))
	case n.err != nil:
		a.addError(r.Entry.Key, n.err)
	case r.Report.Reason != "":
		a.addError(r.Entry.Key, errors.New(message.Text(r.Report.Reason, r.Report.Facts)))
	}
	a.reporters[r.Key.Role] = append(a.reporters[r.Key.Role], n)
}

func (a *assembly) mirror(e kv.Entry) {
	if e.Key == kv.MirrorLease {
		a.fleet.MirrorRunning = e.Session != ""
	}
	if e.Key != kv.MirrorKey {
		return
	}
	s, err := deployments.ParseMirrorState(e.Value)
	if err != nil {
		a.addError(e.Key, err)
		return
	}
	a.fleet.Mirror = &s
}

// countAgentsAndUnassigned sets Fleet.Agents, the number of live nodes by the version that their
// agent reports, and Fleet.Unassigned, the live nodes whose role has no unit.
func (a *assembly) countAgentsAndUnassigned() {
	used := map[deployments.RoleID]bool{}
	for id, u := range a.units {
		_, bad := a.fleet.Errors[kv.DesiredKey(id)]
		reports := func(r reporter) bool { _, ok := r.units[id.Unit]; return ok }
		if u.Record != nil || bad || slices.ContainsFunc(a.reporters[id.RoleID()], reports) {
			used[id.RoleID()] = true
		}
	}
	versions := map[string]string{} // by node: a node of several roles counts once
	for role, reporters := range a.reporters {
		for _, r := range reporters {
			if r.gone {
				continue
			}
			if r.agent != "" {
				versions[r.name] = r.agent
			}
			if !used[role] {
				a.fleet.Unassigned = append(a.fleet.Unassigned, Unassigned{Stage: role.Stage, Role: role.Role, Node: r.name})
			}
		}
	}
	slices.SortFunc(a.fleet.Unassigned, func(a, b Unassigned) int {
		return cmp.Or(cmp.Compare(a.Stage, b.Stage), cmp.Compare(a.Role, b.Role), cmp.Compare(a.Node, b.Node))
	})
	for _, version := range versions {
		if a.fleet.Agents == nil {
			a.fleet.Agents = map[string]int{}
		}
		a.fleet.Agents[version]++
	}
}

// dropExcessNodes removes from each role the nodes that would make its units list more than
// maxListed nodes together, and counts the live ones removed. It prefers nodes with reports on
// units to nodes without and, within each group, live nodes to dead ones.
func (a *assembly) dropExcessNodes(maxListed int) {
	units := map[deployments.RoleID]int{}
	for id := range a.units {
		units[id.RoleID()]++
	}
	a.hidden = map[deployments.RoleID]int{}
	for role, all := range a.reporters {
		most := maxListed / max(1, units[role])
		if len(all) <= most {
			continue
		}
		rank := func(r reporter) (rank int) {
			if len(r.units) == 0 {
				rank += 2
			}
			if r.gone {
				rank++
			}
			return rank
		}
		slices.SortStableFunc(all, func(x, y reporter) int { return rank(x) - rank(y) })
		for _, r := range all[most:] {
			if !r.gone {
				a.hidden[role]++
			}
		}
		a.reporters[role] = all[:most]
		a.addRoleError(role, fmt.Errorf("%d of %d nodes aren't listed: delete the keys of those that aren't yours",
			len(all)-most, len(all)))
	}
}

// nodes adds a unit's nodes, and counts them. If the unit has a record that isn't orphaned, the live nodes of its role
// that aren't listed count as not converged.
func (a *assembly) nodes(u *Unit) {
	for _, r := range a.reporters[u.ID.RoleID()] {
		report, reports := r.units[u.ID.Unit]
		n := Node{Name: r.name, Gone: r.gone, Report: report, joined: r.joined}
		facts := a.fleet.resolveInputs(u, n)
		// A node without a report on the unit counts if it lives and should run the unit.
		desired := facts.Record.Present && !facts.Record.Value.Orphaned
		if !reports && (r.gone || !desired && !facts.UnitPin.Present && !facts.NodePin.Present) {
			continue
		}
		decision := policy.Resolve(facts)
		n.Want, n.Message = decision.Target, message.Decision(decision.Reason, decision.Facts)
		switch {
		case r.err != nil:
			n.Message = "its report can't be used"
			n.Report.Error = r.err.Error()
		case !reports && facts.Record.Present: // without a record the node reports nothing, and Message says so
			n.Message = "has yet to report on this unit"
		case !reports:
		default:
			n.Converged = converged(decision, report)
		}
		u.Nodes = append(u.Nodes, n)
		switch {
		case n.Gone:
			u.Gone++
		case n.Converged:
			u.Live++
			u.Converged++
		default:
			u.Live++
		}
	}
	if u.Record != nil && !u.Record.Orphaned {
		u.Live += a.hidden[u.ID.RoleID()]
	}
	slices.SortFunc(u.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	u.versions = reportedVersions(u.Nodes)
}

// converged reports whether a node's report r says that the node does what d decides. If d is that the node keeps what
// it runs, a waiting node counts, too. It returns false if d is invalid, or if the node doesn't follow the current
// record.
func converged(d policy.Decision, r deployments.UnitReport) bool {
	switch {
	case d.Invalid != nil, r.Reason == deployments.ReasonOldGeneration:
		return false
	case d.Action == policy.ActHold:
		return r.State == deployments.StateHeld
	case d.Action == policy.ActKeep:
		return r.State == deployments.StateWaiting || r.State == deployments.StateConverged
	}
	return r.State == deployments.StateConverged && r.Running.Digest == d.Target.Digest // whatever URL it came from
}

// resolveInputs returns the inputs of a decision about a unit on a node, as far as the store shows them. The node's own
// configuration is unknown here.
func (f *Fleet) resolveInputs(u *Unit, n Node) policy.ResolveInputs {
	facts := policy.ResolveInputs{
		Unit:        u.ID,
		Node:        n.Name,
		Now:         f.At,
		Joined:      n.joined,
		Running:     n.Report.Running,
		Quarantined: n.Report.Quarantined,
		Leavable:    n.Report.Leavable,
	}
	switch {
	case n.Report.OtherServes:
		facts.AtDest = policy.FoundOther
	case !n.Report.Running.IsZero() || !n.Report.Want.IsZero():
		facts.AtDest = policy.FoundNothing
	}
	facts.Record = value(f, kv.DesiredKey(u.ID), u.Record)
	facts.UnitPin = value(f, kv.PinKey(u.ID), u.Pin)
	var own *deployments.Pin
	if p, ok := u.Pins[n.Name]; ok {
		own = &p
	}
	facts.NodePin = value(f, kv.NodePinKey(u.ID, n.Name), own)
	return facts
}

func value[T any](f *Fleet, key string, v *T) policy.Value[T] {
	if text, bad := f.Errors[key]; bad {
		return policy.Value[T]{Present: true, Err: errors.New(text)}
	}
	if v == nil {
		return policy.Value[T]{}
	}
	return policy.Value[T]{Present: true, Value: *v}
}

func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "; " + b
}
