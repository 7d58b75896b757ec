package fleet

import (
	"fmt"
	"strings"

	"kedge/deployments"
	"kedge/sync/fleet/message"
)

// comparedText returns in words how the tree at dest differed from the release, and what an observing node would do. It
// is empty if there is nothing to say.
func comparedText(r deployments.UnitReport) string {
	c := r.Compared
	if c == nil {
		if r.Reason == deployments.ReasonObserving && r.Error == "" && !r.Want.IsZero() {
			return "observes, and has yet to compare"
		}
		return ""
	}
	differs := fmt.Sprintf("%d paths", c.Differs)
	if c.Differs == 1 {
		differs = "1 path"
	}
	if len(c.Paths) > 0 {
		more := ""
		if c.Differs > len(c.Paths) {
			more = ", …"
		}
		differs += " (" + message.Clean(strings.Join(c.Paths, ", ")) + more + ")"
	}
	switch {
	case c.Adopted:
		return "adopted: dest already equalled the release"
	case r.Reason != deployments.ReasonObserving && c.Missing:
		return ""
	case r.Reason != deployments.ReasonObserving:
		return "was not adopted: dest differed in " + differs
	case c.Dest == "":
		return "observes: the release has commands only, and nothing to compare"
	case c.Missing:
		return "observes: dest doesn't exist, and would be made"
	case c.Differs == 0:
		return "observes: dest equals the release byte for byte"
	}
	return "observes: dest differs in " + differs
}
