// Package reports parses what the nodes of a store report, within bounds. A token may write all
// reports of a role, and a stolen one writes as many as the store takes.
package reports

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"kedge/deployments"
	"kedge/kv"
)

// MaxRole bounds how many items are kept of the reports of one role. Items are the units, on all nodes, and the
// digests, paths, facts and logged errors that reports list. Each takes some 430 bytes of memory, and perhaps 8 in the
// store. kv.MaxList has room for some 30 units on each of 10,000 nodes.
const MaxRole = 500_000

// ErrTooMuch is the error of a report that wasn't parsed, as other reports of its role fill
// MaxRole.
var ErrTooMuch = errors.New("too much in the reports of one role")

// Report is a node's entry in status/, parsed.
type Report struct {
	Key   kv.Key
	Entry kv.Entry
	// Report is empty if Err is set: the node counts as one that has not reported.
	Report deployments.Report
	Err    error
}

// Reader parses one view of status/ after the other. It parses only reports that changed. The zero value is ready.
type Reader struct {
	parsed kv.ParseCache[sized]
	full   bool // a role of the last view passed MaxRole
}

// sized is a report with its size, as sizeOf returns it.
type sized struct {
	report deployments.Report
	size   int
}

// Read returns the reports among a view's entries, in the order of the entries. If the reports of a
// role exceed MaxRole, it prefers live nodes to dead ones and, within each group, short reports to
// long ones. So a few huge reports don't displace those of all other nodes. The Err of a report
// that it leaves out wraps ErrTooMuch.
func (r *Reader) Read(entries []kv.Entry) []Report {
	all := make([]Report, 0, len(entries))
	for _, e := range entries {
		if key, err := kv.ParseKey(e.Key); err == nil && key.Kind == kv.StatusPrefix {
			all = append(all, Report{Key: key, Entry: e})
		}
	}
	order := make([]*Report, len(all))
	for i := range all {
		order[i] = &all[i]
	}

	// The order matters only if there are too many reports. If the last view had too many, this one is sorted at once: in
	// another order, read would parse reports that the last view left out.
	was := r.parsed
	if !r.full && r.read(order, was) {
		return all
	}
	slices.SortStableFunc(order, func(a, b *Report) int {
		return cmp.Or(goneRank(a)-goneRank(b), cmp.Compare(len(a.Entry.Value), len(b.Entry.Value)))
	})
	r.full = !r.read(order, was)
	return all
}

// read parses reports in the given order, and takes those that haven't changed from was, the view before. It returns
// false if a role passes MaxRole: the Err of that role's further reports wraps ErrTooMuch.
func (r *Reader) read(order []*Report, was kv.ParseCache[sized]) bool {
	known, parse := was.Next(len(order), parse)
	sizes, full := map[deployments.RoleID]int{}, map[deployments.RoleID]error{}
	for _, n := range order {
		n.Report = deployments.Report{}
		role := n.Key.Role
		if n.Err = full[role]; n.Err != nil {
			continue
		}
		p, err := parse(n.Entry)
		if sizes[role]+p.size > MaxRole {
			delete(known, n.Entry.Key)
			full[role] = fmt.Errorf(
				"%w: those of %s/%s list more than %d units, paths and facts together; the rest are not read",
				ErrTooMuch, role.Stage, role.Role, MaxRole)
			n.Err = full[role]
			continue
		}
		sizes[role] += p.size
		n.Report, n.Err = p.report, err
	}
	r.parsed = known
	return len(full) == 0
}

func goneRank(r *Report) int {
	if r.Entry.Session == "" {
		return 1
	}
	return 0
}

func parse(value []byte) (sized, error) {
	report, err := deployments.ParseReport(value)
	return sized{report, sizeOf(report)}, err
}

// sizeOf returns the number of items that a report lists, which MaxRole bounds. It counts items and not bytes, as an
// item may take more memory than it has bytes.
func sizeOf(r deployments.Report) int {
	n := len(r.Facts) + len(r.Units)
	for _, u := range r.Units {
		n += len(u.Facts) + len(u.Drift) + len(u.Errors) + len(u.Quarantined)
		if u.Compared != nil {
			n += 1 + len(u.Compared.Paths)
		}
	}
	return n
}
