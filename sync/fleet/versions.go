package fleet

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"kedge/deployments"
)

// Versions returns a function that names releases by version; "-" for the zero pointer. The
// beginning of the digest follows if another release that the function knows has the same version.
// It knows the releases of the record, the unit's pin and the nodes, and those that it has named
// before.
func (u *Unit) Versions() func(deployments.Pointer) string {
	named := map[deployments.Digest]string{}
	taken := map[string]deployments.Digest{}
	twice := map[string]bool{}
	reported := u.shownVersions()
	version := func(p deployments.Pointer) string {
		if p.IsZero() {
			return "-"
		}
		if name, ok := named[p.Digest]; ok {
			return name
		}
		name := cmp.Or(reported[p.Digest], Clean(p.Version(), maxVersion))
		named[p.Digest] = name
		if other, ok := taken[name]; ok && other != p.Digest {
			twice[name] = true
		}
		taken[name] = p.Digest
		return name
	}
	if u.Record != nil {
		version(u.Record.Target)
		version(u.Record.Stable)
		version(u.GitTarget())
	}
	if u.Pin != nil {
		version(u.Pin.Release)
	}
	for i := range u.Nodes {
		version(u.Nodes[i].Report.Running)
	}
	return func(p deployments.Pointer) string {
		name := version(p)
		if p.IsZero() || !twice[name] {
			return name
		}
		return name + " " + p.Digest.Short()[:8]
	}
}

// shownVersions returns the versions of the releases that nodes run, each as the first node that
// has a version reports it, cut to maxVersion.
func (u *Unit) shownVersions() map[deployments.Digest]string {
	versions := map[deployments.Digest]string{}
	for i := range u.Nodes {
		r := &u.Nodes[i].Report
		if r.Version != "" && versions[r.Running.Digest] == "" {
			versions[r.Running.Digest] = Clean(r.Version, maxVersion)
		}
	}
	return versions
}

// maxVersion is how many characters of a version are shown.
const maxVersion = 24

// maxReleases is how many running releases a row names.
const maxReleases = 3

// runs returns the releases that live nodes run, the most common first and at most maxReleases,
// each with its number of nodes; "-": no live node is listed.
func (u *Unit) runs(name func(deployments.Pointer) string) Text {
	counts := map[string]int{}
	wanted := true
	for _, n := range u.Nodes {
		if n.Gone {
			continue
		}
		what := "nothing"
		switch r := n.Report.Running; {
		case !r.IsZero():
			what = name(r)
		case n.Report.State == "": // it has yet to report
			what = "unknown"
		case n.Report.OtherServes: // something from before kedge
			what = "something else"
		}
		counts[what]++
		wanted = wanted && u.Record != nil && n.Report.Running.Digest == u.Record.Target.Digest
	}
	if len(counts) == 0 {
		return Text{"-", Dim}
	}
	names := slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	more := ""
	if len(names) > maxReleases {
		more = fmt.Sprintf(", %d more", len(names)-maxReleases)
		names = names[:maxReleases]
	}
	for i, what := range names {
		names[i] = fmt.Sprintf("%s on %d", what, counts[what])
	}
	tone := Good
	if !wanted {
		tone = Warn
	}
	return Text{strings.Join(names, ", ") + more, tone}
}

// Release returns a release's name for people: its version and the beginning of its digest; "-" for
// the zero pointer.
func (u *Unit) Release(p deployments.Pointer) string {
	if p.IsZero() {
		return "-"
	}
	return u.version(p) + " " + p.Digest.Short()[:8]
}

// version returns a release's version, as reported by a node that runs it, or else as in its URL's
// path; "-" for the zero pointer.
func (u *Unit) version(p deployments.Pointer) string {
	if p.IsZero() {
		return "-"
	}
	versions := u.versions
	if versions == nil {
		versions = reportedVersions(u.Nodes)
	}
	return Clean(cmp.Or(versions[p.Digest], p.Version()), maxVersion)
}

// reportedVersions returns the versions of the releases that nodes run, each as the first node that
// has a version reports it.
func reportedVersions(nodes []Node) map[deployments.Digest]string {
	versions := map[deployments.Digest]string{}
	for i := range nodes {
		r := &nodes[i].Report
		if r.Version != "" && versions[r.Running.Digest] == "" {
			versions[r.Running.Digest] = r.Version
		}
	}
	return versions
}
