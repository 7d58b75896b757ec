// Package fleet reads the fleet's state from the store for people (status, explain, history, wait), and writes
// operators' pins and orders.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
)

// Fleet is the state of the units that were read, sorted by ID. Its JSON is the output of kedge status --json.
type Fleet struct {
	At     time.Time                `json:"at"`
	Mirror *deployments.MirrorState `json:"mirror,omitempty"`
	// MirrorRunning is set while a mirror holds the lease. While none does, pushed commits, orders,
	// and pins of units with a rollout have to wait.
	MirrorRunning bool   `json:"mirror_running"`
	Units         []Unit `json:"units"`
	// Agents counts the live nodes by the version that their agents report. A node of several roles
	// counts once.
	Agents map[string]int `json:"agents,omitempty"`
	// Unassigned are live nodes of a stage and role that has no unit.
	Unassigned []Unassigned `json:"unassigned"`
	// Errors has texts of errors. At a key, the text says what is wrong with the key's value. At a
	// prefix, which ends in "/", it says why the prefix can't be read or may be out of date. At a
	// role's prefix with "*" appended, it says what is wrong with some of the role's keys.
	Errors map[string]string `json:"errors,omitempty"`
	// incomplete are the prefixes, sorted, that were not read completely: more is stored there than is read, or no answer
	// came in time.
	incomplete []string
	// late is the one prefix in incomplete for which no answer came in time; empty: none.
	late string
}

// ErrTooMuch and ErrLate are the errors of a fleet that was read in part.
var (
	ErrTooMuch = errors.New("more is stored than can be read")
	ErrLate    = errors.New("no answer came in time for the keys")
)

// CheckComplete returns an error if f may be incomplete: more is stored than is read (ErrTooMuch),
// or no answer came in time (ErrLate). The error wraps one or both, and names the prefixes;
// f.Errors says more about each. If the token may not read something, or the store is away, that
// alone is no error.
func (f *Fleet) CheckComplete() error {
	more := slices.DeleteFunc(slices.Clone(f.incomplete), func(prefix string) bool { return prefix == f.late })
	unread := fmt.Errorf("%w below %s", ErrTooMuch, strings.Join(more, ", "))
	late := fmt.Errorf("%w below %s", ErrLate, f.late)
	switch {
	case len(f.incomplete) == 0:
		return nil
	case f.late == "":
		return unread
	case len(more) == 0:
		return late
	}
	return fmt.Errorf("%w; %w", unread, late)
}

// Unit is one unit on all its nodes.
type Unit struct {
	ID     deployments.UnitID         `json:"unit"`
	Record *deployments.Record        `json:"record,omitempty"`
	Pin    *deployments.Pin           `json:"pin,omitempty"`
	Pins   map[string]deployments.Pin `json:"node_pins,omitempty"`
	// Order is an operator's order, such as retry, that the mirror has yet to take.
	Order string `json:"order,omitempty"`
	// GitAhead has an entry for each release that a pin in force names, or that live nodes under a
	// hold pin run. Its value is how often Git has changed the unit's release since it last named the
	// entry's release; 0: Git still names it. A release that neither the record nor the history names
	// has no entry.
	GitAhead map[deployments.Pointer]int `json:"git_ahead,omitempty"`
	// Nodes are the nodes that report on the unit, and live nodes that should run it and have yet
	// to report on it. They are sorted by name. If some are left out, Fleet.Errors says so.
	Nodes []Node `json:"nodes"`
	// Converged counts the live nodes that do what they should, as Node.Converged says. Live counts
	// the live nodes, even those left out of Nodes. Gone counts the listed nodes whose session has
	// ended.
	Converged int `json:"converged"`
	Live      int `json:"live"`
	Gone      int `json:"gone"`
	// Error says why the record or a pin doesn't parse.
	Error string `json:"error,omitempty"`
	// versions are the versions of releases, by digest, as nodes report them; nil: they have yet to be computed from
	// Nodes.
	versions map[deployments.Digest]string
}

// Unassigned is a live node whose stage and role have no unit. Its agent's stage or role may be mistyped.
type Unassigned struct {
	Stage string `json:"stage"`
	Role  string `json:"role"`
	Node  string `json:"node"`
}

// mirrorStopped reports whether a mirror has run, and none runs now.
func (f *Fleet) mirrorStopped() bool { return f.Mirror != nil && !f.MirrorRunning }

