// Package agent converges one node: it watches what its stage and roles should run, works out what that means for
// this node (package policy), brings it to life (package deploy), and reports.
//
// One loop decides, for all units at once, from what is known at that moment; it keeps no queue of events, so a
// wake-up that is missed, doubled or late changes nothing. Each unit has a worker of its own, which does one thing
// at a time and asks after it what is next. What a worker is doing is called off when the loop's answer changes, as
// soon as package deploy says that is safe.
//
// What decides comes from the first of these that has it: the store, once a view of it is settled; the last known
// state on this node's disk; a snapshot. Until both the records and the pins of a role are known from one of them,
// the role's units stay as they are; a key that is missing later leaves its unit as it is, too. Trouble with the
// store takes nothing away from what is known.
//
// # Ready
//
// /ready answers 200 from the moment when every unit has converged, or is held, or failed and went back to a
// release that serves; and when, after a reboot, the checks of what runs have passed in this boot: that it was
// healthy before says little of services that are only starting. Converged doesn't wait for that, as it is what
// starts them. From then on it is 503 only while a unit is unhealthy, or drained, which a unit is from before its
// switch until it is healthy, or after a failure with nothing good to go back to. Neither a fetch, nor an outage,
// nor a typo in a pin turns it: a load balancer must not lose a node that serves as well as before.
//
// /converged answers 200 while every unit runs what it should, or what a pin holds. A node that failed and went
// back serves, but hasn't converged. A node without any unit is neither, unless Config.AllowEmpty says so.
//
// # On disk
//
// The agent alone writes its state directory (0700):
//
//	lock                      held while it runs; the process's id
//	last-known.json           what the store last held for this node
//	floors.json               which releases are too old for this node: see deploy.Floors
//	node.json                 what the store's agent called this node last
//	agent.sock                /status, /ready and POST /retry for this machine's root
//	units/STAGE/ROLE/UNIT/    package deploy's
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/wait"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/agent/cache"
	"kedge/sync/agent/destwatch"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// DefaultStateDir is where an agent keeps its state.
const DefaultStateDir = "/var/lib/kedge"

// Config configures an Agent.
type Config struct {
	Store kv.Store
	// Node is this node's name. Empty: what the store's agent on this machine calls it; where there is none, or it
	// doesn't say, the host's name up to its first dot.
	Node  string
	Stage string
	Roles []string // at least one
	// StateDir holds the lock, the last known state and every unit's journal. Default DefaultStateDir.
	StateDir string
	Objects  *object.Client
	Bounds   policy.Bounds
	// Trust checks a manifest's signature before anything of it is used; nil: the pointer's digest is enough.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// AllowOlderPins lets a pin name a release that is older than the one that this node has settled on. It gives
	// whoever writes pins all that was ever signed. Without Trust it has no meaning.
	AllowOlderPins bool
	// Maintenance turns the node's maintenance mode in the service catalog while a unit is drained. It is tried again
	// until it succeeds, but a switch does not wait for it longer than 5 s: an outage of the store must not stop a
	// boot. nil: nothing.
	Maintenance func(ctx context.Context, on bool, reason string) error
	// Snapshot returns what the mirror last saved of desired/, for a node that boots while the store is away and has
	// no last known state. It is asked only then. The pins can't be known in that case, and are taken for absent. nil:
	// there is none.
	Snapshot func(ctx context.Context) ([]kv.Entry, error)
	// AllowEmpty lets a node without any unit be ready and converged. Else that is taken for a mistake.
	AllowEmpty bool
	// Observe names units of which the agent fetches and verifies what they should run, compares it with what lies at
	// dest, and reports that. It touches nothing of theirs.
	Observe []string
	// Adopt lets every unit take over a tree that lies at dest before its first release, as Record.Adopt does.
	Adopt bool
	// Secrets reads what manifests name by reference; nil: releases with secrets are refused.
	Secrets deploy.SecretReader
	// Listen serves /ready, /converged and /live, and, if it is a loopback address, what ListenStatus serves; empty:
	// nowhere. ":0" is fine: see Agent.Addr.
	Listen string
	// ListenStatus serves /status (JSON) and /metrics as well; empty: nowhere.
	ListenStatus string
	// StartDelay: a random time up to this is waited before a fetch, to spread a large fleet's load. Default 0.
	StartDelay time.Duration
	// VerifyEvery checks live trees against their indexes in the background; 0: never.
	VerifyEvery time.Duration
	// HashAlways has files of the running release hashed before they are shared with the next, though nothing touched
	// them.
	HashAlways bool
	Version    string
	Metrics    *prometheus.Registry // nil: none
	// Trace takes the spans of deployments; nil: nothing is traced. Its owner runs it.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none

	uptime func() time.Duration // the machine's; tests have their own
}

