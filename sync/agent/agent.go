// Package agent makes one node converge: it watches what the node's stage and roles should run, decides what that
// means for this node (package policy), deploys it (package deploy), and reports.
//
// One loop decides for all units at once, from what is known at that moment. It has no queue of events, so a
// wake-up that is missed, repeated or late does no harm. Each unit has a worker, which does one job at a time and
// then chooses the next. A job is cancelled when the loop's decision changes, as soon as package deploy says that
// this is safe.
//
// The loop decides by the first of these sources that has an answer: the store, once a view of it is synced; the
// last known state on this node's disk; a snapshot. The units of a role stay as they are until both the records and
// the pins of the role are known from one of them. A unit also stays as it is if its key goes missing later. An
// error of the store removes nothing from what is known.
//
// # Ready
//
// /ready answers 200 as soon as every unit has converged, is held, or failed and went back to a release that
// serves. After a reboot, the checks of what runs must also have passed in this boot: that it was healthy before
// says little of services that are only starting. Convergence doesn't wait for that, as it is what starts them.
// From then on /ready is 503 only while a unit is unhealthy or drained. A unit is drained from before its switch
// until it is healthy, or after a failure without a good release to go back to. Neither a fetch, nor an outage, nor
// a typo in a pin changes /ready: a load balancer must not lose a node that serves as well as before.
//
// /converged answers 200 while every unit runs what it should, or what a pin holds. A node that failed and went
// back serves, but hasn't converged. A node without any unit is neither ready nor converged, unless
// Config.AllowEmpty is set.
//
// # On disk
//
// Only the agent writes its state directory (0700):
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
	"kedge/sync/agent/drain"
	"kedge/sync/agent/statedir"
	"kedge/sync/deploy"
	"kedge/sync/trace"
)

// DefaultStateDir is the default of Config.StateDir.
const DefaultStateDir = "/var/lib/kedge"

// Config configures an Agent.
type Config struct {
	Store kv.Store
	// Node is this node's name. Empty: the name that the store's agent on this machine has for it; if there is
	// none, or if it doesn't answer, the host's name up to its first dot.
	Node  string
	Stage string
	Roles []string // at least one
	// StateDir holds the lock, the last known state and every unit's journal; default DefaultStateDir.
	StateDir string
	Objects  *object.Client
	Bounds   policy.Bounds
	// Trust checks a manifest's signature before the manifest is used; nil: only the pointer's digest is checked.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// AllowOlderPins lets a pin name a release that is older than the one that this node has settled on. With it,
	// whoever writes pins can deploy anything that was ever signed. Without Trust it has no effect.
	AllowOlderPins bool
	// Maintenance switches the node's maintenance mode in the service catalog while a unit is drained. It is
	// retried until it succeeds, but a switch waits for it at most 5 s: an outage of the store must not stop a
	// boot. nil: nothing.
	Maintenance func(ctx context.Context, on bool, reason string) error
	// Snapshot returns the mirror's last snapshot of desired/. It is only called if the node boots while the store
	// is away and has no last known state. The pins are unknown then, and count as absent. nil: there is none.
	Snapshot func(ctx context.Context) ([]kv.Entry, error)
	// AllowEmpty lets a node without any unit be ready and converged. By default that counts as a mistake.
	AllowEmpty bool
	// Observe names units that the agent only observes: it fetches and verifies what they should run, compares it
	// with what is at dest, and reports the result. It changes nothing.
	Observe []string
	// Adopt lets every unit take over the tree that is at dest before its first release, like Record.Adopt.
	Adopt bool
	// Secrets reads the secrets that manifests refer to; nil: releases with secrets are refused.
	Secrets deploy.SecretReader
	// Listen is the address that serves /ready, /converged and /live, and, if it is a loopback address, also what
	// ListenStatus serves; empty: none. ":0" chooses a free port: see Agent.Addr.
	Listen string
	// ListenStatus is the address that also serves /status (JSON) and /metrics; empty: none.
	ListenStatus string
	// StartDelay is the upper limit of a random delay before each fetch, which spreads a large fleet's load.
	// Default 0.
	StartDelay time.Duration
	// VerifyEvery is how often live trees are checked against their indexes in the background; 0: never.
	VerifyEvery time.Duration
	// HashAlways makes the agent hash files of the running release before it shares them with the next, even if
	// they look untouched.
	HashAlways bool
	Version    string
	Metrics    *prometheus.Registry // nil: none
	// Trace sends the spans of deployments; nil: nothing is traced. The caller runs it.
	Trace *trace.Sender
	Log   *slog.Logger // nil: none

	uptime func() time.Duration // how long the machine has been up; tests have their own
}

