package deploy

import (
	"context"
	"fmt"
	"os/exec"
	"slices"

	"kedge/artifact"
	"kedge/artifact/meter"
	"kedge/deployments"
)

// maxCompared bounds the paths that a comparison lists.
const maxCompared = 5

// Observe unpacks the release of p in the unit's own directory, and compares it with the tree at its dest, whoever put
// that there. It changes nothing else. limit bounds the bytes read in a second (0, or strategy rsync: unbounded).
func (u *Unit) Observe(
	ctx context.Context,
	p deployments.Pointer,
	limit int64,
) (found *deployments.Compared, err error) {
	defer func() { err = u.secrets.error(err) }()
	r, err := u.admit(ctx, p)
	if err != nil {
		return nil, err
	}
	m := *r.Manifest
	aside := &artifact.Release{Pointer: r.Pointer, Manifest: &m, Raw: r.Raw}
	switch m.Strategy {
	case deployments.StrategyRelease: // which would stage it beside dest
		m.Strategy = deployments.StrategyMv
	case deployments.StrategyRsync:
		if _, err := exec.LookPath("rsync"); err != nil && m.Src != "" {
			return nil, fmt.Errorf("release %s needs rsync(1) on this node: %w", r.Pointer, err)
		}
	}
	if err := artifact.PruneTrees(u.treesDir(), append(u.keptDigests(), p.Digest)); err != nil {
		u.log.Warn("could not remove a tree that was compared before: the next comparison tries again", "error", err)
	}
	progress := func(p meter.Progress) { u.progress(deployments.StateFetching, p) }
	if err := u.switcher(aside).Stage(ctx, aside, artifact.StageOptions{Progress: progress}); err != nil {
		return nil, err
	}
	return u.compare(ctx, aside, limit)
}

// DestOccupied reports whether a file, or a directory that isn't empty, lies at the dest of p. It changes nothing, and
// returns false for a release without a tree. Call it while none of the unit's releases runs.
func (u *Unit) DestOccupied(ctx context.Context, p deployments.Pointer) (occupied bool, err error) {
	defer func() { err = u.secrets.error(err) }()
	r, err := u.admit(ctx, p)
	if err != nil || r.Manifest.Src == "" {
		return false, err
	}
	return artifact.Occupied(r.Manifest.Dest)
}

// compare compares a staged release with the tree at its dest.
func (u *Unit) compare(ctx context.Context, r *artifact.Release, limit int64) (*deployments.Compared, error) {
	found := &deployments.Compared{Release: r.Pointer.Digest, Dest: r.Manifest.Dest}
	if r.Manifest.Src == "" {
		return found, nil
	}
	ds, err := u.switcher(r).Compare(ctx, r, limit)
	if err != nil {
		return nil, fmt.Errorf("comparing %s with %s: %w", r.Manifest.Dest, r.Pointer, err)
	}
	found.Differs = len(ds)
	found.Missing = slices.Contains(ds, artifact.Difference{Path: ".", What: "missing"})
	for _, d := range ds[:min(len(ds), maxCompared)] {
		found.Paths = append(found.Paths, d.Path)
	}
	return found, nil
}

// adoptable compares a staged release with the tree at dest, if none of the unit's releases runs. The result says in
// Adopted whether they are equal; nil: nothing was compared, or comparing failed. The only error is the end of ctx.
func (u *Unit) adoptable(ctx context.Context, r *artifact.Release) (*deployments.Compared, error) {
	if u.j.Deployment != nil || !u.j.Running.IsZero() || r.Manifest.Src == "" {
		return nil, nil
	}
	found, err := u.compare(ctx, r, 0)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		u.log.Warn("could not compare dest with the release: deploying the release instead of adopting dest",
			"dest", r.Manifest.Dest, "error", err)
		return nil, nil
	}
	if found.Adopted = found.Differs == 0; found.Adopted {
		u.log.Info("dest equals the release: it is adopted as it is, without commands", "dest", found.Dest)
	} else {
		u.log.Info("dest differs from the release, and is not adopted", "dest", found.Dest, "differs", found.Differs,
			"paths", found.Paths)
	}
	return found, nil
}

// keptDigests returns the releases whose trees Observe leaves alone: running, good, staged, or of a
// deployment under way.
func (u *Unit) keptDigests() []deployments.Digest {
	keep := []deployments.Digest{u.j.Running.Digest, u.j.LastGood.Digest, u.j.Staged.Digest}
	if d := u.j.Deployment; d != nil {
		keep = append(keep, d.Release.Digest, d.From.Digest, d.Back.Digest)
	}
	return slices.DeleteFunc(keep, deployments.Digest.IsZero)
}