// Agent converges one node. Make it with New, then Run it once.
type Agent struct {
	c       Config  // Node changes once at most, under mu: see findName
	naming  *naming // nil: the name was given
	started time.Time
	begun   time.Time // statedir.Dir.StartingSince
	booted  bool      // the machine had just started when the agent did
	dir     *statedir.Dir
	// nil: none
	listener, statusListener net.Listener
	metrics                  *metrics
	floors                   *deploy.Floors
	drains                   *drains
	drift                    *destwatch.Watcher
	// Each holds one: units fetch one after another, which bounds memory and load, and what is wanted now doesn't wait
	// for what is fetched ahead. Who is slow gives its turn back: see holdTurn.
	fetching, ahead chan struct{}

	kicked    wait.Signal   // asks the loop for a turn
	reportNow wait.Signal   // asks for a look at the reports
	pulse     chan struct{} // Alive's
	idle      chan struct{} // closed once
	converged chan struct{} // closed once

	snapshot sync.Once // the search for one

	mu      sync.Mutex
	cache   *cache.Cache
	making  map[*cache.Source]bool // folder keys: see makeFolder
	units   map[deployments.UnitID]*unit
	onDisk  map[deployments.UnitID]bool // of which something is kept since before the start
	ready   bool                        // once it was ready
	joined  map[string]uint64           // by role, since when the store holds its report; absent: not known yet
	ctx     context.Context
	workers sync.WaitGroup
}

// naming is the state of the search for a name, in an agent that was given none.
type naming struct {
	host string // as the machine calls itself
	// saved is what the store's agent called it at a start before this one; empty: not known. What another host was
	// called doesn't count: the disk may have been in its image.
	saved string
}

// unit is one unit on this node. All fields but the first six are guarded by Agent.mu.
type unit struct {
	id   deployments.UnitID
	log  *slog.Logger
	wake wait.Signal // asks the worker to look at its goal
	// cancel ends the worker.
	cancel context.CancelFunc
	// observes is set if this node only observes the unit.
	observes bool

	// fetched are the bytes of the fetch under way, as it tells of them.
	fetched atomic.Int64

	deploy *deploy.Unit // nil until its state could be opened

	desired
	observed
	reported
}

// desired is what the loop decided about a unit. The loop alone writes it.
type desired struct {
	decided  bool
	record   policy.Value[deployments.Record]
	pins     [2]policy.Value[deployments.Pin] // for the unit, for this node
	floor    int64                            // the highest generation that was acted on
	held     int64                            // the generation of a record that is there, and isn't acted on; 0: none
	decision policy.Decision
	key      string // the failure key: names what asks for the decision's target
	cycle    string // the circle of units that it lies on
	blocked  dependency
	retired  bool // its worker ends, and what is left of it goes
	replaced bool // another unit, which is wanted, has its dest
	contends bool // one that isn't wanted any more is changing it
	goal     goal
}

// observed is the worker's present job, and what its jobs found.
type observed struct {
	busy     job
	phase    deployments.State // of a deployment under way: StateFetching or StateSwitching
	announce *announcement     // of the deployment under way; nil: none was made
	progress artifact.Progress
	done     deployments.Pointer             // converged to in this process
	settled  deployments.Pointer             // noted as settled on in this process
	toSettle deployments.Pointer             // to be noted once it runs, before anything else is deployed
	settleAt time.Time                       // when what claims a time ahead of the clock is noted again
	future   *deploy.FutureError             // what settled claims
	ran      []deployments.Digest            // what converged in this process, the newest last: see dependencyOf
	recover  bool                            // whether something has to be recovered first
	forget   bool                            // everything that failed may be tried again
	trouble  error                           // why the last job failed; nil again when it succeeds
	refused  map[deployments.Pointer]refusal // releases that can't succeed on this node
	retry    *wait.Backoff
	retryAt  time.Time   // no job that can fail is begun before
	verifyAt time.Time   // zero: never
	dest     string      // of what runs
	claimed  string      // dest of what was let in last
	mark     deploy.Mark // what the last deployment left at dest
	foreign  string      // what something else has deployed there; empty: nothing
	drift    []string
	// unhealable is the drift that healing left.
	unhealable []string
	compared   *deployments.Compared // of a node that observes
	looked     lookedAt
	again      *wait.Backoff       // until dest is looked at again there
	health     deploy.Health       // of watched, as its checks say
	watched    deployments.Pointer // the release that was watched last
}

