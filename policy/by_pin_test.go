package policy

import (
	"errors"
	"fmt"
	"testing"

	"kedge/deployments"
)

// A release that is there by a unit pin isn't said to be Git's: not by the decision, the record, its rollout, nor where
// it has failed.
func TestTraceOfAPinThatIsRolledOut(t *testing.T) {
	t.Parallel()
	git, pin := release("v2"), release("v1")
	for _, c := range []struct {
		name   string
		target deployments.Pointer
		pinned *deployments.Pinned
		want   bool
	}{
		{"Git's", git, nil, false},
		{"a pin's", pin, &deployments.Pinned{Target: git, Stable: git}, true},
		{"a pin's that Git names, too", git, &deployments.Pinned{Target: git, Stable: git}, false},
	} {
		r := deployments.Record{Target: c.target, Stable: release("v0"), Generation: 3, Commit: "4f2c91ab", Pinned: c.pinned,
			Rollout: &deployments.Progress{Phase: deployments.PhaseRolling, Cutoff: everyRank}}
		d := Resolve(ResolveInputs{Unit: deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}, Node: "web-1",
			Record: Value[deployments.Record]{Present: true, Value: r}, Quarantined: []deployments.Digest{c.target.Digest}})
		seen := map[string]bool{}
		for _, s := range d.Trace {
			if name := map[string]string{"record": "by_pin", "rollout": "by_pin", "quarantine": "pinned"}[s.What]; name != "" {
				seen[s.What] = true
				if got := s.Facts[name] != ""; got != c.want {
					t.Errorf("%s: %s says %v", c.name, s.What, s.Facts)
				}
			}
		}
		if len(seen) != 3 || (d.Facts["by_pin"] != "") != c.want || (d.Facts["commit"] == "") != c.want {
			t.Errorf("%s: %v of %v", c.name, d.Facts, d.Trace)
		}
	}
}

// A record for a newer kedge is not one that doesn't parse.
func TestRecordForANewerKedge(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]deployments.Reason{
		fmt.Errorf("%w: upgrade", deployments.ErrTooOld): deployments.ReasonAgentTooOld,
		errors.New("no JSON"):                            deployments.ReasonInvalidRecord,
	} {
		d := Resolve(ResolveInputs{Unit: deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}, Node: "web-1",
			Record: Value[deployments.Record]{Present: true, Err: err}})
		if d.Reason != want || d.Action != ActKeep || !errors.Is(d.Invalid, err) {
			t.Errorf("%v: %+v", err, d)
		}
	}
}
