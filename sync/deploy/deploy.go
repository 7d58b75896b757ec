// Package deploy brings releases of one unit to life on one node, whole or not at all, through crashes and power cuts.
//
// # Steps
//
// A deployment goes through these steps. From drain on, the journal names each step before it is
// begun. The journal is replaced in one rename, so that after a kill it is known which step may be
// half done. Each step may be done again.
//
//	stage      the release lies complete and verified on disk; nothing that runs is touched
//	drain      /ready turns 503, Consul's maintenance mode goes on; then the drain time, unless nothing ran
//	pre        commands
//	switch     dest holds the release: the point from which a cut-off deployment is finished, not undone
//	post       commands
//	health     the checks; passing them confirms the release
//	undrain    back in service
//	success    commands, with the deployment's log on stdin
//	tidy       old releases go
//
// If a pre or post command, the switch or a check fails, the deployment goes back. The digest is
// quarantined, dest is switched to the last good release, and that release's post commands run so
// that it serves again. Once its health checks pass, the node is back in service, and the failed
// release's failure commands run. While the good release's own commands or checks fail, the unit
// stays out of service, and Recover tries them again. If a first release fails, what was at dest
// before it is put back. The failure commands then run before the unit is in service again, because
// no manifest says how to start what was there. See Leave for a first release that fails on other
// nodes. With nothing to go back to, dest stays as it is, and the unit out of service. A stage or
// drain that fails, or a switch that fails because of the machine, such as its disk, leaves things
// as they were, without a quarantine. A secret that can't be read is no fault of the release
// either: the deployment is undone or, after the switch, waits for the secret.
//
// # Cut off
//
// A deployment is cut off if the agent or the machine ends during it. Recover undoes a deployment
// that was cut off before its switch, and finishes one that was cut off later, by the same code. If
// a step's end isn't journalled, its commands are run again from the first: they must allow for
// that. A command with once that was begun is left out. Processes that the cut-off command left
// running are ended first (command.EndLeftovers). Post commands are also run again if the machine
// was restarted before the health checks had passed, because services that they had started are
// gone. If the agent or the machine ended three times in one step from pre to health, the release
// counts as failed: it may be the cause. See maxCutOff for the other steps.
//
// While systemd shuts the machine down, no failure is a release's: the deployment is undone, or left to the next start.
//
// When Deploy's context ends before the switch, the deployment is undone at once; what isn't undone within 30 s is left
// to Recover. When the context ends later, the deployment is left to Recover or the next Deploy. A Deploy of another
// release supersedes it.
//
// Retry or 16 newer failures end a quarantine: the success of another release says nothing of the
// failed one.
//
// # On disk
//
// The agent alone writes a unit's directory, STATE/units/STAGE/ROLE/UNIT (0700):
//
//	journal.json               what runs, what is good, what is quarantined, and the deployment under way
//	journal.json.bad           a journal that could not be used; for people
//	manifests/DIGEST.json      manifests of what runs, is good, is staged, so that going back needs no network
//	trees/DIGEST/              unpacked trees of the rsync and mv strategies, and those that Observe compares
//	before/                    under rsync and mv, to put back what was at dest before the first release
//	made/DIGEST.made           what the commands of a release made of its tree, under strategy rsync
//
// What a release's pre and post commands made, changed or removed in its tree is recorded after post, and is the
// release's from then on: Verify doesn't name it, and Heal brings it back. A part that only the commands could make
// again, as the content of a directory that is gone, is named and stays away until the release is deployed again.
//
// The node's version floors are kept in one file for all units: see Floors.
//
// Beside dest lies .NAME.kedge-lock: one process at a time deploys to a dest, kedge run included. Strategy release
// keeps the rest in DEST.releases/ and DEST.shared/ (package artifact). Strategy mv renames within dest's
// directory, where it uses .NAME.kedge-DIGEST and .NAME.kedge-failed.
//
// # stretcher
//
// Once deploys like stretcher: the same manifest leaves the same files and modes, runs the same commands in the
// same order, and gives success and failure commands the log on stdin. It differs where stretcher has a trap:
// deployments/migrating/differences.md lists how, and why.
package deploy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
)

