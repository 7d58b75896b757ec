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

// A pin that is set again before its end has been rolled out is still no release of Git's.
func TestStableOfAPinThatComesBack(t *testing.T) {
	t.Parallel()
	git, pin, next := release("v2"), release("v1"), release("v3")
	for _, c := range []struct {
		name   string
		again  deployments.Pointer
		failed bool // Git's release fails on the way
		want   bool // of the rollout that follows the pin's second end
	}{
		{"the same release", pin, false, true},
		{"another release", next, false, true},
		{"the same release, after Git's has failed", pin, true, true},
		{"another release, after Git's has failed", next, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := paced10()
			s.Unit.Release, s.Pin = git, &Value[deployments.Pin]{}
			s.Record = deployments.Record{Target: pin, Stable: pin, Generation: 5, Paced: true, Nodes: 10, Joined: 100,
				Pinned: &deployments.Pinned{Target: git, Stable: release("v0"), Claim: 4}}
			each(&s, func(u *deployments.UnitReport) { u.Running, u.Want, u.Generation = pin, pin, 5 })
			s.Record = Next(s).Record // to Git's release
			if p := s.Record.Rollout; p == nil || !p.StablePinned {
				t.Fatalf("after the pin: %+v of %+v", p, s.Record)
			}
			if c.failed {
				s.Order = "abort"
				s.Record = Next(s).Record
				s.Order = ""
			}
			s.Pin = &Value[deployments.Pin]{Present: true, Value: deployments.Pin{Release: c.again}}
			s.Record = Next(s).Record
			if s.Record.Pinned == nil || !s.Record.Pinned.StablePinned {
				t.Fatalf("pinned again: %+v of %+v", s.Record.Pinned, s.Record)
			}
			each(&s, func(u *deployments.UnitReport) {
				u.Running, u.Want, u.Generation = c.again, c.again, s.Record.Generation
			})
			for range 3 {
				s.Record = Next(s).Record
			}
			s.Pin = &Value[deployments.Pin]{}
			s.Record = Next(s).Record
			if p := s.Record.Rollout; p == nil || s.Record.Pinned != nil || p.StablePinned != c.want {
				t.Errorf("after the second pin: %+v of %+v", p, s.Record)
			}
		})
	}
}
