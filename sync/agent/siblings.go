package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/fleet/message"
)

// dependencyOf returns the unit of its role that a unit has to wait for.
func (a *Agent) dependencyOf(u *unit) dependency {
	want := u.decision.Target
	if want.IsZero() {
		return dependency{}
	}
	if s := u.state(); s.Running.Digest == want.Digest && s.Confirmed && !s.Unfinished {
		return dependency{}
	}
	if u.cycle != "" {
		return dependency{u.id.Unit, "its record makes a circle: " + u.cycle, true}
	}
	if name := a.before(u); name != "" {
		return dependency{name, "its file is no longer in Git: waits for " + name + ", which may take its dest", false}
	}
	// What runs already elsewhere, or ran before, needs nothing that is yet to come.
	r := u.record.Value
	settled := u.decision.Source != policy.FromTarget || r.Target == r.Stable || slices.Contains(u.ran, want.Digest)
	for _, name := range r.After {
		id := u.id
		id.Unit = name
		dep := a.units[id]
		switch {
		case dep == nil || !dep.decided || dep.decision.Source == policy.FromNothing && dep.state().Running.IsZero():
			return dependency{name, "waits for " + name + ", which has no record", true}
		case dep.observes: // it never converges: what somebody else deploys there has to be the release
			if c := dep.compared; !settled && (c == nil || c.Differs > 0 || c.Release != dep.decision.Target.Digest) {
				return dependency{name, "waits for " + name + ", which is only observed here, and differs from its release", true}
			}
		case settled && dep.serves():
		case dep.decision.Target.IsZero(): // held, or kept as it is
			if dep.state().Running.IsZero() {
				return dependency{
					name,
					"waits for " + name + ", of which nothing runs: " + message.Decision(dep.decision.Reason, dep.decision.Facts),
					true,
				}
			}
		case dep.done != dep.decision.Target:
			if now := dep.standing(); now.err != nil {
				return dependency{
					name,
					"waits for " + name + ", which is " + string(now.state) + ": " + oneLine(now.err),
					dep.final(),
				}
			}
			return dependency{name, "waits for " + name, dep.final()}
		}
	}
	return dependency{}
}

// before returns a unit that Git names, and that an orphaned one has to let go first on a node where nothing of it
// runs: it may be the same under a new name. Empty: none.
func (a *Agent) before(u *unit) string {
	if !u.orphaned() || !u.state().Running.IsZero() {
		return ""
	}
	for id, other := range a.units {
		if id.Role == u.id.Role && u.yields(other) && !other.final() {
			return id.Unit
		}
	}
	return ""
}

// cycles finds, among units that name those they come after, each one that lies on a cycle, and gives it that cycle
// in words: "a after b after a". The mirror never writes one; a person may.
func cycles(after map[string][]string) map[string]string {
	found := map[string]string{}
	for start := range after {
		if path := pathTo(after, start, start, map[string]bool{}); path != nil {
			found[start] = strings.Join(append([]string{start}, path...), " after ")
		}
	}
	return found
}

// pathTo is the units that lead from one to another, the last included; nil where there is no way.
func pathTo(after map[string][]string, from, to string, seen map[string]bool) []string {
	if seen[from] {
		return nil
	}
	seen[from] = true
	next := slices.Sorted(slices.Values(after[from]))
	if slices.Contains(next, to) {
		return []string{to}
	}
	for _, n := range next {
		if path := pathTo(after, n, to, seen); path != nil {
			return append([]string{n}, path...)
		}
	}
	return nil
}

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

// replaced reports whether the unit yields its place to another unit, which has it or waits for it.
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

// contends reports whether what serves at the dest of u is changing for a unit that gives the place up to it once that
// is over: until then the node is out of service for the sake of u as well. a.mu is held.
func (a *Agent) contends(u *unit) bool {
	if !u.state().Running.IsZero() {
		return false
	}
	for _, p := range []deployments.Pointer{u.decision.Target, u.decision.Stage} {
		dest := u.refused[p].dest
		for _, other := range a.units {
			if other != u && dest != "" && dest == other.dest && other.yields(u) && other.changing() {
				return true
			}
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

// displace notes that what other units deployed to the dest of u is gone from there.
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