// Config configures a Unit.
type Config struct {
	ID deployments.UnitID
	// Node returns this node's current name. It must not be nil if commands or checks are to run.
	Node func() string
	// Dir is the unit's own directory in the agent's state: STATE/units/STAGE/ROLE/UNIT. It contains the journal.
	Dir string
	// Socket is the agent's socket, by which kedge run detects that an agent manages a dest; empty: there is no
	// agent.
	Socket  string
	Objects *object.Client
	Bounds  policy.Bounds
	// HashAlways is artifact.SwitcherConfig.HashAlways.
	HashAlways bool
	// Trust checks a manifest's bytes before they are used; nil: the pointer's digest is enough.
	Trust func(ctx context.Context, p deployments.Pointer, manifest []byte) error
	// Floors are the node's version floors; nil: only the unit's journal has one.
	Floors *Floors
	// Older reports whether a pointer may name a release that was made before the node's version floor. It is used only
	// if Trust is set. Nil: no pointer may.
	Older func(p deployments.Pointer) bool
	// Secrets reads what manifests name by reference; nil: a release with secrets is refused.
	Secrets SecretReader
	// Drain is called with true in the step drain, before the release's drain time, and with false
	// to put the unit back in service. It switches /ready and Consul's maintenance mode. It may be
	// called again with the same value. May be nil.
	Drain func(ctx context.Context, on bool) error
	// Claim returns an error if a release may not have its tree at dest; otherwise it reserves dest for this unit.
	// Nil: every dest is allowed.
	Claim func(dest string) error
	// Progress is called with StateFetching while a release is fetched, also outside a deployment, and with
	// StateSwitching when the steps from drain on begin or resume. May be nil.
	Progress func(deployments.State, meter.Progress)
	// Stepped is called after each step of a deployment from drain on, with the step's error; may be nil.
	Stepped func(step string, began time.Time, err error)
	// RsyncVerbose are rsync's options for its output; nil: -v.
	RsyncVerbose []string
	Log          *slog.Logger // nil: discard; if there are several units, its attributes should name the unit
}

// Unit deploys releases of one unit on this node, one at a time. Only one goroutine may call its methods. State is the
// exception: any goroutine may call it.
type Unit struct {
	c         Config
	log       *slog.Logger // Config.Log, also writing to deployLog, with secrets masked
	deployLog *deploymentLog
	// secrets are values that the unit's log, journal and errors must not show.
	secrets *secrets

	// lock is held while this unit writes to a dest; else nil.
	lock *destLock
	// cutOff is set by Open if the unfinished deployment's commands may still run, until resume has ended them.
	cutOff bool
	// at is called at every point where a test may kill the process.
	at func(point string)
	// boot is the ID of this boot. ending reports whether the machine shuts down. Tests replace both.
	boot   string
	ending func() bool
	// maxCutOff and manifestWithin are the constants of those names; tests replace them.
	maxCutOff      int
	manifestWithin time.Duration

	mu sync.Mutex // guards j, which State reads in any goroutine and the other methods write in one
	j  journal
}

