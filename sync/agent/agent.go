package agent

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
)

// Config configures an Agent.
type Config struct {
	Store kv.Store
	Node  string // this node's name
	Stage string
	Roles []string // at least one
	// StateDir holds the lock, the last known state and every unit's journal. Default /var/lib/kedge.
	StateDir string
	Objects  *object.Client
	Bounds   policy.Bounds
	Trust    func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// Listen serves /ready, /live, /status (JSON) and /metrics; empty: nowhere. ":0" is fine: see Agent.Addr.
	Listen string
	// StartDelay: a random time up to this is waited before a fetch, to spread a large fleet's load. Default 0.
	StartDelay time.Duration
	// VerifyEvery checks live trees against their indexes in the background; 0: never.
	VerifyEvery time.Duration
	Version     string
	Metrics     *prometheus.Registry // nil: none
	Log         *slog.Logger
}

// Agent converges one node. Make it with New, then Run it once.
type Agent struct{ impl }

// New checks c and takes the lock of the state directory: ErrLocked where another agent has it.
func New(c Config) (*Agent, error) { return newAgent(c) }

// Run converges, reports and waits for changes until ctx ends; it then stops in order, with commands under way ended.
func (a *Agent) Run(ctx context.Context) error { return a.run(ctx) }

// Addr is the address of Listen; empty without one.
func (a *Agent) Addr() string { return a.addr() }

// Converged is closed when all units have converged, or failed for good, for the first time since the start: systemd's READY.
func (a *Agent) Converged() <-chan struct{} { return a.converged() }

// Report returns what the agent says of itself now, a report for each role.
func (a *Agent) Report() map[string]deployments.Report { return a.report() }
