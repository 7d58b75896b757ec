package cache

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// Role has one role's records and pins, as this node knows them.
type Role struct {
	Name          string
	Records, Pins *Source
	// LeftOut counts the units beyond deployments.MaxRoleUnits, which the node ignores.
	LeftOut int
	// PassedOver counts the pins that are ignored, as their units have neither a record nor files on this node.
	PassedOver int

	stage string
}

func newRole(stage, name string) *Role {
	r := &Role{Name: name, stage: stage}
	r.Records = &Source{Prefix: kv.RolePrefix(kv.DesiredPrefix, stage, name), role: r, desired: true}
	r.Pins = &Source{Prefix: kv.RolePrefix(kv.PinsPrefix, stage, name), role: r}
	return r
}

// Sources returns the role's records and its pins.
func (r *Role) Sources() []*Source { return []*Source{r.Records, r.Pins} }

// Known reports whether enough is known of the role's records and of its pins to decide: a missing pin counts as absent
// only then. After a start it is false while the store has answered for one of the two but not for the other. The
// answer isn't combined with what is remembered of the other source, as a pin may have come or gone meanwhile.
func (r *Role) Known() bool {
	return r.Records.from != fromNowhere && r.Pins.from != fromNowhere && r.Records.Answered() == r.Pins.Answered()
}

// Unknown returns why a source isn't known from the store yet; nil once the store has answered for each and something
// is known. The agent calls it while Known is false.
func (r *Role) Unknown() error {
	for _, s := range r.Sources() {
		if s.from == fromNowhere || !s.Answered() {
			switch {
			case errors.Is(s.err, kv.ErrNoFolder):
				return fmt.Errorf("nothing is known of %s: see whether this agent's stage and role are right: %w",
					s.Prefix, s.err)
			case s.err != nil:
				return fmt.Errorf("nothing is known of %s yet: %w", s.Prefix, s.err)
			}
			return errors.New("waiting for the store's first answer for " + s.Prefix)
		}
	}
	return nil
}

// Missing reports whether nothing is known of the role's records, and the store lacks their folder: a name may be
// mistyped.
func (r *Role) Missing() bool {
	return r.Records.from == fromNowhere && errors.Is(r.Records.err, kv.ErrNoFolder)
}

// Units returns the units that have a record, sorted.
func (r *Role) Units() []deployments.UnitID {
	var ids []deployments.UnitID
	for _, e := range r.Records.entries {
		if id := r.unit(r.Records.unitOf(e.Key)); id.Check() == nil && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b deployments.UnitID) int { return strings.Compare(a.Unit, b.Unit) })
	return ids
}

func (r *Role) unit(name string) deployments.UnitID {
	return deployments.UnitID{Stage: r.stage, Role: r.Name, Unit: name}
}

// Record returns a unit's record; it isn't Present if there is none.
func (r *Role) Record(id deployments.UnitID) policy.Value[deployments.Record] {
	return r.Records.records[kv.DesiredKey(id)]
}

// UnitPins returns the pins of a unit: the one for all nodes, and the one for node. A missing pin isn't Present.
func (r *Role) UnitPins(id deployments.UnitID, node string) (unitPin, nodePin policy.Value[deployments.Pin]) {
	return r.Pins.pins[kv.PinKey(id)], r.Pins.pins[kv.NodePinKey(id, node)]
}

// Generation returns the highest generation of a unit's record that the node has acted on; 0: none. held is the
// generation of a record in the store that the node doesn't act on; 0: there is none, or it has no generation.
func (r *Role) Generation(id deployments.UnitID) (actedOn, held int64) {
	key := kv.DesiredKey(id)
	return r.Records.actedOn[key], r.Records.held[key].generation
}
