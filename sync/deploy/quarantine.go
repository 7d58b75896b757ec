package deploy

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/deployments"
)

// Failure is a release that failed on this node. Its quarantine begins with the failure (see fail), lasts through
// restarts, and ends with Retry (or maxQuarantined newer failures).
type Failure struct {
	Digest deployments.Digest `json:"digest"`
	// Key identifies the request that failed: see Request. Empty: an earlier version wrote the journal.
	Key  string              `json:"key,omitempty"`
	Step string              `json:"step"`
	Back deployments.Pointer `json:"back,omitzero"` // what the unit goes back to; zero: no release
	// Reason is the error's text, of at most 2000 bytes.
	Reason string    `json:"reason"`
	At     time.Time `json:"at"` // the node's clock; for people
}

// Err returns f, a failure of the release p, as the error that Deploy returned then. Its Reason is always
// ReasonQuarantined, as f doesn't say whether a check failed.
func (f Failure) Err(p deployments.Pointer) *Failed {
	return &Failed{
		Release: p, Back: f.Back, Step: f.Step, Err: errors.New(f.Reason),
		Reason: deployments.ReasonQuarantined, Facts: deployments.Facts{"step": f.Step, "error": f.Reason},
	}
}

// Failed is the error of a deployment that failed after its release was staged: by a command, the switch, a check, or
// too many cut-offs. Release is quarantined, and the unit went back to Back (zero: to what was there before, or
// nowhere).
type Failed struct {
	Release deployments.Pointer
	Back    deployments.Pointer
	Step    string // "pre", "switch", "post" or "health"
	// Reason is ReasonUnhealthy if a check failed, else ReasonQuarantined. Facts has step and error, and check if a
	// check failed. See Failure.Err for an exception.
	Reason deployments.Reason
	Facts  deployments.Facts
	Err    error
	// Unfinished is set, in what the agent reports, while the node still goes back.
	Unfinished bool
}

func (f *Failed) Error() string {
	release := f.Release.Short()
	switch {
	case f.Back.IsZero():
		return fmt.Sprintf("release %s failed in %s, and no other is known to be good here: %v", release, f.Step, f.Err)
	case f.Unfinished:
		return fmt.Sprintf("release %s failed in %s, and the node goes back to %s: %v", release, f.Step, f.Back.Short(),
			f.Err)
	}
	return fmt.Sprintf("release %s failed in %s, and the node went back to %s: %v", release, f.Step, f.Back.Short(), f.Err)
}

func (f *Failed) Unwrap() error { return f.Err }

// isQuarantined reports whether p is in quarantine.
func (j *journal) isQuarantined(p deployments.Pointer) bool {
	return slices.ContainsFunc(j.Quarantined, func(f Failure) bool { return f.Digest == p.Digest })
}

// Retry takes a digest out of quarantine; the zero digest means all.
func (u *Unit) Retry(d deployments.Digest) error {
	return u.save(func(j *journal) {
		j.Quarantined = slices.DeleteFunc(j.Quarantined, func(f Failure) bool { return d.IsZero() || f.Digest == d })
	})
}

// SetKey sets the failure key of the release with digest d, if that is in quarantine and has no key.
func (u *Unit) SetKey(d deployments.Digest, key string) error {
	return u.save(func(j *journal) {
		for i := range j.Quarantined {
			if f := &j.Quarantined[i]; f.Digest == d && f.Key == "" {
				f.Key = key
			}
		}
	})
}
