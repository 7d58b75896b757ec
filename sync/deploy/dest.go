package deploy

import (
	"context"
	"path/filepath"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/sync/command"
)

// switcher returns the Switcher of r's strategy and dest.
func (u *Unit) switcher(r *artifact.Release) artifact.Switcher {
	return artifact.NewSwitcher(r.Manifest, artifact.SwitcherConfig{
		Objects: u.c.Objects, Log: u.log, Trees: u.treesDir(), Made: u.madeDir(), RsyncVerbose: u.c.RsyncVerbose,
		Within: u.c.Bounds.Dests, Owners: ownersOf(u.c.Bounds), HashAlways: u.c.HashAlways,
		Tool: func(ctx context.Context, silent bool, name string, args ...string) ([]byte, error) {
			log := u.log
			if silent {
				log = quiet()
			}
			result, err := command.Tool(ctx, log, name, args...)
			return result.Output, err
		},
	})
}

func (u *Unit) treesDir() string     { return filepath.Join(u.c.Dir, treesDir) }
func (u *Unit) madeDir() string      { return filepath.Join(u.c.Dir, madeDir) }
func (u *Unit) manifestsDir() string { return filepath.Join(u.c.Dir, manifestsDir) }

// Dest is where what runs lies, for whoever watches it; empty where nothing runs, or without a tree. live is the
// directory that it should lead to: the release's own, or, under a strategy without one, wherever it leads now.
func (u *Unit) Dest() (dest, live string) {
	r, err := u.recall(u.State().Running)
	if err != nil || r == nil || r.Manifest.Src == "" {
		return "", ""
	}
	dir := r.Manifest.Dest
	if r.Manifest.Strategy == deployments.StrategyRelease {
		// Not what dest leads to: somebody may have led it elsewhere meanwhile.
		if dir = u.switcher(r).Dir(r); dir == "" {
			return r.Manifest.Dest, ""
		}
	}
	live, _ = filepath.EvalSymlinks(dir)
	return r.Manifest.Dest, live
}
