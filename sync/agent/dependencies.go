package agent

import (
	"slices"
	"strings"

	"kedge/policy"
)

// blockedBy says which unit of its role a unit has to wait for, if any, and whether that one can't move by itself.
func (a *Agent) blockedBy(r *role, u *unit) (why string, stuck bool) {
	want := u.decision.Target
	if want.IsZero() {
		return "", false
	}
	if s := u.state(); s.Running.Digest == want.Digest && s.Confirmed && !s.Unfinished {
		return "", false
	}
	if u.cycle != "" {
		return "its record makes a circle: " + u.cycle, true
	}
	for _, name := range u.record.Value.After {
		id := u.id
		id.Unit = name
		dep := a.units[id]
		switch {
		case dep == nil || !dep.decided || dep.decision.Source == policy.FromNothing && dep.state().Running.IsZero():
			return "waits for " + name + ", which has no record", true
		case dep.decision.Target.IsZero(): // held, or kept as it is
			if dep.state().Running.IsZero() {
				return "waits for " + name + ", of which nothing runs: " + dep.decision.Why, true
			}
		case dep.done != dep.decision.Target:
			state, err := dep.standing()
			if err != nil {
				return "waits for " + name + ", which is " + string(state) + ": " + oneLine(err), dep.final()
			}
			return "waits for " + name, dep.final()
		}
	}
	return "", false
}

// cycles finds, among units that name those they come after, each one that lies on a cycle, and gives it that cycle in words:
// "a after b after a". The mirror never writes one; a person may.
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
