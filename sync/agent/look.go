package agent

import (
	"context"
	"math"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/policy"
)

// lookedAt is what was found at the dest of a release while its unit ran nothing.
type lookedAt struct {
	release deployments.Digest
	found   policy.Found
}

// toLook reports whether the unit waits for a look at dest: what serves there is not replaced on all nodes at once.
func (u *unit) toLook() bool {
	p := u.goal.stage
	return !p.IsZero() && u.goal.run.IsZero() && u.atDest(p) == policy.FoundUnknown && u.refused[p].err == nil
}

// atDest returns what lies at the dest of one of the releases, as far as that is known. It has no meaning once one
// runs.
func (u *unit) atDest(releases ...deployments.Pointer) policy.Found {
	is := func(p deployments.Pointer) bool { return u.looked.release == p.Digest }
	was := func(p deployments.Pointer) bool { return !p.IsZero() && u.state().Restored == p.Digest }
	switch {
	case !u.state().Running.IsZero():
		return policy.FoundNothing
	case slices.ContainsFunc(releases, was):
		return policy.FoundOther
	case !slices.ContainsFunc(releases, is):
		return policy.FoundUnknown
	}
	return u.looked.found
}

// look does jobLook.
func (a *Agent) look(ctx context.Context, u *unit, p deployments.Pointer) error {
	occupied, err := u.deploy.Look(ctx, p)
	if err != nil {
		return err
	}
	found := policy.FoundNothing
	if occupied {
		found = policy.FoundOther
	}
	u.log.Debug("looked at what lies at dest", "release", p.String(), "found", string(found))
	a.mu.Lock()
	defer a.mu.Unlock()
	u.looked = lookedAt{p.Digest, found}
	a.kickReport()
	return nil
}

// bootWithin is how long after the machine's start an agent may start and still count as started by the boot.
const bootWithin = 5 * time.Minute

// uptime returns for how long the machine has been up; where that can't be told, for long.
func uptime() time.Duration {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return math.MaxInt64
	}
	return time.Duration(info.Uptime) * time.Second
}