// Pinned reports whether the unit has a valid pin that hasn't expired. Nodes may have pins of their
// own.
func (u *Unit) Pinned(now time.Time) bool { return u.Pin != nil && !u.Pin.Expired(now) }

// orphaned reports whether the unit was removed from Git, though its record stays.
func (u *Unit) orphaned() bool { return u.Record != nil && policy.IsOrphaned(*u.Record) }

// GitTarget returns the release that Git names, as the record has it; zero: there is no record. While a pin is rolled
// out, the record's target is the pin's release.
func (u *Unit) GitTarget() deployments.Pointer {
	switch {
	case u.Record == nil:
		return deployments.Pointer{}
	case u.Record.Pinned != nil:
		return u.Record.Pinned.Target
	}
	return u.Record.Target
}

// Node is one unit on one node.
type Node struct {
	Name string `json:"node"`
	// Gone is set if the node's session has ended. Its last report is kept.
	Gone bool `json:"gone,omitempty"`
	// Report has no State if the node has yet to report on the unit, or its report can't be used.
	Report deployments.UnitReport `json:"report"`
	// Converged is set if the node, by its last report, does what policy.Resolve decides, as far as
	// the store shows.
	Converged bool                `json:"converged"`
	Want      deployments.Pointer `json:"want,omitzero"`
	Message   string              `json:"message"`
	joined    uint64              // deployments.Report.Joined, of the report on all the node's units
}

// PinnedOrHeld reports whether a pin, not the record, decides for the node, or the node only
// observes. In both cases the mirror doesn't admit the node by rank.
func (n *Node) PinnedOrHeld() bool {
	return n.Report.Pinned || n.Report.State == deployments.StateHeld
}

// Filter selects units; an empty field selects all.
type Filter struct{ Stage, Role, Unit string }

// takes reports whether the filter selects id.
func (f Filter) takes(id deployments.UnitID) bool {
	return (f.Stage == "" || f.Stage == id.Stage) && (f.Role == "" || f.Role == id.Role) &&
		(f.Unit == "" || f.Unit == id.Unit)
}

// prefix returns the prefix of a kind to read for the filter. It is a role's prefix if the filter
// names stage and role, or else that of the whole kind. Both have folder keys, which tell an absent
// key from one that the token may not read.
func (f Filter) prefix(kind string) string {
	if f.Stage == "" || f.Role == "" {
		return kind
	}
	return kv.RolePrefix(kind, f.Stage, f.Role)
}

// narrow removes the units, unassigned nodes and errors that the filter doesn't select from a fleet, and returns it.
func (f Filter) narrow(all *Fleet) *Fleet {
	all.Units = slices.DeleteFunc(all.Units, func(u Unit) bool { return !f.takes(u.ID) })
	all.Unassigned = slices.DeleteFunc(all.Unassigned, func(n Unassigned) bool {
		return f.Unit != "" || f.Stage != "" && f.Stage != n.Stage || f.Role != "" && f.Role != n.Role
	})
	maps.DeleteFunc(all.Errors, func(key, _ string) bool {
		kind, rest, _ := strings.Cut(key, "/")
		parts := strings.Split(strings.Trim(rest, "/"), "/")
		if kind+"/" == kv.MirrorPrefix || rest == "" {
			return false
		}
		differs := func(i int, want string) bool {
			return want != "" && i < len(parts) && parts[i] != "" && parts[i] != want
		}
		return differs(0, f.Stage) || differs(1, f.Role) || kind+"/" != kv.StatusPrefix && differs(2, f.Unit)
	})
	return all
}

// kinds are the prefixes that a Fleet is read from; in addition, the history of pinned units is
// read. Read reads them in this order, so that its Fleet is consistent. The mirror deletes an order
// in the transaction that obeys it. The mirror writes its state together with, or after, the
// records that the state is about. A node reports after it has read its record.
var kinds = []string{kv.ControlPrefix, kv.MirrorPrefix, kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix}

