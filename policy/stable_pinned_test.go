package policy

import (
	"testing"

	"kedge/deployments"
)

// As long as a rollout lasts, its record says that the stable release was a pin's: it must not raise version floors.
func TestStableOfAPin(t *testing.T) {
	t.Parallel()
	git, pin, next := release("v2"), release("v1"), release("v3")
	for _, c := range []struct {
		name  string
		now   deployments.Pointer // what Git names once the pin has ended
		set   func(*deployments.Record)
		order deployments.Verb
		want  bool
	}{
		{"after the pin", git, func(*deployments.Record) {}, "", true},
		{"to a new release", next, func(*deployments.Record) {}, "", true},
		{"turned back", next, func(*deployments.Record) {}, "abort", true},
		{"tried again", next, func(*deployments.Record) {}, "retry", true},
		{"a pin to what was stable", next, func(r *deployments.Record) { r.Target, r.Stable = git, git }, "", false},
		{"without a pin", next, func(r *deployments.Record) { r.Pinned = nil }, "", false},
		{"back to what was stable before a release that failed", next, func(r *deployments.Record) {
			r.Pinned = &deployments.Pinned{Target: next, Stable: git, Failed: next.Digest}
		}, "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := paced10()
			s.Unit.Release, s.Pin = c.now, &Value[deployments.Pin]{}
			s.Record = deployments.Record{Target: pin, Stable: pin, Generation: 5, Paced: true, Nodes: 10, Joined: 100,
				Pinned: &deployments.Pinned{Target: git, Stable: git, Claim: 4}}
			each(&s, func(u *deployments.UnitReport) { u.Running, u.Want, u.Generation = pin, pin, 5 })
			c.set(&s.Record)
			s.Record = Next(s).Record
			if c.order == "retry" {
				s.Order = "abort"
				s.Record = Next(s).Record
			}
			s.Order = string(c.order)
			r := Next(s).Record
			if r.Rollout == nil || r.Stable == r.Target || r.Rollout.StablePinned != c.want {
				t.Errorf("%+v of %+v", r.Rollout, r)
			}
		})
	}
}