// Agent makes one node converge. Create it with New and call Run once.
type Agent struct {
	c       Config  // Node changes at most once, under mu: see findName
	naming  *naming // nil: Config.Node was given
	started time.Time
	begun   time.Time // statedir.Dir.StartingSince
	booted  bool      // the machine had just booted when the agent started
	dir     *statedir.Dir
	// listener and statusListener are nil if there is no such address.
	listener, statusListener net.Listener
	metrics                  *metrics
	floors                   *deploy.Floors
	drained                  *drain.Tracker
	drift                    *destwatch.Watcher
	// fetching and ahead have room for one token each: units fetch one after another, which bounds memory and load,
	// and what is wanted now doesn't wait for what is fetched ahead. A slow fetch returns its token: see holdTurn.
	fetching, ahead chan struct{}

	changed   wait.Signal   // wakes the loop
	reportDue wait.Signal   // wakes report
	pulse     chan struct{} // answers Alive
	idle      chan struct{} // closed once
	converged chan struct{} // closed once

	snapshot sync.Once // starts useSnapshot

	mu      sync.Mutex
	cache   *cache.Cache
	making  map[*cache.Source]bool // whose folder keys are being made: see makeFolder
	units   map[deployments.UnitID]*unit
	onDisk  map[deployments.UnitID]bool // units with files from before the start
	ready   bool                        // the node was ready once
	joined  map[string]uint64           // by role, the number of its report; absent: not known yet
	ctx     context.Context
	workers sync.WaitGroup
}

// naming is the state of the search for the name of a node whose configuration has none.
type naming struct {
	host string // the host's own name
	// saved is the name that the store's agent had at an earlier start; empty: unknown. A name saved by another
	// host doesn't count: the disk may have been part of its image.
	saved string
}

// unit is one unit on this node. Agent.mu guards all fields but the first six.
type unit struct {
	id   deployments.UnitID
	log  *slog.Logger
	wake wait.Signal // makes the worker look at its goal
	// cancel ends the worker.
	cancel context.CancelFunc
	// observes is set if this node only observes the unit.
	observes bool

	// fetched is the number of bytes of the fetch under way.
	fetched atomic.Int64

	deploy *deploy.Unit // nil until the unit's state was opened

	desired
	observed
	reported
}

// desired is what the loop decided about a unit. Only the loop writes it.
type desired struct {
	decided  bool
	record   policy.Value[deployments.Record]
	pins     [2]policy.Value[deployments.Pin] // the unit's pin, this node's pin
	floor    int64                            // the highest generation that was acted on
	held     int64                            // the generation of a record that is not acted on; 0: none
	decision policy.Decision
	key      string // the failure key: identifies the request for the target
	cycle    string // the cycle of units that it is on; empty: none
	blocked  dependency
	retired  bool // its worker ends, and its files are removed
	replaced bool // another unit, which is desired, has its dest
	contends bool // a unit that is no longer desired is changing its dest
	goal     goal
}

// observed is the worker's present job, and what its jobs found.
type observed struct {
	busy     job
	phase    deployments.State // StateFetching or StateSwitching during a deployment
	announce *announcement     // of the deployment under way; nil: none was made
	progress artifact.Progress
	done     deployments.Pointer             // what the unit converged to in this process
	settled  deployments.Pointer             // what was recorded as settled on in this process
	toSettle deployments.Pointer             // to record as settled on once it runs, before any other deployment
	settleAt time.Time                       // when a release with a time ahead of the clock is recorded again
	future   *deploy.FutureError             // the time that settled claims
	ran      []deployments.Digest            // what it converged to in this process, newest last: see dependencyOf
	recover  bool                            // a deployment has to be recovered first
	forget   bool                            // all releases that failed may be retried
	trouble  error                           // why the last job failed; nil if it succeeded
	refused  map[deployments.Pointer]refusal // releases that can't succeed on this node
	retry    *wait.Backoff
	retryAt  time.Time   // before that no job is begun that can fail
	verifyAt time.Time   // zero: never
	dest     string      // dest of the running release
	claimed  string      // dest that was claimed last
	mark     deploy.Mark // what the last deployment left at dest
	foreign  string      // what another tool deployed to dest; empty: nothing
	drift    []string
	// unhealable is the drift that healing could not repair.
	unhealable []string
	compared   *deployments.Compared // on a node that observes
	looked     lookedAt
	again      *wait.Backoff       // until dest is compared again, on a node that observes
	health     deploy.Health       // health of watched
	watched    deployments.Pointer // the release whose health was watched last
}