// Read reads the fleet once, with Consul from the servers' leader.
//
// If a part of the store can't be read, because the token may not read it or no mirror has run yet, Errors says so. It
// is an error if no part can be read, unless the store is known to be empty.
//
// If the orders, the pins or the reports of all roles are too many for one read, Read reads them
// role by role, for roles that have a record. Any other part that holds too much is left out. So is
// the first part, a kind or a role, for which no answer comes in time, if the store then answers
// another request. CheckComplete names all these parts. A second late part is an error, as is any
// other failure.
func Read(ctx context.Context, store kv.Store, filter Filter) (*Fleet, error) {
	r := reading{store: store, failed: map[string]error{}}
	ofKinds := map[string]error{}
	for _, kind := range kinds {
		prefix := kind
		if kind != kv.MirrorPrefix {
			prefix = filter.prefix(kind)
		}
		some, err := store.List(ctx, prefix)
		if errors.Is(err, kv.ErrDenied) && prefix != kind {
			// A role that the mirror doesn't know has no folder of its own.
			some, err = store.List(ctx, kind)
		}
		r.entries = append(r.entries, some...)
		if err == nil {
			continue
		}
		ofKinds[kind] = err
		if errors.Is(err, kv.ErrDenied) {
			r.failed[kind] = err
			continue
		}
		if err := r.leaveOut(ctx, prefix, err); err != nil {
			return nil, err
		}
		if errors.Is(err, kv.ErrTooLarge) && prefix == kind {
			if err := r.byRole(ctx, kind); err != nil {
				return nil, err
			}
		}
	}
	switch {
	case len(ofKinds) < len(kinds):
	case everyIs(ofKinds, kv.ErrEmpty):
		r.failed = nil // no mirror and no agent has run yet
	default:
		return nil, fmt.Errorf("reading the fleet: %w", ofKinds[kv.DesiredPrefix])
	}
	r.entries = append(r.entries, histories{}.of(ctx, store, filter, r.entries)...)
	return filter.narrow(withErrors(Assemble(r.entries, time.Now()), r.failed)), nil
}

// reading is the state of one call of Read.
type reading struct {
	store   kv.Store
	entries []kv.Entry
	// failed has, by prefix, why a part is left out, isn't read as a whole, or may not be read.
	failed map[string]error
	// late is set once a part is left out because no answer came in time.
	late bool
}

// leaveOut records why a part is left out, or returns an error that ends the whole Read.
func (r *reading) leaveOut(ctx context.Context, prefix string, err error) error {
	switch {
	case errors.Is(err, kv.ErrTooLarge):
		r.failed[prefix] = err
	case errors.Is(err, context.DeadlineExceeded) && !r.late && answers(ctx, r.store):
		r.late = true
		r.failed[prefix] = &lateError{prefix, err}
	default:
		return fmt.Errorf("reading the fleet: %w", err)
	}
	return nil
}

// answers reports whether the store answers a small request now.
func answers(ctx context.Context, store kv.Store) bool {
	_, err := store.Get(ctx, kv.MirrorKey)
	return err == nil || errors.Is(err, kv.ErrNotFound) || errors.Is(err, kv.ErrDenied)
}

// lateError means that the answer for a prefix didn't come in time, though the store answers. The
// usual cause is a gigabyte of keys there: Consul then takes longer to make the answer than the
// request may last.
type lateError struct {
	prefix string
	err    error
}

func (e *lateError) Error() string {
	const text = "the keys below %s did not come in time, though others did: see whether there are too many of them (%v)"
	return fmt.Sprintf(text, e.prefix, e.err)
}
func (e *lateError) Unwrap() error { return e.err }

// byRole reads the entries of a kind role by role, if they are too many to be read at once. It
// reads only roles that have a record. A role is left out if the kind's entries would exceed
// kv.MaxList bytes with it. An error ends the whole Read. Records themselves aren't read by role,
// as nothing else names the roles.
func (r *reading) byRole(ctx context.Context, kind string) error {
	records := r.entries
	if kind == kv.ControlPrefix {
		// Orders are read before records. Here the records only name the roles: Read reads them again.
		var err error
		if records, err = r.store.List(ctx, kv.DesiredPrefix); err != nil {
			return nil // Read meets this error, too, when it reads the records
		}
	}
	size := 0
	for role := range unitsByRole(records) {
		prefix := kv.RolePrefix(kind, role.Stage, role.Role)
		some, err := r.store.List(ctx, prefix)
		if errors.Is(err, kv.ErrDenied) { // the role has no folder, and so no keys
			continue
		}
		if err != nil {
			if err := r.leaveOut(ctx, prefix, err); err != nil {
				return err
			}
			continue
		}
		before := size
		for _, e := range some {
			size += e.Size()
		}
		if size > kv.MaxList {
			r.failed[prefix] = fmt.Errorf("%w: with the keys of other roles there are more than %d MiB: look at this role alone",
				kv.ErrTooLarge, kv.MaxList>>20)
			size = before
			continue
		}
		r.entries = append(r.entries, some...)
	}
	return nil
}

func everyIs(errs map[string]error, target error) bool {
	for _, err := range errs {
		if !errors.Is(err, target) {
			return false
		}
	}
	return true
}

// withErrors records in f why parts of the store can't be read or may be out of date, and returns f. trouble has the
// errors by prefix; a nil error counts as none.
func withErrors(f *Fleet, trouble map[string]error) *Fleet {
	for prefix, err := range trouble {
		if err == nil {
			continue
		}
		if f.Errors == nil {
			f.Errors = map[string]string{}
		}
		text := err.Error()
		switch {
		case errors.As(err, new(*lateError)):
			f.incomplete = append(f.incomplete, prefix)
			f.late = prefix
			text = strings.ReplaceAll(text, kv.ErrUnavailable.Error()+": ", "")
		case errors.Is(err, kv.ErrTooLarge):
			f.incomplete = append(f.incomplete, prefix)
			if _, after, is := strings.Cut(text, kv.ErrUnavailable.Error()+": "); is {
				text = after
			}
		case errors.Is(err, kv.ErrEmpty):
			text = "no key was ever written here: has a mirror run yet, with this --prefix?"
		case errors.Is(err, kv.ErrDenied):
			text = "no key was ever written here, or this token may not read it: has a mirror run yet, with this --prefix?"
		}
		f.Errors[prefix] = text
	}
	slices.Sort(f.incomplete)
	return f
}

// watchPause is the least pause after a call of Watch's f, and longestPause the most, after a call that took long.
const (
	watchPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

// Watch calls f with the fleet until ctx ends. The first call comes once every part has been read,
// or is known to be unreadable. Others follow after changes, when pins expire, and at least hourly.
// Watch returns ctx's error, or the error of a store that can't be watched. It calls f at most ten
// times a second, and less often if that would take more than a twentieth of a core: see
// longestPause. While the store is away, the fleet stays as it was last known, and Errors has the
// store's errors.
func Watch(ctx context.Context, store kv.Store, filter Filter, f func(*Fleet)) error {
	var mu sync.Mutex
	views := map[string]kv.View{}
	changed := wait.NewSignal()
	g, ctx := errgroup.WithContext(ctx)
	for _, kind := range kinds {
		prefix := kind
		if kind != kv.MirrorPrefix {
			prefix = filter.prefix(kind)
		}
		g.Go(func() error {
			return store.Watch(ctx, prefix, func(v kv.View) {
				mu.Lock()
				views[prefix] = v
				mu.Unlock()
				changed.Set()
			})
		})
	}
	g.Go(func() error {
		// The end of a pin changes the fleet without a change in the store.
		expiry := time.NewTimer(time.Hour)
		defer expiry.Stop()
		known, assembler := histories{}, new(assembler)
		for {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-changed.C():
			case <-expiry.C:
			}
			var entries []kv.Entry
			trouble := map[string]error{}
			mu.Lock()
			complete := len(views) == len(kinds)
			for prefix, v := range views {
				entries = append(entries, v.Entries...)
				trouble[prefix] = v.Err
			}
			mu.Unlock()
			if !complete {
				continue
			}
			entries = append(entries, known.of(ctx, store, filter, entries)...)
			began := time.Now()
			fleet := filter.narrow(withErrors(assembler.assemble(entries, began), trouble))
			f(fleet)
			expiry.Reset(timeToExpiry(fleet))
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(max(watchPause, wait.Rest(time.Since(began), longestPause))):
			}
		}
	})
	return g.Wait()
}

// timeToExpiry returns the time until the next pin of the fleet expires, at most an hour.
func timeToExpiry(f *Fleet) time.Duration {
	next := time.Hour
	look := func(p deployments.Pin) {
		if left := p.Until.Sub(f.At); !p.Until.IsZero() && left > 0 {
			next = min(next, left+time.Millisecond)
		}
	}
	for _, u := range f.Units {
		if u.Pin != nil {
			look(*u.Pin)
		}
		for _, p := range u.Pins {
			look(p)
		}
	}
	return next
}