// State is the unit's state on disk, from the journal.
type State struct {
	Running deployments.Pointer // the release that was switched to last; zero: none, or it is unknown
	Version string              // Running's, from its manifest
	// LastGood is the release that passed its health checks last or, after a damaged journal, the one that dest leads to.
	// Another release that fails goes back to it.
	LastGood deployments.Pointer
	Staged   deployments.Pointer
	// Confirmed is set if Running passed its health checks.
	Confirmed bool
	// Proven is set if Running passed its health checks in this boot of the machine: see Unit.Prove.
	Proven      bool
	Quarantined []deployments.Digest
	// Failures say why, and under which key, each of Quarantined failed.
	Failures []Failure
	// Drained is set from just before Drain(true) until Drain(false) has succeeded.
	Drained bool
	// Unfinished is set while a deployment is under way, or waits for Recover or the next Deploy to finish it.
	Unfinished bool
	// RollingBack is set while a deployment that failed goes back. It is also set while the release that an undone
	// deployment went back to isn't healthy.
	RollingBack bool
	// FailedAt is when the deployment under way failed; zero: it didn't fail, there is none, or an earlier version
	// wrote the journal.
	FailedAt time.Time
	// Health is what KeepHealth last stored of the running release. While a deployment is under way, it is instead the
	// health of the release that the deployment went back to; Recover tries an unhealthy release again. The zero Health
	// is healthy.
	Health Health
	// Leavable is set if a release runs, and what was at dest before the first one is kept for
	// Leave. Leaving is set while Leave puts it back. Restored is the release that was left or
	// failed, while dest holds again what was there before it.
	Leavable, Leaving bool
	Restored          deployments.Digest
	// Compared is how the tree at dest differed from the first release, if Request.Adopt asked for a comparison. It is
	// nil if nothing was compared, and once another deployment has begun.
	Compared *deployments.Compared
	// RecoversTo is the release that runs after Recover if that doesn't fail; zero: none, or no deployment is
	// unfinished.
	RecoversTo deployments.Pointer
}

// Empty reports whether the unit has no running and no last good release, no unfinished deployment, no failed release,
// and no drain on this node. It may have a staged release.
func (s State) Empty() bool {
	return s.Running.IsZero() && s.LastGood.IsZero() && !s.Unfinished && !s.Drained && len(s.Failures) == 0
}

// Open opens a unit's state. It runs no command and changes no dest; call Recover next.
func Open(c Config) (*Unit, error) {
	if c.Log == nil {
		c.Log = quiet()
	}
	text, hidden := new(deploymentLog), new(secrets)
	u := &Unit{
		c: c, log: slog.New(hidden.log(tee{next: c.Log.Handler(), text: text})), deployLog: text, secrets: hidden,
		at: func(string) {}, boot: BootID(), ending: shuttingDown, maxCutOff: maxCutOff,
		manifestWithin: manifestWithin,
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("opening the state of %s: %w", u.name(), err)
	}
	if err := u.load(); err != nil {
		return nil, err
	}
	if u.cutOff = u.j.Deployment != nil; !u.cutOff {
		if err := u.removeOriginal(); err != nil {
			u.log.Warn("could not remove the copy of what was at dest before kedge, which is no longer needed: "+
				"trying again after the next deployment or start", "error", err)
		}
	}
	if err := u.keepFloor(); err != nil {
		return nil, err
	}
	return u, nil
}

// State returns the unit's state.
func (u *Unit) State() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	s := State{
		Running:    u.j.Running,
		Version:    u.j.Version,
		Confirmed:  u.j.Confirmed,
		LastGood:   u.j.LastGood,
		Staged:     u.j.Staged,
		Drained:    u.j.Drained,
		Unfinished: u.j.Deployment != nil,
		Compared:   u.j.Compared,
		Proven:     u.j.Confirmed && u.j.Proven == u.boot,
		Leavable:   u.j.Before != nil && !u.j.Running.IsZero(),
		Restored:   u.j.Restored,
	}
	if d := u.j.Deployment; d != nil {
		s.Leaving, s.RollingBack = d.Leaves, d.Fault != nil || d.BackFailure != nil
		if s.RecoversTo = d.target(); d.Step.beforeSwitch() {
			s.RecoversTo = d.From
		}
		if d.Fault != nil {
			s.FailedAt = d.Fault.At
		}
		s.Health = d.BackFailure.health()
	} else {
		s.Health = u.j.HealthFailure.health()
	}
	for _, f := range u.j.Quarantined {
		s.Quarantined = append(s.Quarantined, f.Digest)
	}
	s.Failures = u.j.Quarantined // never changed in place: see save
	return s
}

