package deploy

import (
	"context"
	"log/slog"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
)

// Config configures a Unit.
type Config struct {
	ID   deployments.UnitID
	Node string
	// Dir is this unit's own directory below the agent's state: STATE/units/STAGE/ROLE/UNIT. It holds the journal.
	Dir     string
	Objects *object.Client
	Bounds  policy.Bounds
	// Trust checks a manifest's bytes before anything of it is used; nil: the pointer's digest is enough.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// Drain is called with true before a switch that has a drain time (or, without one, at once before it), and with false
	// when the unit is healthy again: it turns /ready and Consul's maintenance mode. nil: nothing.
	Drain func(ctx context.Context, on bool) error
	// Progress is told where a deployment is. nil: nobody.
	Progress func(deployments.State, artifact.Progress)
	Log      *slog.Logger
}

// Unit deploys releases of one unit on this node, one at a time. Its methods are called by one goroutine, State by any.
type Unit struct{ impl }

// State is what is on disk, as the journal has it.
type State struct {
	Running deployments.Pointer // what dest resolves to, or, without a release directory, what was deployed last
	Version string
	// LastGood is the newest release that passed its health checks; what a failed one goes back to.
	LastGood    deployments.Pointer
	Staged      deployments.Pointer
	Quarantined []deployments.Digest
	// Drained is true from Drain(true) to Drain(false).
	Drained bool
	// Unfinished is set while a journalled deployment waits to be finished by Recover.
	Unfinished bool
}

// Failed is the error of a deployment that failed after its release was staged: by a command, the switch or the health checks.
// The unit is back on Back (zero: there was nothing to go back to), and Digest is quarantined.
type Failed struct {
	Release deployments.Pointer
	Back    deployments.Pointer
	Step    string // "pre", "switch", "post", "health", …
	Err     error
}

// Open opens a unit's state. It runs nothing; call Recover next.
func Open(c Config) (*Unit, error) { return open(c) }

// Recover finishes, or takes back, what a kill or power cut left half done, through the same code as Deploy.
func (u *Unit) Recover(ctx context.Context) error { return u.recover(ctx) }

// State returns the unit's state.
func (u *Unit) State() State { return u.state() }

// Stage has the release of p ready on disk, without touching what runs.
func (u *Unit) Stage(ctx context.Context, p deployments.Pointer) error { return u.stage(ctx, p) }

// Deploy converges to p: stage, drain, pre, switch, post, health, success, each journalled first. It does nothing where p runs
// already and is confirmed. *Failed means that it went back and p is quarantined; any other error is transient (network, storage,
// disk): nothing was changed, try again. commit is shown to commands. A cancelled ctx stops it as soon as that is safe: before
// the switch it leaves everything as it was; after it the deployment is finished by the next Recover or Deploy.
func (u *Unit) Deploy(ctx context.Context, p deployments.Pointer, commit string) error {
	return u.deploy(ctx, p, commit)
}

// Retry lets a quarantined digest be tried once more; the zero digest means all.
func (u *Unit) Retry(d deployments.Digest) error { return u.retry(d) }

// Verify compares the live tree with its release; Heal stages it anew beside, and switches to it without commands.
func (u *Unit) Verify(ctx context.Context, limit int64) ([]artifact.Difference, error) {
	return u.verify(ctx, limit)
}
func (u *Unit) Heal(ctx context.Context) error { return u.heal(ctx) }

func (f *Failed) Error() string { return f.message() }
func (f *Failed) Unwrap() error { return f.Err }
