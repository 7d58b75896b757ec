package deploy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"kedge/deployments"
	"kedge/sync/command"
)

const (
	// maxCutOff is how many times a step with an owner (see deployment.owner) may be cut off. The last of them makes
	// the deployment fail. In the step success, and on the way back, the step's commands are left out instead. A step
	// is cut off if the agent or the machine ends during it, but not while it waits for its next try.
	maxCutOff = 3
	// maxAttempts bounds journal.Attempts; the oldest entries are dropped.
	maxAttempts = 32
)

// attempt is what the journal keeps of a release's step, if the step was cut off or began a command with once.
type attempt struct {
	Digest deployments.Digest `json:"digest"`
	Step   step               `json:"step"`
	CutOff int                `json:"cut_off,omitempty"` // how many times; 0: it only began commands with once
	// Begun are the indexes of commands in the step's list that must not be run again.
	Begun []int `json:"begun,omitempty"`
}

// attempt returns the journal's entry for a step of a release; a new one if there is none.
func (j *journal) attempt(digest deployments.Digest, s step) attempt {
	for _, a := range j.Attempts {
		if a.Digest == digest && a.Step == s {
			return a
		}
	}
	return attempt{Digest: digest, Step: s}
}

// setAttempt replaces the journal's entry for the step of a by a, as the newest entry.
func (j *journal) setAttempt(a attempt) {
	j.forgetAttempt(a.Digest, a.Step)
	j.Attempts = append(j.Attempts, a)
	if len(j.Attempts) > maxAttempts {
		j.Attempts = slices.Delete(j.Attempts, 0, 1)
	}
}

// forgetAttempt removes the journal's entry for a step of a release.
func (j *journal) forgetAttempt(digest deployments.Digest, s step) {
	j.Attempts = slices.DeleteFunc(j.Attempts, func(a attempt) bool { return a.Digest == digest && a.Step == s })
}

// forgetAttempts removes the journal's entries for a release.
func (j *journal) forgetAttempts(digest deployments.Digest) {
	j.Attempts = slices.DeleteFunc(j.Attempts, func(a attempt) bool { return a.Digest == digest })
}

// owner returns the release against which a cut-off of the current step counts. It is the release whose commands or
// checks the step runs, or to which the step switches. Zero: cut-offs of the step aren't counted.
func (d *deployment) owner() deployments.Digest {
	switch d.Step {
	case stepPre, stepSwitch, stepPost, stepHealth, stepSuccess, stepFailure:
		return d.Release.Digest
	case stepBackPost, stepBackHealth:
		return d.target().Digest
	}
	return deployments.Digest{}
}

// wait marks the current step as waiting for its next try, if cut-offs of it count.
func (d *deployment) wait() { d.Waits = !d.owner().IsZero() }

// resume prepares the deployment that Open found, so that it can continue; later calls do nothing.
// It ends processes that the deployment's command left running, and counts the step as cut off
// unless the step only waited: see maxCutOff. After a reboot during the health checks, it sets the
// step to the post commands again, because what those had started was ended.
func (u *Unit) resume(ctx context.Context) error {
	d := u.j.Deployment
	if !u.cutOff || d == nil {
		return nil
	}
	n, err := command.EndLeftovers(ctx, d.Run)
	if err != nil {
		return err
	}
	if n > 0 {
		u.log.Warn("ended processes of a command that was cut off", "step", string(d.Step), "processes", n)
	}
	again := map[step]step{stepHealth: stepPost, stepBackHealth: stepBackPost}[d.Step]
	if d.Boot == u.boot {
		again = ""
	}
	err = u.save(func(j *journal) {
		d := j.Deployment
		a := j.attempt(d.owner(), d.Step)
		a.CutOff++
		switch {
		case a.Digest.IsZero(), d.Waits:
		case a.CutOff >= u.maxCutOff && !d.Step.goesBack() && d.Step != stepSuccess:
			err := fmt.Errorf("the agent or the machine stopped %d times during this step", a.CutOff)
			u.log.Error("the deployment failed", "release", d.Release.String(), "step", string(d.Step),
				"going_back_to", d.backName(), "error", err)
			j.fail(err)
			return
		default:
			j.setAttempt(a)
		}
		if again != "" {
			u.log.Info("the machine was restarted: running the post commands again", "release", d.target().String(),
				"step", string(again))
			d.enter(again)
		}
		d.wait() // the next start must not count this cut-off again
	})
	if err == nil {
		u.cutOff = false
	}
	return err
}

// mayRun reports whether to run the command at a place in the step's list. It returns false if the step was cut off too
// often, or if the command has once and was begun before. Before it returns true for a command with once, it records in
// the journal that the command was begun.
func (u *Unit) mayRun(d *deployment, place int, c deployments.Command) (bool, error) {
	a := u.j.attempt(d.owner(), d.Step)
	switch {
	case a.CutOff >= u.maxCutOff:
		u.log.Error("a command is skipped, as the agent or the machine stopped too often during this step: "+
			"see why, and run it by hand if it is needed",
			"release", d.Release.String(), "step", string(d.Step), "command", c.Run, "times", a.CutOff)
		return false, nil
	case slices.Contains(a.Begun, place):
		u.log.Warn("a command with once is not run again, though it may have been cut off: see whether it did its work, "+
			"and run it by hand if it didn't",
			"release", d.Release.String(), "step", string(d.Step), "command", c.Run)
		return false, nil
	case !c.Once:
		return true, nil
	}
	a.Begun = append(slices.Clip(a.Begun), place)
	return true, u.save(func(j *journal) { j.setAttempt(a) })
}

// StageFailed runs the failure commands of a release that could not be staged because of cause. It does so once while
// the request stays the same, though staging is tried again and again. It returns cause, joined with an error of the
// journal. It runs nothing if the manifest wasn't admitted, or if ctx has ended.
func (u *Unit) StageFailed(ctx context.Context, q Request, cause error) error {
	told := q.Release.Digest.String() + " " + q.Key
	if ctx.Err() != nil || u.j.StageFailureTold == told {
		return cause
	}
	r, err := u.remembered(q.Release)
	if err != nil || r == nil || len(r.Manifest.Commands.Failure) == 0 || u.allow(ctx, r) != nil {
		return cause
	}
	u.deployLog.reset()
	u.log.Error("the release could not be staged: running its failure commands",
		"release", q.Release.String(), "error", cause)
	d := &deployment{Release: q.Release, Commit: q.Commit, Fault: &fault{Reason: short(cause)}}
	d.enter(stepFailure)
	err = u.commands(ctx, d, r, nil, r.Manifest.Commands.Failure)
	if err := u.note(ctx, "a failure command failed: those after it do not run", err); err != nil {
		return cause
	}
	return errors.Join(cause, u.save(func(j *journal) {
		j.StageFailureTold = told
		// The next failure of the release has its commands run again, those with once as well.
		j.forgetAttempt(q.Release.Digest, stepFailure)
	}))
}
