// Package fleet reads the whole of a store for people: status, explain, wait; and writes what operators ask for.
package fleet

import (
	"context"
	"time"

	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/mirror"
)

// Fleet is the state of every unit, sorted; the JSON of kedge status.
type Fleet struct {
	At     time.Time      `json:"at"`
	Mirror *mirror.Status `json:"mirror,omitempty"`
	Units  []Unit         `json:"units"`
	// Errors are values that don't parse, by key.
	Errors map[string]string `json:"errors,omitempty"`
}

// Unit is one unit over all its nodes.
type Unit struct {
	ID     deployments.UnitID         `json:"unit"`
	Record *deployments.Record        `json:"record,omitempty"`
	Pin    *deployments.Pin           `json:"pin,omitempty"`
	Pins   map[string]deployments.Pin `json:"node_pins,omitempty"`
	Nodes  []Node                     `json:"nodes"`
	// Converged of Live nodes run what they should; Gone are nodes whose session has ended.
	Converged int    `json:"converged"`
	Live      int    `json:"live"`
	Gone      int    `json:"gone"`
	Error     string `json:"error,omitempty"`
}

// Node is one unit on one node.
type Node struct {
	Name   string                 `json:"node"`
	Gone   bool                   `json:"gone,omitempty"`
	Report deployments.UnitReport `json:"report"`
	// Converged is whether it runs what policy.Resolve says it should, as seen from here.
	Converged bool                `json:"converged"`
	Want      deployments.Pointer `json:"want,omitzero"`
	Why       string              `json:"why"`
}

// Read reads the fleet once. Stage, role and unit narrow it down; empty: all.
func Read(ctx context.Context, store kv.Store, filter Filter) (*Fleet, error) {
	return read(ctx, store, filter)
}

// Watch calls f with the fleet now and after every change, at most ten times a second, until ctx ends.
func Watch(ctx context.Context, store kv.Store, filter Filter, f func(*Fleet)) error {
	return watch(ctx, store, filter, f)
}

// Filter narrows down what is read.
type Filter struct{ Stage, Role, Unit string }

// Assemble computes a Fleet from entries; pure.
func Assemble(entries []kv.Entry, now time.Time) *Fleet { return assemble(entries, now) }

// Explain answers why a node runs what it runs of a unit.
func Explain(f *Fleet, id deployments.UnitID, node string) (policy.Decision, error) {
	return explain(f, id, node)
}

// Pin writes a pin for a unit, or for one node of it; Unpin removes it and says whether there was one.
func Pin(ctx context.Context, store kv.Store, id deployments.UnitID, node string, pin deployments.Pin) error {
	return putPin(ctx, store, id, node, pin)
}

func Unpin(ctx context.Context, store kv.Store, id deployments.UnitID, node string) (bool, error) {
	return unpin(ctx, store, id, node)
}
