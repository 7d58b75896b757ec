package mirror

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/git"
)

// order is what an operator wrote at control/STAGE/ROLE/UNIT. It is consumed, which is to say removed, in the
// transaction that does it.
type order struct {
	deployments.Order
	version uint64
}

// orders reads a view of control/. What can't be obeyed is left where it is, and named in bad.
func orders(view kv.View) (good map[deployments.UnitID]order, bad []error) {
	good = map[deployments.UnitID]order{}
	for _, e := range view.Entries {
		key, err := kv.ParseKey(e.Key)
		var o deployments.Order
		if err == nil {
			o, err = deployments.ParseOrder(e.Value)
		}
		if err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", e.Key, err))
			continue
		}
		good[key.UnitID()] = order{o, e.Version}
	}
	return good, bad
}

// pendingOrders returns the orders that were not obeyed yet, and logs which can't be.
func (l *leader) pendingOrders(commit *git.Commit, seen observedOrders) map[deployments.UnitID]order {
	pending, bad := map[deployments.UnitID]order{}, slices.Clone(seen.bad)
	units := map[deployments.UnitID]bool{}
	for _, u := range commit.Tree.Units {
		units[u.ID] = true
	}
	for _, id := range slices.SortedFunc(maps.Keys(seen.good), deployments.UnitID.Compare) {
		switch o := seen.good[id]; {
		case l.written.orders[id] == o.version: // it has yet to vanish from the watch
		case !units[id]:
			bad = append(bad, fmt.Errorf("%s: the commit has no such unit, and one that comes later would be met by it: "+
				"remove the key", kv.ControlKey(id)))
		default:
			pending[id] = o
		}
	}
	if words := text(errors.Join(bad...)); words != l.badOrders {
		if l.badOrders = words; words != "" {
			l.c.Log.Warn("an operator's order can't be obeyed", "orders", len(bad), "error", clip(words, maxLogged))
		}
	}
	return pending
}
