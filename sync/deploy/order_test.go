package deploy

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"kedge/deployments"
)

// A node with signers goes to nothing older than what it has settled on, also after a restart; a release that it has not settled on may be
// gone back from.
func TestNothingOlderThanWhatWasSettledOn(t *testing.T) {
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
		c.Trust = func(context.Context, deployments.Pointer, []byte) error { return nil }
		c.Older = func(p deployments.Pointer) bool { return p == allowed }
	}
	u := w.open(signers)
	settle := func() {
		t.Helper()
		if err := u.Settle(); err != nil {
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
	settle()
	w.deploy(u, two)
	settle()
	refused(one, "2")
	refused(undated, "2")

	w.deploy(u, three)
	w.deploy(u, two) // its rollout turned back before it was settled on

	w.deploy(u, three)
	settle()
	u = w.reopen(signers)
	refused(two, "3")

	for _, file := range []string{journalFile, newestFile, journalFile} { // one alone loses nothing, and is made up for
		if err := os.WriteFile(w.path("state", file), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		u = w.reopen(signers)
		refused(two, "3")
		w.deploy(u, three)
		settle()
	}

	allowed = one
	w.deploy(u, one)
	settle()
	allowed = deployments.Pointer{}
	refused(two, "1")
	w.deploy(u, three)

	// Without signers nobody vouches for the time.
	w.deploy(w.reopen(nil), two)
}
