package deploy

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"kedge/deployments"
)

// signed is the configuration of a node with signers, which vouch for everything.
func (w *world) signed(c *Config) {
	w.t.Helper()
	floors, err := OpenFloors(w.path("floors.json"), quiet())
	if err != nil {
		w.t.Fatal(err)
	}
	c.Floors = floors
	c.Trust = func(context.Context, deployments.Pointer, []byte) error { return nil }
}

// A node with signers goes to nothing older than its version floor, also after a restart. It may go back from a release
// that hasn't raised the floor yet.
func TestNothingOlderThanTheFloor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	at := func(version string, hour int) deployments.Pointer {
		return w.publish(version, func(m *deployments.Manifest) {
			if hour > 0 {
				m.Created = time.Date(2026, 11, 24, hour, 0, 0, 0, time.UTC)
			}
		})
	}
	undated, one, two, three := at("0", 0), at("1", 1), at("2", 2), at("3", 3)
	allowed := deployments.Pointer{}
	signers := func(c *Config) {
		w.signed(c)
		c.Older = func(p deployments.Pointer) bool { return p == allowed }
	}
	u := w.open(signers)
	raiseFloor := func() {
		t.Helper()
		if err := u.RaiseFloor(); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(p deployments.Pointer, live string) {
		t.Helper()
		for what, err := range map[string]error{"Deploy": u.Deploy(t.Context(), Request{Release: p}), "Stage": u.Stage(t.Context(), p)} {
			if !errors.Is(err, ErrRefused) {
				t.Errorf("%s of an older release gave %v, want ErrRefused", what, err)
			}
		}
		w.wantVersion(live)
	}
	w.deploy(u, undated)
	raiseFloor()
	w.deploy(u, two)
	raiseFloor()
	refused(one, "2")
	refused(undated, "2")

	w.deploy(u, three)
	w.deploy(u, two) // its rollout turned back before it raised the floor

	w.deploy(u, three)
	raiseFloor()
	u = w.reopen(signers)
	refused(two, "3")

	journal, floors := w.path("state", journalFile), w.path("floors.json")
	for _, file := range []string{journal, floors, journal} { // one alone loses nothing, and is made up for
		if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		u = w.reopen(signers)
		refused(two, "3")
		w.deploy(u, three)
		raiseFloor()
	}

	allowed = one
	w.deploy(u, one)
	raiseFloor()
	allowed = deployments.Pointer{}
	refused(two, "1")
	w.deploy(u, three)

	// Without signers nobody vouches for the time.
	w.deploy(w.reopen(nil), two)
}

// An older release is refused under any name of a unit: for the name that it bears itself, and for its dest. That also
// holds if the unit that raised the floor, its journal, or both are gone.
func TestOldCodeUnderANewName(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	at := func(version string, hour int, change func(*deployments.Manifest)) deployments.Pointer {
		return w.publish(version, func(m *deployments.Manifest) {
			m.Created = time.Date(2026, 11, 24, hour, 0, 0, 0, time.UTC)
			if change != nil {
				change(m)
			}
		})
	}
	elsewhere := func(name, dest string) func(*deployments.Manifest) {
		return func(m *deployments.Manifest) { m.Name, m.Dest = name, w.path("srv", dest) }
	}
	two := at("2", 2, nil)
	u := w.open(w.signed)
	w.deploy(u, two)
	if err := u.RaiseFloor(); err != nil {
		t.Fatal(err)
	}
	for name, lose := range map[string]string{"the unit is there": "", "its journal is lost": w.path("state", journalFile), "it is gone": w.path("state")} {
		if lose != "" {
			if err := os.RemoveAll(lose); err != nil {
				t.Fatal(err)
			}
		}
		other := w.open(func(c *Config) {
			w.signed(c)
			c.ID.Unit, c.Dir = "app2", w.path("other", name)
		})
		for _, c := range []struct {
			release deployments.Pointer
			of      string
		}{
			{at("same", 1, nil), "name app"},
			{at("same-name", 1, elsewhere("app", "app2")), "name app"},
			{at("same-dest", 1, elsewhere("other", "app")), "dest " + w.dest()},
		} {
			err := other.Deploy(t.Context(), Request{Release: c.release})
			var older *OlderError
			if !errors.Is(err, ErrRefused) || !errors.As(err, &older) || older.Of != c.of {
				t.Errorf("%s: %v, want ErrRefused for %s", name, err, c.of)
			}
		}
		if err := other.Stage(t.Context(), at("unrelated", 1, elsewhere("other", "other"))); err != nil {
			t.Errorf("%s: another application is refused: %v", name, err)
		}
	}
	w.wantVersion("2")
}

// A release that says that it was made ahead of the node's clock doesn't lock out what is made after it raised the
// floor: neither by a restart, nor because an earlier version believed it.
func TestMadeAheadOfTheClock(t *testing.T) {
	t.Parallel()
	for name, legacy := range map[string]bool{"made now": false, "believed by an earlier version": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			at := func(version string, made time.Time) deployments.Pointer {
				return w.publish(version, func(m *deployments.Manifest) { m.Created = made.UTC().Truncate(time.Second) })
			}
			far := time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC)
			u := w.open(w.signed)
			w.deploy(u, at("far", far))
			var future *FutureError
			if err := u.RaiseFloor(); !errors.As(err, &future) || !future.Created.Equal(far) {
				t.Fatalf("raise the floor: %v, want a FutureError", err)
			}
			first := future.Floor
			if legacy {
				if err := os.Remove(w.path("floors.json")); err != nil {
					t.Fatal(err)
				}
				if err := u.save(func(j *journal) { j.Newest, j.Ahead = far, nil }); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(w.path("state", newestFile), []byte(far.Format(time.RFC3339Nano)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			u = w.reopen(w.signed)
			if err := u.RaiseFloor(); !errors.As(err, &future) || !legacy && !future.Floor.Equal(first) {
				t.Errorf("raise the floor again: %v, first at %v", err, first)
			}
			if err := u.Deploy(t.Context(), Request{Release: at("old", time.Now().Add(-24*time.Hour))}); !errors.Is(err, ErrRefused) {
				t.Errorf("an older release: %v, want ErrRefused", err)
			}
			w.deploy(u, at("next", time.Now().Add(2*time.Second)))
			if err := u.RaiseFloor(); err != nil {
				t.Error(err)
			}
			w.wantVersion("next")
		})
	}
}