// Recover goes on with an unfinished deployment, by the same code as Deploy: it undoes one whose
// switch had not begun, and finishes any other. A drained unit is first drained again, unless its
// drain was about to end. *Failed means that the deployment failed and went back. After any other
// error the deployment may still be unfinished: call Recover again.
func (u *Unit) Recover(ctx context.Context) (err error) {
	defer func() { err = u.secrets.error(err) }()
	d := u.j.Deployment
	if u.j.Drained && (d == nil || d.Step != stepUndrain && d.Step != stepBackUndrain) {
		// The process that drained the unit may have ended.
		if err := u.drain(ctx, true); err != nil {
			u.log.Warn("could not take the node out of service again after a restart: going on all the same",
				"error", err)
		}
	}
	if d == nil {
		return nil
	}
	u.deployLog.reset()
	u.log.Warn("going on with an unfinished deployment", "release", d.Release.String(), "step", string(d.Step))
	if d.Step.beforeSwitch() {
		// resume comes before the step changes, as it finds the step's commands by their mark.
		if err := u.resume(ctx); err != nil {
			return err
		}
	}
	if d := u.j.Deployment; d.Step.beforeSwitch() {
		if err := u.save(func(j *journal) { j.Deployment.reverse() }); err != nil {
			return err
		}
	}
	return u.runSteps(ctx)
}

// Stage puts the release of p on disk, ready to switch to, without touching what runs. If the disk is full, it removes
// the unit's old releases and tries once more.
func (u *Unit) Stage(ctx context.Context, p deployments.Pointer) (err error) {
	defer func() { err = u.secrets.error(err) }()
	r, err := u.admit(ctx, p)
	if err != nil {
		return err
	}
	return u.stage(ctx, r)
}

func (u *Unit) stage(ctx context.Context, r *artifact.Release) error {
	if r.Manifest.Src != "" && r.Manifest.Strategy == deployments.StrategyRsync {
		if _, err := exec.LookPath("rsync"); err != nil {
			return fmt.Errorf("release %s needs rsync(1) on this node: %w", r.Pointer, err)
		}
	}
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	progress := func(p meter.Progress) { u.progress(deployments.StateFetching, p) }
	progress(meter.Progress{})
	u.at("before stage")
	if err := u.remember(r); err != nil {
		return err
	}
	opt := artifact.StageOptions{Base: u.j.Running, Progress: progress}
	err = u.switcher(r).Stage(ctx, r, opt)
	if errors.Is(err, syscall.ENOSPC) {
		u.log.Warn("the disk is full: removing old and failed releases, and trying again",
			"release", r.Pointer.String(), "error", err)
		if failed := u.makeRoom(r); failed != nil {
			u.log.Error("could not remove old releases: trying again all the same", "error", failed)
		}
		err = u.switcher(r).Stage(ctx, r, opt)
	}
	if err != nil {
		return err
	}
	u.at("after stage")
	if u.j.Staged == r.Pointer {
		return nil
	}
	return u.save(func(j *journal) { j.Staged = r.Pointer })
}

// Request describes a deployment: its release, who asked for it, and under which conditions.
type Request struct {
	Release deployments.Pointer
	// Commit is the Git commit; commands see it.
	Commit string
	// Key identifies the request: a generation of a record, or a pin. It is journalled with a failure, so that the
	// caller can tell whether the same request failed before.
	Key string
	// Adopt lets the unit take over the tree at dest before the first release, if artifact.Switcher.Compare finds no
	// difference. Its health is then checked, and no commands run except failure commands.
	Adopt bool
	// MayLeave keeps what was at dest before the unit's first release, so that Leave can put it back. ForgetBefore
	// discards it, and so does the switch to a release with another dest or strategy.
	MayLeave bool
}

