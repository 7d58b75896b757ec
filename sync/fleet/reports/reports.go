// Package reports parses what the nodes of a store report, within bounds: a token may write all reports of a role,
// and those of a thief are as many as the store takes.
package reports

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"

	"kedge/deployments"
	"kedge/kv"
)

// MaxRole bounds what is kept of the reports of one role: their units on all nodes, with the digests, paths and facts
// that they list. Each takes some 430 bytes of memory, and perhaps 8 in the store. What kv.MaxList has room for are
// some 30 units on each of 10,000 nodes.
const MaxRole = 500_000

// ErrTooMuch is the error of a report that wasn't read, as other reports of its role fill MaxRole.
var ErrTooMuch = errors.New("it is not read")

// Report is a node's entry in status/, parsed.
type Report struct {
	Key   kv.Key
	Entry kv.Entry
	// Report is empty if Err is set: the node counts as one that has not reported.
	Report deployments.Report
	Err    error
}

// Reader parses one view of status/ after the other. It parses only reports that changed. The zero value is ready.
type Reader struct{ known map[string]parsed }

// parsed is a report with the stored value that it was parsed from.
type parsed struct {
	value  []byte
	report deployments.Report
	err    error
	size   int // as sizeOf returns it
}

// Read returns the reports among a view's entries, in their order. Beyond MaxRole it reads those of live nodes before
// those of dead ones, and short ones before long ones: what a node says of some units is short.
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
	slices.SortStableFunc(order, func(a, b *Report) int {
		return cmp.Or(gone(a)-gone(b), cmp.Compare(len(a.Entry.Value), len(b.Entry.Value)))
	})

	was := r.known
	r.known = make(map[string]parsed, len(all))
	sizes, full := map[deployments.RoleID]int{}, map[deployments.RoleID]error{}
	for _, n := range order {
		role := n.Key.Role
		if n.Err = full[role]; n.Err != nil {
			continue
		}
		p, known := was[n.Entry.Key]
		if !known || !bytes.Equal(p.value, n.Entry.Value) {
			p = parse(n.Entry.Value)
		}
		if sizes[role]+p.size > MaxRole {
			full[role] = fmt.Errorf("the reports of %s/%s have more than %d units, paths and facts together: %w",
				role.Stage, role.Role, MaxRole, ErrTooMuch)
			n.Err = full[role]
			continue
		}
		sizes[role] += p.size
		r.known[n.Entry.Key] = p
		n.Report, n.Err = p.report, p.err
	}
	return all
}

func gone(r *Report) int {
	if r.Entry.Session == "" {
		return 1
	}
	return 0
}

func parse(value []byte) parsed {
	report, err := deployments.ParseReport(value)
	return parsed{value, report, err, sizeOf(report)}
}

// sizeOf counts what a report lists: each takes more memory than it has bytes.
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
