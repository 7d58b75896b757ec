package deploy

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"time"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/deployments/wait"
	"kedge/sync/command"
)

// step is a step of a deployment. The journal contains its text.
type step string

const (
	stepDrain   step = "drain"
	stepPre     step = "pre"
	stepSwitch  step = "switch"
	stepPost    step = "post"
	stepHealth  step = "health"
	stepUndrain step = "undrain"
	stepSuccess step = "success"
	stepTidy    step = "tidy"

	stepBack        step = "back"
	stepBackPost    step = "back post"
	stepBackHealth  step = "back health"
	stepBackUndrain step = "back undrain"
	stepFailure     step = "failure"
)

var (
	forwardSteps = []step{stepDrain, stepPre, stepSwitch, stepPost, stepHealth, stepUndrain, stepSuccess, stepTidy}
	backSteps    = []step{stepBack, stepBackPost, stepBackHealth, stepBackUndrain, stepFailure}
)

// undoWithin bounds the time for undoing a deployment at once. Recover continues after that.
const undoWithin = 30 * time.Second

func (s step) known() bool        { return slices.Contains(forwardSteps, s) || s.goesBack() }
func (s step) goesBack() bool     { return slices.Contains(backSteps, s) }
func (s step) beforeSwitch() bool { return s == stepDrain || s == stepPre }

// next returns the step after s; "" after the last.
func (s step) next() step {
	for _, steps := range [][]step{forwardSteps, backSteps} {
		if i := slices.Index(steps, s); i >= 0 && i+1 < len(steps) {
			return steps[i+1]
		}
	}
	return ""
}

// next returns the step after d's; "" after the last. What was at dest before the first release has no manifest with
// commands and checks. If the deployment puts that back, the failure commands of its release start it, before the unit
// is in service.
func (d *deployment) next() step {
	switch {
	case d.Step == stepBack && d.Restored:
		return stepFailure
	case d.Step == stepFailure && d.Restored:
		return stepBackUndrain
	case d.Step == stepBackUndrain && (d.Restored || d.Leaves):
		return ""
	case d.Step == stepBack && d.Leaves:
		return stepBackUndrain
	case d.Step == stepDrain && d.Leaves:
		return stepBack
	}
	return d.Step.next()
}

// target returns the release that the deployment ends on: Release while it goes forward, From while it is undone, and
// Back after a failure. Zero: it ends on no release.
func (d *deployment) target() deployments.Pointer {
	switch {
	case !d.Step.goesBack():
		return d.Release
	case d.Leaves && (d.Restored || d.Step == stepBack):
		return deployments.Pointer{}
	case d.Fault == nil:
		return d.From
	default:
		return d.Back
	}
}

// advance moves the deployment under way on to its next step. After the last step, no deployment is under way any more.
// advance then drops the attempts of the release that the deployment ends on, and those of its own release unless it
// was undone.
func (j *journal) advance() {
	d := j.Deployment
	if next := d.next(); next != "" {
		d.enter(next)
		return
	}
	j.Deployment = nil
	if d.Fault != nil || d.Restored || !d.Step.goesBack() { // otherwise it was undone, and may be tried again
		j.forgetAttempts(d.Release.Digest)
	}
	if j.Running.IsZero() {
		j.Before = nil // nothing is left to put back
	}
	j.forgetAttempts(d.target().Digest)
}

// runSteps runs the steps of the deployment under way until its end. It alone runs steps, of new
// deployments and of interrupted ones. It returns nil after a success, or once the deployment is
// undone or Leave has ended. It returns *Failed if the deployment failed and has gone back. After
// any other error the deployment may still be under way.
func (u *Unit) runSteps(ctx context.Context) error {
	if err := u.resume(ctx); err != nil {
		return err
	}
	r, err := u.need(ctx, u.j.Deployment.Release)
	if err != nil {
		return err
	}
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	u.lock.noteBegun()
	u.progress(deployments.StateSwitching, meter.Progress{})
	for {
		if u.j.Deployment.Waits {
			if err := u.save(func(j *journal) { j.Deployment.Waits = false }); err != nil {
				return err
			}
		}
		d := u.j.Deployment
		u.at("before " + string(d.Step))
		began := time.Now()
		change, err := u.do(ctx, d)
		err = u.secrets.error(err)
		if u.c.Stepped != nil {
			u.c.Stepped(string(d.Step), began, err)
		}
		u.at("after " + string(d.Step))
		if err != nil {
			if err := u.handleStepError(ctx, d, err); err != nil {
				return err
			}
			continue
		}
		err = u.save(func(j *journal) {
			if change != nil {
				change(j)
			}
			j.advance()
		})
		if err != nil {
			return err
		}
		if u.j.Deployment != nil {
			continue
		}
		if d.Fault != nil {
			return d.failure()
		}
		if !d.Step.goesBack() {
			u.lock.noteDone(d.Release)
		}
		return nil
	}
}