// Deploy converges to asked.Release, here p, by the package's steps. It first finishes an
// unfinished deployment of p, or rollback to p, and does nothing more if p is then live and
// confirmed. *Failed means that the unit went back from Failed.Release, which is quarantined. That
// release is p or, if Deploy finished a rollback to p, the one rolled back. ErrQuarantined is returned
// until Retry. ErrRefused, deployments.ErrDigest and the error of a bad signature are returned
// until p, or something on this node, changes. Any other error may be transient (network, storage,
// disk): try again. A cancelled ctx stops Deploy as soon as that is safe. Before the switch,
// everything is left as it was. After it, the next Recover or Deploy finishes the deployment.
func (u *Unit) Deploy(ctx context.Context, asked Request) (err error) {
	defer func() { err = u.secrets.error(err) }()
	p := asked.Release
	u.deployLog.reset()
	if d := u.j.Deployment; d != nil && (d.Release == p || d.Step.goesBack() && d.target() == p) {
		if err := u.runSteps(ctx); err != nil {
			return err
		}
	}
	if u.converged(p) {
		return nil
	}
	if u.j.isQuarantined(p) {
		return fmt.Errorf("release %s: %w", p, ErrQuarantined)
	}
	r, err := u.admit(ctx, p)
	if err != nil {
		return err
	}
	return u.deploy(ctx, r, asked)
}

func (u *Unit) deploy(ctx context.Context, r *artifact.Release, asked Request) error {
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	u.log.Info("deploying", "release", r.Pointer.String(), "version", r.Manifest.Version)
	if err := u.stage(ctx, r); err != nil {
		return err
	}
	if err := u.resume(ctx); err != nil {
		return err
	}
	if _, err := u.readSecrets(ctx, r, 0); err != nil {
		return err // nothing is changed for a release whose commands can't run
	}
	var compared *deployments.Compared
	if asked.Adopt {
		if compared, err = u.adoptable(ctx, r); err != nil {
			return err
		}
	}
	kept, err := u.keepBefore(ctx, r, asked.MayLeave)
	if err != nil {
		return err
	}
	if err := u.recordBefore(ctx, r); err != nil {
		return err
	}
	err = u.save(func(j *journal) {
		d := &deployment{Release: r.Pointer, Commit: asked.Commit, Key: asked.Key}
		j.Compared, j.Before = compared, kept
		if other := j.Deployment; other != nil {
			u.log.Warn("superseding a deployment under way", "release", other.Release.String(), "step", string(other.Step))
			d.Touched, d.Dirty = other.Touched, other.Touched
		}
		if d.From = j.Running; j.isQuarantined(j.Running) {
			d.From = j.LastGood // a release that failed here is nothing to go back to, even if dest holds it
		}
		if j.LastGood.Digest != r.Pointer.Digest {
			d.Back = j.LastGood
		}
		j.Deployment = d
		if compared != nil && compared.Adopted {
			d.Adopted = true
			d.enter(stepSwitch)
			d.Touched = d.Dirty || r.Manifest.Strategy == deployments.StrategyRelease
			return
		}
		d.enter(stepDrain)
		j.Drained = true
	})
	if err != nil {
		return err
	}
	u.at("begun")
	return u.runSteps(ctx)
}

// converged reports whether there is nothing to do for p.
func (u *Unit) converged(p deployments.Pointer) bool {
	if u.j.Running.Digest != p.Digest || !u.j.Confirmed || u.j.Deployment != nil {
		return false
	}
	r, err := u.remembered(u.j.Running)
	return err == nil && u.switcher(r).IsLive(r)
}

// liveRelease returns the running release; nil if nothing runs, or if a deployment is under way.
func (u *Unit) liveRelease() (*artifact.Release, error) {
	if u.j.Deployment != nil {
		return nil, nil
	}
	return u.remembered(u.j.Running)
}

// name returns the unit's name for people: "kedge run" for a unit without an ID.
func (u *Unit) name() string {
	if u.c.ID == (deployments.UnitID{}) {
		return "kedge run"
	}
	return u.c.ID.String()
}

func (u *Unit) progress(s deployments.State, p meter.Progress) {
	if u.c.Progress != nil {
		u.c.Progress(s, p)
	}
}

func (u *Unit) drain(ctx context.Context, on bool) error {
	if u.c.Drain == nil {
		return nil
	}
	if err := u.c.Drain(ctx, on); err != nil {
		return fmt.Errorf("turning the drain of %s %s: %w", u.name(), map[bool]string{true: "on", false: "off"}[on], err)
	}
	return nil
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }
