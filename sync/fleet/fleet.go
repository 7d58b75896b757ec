// Package fleet reads the whole of a store for people: status, explain, history, wait; and writes what operators
// ask for.
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

// Fleet is the state of every unit, sorted; the JSON of kedge status.
type Fleet struct {
	At     time.Time                `json:"at"`
	Mirror *deployments.MirrorState `json:"mirror,omitempty"`
	// MirrorRunning is set while a mirror holds the lease. Without one, what is pushed and what operators order
	// waits.
	MirrorRunning bool   `json:"mirror_running"`
	Units         []Unit `json:"units"`
	// Agents counts the live nodes by the version of their agent.
	Agents map[string]int `json:"agents,omitempty"`
	// Unassigned are live nodes of a stage and role that have no unit.
	Unassigned []Unassigned `json:"unassigned"`
	// Errors are values that don't parse, by key; and, by prefix, why a part of the store could not be read.
	Errors map[string]string `json:"errors,omitempty"`
}

// Unit is one unit over all its nodes.
type Unit struct {
	ID     deployments.UnitID         `json:"unit"`
	Record *deployments.Record        `json:"record,omitempty"`
	Pin    *deployments.Pin           `json:"pin,omitempty"`
	Pins   map[string]deployments.Pin `json:"node_pins,omitempty"`
	// Order is what an operator asked for, as in retry, and the mirror has yet to take.
	Order string `json:"order,omitempty"`
	// GitAhead counts, for each release that a pin names or holds, the releases that Git has named since it last
	// named that one; 0: it names it still. A release that the history doesn't know isn't there.
	GitAhead map[deployments.Pointer]int `json:"git_ahead,omitempty"`
	// Nodes are sorted by name: those that report on the unit, and live ones of its role that have yet to.
	Nodes []Node `json:"nodes"`
	// Converged of Live nodes run what they should; Gone are nodes whose session has ended.
	Converged int `json:"converged"`
	Live      int `json:"live"`
	Gone      int `json:"gone"`
	// Error is why the record or a pin doesn't parse.
	Error string `json:"error,omitempty"`
}

// Unassigned is a node that no unit is meant for: its agent's stage or role may be mistyped.
type Unassigned struct {
	Stage string `json:"stage"`
	Role  string `json:"role"`
	Node  string `json:"node"`
}

// mirrorStopped reports whether a mirror ran once, and none does now.
func (f *Fleet) mirrorStopped() bool { return f.Mirror != nil && !f.MirrorRunning }

// Pinned reports whether a pin decides for a unit, on nodes without one of their own.
func (u *Unit) Pinned(now time.Time) bool { return u.Pin != nil && !u.Pin.Expired(now) }

// orphaned reports whether Git names the unit no longer, though its record stays.
func (u *Unit) orphaned() bool { return u.Record != nil && policy.IsOrphaned(*u.Record) }

// GitTarget is the release that Git names: while a pin is rolled out, the record's target is the pin's.
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
	// Gone is a node whose session has ended. What it reported last stays.
	Gone bool `json:"gone,omitempty"`
	// Report has no State where the node has yet to report on the unit.
	Report deployments.UnitReport `json:"report"`
	// Converged is whether it runs what policy.Resolve says it should, as seen from here.
	Converged bool                `json:"converged"`
	Want      deployments.Pointer `json:"want,omitzero"`
	Why       string              `json:"why"`
}

// Filter narrows down what is read; empty fields: all.
type Filter struct{ Stage, Role, Unit string }

// takes reports whether id passes the filter.
func (f Filter) takes(id deployments.UnitID) bool {
	return (f.Stage == "" || f.Stage == id.Stage) && (f.Role == "" || f.Role == id.Role) &&
		(f.Unit == "" || f.Unit == id.Unit)
}

// prefix is the narrowest part of a kind's keys whose folder the mirror makes: only there can absence be told.
func (f Filter) prefix(kind string) string {
	if f.Stage == "" || f.Role == "" {
		return kind
	}
	return kv.RolePrefix(kind, f.Stage, f.Role)
}

// narrow removes from a fleet what the filter doesn't select.
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

// kinds are what a Fleet is made of, in an order that lets a reader trust it: a mirror takes an order in the
// transaction that does it, it writes its state with, or after, the records that it speaks of, and a node reports
// after it has read its record. The history of units that are pinned comes on top.
var kinds = []string{kv.ControlPrefix, kv.MirrorPrefix, kv.DesiredPrefix, kv.PinsPrefix, kv.StatusPrefix}

// Read reads the fleet once, from the leader.
//
// A part that can't be read, or whose folder is missing, as where no mirror ever ran, is named in Errors. Where all
// of them can't, that is an error.
func Read(ctx context.Context, store kv.Store, filter Filter) (*Fleet, error) {
	var entries []kv.Entry
	trouble := map[string]error{}
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
		switch {
		case errors.Is(err, kv.ErrDenied):
			trouble[kind] = err
		case err != nil:
			return nil, fmt.Errorf("read the fleet: %w", err)
		}
		entries = append(entries, some...)
	}
	if len(trouble) == len(kinds) && everyIs(trouble, kv.ErrEmpty) {
		trouble = nil // no mirror and no agent has ever run
	}
	if len(trouble) == len(kinds) {
		return nil, fmt.Errorf("read the fleet: %w", trouble[kv.DesiredPrefix])
	}
	entries = append(entries, histories{}.of(ctx, store, filter, entries)...)
	return filter.narrow(withTrouble(Assemble(entries, time.Now()), trouble)), nil
}

func everyIs(errs map[string]error, target error) bool {
	for _, err := range errs {
		if !errors.Is(err, target) {
			return false
		}
	}
	return true
}

// withTrouble notes why parts of the store can't be read, or may be out of date.
func withTrouble(f *Fleet, trouble map[string]error) *Fleet {
	for prefix, err := range trouble {
		if err == nil {
			continue
		}
		if f.Errors == nil {
			f.Errors = map[string]string{}
		}
		text := err.Error()
		switch {
		case errors.Is(err, kv.ErrEmpty):
			text = "nothing to be seen here: nothing was ever written"
		case errors.Is(err, kv.ErrDenied):
			text = "nothing to be seen here: nothing was ever written, or this token may not read it"
		}
		f.Errors[prefix] = text
	}
	return f
}

// watchPause is the time between two calls of Watch's f, and longestPause the same where each of them takes long.
const (
	watchPause   = 100 * time.Millisecond
	longestPause = 5 * time.Second
)

// Watch calls f with the fleet now and after changes, at most ten times a second, until ctx ends; it returns ctx's
// error. A fleet so large that this would take more than a twentieth of a core is shown less often. In an outage of the
// store the fleet stays as it was last known, with the trouble in Errors.
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
		// Time alone changes what is wanted when a pin ends.
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
			fleet := filter.narrow(withTrouble(assembler.assemble(entries, began), trouble))
			f(fleet)
			expiry.Reset(untilExpiry(fleet))
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(max(watchPause, wait.Rest(time.Since(began), longestPause))):
			}
		}
	})
	return g.Wait()
}

// untilExpiry is how long no pin of the fleet ends by itself.
func untilExpiry(f *Fleet) time.Duration {
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
