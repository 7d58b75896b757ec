package mirror

import (
	"fmt"
	"strings"

	"kedge/deployments"
	"kedge/kv"
)

// order is what an operator wrote at control/STAGE/ROLE/UNIT. It is consumed, which is to say removed, in the transaction that
// does it.
type order struct {
	verb    string
	version uint64
}

// orders reads a view of control/. What can't be obeyed is left where it is, and named in bad.
func orders(view kv.View) (good map[deployments.UnitID]order, bad []error) {
	good = map[deployments.UnitID]order{}
	for _, e := range view.Entries {
		id, err := deployments.ParseUnitID(strings.TrimPrefix(e.Key, kv.ControlPrefix))
		if err != nil {
			bad = append(bad, fmt.Errorf("%s: %w", e.Key, err))
			continue
		}
		switch verb := strings.ToLower(deployments.Trim(string(e.Value))); verb {
		case "promote", "pause", "resume", "abort", "retry":
			good[id] = order{verb, e.Version}
		default:
			bad = append(bad, fmt.Errorf("%s: %q is not one of promote, pause, resume, abort, retry", e.Key, clip(verb, 40)))
		}
	}
	return good, bad
}
