package kv

import (
	"context"
	"fmt"
)

// Namer is a Store with an agent on each node, which has a name for it.
type Namer interface {
	// NodeName returns what the agent on this machine calls it; empty where the store is asked through another machine's
	// agent, or a server. It needs agent:read for that node, which no other call here does: ErrDenied without.
	NodeName(ctx context.Context) (string, error)
}

// ErrTokenUnknown is an ErrDenied: this machine's agent doesn't know the token. It remembers that of a new token for
// half a minute, while the servers, which the keys are read from, know the token already.
var ErrTokenUnknown = fmt.Errorf("unknown token: %w", ErrDenied)

// Maintainer is a Store beside which services are registered, so that a node can be taken out of service.
type Maintainer interface {
	// Maintain turns the maintenance mode of the node on or off. A mode that somebody else turned on, for a reason that
	// doesn't begin with MaintenanceReason, is left as it is, and is no error. It needs node:write for the node, which
	// no other call here does.
	Maintain(ctx context.Context, on bool, reason string) error
}

// MaintenanceReason begins the reason of every maintenance that kedge turned on, also in a run before this one.
const MaintenanceReason = "kedge "

// Located is a Store that lies in one of several datacenters.
type Located interface {
	// Datacenter names it. It needs no right.
	Datacenter(ctx context.Context) (string, error)
}