// goal is what a unit's worker should bring about. The zero goal: leave it as it is, but finish what was begun.
type goal struct {
	run    deployments.Pointer // have it live; zero: whatever runs stays
	stage  deployments.Pointer // have it ready on disk as well
	commit string              // that asked for run
	key    string              // what asks for run: the failure key
	heal   bool                // put drift right
	adopt  bool                // take over what lies at dest, if it is the first release's already
	// observe has the agent touch nothing of the unit, and compare this release with what lies at dest. Then all else is
	// zero.
	observe deployments.Pointer
	leave   bool // go back to what was there before the first release
	stays   bool // what was there before the first release is gone back to no more
	settle  bool // once it runs, nothing older is gone back to: see observed.toSettle
}

// job is what a worker is doing.
type job struct {
	kind    jobKind
	release deployments.Pointer
	commit  string
	key     string
	adopt   bool
	leaves  bool // it may be left: see goal.leave
	cancel  context.CancelCauseFunc
	span    trace.Context // zero: it isn't traced
	root    trace.SpanID  // of span's trace
}

// switches reports whether the job takes the unit out of service.
func (j job) switches() bool {
	return j.kind == jobDeploy || j.kind == jobRecover || j.kind == jobLeave
}

type jobKind string

const (
	jobNone         jobKind = ""
	jobRecover      jobKind = "recover" // finish what a crash cut off
	jobForget       jobKind = "forget"  // end quarantine
	jobDeploy       jobKind = "deploy"
	jobStage        jobKind = "stage"
	jobHeal         jobKind = "heal"
	jobVerify       jobKind = "verify"
	jobProve        jobKind = "prove" // await the health of what runs, after a reboot
	jobObserve      jobKind = "observe"
	jobLook         jobKind = "look"          // at dest, before the first release
	jobLeave        jobKind = "leave"         // go back to what was there before the first release
	jobForgetBefore jobKind = "forget-before" // give up what was there, which nobody goes back to any more
	jobSettle       jobKind = "settle"        // note that nothing older is gone back to
)

// reported is the state in which the unit is, and since when.
type reported struct {
	state deployments.State
	since time.Time
}

// announcement is a switch that begins once the store holds a report that says so.
type announcement struct {
	release deployments.Pointer
	made    chan struct{} // closed when it does
}

// begins reports whether what is announced, if anything is, may begin.
func (x *announcement) begins() bool {
	if x == nil {
		return true
	}
	select {
	case <-x.made:
		return true
	default:
		return false
	}
}

// lookedAt is what was found at the dest of a release while its unit ran nothing.
type lookedAt struct {
	release deployments.Digest
	found   policy.Found
}

// dependency is a unit that another one waits for. The zero dependency: it waits for none.
type dependency struct {
	unit  string
	why   string
	stuck bool // it can't move by itself
}

// refusal is an error that trying again doesn't mend.
type refusal struct {
	err  error
	dest string // which another unit has; empty: that isn't why
}

// takenError says that another unit has a place.
type takenError struct {
	dest string
	why  string
}

func (e *takenError) Error() string { return e.why }

// foreignError says that something else has deployed to a unit's dest.
type foreignError struct{ dest, found string }

func (e *foreignError) Error() string {
	return fmt.Sprintf("something else has deployed to %s: %s", e.dest, e.found)
}

func (u *unit) nudge() {
	u.wake.Set()
}

// state returns the unit's state on disk; zero until it could be read.
func (u *unit) state() deploy.State {
	if u.deploy == nil {
		return deploy.State{}
	}
	return u.deploy.State()
}

// kick asks the loop to decide anew.
func (a *Agent) kick() {
	a.kicked.Set()
}

func (a *Agent) kickReport() {
	a.reportNow.Set()
}

// Node returns this node's name, which may change once if Config gave none.
func (a *Agent) Node() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.c.Node
}

// maxRetry is the longest pause between tries.
const maxRetry = 30 * time.Second

// newBackoff returns the pauses between tries after any failure, of this node or of the store.
func newBackoff() *wait.Backoff { return wait.NewBackoff(250*time.Millisecond, maxRetry/2) }

// closeOnce closes c, and reports whether it was open.
func closeOnce(c chan struct{}) bool {
	select {
	case <-c:
		return false
	default:
		close(c)
		return true
	}
}

// oneLine shortens an error to one line of at most 300 bytes, for a report.
func oneLine(err error) string {
	return clipped(strings.Join(strings.Fields(err.Error()), " "), 300)
}

// clipped cuts a text to limit bytes.
func clipped(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return strings.ToValidUTF8(s[:limit-len("…")], "") + "…"
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
