package kv

import (
	"context"
	"fmt"
)

// Namer is a Store that has an agent of its own on each node, as Consul does. That agent knows the
// node's name.
type Namer interface {
	// NodeName returns the name that this machine's agent has for the machine. It is empty unless the store's address is a
	// loopback address or a Unix socket, as the agent may be another machine's. The token needs agent:read for that node,
	// which no other call of this package needs; without it the error is ErrDenied.
	NodeName(ctx context.Context) (string, error)
}

// ErrTokenUnknown is an ErrDenied: this machine's Consul agent doesn't know the token. The agent
// caches that for half a minute, while the servers may already know a new token.
var ErrTokenUnknown = fmt.Errorf("unknown token: %w", ErrDenied)

// Maintainer is a Store whose nodes offer services, so that it can take a node out of service.
type Maintainer interface {
	// SetMaintenance turns the maintenance mode of the node whose agent answers on or off, unless
	// it is so already. The reason for turning it on must begin with MaintenanceReason. A mode that
	// somebody else turned on, for a reason that begins otherwise, stays on, without an error. The
	// token needs node:write for the node, which no other call of this package needs.
	SetMaintenance(ctx context.Context, on bool, reason string) error
}

// MaintenanceReason begins the reason of every maintenance that kedge turned on, even in an earlier run.
const MaintenanceReason = "kedge "

// Located is a Store that lies in one of several datacenters.
type Located interface {
	// Datacenter returns the datacenter's name; empty: the store names none. It needs no right.
	Datacenter(ctx context.Context) (string, error)
}
