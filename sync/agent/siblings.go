package agent

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/deploy"
	"kedge/sync/fleet/message"
)

// dependencyOf returns the unit of the same role that u has to wait for, and why; the zero dependency if there is none.
func (a *Agent) dependencyOf(u *unit) dependency {
	want := u.decision.Target
	if want.IsZero() {
		return dependency{}
	}
	if s := u.state(); s.Running.Digest == want.Digest && s.Confirmed && !s.Unfinished {
		return dependency{}
	}
	if u.cycle != "" {
		return dependency{u.id.Unit, "the units wait for one another (" + u.cycle + "): correct after in their records", true}
	}
	if name := a.successor(u); name != "" {
		return dependency{name, "waits for " + name + ", which may take over the dest of this unit, whose file is no " +
			"longer in Git", false}
	}
	// Only the record's new target needs the new releases of the units in After. For any other release, those units
	// only have to serve.
	r := u.record.Value
	proven := u.decision.Source != policy.FromTarget || r.Target == r.Stable || slices.Contains(u.ran, want.Digest)
	for _, name := range r.After {
		id := u.id
		id.Unit = name
		dep := a.units[id]
		switch {
		case dep == nil || !dep.decided || dep.decision.Source == policy.FromNothing && dep.state().Running.IsZero():
			return dependency{name, "waits for " + name + ", of which this node knows no record", true}
		case dep.observes: // it never converges: what another tool deploys there has to be the release
			if c := dep.comparison; !proven && (c == nil || c.Differs > 0 || c.Release != dep.decision.Target.Digest) {
				return dependency{name, "waits for " + name + ", which is only observed here, until what is at its dest equals " +
					"its release", true}
			}
		case proven && dep.serves():
		case dep.decision.Target.IsZero(): // held, or left as it is
			if dep.state().Running.IsZero() {
				return dependency{
					name,
					"waits for " + name + ", which runs no release here: " + message.Decision(dep.decision.Reason, dep.decision.Facts),
					true,
				}
			}
		case dep.done != dep.decision.Target:
			if now := dep.condition(); now.err != nil {
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

// successor returns the name of another unit of u's role that may be u under a new name, and isn't
// final yet; empty: there is none. u waits for that unit. Only an orphaned unit of which nothing
// runs here has a successor.
func (a *Agent) successor(u *unit) string {
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

// cycles returns, for each unit on a cycle of "after", the cycle in words: "a after b after a". The mirror never
// writes a cycle, but a person may.
func cycles(after map[string][]string) map[string]string {
	found := map[string]string{}
	for start := range after {
		if path := pathTo(after, start, start, map[string]bool{}); path != nil {
			found[start] = strings.Join(append([]string{start}, path...), " after ")
		}
	}
	return found
}

// pathTo returns the units on a path along after, from the unit after from up to and including to. It returns nil if
// there is no path. seen has the units that were tried before.
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

// claim reserves a dest for a unit's tree, if no other unit has or has reserved one at, in or around it. Otherwise it
// returns a *destInUseError. A unit that moves to another dest holds both until it has moved. Another unit that yields
// its dest to this one doesn't count, unless it is changing. So a unit that was renamed in Git keeps its tree.
func (a *Agent) claim(u *unit, dest string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.checkDest(u, dest); err != nil {
		return err
	}
	u.claimed = dest
	return nil
}

// checkDest returns why a unit may not have its tree at dest; nil: it may. a.mu is held.
func (a *Agent) checkDest(u *unit, dest string) error {
	for _, other := range a.units {
		if other == u || other.yields(u) && !other.changing() {
			continue
		}
		for _, taken := range []string{other.dest, other.claimed} {
			if taken != "" && (within(dest, taken) || within(taken, dest)) {
				return &destInUseError{
					dest, other.id,
					fmt.Sprintf("dest %s is in the way of %s, which has %s: give each unit a directory of its own", dest,
						other.id, taken),
				}
			}
		}
	}
	return nil
}

// replaced reports whether u yields its dest to another unit, which has the dest already. If u has no dest, as nothing
// of u runs, replaced reports whether u is orphaned and refused because another unit has the dest. While u is changing,
// it returns false. a.mu is held.
func (a *Agent) replaced(u *unit) bool {
	if u.changing() {
		return false
	}
	if u.dest == "" {
		return u.orphaned() && errors.As(u.refused[u.decision.Target].err, new(*destInUseError))
	}
	for _, other := range a.units {
		if other != u && other.dest == u.dest && !other.unwanted() && u.yields(other) {
			return true
		}
	}
	return false
}

// contends reports whether u, which runs nothing yet, waits for a unit that will yield its dest to u but still deploys
// to it. Until that deployment ends, the node is out of service because of u, too. a.mu is held.
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

// contested reports whether another unit, to which u yields, has reserved the dest of u. a.mu is held.
func (a *Agent) contested(u *unit) bool {
	for _, other := range a.units {
		if other != u && other.claimed != "" && other.claimed == u.dest && u.yields(other) {
			return true
		}
	}
	return false
}

// displace records, after a deployment of u, that what other units deployed to its dest is gone. a.mu is held.
func (a *Agent) displace(u *unit) {
	for _, other := range a.units {
		if other != u && u.dest != "" && other.dest == u.dest {
			other.done, other.drift = deployments.Pointer{}, nil
			other.wake.Set()
		}
	}
}

// refuse records that a release is refused on this node because of err. It isn't tried until endRefusals, or an order
// to retry, ends that.
func (u *unit) refuse(p deployments.Pointer, err error) {
	why := refusal{err: err}
	if taken := new(destInUseError); errors.As(err, &taken) {
		why.dest = taken.dest
	}
	if u.refused == nil {
		u.refused = map[deployments.Pointer]refusal{}
	}
	u.refused[p] = why
}

// endRefusals ends the unit's refusals of releases that would be admitted now: another unit's dest has become free, or
// a pin now names a release older than the floor. (A node may see a record whose target is pinned before it sees the
// pin.) a.mu is held.
func (a *Agent) endRefusals(u *unit) {
	for p, why := range u.refused {
		switch {
		case why.dest != "" && a.checkDest(u, why.dest) == nil:
			u.log.Info("the dest that another unit had is free: no longer refusing the release",
				"release", p.String(), "dest", why.dest)
		case errors.As(why.err, new(*deploy.OlderError)) && a.mayBeOlder(u, p):
			u.log.Info("a pin names the release: no longer refusing it, though it is older than the version floor",
				"release", p.String())
		default:
			continue
		}
		delete(u.refused, p)
		u.wake.Set()
	}
}

// within reports whether a clean path is dir or the directory of its releases, or is below one of them.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/") || path == dir+".releases" ||
		strings.HasPrefix(path, dir+".releases/")
}
