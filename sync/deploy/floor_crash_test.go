package deploy

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/deployments"
)

// A node that is killed before, between and after the writes that raise its version floor raises it at its next start.
// Whatever floor its journal has, its floors refuse anything older under every name. A release from the future raises
// the floor once, to the time of the first try.
func TestKilledWhileItRaisesFloors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	now := time.Now().UTC().Truncate(time.Second)
	made := func(version string, at time.Time) deployments.Pointer {
		return w.publish(version, func(m *deployments.Manifest) { m.Created = at })
	}
	old, two, far := made(
		"old",
		now.Add(-3*time.Hour),
	), made(
		"2",
		now.Add(-2*time.Hour),
	), made(
		"far",
		now.AddDate(5000, 0, 0),
	)
	s := story{world: w, releases: []deployments.Pointer{two, far}, cutOff: 1000}
	data := s.planned(plan{Root: w.root, Releases: s.releases, Die: true, CutOff: s.cutOff, RaiseFloor: true})

	refused := func(release deployments.Pointer) bool {
		t.Helper()
		other := w.open(func(c *Config) {
			w.signed(c)
			c.ID.Unit, c.Dir = "renamed", w.path("renamed")
		})
		err := other.Stage(t.Context(), release)
		if err != nil && !errors.Is(err, ErrRefused) {
			t.Fatal(err)
		}
		return err != nil
	}
	var first time.Time // the floor of the release from the future
	for cut := true; cut; {
		cmd := s.start(data)
		cut = cmd.Wait() != nil
		if text := cmd.Stderr.(*strings.Builder).String(); text != "" {
			t.Fatal(text)
		}
		u := w.open(w.signed)
		if newest := u.j.Newest; !newest.IsZero() && !refused(old) {
			t.Errorf(
				"the journal has the floor %v, and an older release is admitted under another name",
				newest,
			)
		}
		if ahead := u.j.Ahead; ahead != nil {
			if first.IsZero() {
				first = ahead.Floor
			}
			if !ahead.Floor.Equal(first) {
				t.Errorf("the release from the future has the floor %v, and then %v", first, ahead.Floor)
			}
		}
	}
	if first.IsZero() || !refused(old) || !refused(two) || refused(made("next", time.Now().UTC().Add(2*time.Second))) {
		t.Errorf("in the end the floor is not at %v", first)
	}
	points, err := os.ReadFile(w.path("points"))
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range []string{"before floor", "ahead kept", "floors raised", "floor kept"} {
		if !strings.Contains(string(points), point+"\n") {
			t.Errorf("it was never killed at %q", point)
		}
	}
}
