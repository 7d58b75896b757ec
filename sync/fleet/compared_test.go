package fleet

import (
	"testing"

	"kedge/deployments"
)

func TestComparedText(t *testing.T) {
	t.Parallel()
	p := deployments.Pointer{URL: "s3://b/m.yaml", Digest: deployments.Digest{1}}
	observing := func(c *deployments.Compared) deployments.UnitReport {
		return deployments.UnitReport{State: deployments.StateHeld, Reason: deployments.ReasonObserving, Want: p, Compared: c}
	}
	for want, r := range map[string]deployments.UnitReport{
		"":                                 {State: deployments.StateConverged},
		"observes, and has yet to compare": observing(nil),
		"observes: dest equals the release byte for byte": observing(&deployments.Compared{Dest: "/srv/app"}),
		"observes: dest differs in 1 path (a)": observing(
			&deployments.Compared{Dest: "/srv/app", Differs: 1, Paths: []string{"a"}}),
		"observes: dest differs in 9 paths (a, b, …)": observing(
			&deployments.Compared{Dest: "/srv/app", Differs: 9, Paths: []string{"a", "b"}}),
		"observes: dest doesn't exist, and would be made": observing(
			&deployments.Compared{Dest: "/srv/app", Differs: 1, Missing: true, Paths: []string{"."}}),
		"observes: the release has commands only, and nothing to compare": observing(&deployments.Compared{}),
		"adopted: dest already equalled the release": {
			Compared: &deployments.Compared{Dest: "/srv/app", Adopted: true}},
		"was not adopted: dest differed in 1 path (a)": {
			Compared: &deployments.Compared{Dest: "/srv/app", Differs: 1, Paths: []string{"a"}},
		},
	} {
		if got := comparedText(r); got != want {
			t.Errorf("%+v: %q, want %q", r, got, want)
		}
	}
	if got := comparedText(deployments.UnitReport{Compared: &deployments.Compared{Dest: "/srv/app", Differs: 1, Missing: true}}); got != "" {
		t.Errorf("nothing was at dest: %q", got)
	}
}
