package kv

import (
	"context"
	"fmt"
)

// Namer is a Store that has an agent on each node, which knows the node's name.
type Namer interface {
	// NodeName returns the name that this machine's agent has for the machine. It is empty unless the store's address is a
	// loopback address or a Unix socket, as the agent may be another machine's. The token needs agent:read for that node,
	// which no other call of this package needs; without it the error is ErrDenied.
	NodeName(ctx context.Context) (string, error)
}

// ErrTokenUnknown is an ErrDenied: this machine's agent doesn't know the token. The agent caches that answer for
// half a minute, while the servers may already know a new token.
var ErrTokenUnknown = fmt.Errorf("unknown token: %w", ErrDenied)

// Maintainer is a Store whose nodes offer services, so that it can take a node out of service.
type Maintainer interface {
	// SetMaintenance turns the maintenance mode of the node on or off, if it isn't so already. If somebody else turned it
	// on, with a reason that doesn't begin with MaintenanceReason, the mode stays on, without an error. A reason to turn
	// it on must begin so. The token needs node:write for the node, which no other call of this package needs.
	SetMaintenance(ctx context.Context, on bool, reason string) error
}

// MaintenanceReason begins the reason of every maintenance that kedge turned on, even in an earlier run.
const MaintenanceReason = "kedge "

// Located is a Store that lies in one of several datacenters.
type Located interface {
	// Datacenter returns the datacenter's name; empty: the store names none. It needs no right.
	Datacenter(ctx context.Context) (string, error)
}
