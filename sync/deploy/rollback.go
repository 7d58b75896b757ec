package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kedge/artifact"
	"kedge/deployments"
)

// fault says why a deployment failed.
type fault struct {
	Step               step   `json:"step"`
	Reason             string `json:"reason"`
	Check              string `json:"check,omitempty"` // the health check that failed; empty: no check did
	FailureCommandsRan bool   `json:"told,omitempty"`  // the release's failure commands have run already
	// At is when the deployment failed; zero in journals of earlier versions.
	At time.Time `json:"at,omitzero"`

	err error // the error that Reason quotes; nil after a restart
}

func (f *fault) cause() error {
	if f.err != nil {
		return f.err
	}
	return errors.New(f.Reason)
}

// failure returns the error of a finished deployment that failed.
func (d *deployment) failure() *Failed {
	f := &Failed{Release: d.Release, Back: d.Back, Step: string(d.Fault.Step), Err: d.Fault.cause()}
	f.Reason = deployments.ReasonQuarantined
	f.Facts = deployments.Facts{"step": f.Step, "error": d.Fault.Reason}
	if d.Fault.Check != "" {
		f.Reason = deployments.ReasonUnhealthy
		f.Facts["check"] = d.Fault.Check
	}
	return f
}

// reverse makes d undo itself without a failure. If no pre commands were begun and dest is whole, only the drain has to
// be undone.
func (d *deployment) reverse() {
	if d.Step == stepDrain && !d.Touched {
		d.enter(stepBackUndrain)
	} else {
		d.enter(stepBack)
	}
}

// backName names the release that the deployment goes back to if it fails, or says that there is none.
func (d *deployment) backName() string {
	if d.Back.IsZero() {
		return "no release: no other is known to be good here"
	}
	return d.Back.String()
}

// fail quarantines the deployment's release. From then on the deployment goes back.
func (j *journal) fail(err error) {
	d := j.Deployment
	if len(j.Quarantined) >= maxQuarantined {
		j.Quarantined = slices.Delete(j.Quarantined, 0, 1)
	}
	now := time.Now().UTC()
	j.Quarantined = append(j.Quarantined, Failure{
		Digest: d.Release.Digest, Key: d.Key, Step: string(d.Step), Back: d.Back, Reason: short(err), At: now,
	})
	d.Fault = &fault{Step: d.Step, Reason: short(err), At: now, err: err}
	if failed := new(checkError); errors.As(err, &failed) {
		d.Fault.Check = failed.check
	}
	if errors.Is(err, artifact.ErrUntouched) {
		d.Touched = d.Dirty
	}
	d.enter(stepBack)
}

// handleStepError handles the error of d's step. It returns nil if the deployment now goes back: runSteps continues.
// It returns an error if the deployment was undone, or will be finished later.
func (u *Unit) handleStepError(ctx context.Context, d *deployment, err error) error {
	s := d.Step
	stopped := ctx.Err() != nil
	switch {
	case (s == stepBackPost || s == stepBackHealth) && !stopped && !u.ending():
		return u.stayOutOfService(ctx, d, err)
	case s.goesBack(), s == stepUndrain, s == stepSuccess, s == stepTidy, stopped && !s.beforeSwitch(),
		errors.Is(err, ErrSecretUnavailable) && !s.beforeSwitch():
		if !stopped && !d.owner().IsZero() && !u.ending() {
			err = errors.Join(err, u.save(func(j *journal) { j.Deployment.wait() }))
		}
		return fmt.Errorf("the deployment of %s is unfinished in step %s, and goes on at the next try: %w", d.Release, s, err)
	case stopped, s == stepDrain, s == stepSwitch && transient(err), errors.Is(err, ErrSecretUnavailable):
		u.log.Warn("undoing the deployment", "release", d.Release.String(), "step", string(s), "error", err)
		if failed := u.save(func(j *journal) { j.Deployment.reverse() }); failed != nil {
			return errors.Join(err, failed)
		}
		ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), undoWithin,
			fmt.Errorf("it took longer than %s", undoWithin))
		defer cancel()
		if failed := u.runSteps(ctx); failed != nil {
			return fmt.Errorf("deploying %s was stopped in %s: %w; undoing it failed, and is tried again: %w",
				d.Release, s, err, failed)
		}
		return fmt.Errorf("deploying %s was stopped in %s, and undone: %w", d.Release, s, err)
	case u.ending():
		return fmt.Errorf("deploying %s stopped in %s as the machine shuts down, and is left to the agent's next start: %w",
			d.Release, s, err)
	default:
		u.log.Error("the deployment failed", "release", d.Release.String(), "step", string(s),
			"going_back_to", d.backName(), "error", err)
		return u.save(func(j *journal) { j.fail(err) })
	}
}

