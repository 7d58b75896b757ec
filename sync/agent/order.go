package agent

import (
	"slices"
	"strings"
)

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
