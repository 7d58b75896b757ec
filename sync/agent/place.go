package agent

import (
	"errors"
	"fmt"
	"strings"

	"kedge/deployments"
)

// takenError says that another unit has a place.
type takenError struct {
	dest string
	why  string
}

func (e *takenError) Error() string { return e.why }

// claim takes a place for a unit's tree, where no other unit has its own there, in it or around it. A unit that
// moves has both places until it has moved; one that nothing names any more, or Git no longer, has none, once it
// has ended what it began, so that it can go on under another name.
func (a *Agent) claim(u *unit, dest string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.free(u, dest); err != nil {
		return err
	}
	u.claimed = dest
	return nil
}

// free reports why a unit may not have its tree at dest. a.mu is held.
func (a *Agent) free(u *unit, dest string) error {
	for _, other := range a.units {
		if other == u || other.yields(u) && !other.changing() {
			continue
		}
		for _, taken := range []string{other.dest, other.claimed} {
			if taken != "" && (within(dest, taken) || within(taken, dest)) {
				return &takenError{
					dest,
					fmt.Sprintf(
						"dest %s is in the way of %s, which has %s: give each unit a directory of its own",
						dest,
						other.id,
						taken,
					),
				}
			}
		}
	}
	return nil
}

// replaced reports whether the unit yields its place to another, which has it or kept the unit out of it.
func (a *Agent) replaced(u *unit) bool {
	if u.changing() {
		return false
	}
	if u.dest == "" {
		return u.orphaned() && errors.As(u.refused[u.decision.Target].err, new(*takenError))
	}
	for _, other := range a.units {
		if other != u && other.dest == u.dest && !other.unwanted() && u.yields(other) {
			return true
		}
	}
	return false
}

// contested reports whether a unit that Git names is about to take the place of u. a.mu is held.
func (a *Agent) contested(u *unit) bool {
	for _, other := range a.units {
		if other != u && other.claimed != "" && other.claimed == u.dest && u.yields(other) {
			return true
		}
	}
	return false
}

// displace notes, of other units with the dest of u, that what they deployed there is there no more. a.mu is held.
func (a *Agent) displace(u *unit) {
	for _, other := range a.units {
		if other != u && u.dest != "" && other.dest == u.dest {
			other.done, other.drift = deployments.Pointer{}, nil
			other.nudge()
		}
	}
}

// refuse notes that a release can't succeed on this node.
func (u *unit) refuse(p deployments.Pointer, err error) {
	why := refusal{err: err}
	if taken := new(takenError); errors.As(err, &taken) {
		why.dest = taken.dest
	}
	if u.refused == nil {
		u.refused = map[deployments.Pointer]refusal{}
	}
	u.refused[p] = why
}

// readmit ends refusals for a place that has become free meanwhile. a.mu is held.
func (a *Agent) readmit(u *unit) {
	for p, why := range u.refused {
		if why.dest != "" && a.free(u, why.dest) == nil {
			u.log.Info("the place that another unit had is free", "release", p.String(), "dest", why.dest)
			delete(u.refused, p)
			u.nudge()
		}
	}
}

// within reports whether a clean path is dir, or below it or the directory of its releases.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/") || path == dir+".releases" ||
		strings.HasPrefix(path, dir+".releases/")
}