// healthFailure says why the release that a deployment went back to, or the running release, isn't healthy.
type healthFailure struct {
	Step  step      `json:"step"`
	Check string    `json:"check,omitempty"` // the check that failed
	Error string    `json:"error"`
	Since time.Time `json:"since"`
}

// health returns b as a Health. It is healthy if b is nil.
func (b *healthFailure) health() Health {
	if b == nil {
		return Health{}
	}
	facts := deployments.Facts{"step": string(b.Step), "error": b.Error}
	if b.Check != "" {
		facts["check"] = b.Check
	}
	return Health{Unhealthy: true, Reason: deployments.ReasonUnhealthy, Facts: facts, Since: b.Since}
}

// stayOutOfService handles an error of the post commands or checks of the release that the unit went back to, and
// returns an error. The unit stays out of service; Recover tries the commands and checks again until they pass. The
// first time, stayOutOfService also runs the failure commands of a release that failed, so that people learn of it.
func (u *Unit) stayOutOfService(ctx context.Context, d *deployment, cause error) error {
	u.log.Error("the release that the unit went back to does not serve: its commands and checks will be tried again",
		"release", d.target().String(), "step", string(d.Step), "error", cause)
	r, err := u.need(ctx, d.Release)
	if err != nil {
		return errors.Join(cause, err)
	}
	old, err := u.need(ctx, d.target())
	if err != nil {
		return errors.Join(cause, err)
	}
	if err := u.failureCommands(ctx, d, r, old); err != nil {
		return errors.Join(cause, err)
	}
	err = u.save(func(j *journal) {
		d := j.Deployment
		now := &healthFailure{Step: d.Step, Error: short(cause), Since: time.Now().UTC()}
		if d.BackFailure != nil {
			now.Since = d.BackFailure.Since
		}
		if failed := new(checkError); errors.As(cause, &failed) {
			now.Check = failed.check
		}
		d.BackFailure, j.Confirmed = now, false
		// This try was not cut off: forget earlier cut-offs, unless there were so many that the commands are left out.
		if a := j.attempt(d.owner(), stepBackPost); a.CutOff < u.maxCutOff {
			j.forgetAttempt(a.Digest, a.Step)
		}
		if d.Fault != nil {
			f := *d.Fault
			f.FailureCommandsRan = true
			d.Fault = &f
		}
		if u.switcher(old).IsLive(old) {
			d.enter(stepBackPost)
		} else {
			d.enter(stepBack)
		}
		d.wait()
	})
	if err != nil {
		return errors.Join(cause, err)
	}
	return fmt.Errorf("release %s, which %s went back to, does not serve, and is tried again: %w",
		d.target().Short(), u.name(), cause)
}

// failureCommands runs, once, the failure commands of a deployment that failed, or of a release that is left, and then
// removes old releases. After any other deployment it does nothing.
func (u *Unit) failureCommands(ctx context.Context, d *deployment, r, old *artifact.Release) error {
	if d.Fault == nil && !d.Leaves || d.Fault != nil && d.Fault.FailureCommandsRan {
		return nil
	}
	at := *d
	at.Step = stepFailure // even if the commands run before that step
	if err := u.note(ctx, "a failure command failed: those after it do not run",
		u.commands(ctx, &at, r, old, r.Manifest.Commands.Failure)); err != nil {
		return err
	}
	return u.note(ctx, "could not remove old files: the next deployment tries again", u.tidy(r))
}