// goal is what a unit's worker should reach. With the zero goal it only finishes what was begun.
type goal struct {
	run    deployments.Pointer // the release to deploy; zero: whatever runs stays
	stage  deployments.Pointer // the release to have ready on disk as well
	commit string              // the commit that asked for run
	key    string              // the failure key of run
	heal   bool                // repair drift
	adopt  bool                // take over the tree at dest if it equals the first release
	// observe is the release to compare with what is at dest, without changing anything of the unit. All other
	// fields are zero then.
	observe deployments.Pointer
	leave   bool // restore what was there before the first release
	stays   bool // what was there before the first release isn't restored any more
	settle  bool // once run is live, nothing older may follow: see observed.toSettle
}

// job is what a worker does at present.
type job struct {
	kind    jobKind
	release deployments.Pointer
	commit  string
	key     string
	adopt   bool
	leaves  bool // it may give way to goal.leave
	cancel  context.CancelCauseFunc
	span    trace.Context // zero: not traced
	root    trace.SpanID  // the root span of span's trace
}

// switches reports whether the job takes the unit out of service.
func (j job) switches() bool {
	return j.kind == jobDeploy || j.kind == jobRecover || j.kind == jobLeave
}

type jobKind string

const (
	jobNone         jobKind = ""
	jobRecover      jobKind = "recover" // finish what a crash interrupted
	jobForget       jobKind = "forget"  // end quarantine
	jobDeploy       jobKind = "deploy"
	jobStage        jobKind = "stage"
	jobHeal         jobKind = "heal"
	jobVerify       jobKind = "verify"
	jobProve        jobKind = "prove" // await the health of the running release, after a reboot
	jobObserve      jobKind = "observe"
	jobLook         jobKind = "look"          // look at dest before the first release
	jobLeave        jobKind = "leave"         // restore what was there before the first release
	jobForgetBefore jobKind = "forget-before" // discard what was there before the first release
	jobSettle       jobKind = "settle"        // record that nothing older may follow
)

// reported is the unit's last state, and since when it has been in that state.
type reported struct {
	state deployments.State
	since time.Time
}

// announcement is a switch that begins once the store holds a report that announces it.
type announcement struct {
	release deployments.Pointer
	made    chan struct{} // closed once the store holds the report
}

// begins reports whether the announced switch may begin, or nothing is announced.
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

// lookedAt is what was found at a release's dest while its unit ran nothing.
type lookedAt struct {
	release deployments.Digest
	found   policy.Found
}

// dependency is a unit that another one waits for; zero: none.
type dependency struct {
	unit  string
	why   string
	stuck bool // the wait doesn't end without a person
}

// refusal is an error that a retry doesn't cure.
type refusal struct {
	err  error
	dest string // the dest that another unit has; empty: there is another cause
}

// takenError means that another unit has the dest.
type takenError struct {
	dest string
	why  string
}

func (e *takenError) Error() string { return e.why }

// foreignError means that another tool has deployed to a unit's dest.
type foreignError struct{ dest, found string }

func (e *foreignError) Error() string {
	return fmt.Sprintf("something else has deployed to %s: %s", e.dest, e.found)
}

// state returns the unit's state on disk; zero until it was opened.
func (u *unit) state() deploy.State {
	if u.deploy == nil {
		return deploy.State{}
	}
	return u.deploy.State()
}

// Node returns this node's name. It may change once if Config gave none.
func (a *Agent) Node() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.c.Node
}

// maxRetry is the longest pause between two tries.
const maxRetry = 30 * time.Second

// newBackoff returns the pauses between tries after a failure of this node or the store.
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

// oneLine returns an error's text on one line of at most 300 bytes, for a report.
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
