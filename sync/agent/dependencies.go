package agent

import (
	"slices"
	"strings"

	"kedge/policy"
	"kedge/sync/fleet/message"
)

// dependency is a unit that another one waits for. The zero dependency: it waits for none.
type dependency struct {
	unit  string
	why   string
	stuck bool // it can't move by itself
}

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