// do runs d's step. change is what to change in the journal once the step is done; nil: nothing.
func (u *Unit) do(ctx context.Context, d *deployment) (change func(*journal), _ error) {
	r, err := u.need(ctx, d.Release)
	if err != nil {
		return nil, err
	}
	from, err := u.need(ctx, d.From)
	if err != nil {
		return nil, err
	}
	old := from // once the deployment goes back, the release that it ends on
	if d.Step.goesBack() {
		if old, err = u.need(ctx, d.target()); err != nil {
			return nil, err
		}
	}
	switch d.Step {
	case stepDrain:
		if err := u.drain(ctx, true); err != nil || from == nil {
			return nil, err // while nothing runs there is nobody to wait for
		}
		return nil, wait.For(ctx, r.Manifest.Drain)
	case stepPre:
		return nil, u.commands(ctx, d, r, from, r.Manifest.Commands.Pre)
	case stepSwitch:
		if d.Adopted && r.Manifest.Strategy != deployments.StrategyRelease {
			return setRunning(r), nil
		}
		return setRunning(r), u.switcher(r).Switch(ctx, r)
	case stepPost:
		if d.Adopted {
			return nil, nil
		}
		if err := u.commands(ctx, d, r, from, r.Manifest.Commands.Post); err != nil {
			return nil, err
		}
		u.at("hooks ran")
		return nil, u.recordAfter(ctx, r)
	case stepHealth:
		return u.setConfirmed, u.healthy(ctx, d, r, from)
	case stepUndrain:
		return clearDrained, u.drain(ctx, false)
	case stepSuccess:
		if d.Adopted {
			return nil, nil
		}
		err := u.commands(ctx, d, r, from, r.Manifest.Commands.Success)
		return nil, u.note(ctx, "a success command failed: those after it do not run, and the release stays live", err)
	case stepTidy:
		return nil, u.note(ctx, "could not remove old files: the next deployment tries again", u.tidy(r))
	}

	switch {
	case d.Step == stepFailure:
		return nil, u.failureCommands(ctx, d, r, old)
	case d.Step == stepBack && d.Leaves:
		return u.leave(ctx)
	case d.Step == stepBackUndrain && (old != nil || d.Restored || d.Fault == nil && u.j.Running.IsZero()):
		return clearDrained, u.drain(ctx, false)
	case d.Step == stepBack && old == nil && d.From.IsZero() && u.j.LastGood.IsZero():
		return u.restore(ctx, d, r)
	case old == nil:
		return nil, nil // there is no good release to go back to: the node stays out of service
	case d.Step == stepBack:
		if !d.Touched && u.j.Running == old.Pointer && u.switcher(old).IsLive(old) {
			return nil, u.recordBefore(ctx, old)
		}
		if err := u.switcher(old).SwitchBack(ctx, old, r, d.Dirty); err != nil {
			return nil, err
		}
		return setRunning(old), u.recordBefore(ctx, old)
	case d.Step == stepBackPost:
		if err := u.commands(ctx, d, old, r, old.Manifest.Commands.Post); err != nil {
			return nil, err
		}
		return nil, u.recordAfter(ctx, old)
	case d.Step == stepBackHealth:
		return u.setServing, u.healthy(ctx, d, old, r)
	}
	return nil, nil
}

// setRunning returns the change of the journal after a switch to r.
func setRunning(r *artifact.Release) func(*journal) {
	return func(j *journal) {
		j.Running, j.Version, j.Confirmed, j.Restored = r.Pointer, r.Manifest.Version, false, deployments.Digest{}
		j.HealthFailure = nil
		if j.Before != nil && !j.Before.restorableUnder(r) {
			j.Before = nil
		}
	}
}

// setConfirmed marks the running release as the one to go back to. Earlier failures stay in
// quarantine, as the same commit may ask for them again once a pin has ended.
func (u *Unit) setConfirmed(j *journal) {
	j.Confirmed, j.HealthFailure, j.LastGood, j.Proven = true, nil, j.Running, u.boot
}

