package deploy

import (
	"context"
	"errors"

	"kedge/artifact"
	"kedge/deployments"
)

// before is what was at dest before the unit's first release, for Leave. It is kept while other releases replace the
// first one, until ForgetBefore or the switch to a release with another dest or strategy.
type before struct {
	// First is the first release. Its manifest says how to put back what was there.
	First    deployments.Pointer  `json:"first"`
	Dest     string               `json:"dest"`
	Strategy deployments.Strategy `json:"strategy"`
}

// restorableUnder reports whether what was at dest before the first release can be put back while r is deployed. It can
// if r has a tree, with the same dest and strategy.
func (b *before) restorableUnder(r *artifact.Release) bool {
	return r.Manifest.Src != "" && r.Manifest.Dest == b.Dest && r.Manifest.Strategy == b.Strategy
}

// keepBefore keeps what is at dest before the first release, for restore and, if mayLeave is set, for Leave. It returns
// the journal's next Before; nil: Leave has nothing to put back. If the unit has a release, or a superseded deployment
// is past drain, it leaves Before as it is.
func (u *Unit) keepBefore(ctx context.Context, r *artifact.Release, mayLeave bool) (*before, error) {
	d := u.j.Deployment
	if !u.j.Running.IsZero() || !u.j.LastGood.IsZero() || d != nil && d.Step != stepDrain {
		return u.j.Before, nil
	}
	if err := u.switcher(r).Keep(ctx, r); err != nil || !mayLeave || r.Manifest.Src == "" {
		return nil, err
	}
	if occupied, err := artifact.Occupied(r.Manifest.Dest); err != nil || !occupied {
		return nil, err
	}
	return &before{First: r.Pointer, Dest: r.Manifest.Dest, Strategy: r.Manifest.Strategy}, nil
}

// Leave puts back what was at dest before the unit's first release. The agent calls it when the
// rollout goes back and there is no stable release. Its steps are drain, the switch, the failure
// commands of the release that is left, and undrain. No other commands and no checks run, because
// what was there has no manifest. If what was there is gone, or wasn't kept, the unit keeps what it
// runs, and State.Leavable is false. If a deployment is unfinished, Leave may do no more than end
// that deployment. It undoes a deployment that hasn't switched. It finishes one with another dest
// or strategy, and one that goes back, unless that went back to an unhealthy release. If ctx is
// cancelled before the switch, Leave stops. If it is cancelled later, Recover finishes Leave, as
// after a kill.
func (u *Unit) Leave(ctx context.Context) (err error) {
	defer func() { err = u.secrets.error(err) }()
	if err := u.resume(ctx); err != nil || u.j.Before == nil {
		return err
	}
	u.deployLog.reset()
	p := u.j.Running
	// Why the release that a deployment went back to is unhealthy; nil: no such deployment. If set, Leave replaces that
	// release.
	var failed *healthFailure
	if d := u.j.Deployment; d != nil && d.BackFailure != nil && !d.Leaves {
		failed = d.BackFailure
	} else if d != nil {
		p = d.Release
	}
	r, err := u.need(ctx, p)
	if err != nil {
		return err
	}
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return err
	}
	defer unlock()
	switch d := u.j.Deployment; {
	case failed != nil:
	case d != nil && d.Step.beforeSwitch():
		return u.Recover(ctx) // it takes the deployment back
	case d != nil && (d.Step.goesBack() || !u.j.Before.restorableUnder(r)):
		return u.runSteps(ctx)
	}
	if u.j.Deployment != nil { // a restart may have ended the drain
		if err := u.drain(ctx, true); err != nil {
			return err
		}
	}
	u.log.Info("putting back what was at dest before kedge", "release", r.Pointer.String())
	err = u.save(func(j *journal) {
		next := stepBack
		if j.Deployment == nil || failed != nil {
			j.Deployment, next = &deployment{Release: j.Running, From: j.Running, BackFailure: failed}, stepDrain
		}
		j.Deployment.Leaves, j.Drained = true, true
		j.Deployment.enter(next)
	})
	if err != nil {
		return err
	}
	u.at("leaving")
	return u.runSteps(ctx)
}

// leave does the step of Leave that puts back what was at dest before the first release, and
// returns the change of the journal. If what was there is gone, the change keeps the unit on what
// it runs.
func (u *Unit) leave(ctx context.Context) (func(*journal), error) {
	if b := u.j.Before; b != nil {
		first, err := u.need(ctx, b.First)
		if err != nil {
			return nil, err
		}
		if back, err := u.switcher(first).Restore(ctx, first); err != nil || back {
			return setRestored, err
		}
	}
	u.log.Error("what was at dest before the first release is gone: the unit stays on what it runs")
	return func(j *journal) {
		j.Before = nil
		switch d := j.Deployment; {
		case j.Confirmed:
		case d.BackFailure != nil: // the release gone back to is tried again
			d.Leaves = false
		default: // a deployment that was turned back: it continues from its switch
			d.Leaves, d.Step = false, stepPre
		}
	}, nil
}

// ForgetBefore removes what was kept from before the first release: the rollout no longer goes back there.
// Strategy release keeps it beside dest nevertheless, as nobody published that tree.
func (u *Unit) ForgetBefore() error {
	if u.j.Before == nil {
		return nil
	}
	if err := u.save(func(j *journal) { j.Before = nil }); err != nil {
		return err
	}
	u.at("forgotten")
	return u.removeOriginal()
}

// removeOriginal removes what the strategies rsync and mv kept from before the first release,
// unless Leave may need it.
func (u *Unit) removeOriginal() error {
	if u.j.Before != nil {
		return nil
	}
	return artifact.PruneTrees(u.beforeDir(), nil)
}

// errLeft is the error that the failure commands of a release see when Leave left it.
var errLeft = errors.New("the rollout of the release has stopped: dest has again what was there before kedge")

// restore puts back what was at dest before a first release that has failed or was stopped. It
// returns the change of the journal; nil: there is none.
func (u *Unit) restore(ctx context.Context, d *deployment, r *artifact.Release) (func(*journal), error) {
	// Strategy release switches by one rename. A deployment that was stopped before the rename has changed nothing at
	// dest. A switch that failed because of the disk may have renamed already.
	atomic := r.Manifest.Strategy == deployments.StrategyRelease
	if d.Fault == nil && atomic && !d.Touched {
		return nil, nil
	}
	back := !d.Touched && exists(r.Manifest.Dest)
	if d.Touched || !back && !atomic { // a pre command may have moved it away
		var err error
		if back, err = u.switcher(r).Restore(ctx, r); err != nil {
			return nil, err
		}
	}
	if !back {
		return func(j *journal) { j.Before = nil }, nil
	}
	return setRestored, nil
}

// setRestored records that dest holds what was there before the first release.
func setRestored(j *journal) {
	j.Running, j.Version, j.Confirmed, j.LastGood = deployments.Pointer{}, "", false, deployments.Pointer{}
	j.Before, j.Restored = nil, j.Deployment.Release.Digest
	j.Deployment.Restored = true
}
