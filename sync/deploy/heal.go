package deploy

import (
	"context"
	"fmt"

	"kedge/artifact"
)

// Verify compares the live tree with its release. limit bounds the bytes read in a second (0, or strategy rsync:
// unbounded). It finds nothing if nothing runs, under strategy mv, or while a deployment is under way.
func (u *Unit) Verify(ctx context.Context, limit int64) (found []artifact.Difference, err error) {
	defer func() { err = u.secrets.error(err) }()
	r, err := u.liveRelease()
	if err != nil || r == nil {
		return nil, err
	}
	ds, err := u.switcher(r).Verify(ctx, r, limit)
	if err != nil {
		return nil, fmt.Errorf("verifying %s: %w", r.Pointer, err)
	}
	return ds, nil
}

// Heal makes the live tree equal to its release, without running commands. left has the differences that remain,
// because only the release's commands can repair them. Under strategy mv, Heal only puts back a tree that is gone. It
// does nothing if nothing runs, or a deployment is under way.
func (u *Unit) Heal(ctx context.Context) (left []artifact.Difference, err error) {
	defer func() { err = u.secrets.error(err) }()
	r, err := u.liveRelease()
	if err != nil || r == nil {
		return nil, err
	}
	unlock, err := u.lockDest(ctx, r)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if left, err = u.switcher(r).Heal(ctx, r); err != nil {
		return nil, fmt.Errorf("healing %s: %w", r.Pointer, err)
	}
	u.lock.noteDone(r.Pointer)
	return left, nil
}

// recordBefore records how a release's tree differs before its commands run, and recordAfter what the commands changed.
// They only log errors, unless ctx has ended: what isn't recorded is reported as drift.
func (u *Unit) recordBefore(ctx context.Context, r *artifact.Release) error {
	if len(r.Manifest.Commands.Pre)+len(r.Manifest.Commands.Post) == 0 {
		return nil
	}
	return u.note(ctx, "could not record the tree before the commands run: what they change counts as drift",
		u.switcher(r).RecordBefore(ctx, r))
}

func (u *Unit) recordAfter(ctx context.Context, r *artifact.Release) error {
	if len(r.Manifest.Commands.Pre)+len(r.Manifest.Commands.Post) == 0 {
		return nil
	}
	return u.note(ctx, "could not record what the release's commands changed: it counts as drift",
		u.switcher(r).RecordAfter(ctx, r))
}