// setServing does what setConfirmed does, for a deployment that has gone back, and records that its
// release serves again.
func (u *Unit) setServing(j *journal) {
	u.setConfirmed(j)
	j.Deployment.BackFailure = nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func clearDrained(j *journal) { j.Drained = false }

// note logs an error that doesn't stop a deployment, and returns nil. If ctx has ended, or the machine shuts down, it
// returns the error instead.
func (u *Unit) note(ctx context.Context, what string, err error) error {
	if err == nil || ctx.Err() != nil || u.ending() {
		return err
	}
	u.log.Error(what, "error", err)
	return nil
}

// need returns a release by its manifest on this node or, if that is lost, in storage; nil for the zero pointer.
func (u *Unit) need(ctx context.Context, p deployments.Pointer) (*artifact.Release, error) {
	if p.IsZero() {
		return nil, nil
	}
	if r, err := u.remembered(p); err == nil {
		return r, nil
	}
	raw, err := artifact.ReadManifest(ctx, u.c.Objects, p)
	if err != nil {
		return nil, err
	}
	return u.parse(p, raw)
}

// commands runs one list of r's commands; the first that fails ends it. other is the release for
// KEDGE_PREVIOUS; nil: there is none. It is the release before r or, if the deployment goes back to
// r, the one that failed or was undone. Failure commands run even if their secrets can't be read.
func (u *Unit) commands(
	ctx context.Context,
	d *deployment,
	r, other *artifact.Release,
	list []deployments.Command,
) error {
	if len(list) == 0 {
		return nil
	}
	env, err := u.withSecrets(ctx, u.env(d, r, other), r, duringDeployment)
	if err != nil && d.Step != stepFailure {
		return err
	}
	if err != nil {
		u.log.Error("failure commands run without their secrets", "error", err)
	}
	for i, c := range list {
		if run, err := u.mayRun(d, i, c); err != nil {
			return err
		} else if !run {
			continue
		}
		var stdin []byte
		if d.Step == stepSuccess || d.Step == stepFailure {
			stdin = u.deployLog.bytes()
		}
		if _, err := command.Run(ctx, u.log, c, env, stdin); err != nil {
			return err
		}
	}
	return nil
}

func (u *Unit) env(d *deployment, r, other *artifact.Release) command.Env {
	env := command.Env{
		Unit: u.c.ID, Node: u.c.Node(), Step: string(d.Step), Release: u.switcher(r).Dir(r), Dest: r.Manifest.Dest,
		Digest: r.Pointer.Digest, Version: r.Manifest.Version, Name: r.Manifest.Name, Commit: d.Commit, Run: d.Run,
		Vars: r.Manifest.Commands.Env, Mask: u.secrets.now(),
	}
	switch d.Step {
	case stepBackPost:
		env.Step = string(stepPost)
	case stepBackHealth:
		env.Step = string(stepHealth)
	}
	if other != nil {
		env.Previous = u.switcher(other).Dir(other)
	}
	if d.Fault != nil {
		env.Error = d.Fault.Reason
	} else if d.Leaves {
		env.Error = errLeft.Error()
	}
	return env
}

// tidy removes files that are no longer needed, after a success and after a failure. The release that failed last stays
// for inspection at least until another one succeeds.
func (u *Unit) tidy(r *artifact.Release) error {
	d := u.j.Deployment
	if err := u.removeOriginal(); err != nil {
		return err
	}
	if d.Fault == nil {
		return u.prune(r, r.Manifest.Keep, nil)
	}
	var failed []deployments.Digest
	for _, f := range u.j.Quarantined {
		if f.Digest != d.Release.Digest {
			failed = append(failed, f.Digest)
		}
	}
	return u.prune(r, r.Manifest.Keep, failed, d.Release.Digest, d.From.Digest)
}

// makeRoom removes all files of the unit that aren't needed from a full disk, so that r can be staged.
func (u *Unit) makeRoom(r *artifact.Release) error {
	keep := []deployments.Digest{r.Pointer.Digest}
	if d := u.j.Deployment; d != nil {
		keep = append(keep, d.From.Digest, d.Back.Digest)
	}
	return u.prune(r, 0, nil, keep...)
}

// prune removes the unit's releases, except those in keep, the running, last good and staged ones, and the first one
// while journal.Before is set. Under strategy release, the newest of the remaining releases stay as well: at most
// others of them, and none in drop.
func (u *Unit) prune(r *artifact.Release, others int, drop []deployments.Digest, keep ...deployments.Digest) error {
	for _, p := range []deployments.Pointer{u.j.Running, u.j.LastGood, u.j.Staged} {
		keep = append(keep, p.Digest)
	}
	if u.j.Before != nil {
		keep = append(keep, u.j.Before.First.Digest)
	}
	keep = slices.DeleteFunc(keep, deployments.Digest.IsZero)
	trees := keep
	if r.Manifest.Strategy == deployments.StrategyRelease { // its tree lies beside dest; see Observe
		trees = slices.DeleteFunc(slices.Clone(keep), func(d deployments.Digest) bool { return d == r.Pointer.Digest })
	}
	return errors.Join(u.switcher(r).Prune(r, others, keep, drop), artifact.PruneTrees(u.treesDir(), trees),
		artifact.PruneChanges(u.changesDir(), keep), artifact.PruneReleases(u.manifestsDir(), keep))
}

// transient reports whether an error of a switch is the machine's fault, not the release's.
func transient(err error) bool {
	for _, e := range []error{
		syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO, syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EAGAIN, exec.ErrNotFound,
		safefs.ErrUnsafe, // an administrator has to correct the machine's directories
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	// rsync(1), EXIT VALUES: file and socket I/O, its protocol stream and child processes, memory, signals,
	// timeouts. 23 and 24, partial transfers, are not among them: they mean that files can't be written.
	var exit *exec.ExitError
	return errors.As(err, &exit) && slices.Contains([]int{10, 11, 12, 14, 20, 22, 30, 35}, exit.ExitCode())
}

// short returns an error's text, of at most 2000 bytes, for the journal and for KEDGE_ERROR.
func short(err error) string { return safetext.Cut(err.Error(), 2000) }
