package deploy

import (
	"context"
	"io"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/sync/command"
)

// switcher returns the Switcher of r's strategy and dest.
func (u *Unit) switcher(r *artifact.Release) artifact.Switcher {
	before := u.beforeDir()
	if u.c.ID == (deployments.UnitID{}) {
		before = "" // kedge run leaves what failed in place, as stretcher does
	}
	return artifact.NewSwitcher(r.Manifest, artifact.SwitcherConfig{
		Objects: u.c.Objects, Log: u.log, Trees: u.treesDir(), Changes: u.changesDir(), Before: before,
		RsyncVerbose: u.c.RsyncVerbose,
		Within:       u.c.Bounds.Dests, CheckOwner: ownersOf(u.c.Bounds), HashAlways: u.c.HashAlways,
		Tool: func(ctx context.Context, all io.Writer, name string, args ...string) ([]byte, error) {
			log := u.log
			if all != nil {
				log = quiet()
			}
			result, err := command.Tool(ctx, log, all, name, args...)
			return result.Output, err
		},
	})
}

func (u *Unit) treesDir() string     { return filepath.Join(u.c.Dir, treesDir) }
func (u *Unit) changesDir() string   { return filepath.Join(u.c.Dir, changesDir) }
func (u *Unit) beforeDir() string    { return filepath.Join(u.c.Dir, beforeDir) }
func (u *Unit) manifestsDir() string { return filepath.Join(u.c.Dir, manifestsDir) }

// Mark describes what a deployment left at its dest, to detect whether something else has deployed there since.
type Mark struct {
	Dest string // empty: nothing runs, or the release has no tree or isn't known
	// LeadsTo is the directory that dest should lead to. Under strategy release, that is the release's own directory;
	// under the others, it is where dest led when the mark was taken. Empty: dest may lead anywhere, as a deployment is
	// half done or nothing was there.
	LeadsTo string
	// inode is LeadsTo's inode under the strategies rsync and mv; 0: it isn't compared.
	inode   uint64
	running deployments.Digest
}

// Mark returns the mark of the running release. It is the zero Mark if nothing runs, or if the release has no tree or
// isn't known.
func (u *Unit) Mark() Mark {
	r, err := u.remembered(u.State().Running)
	if err != nil || r == nil || r.Manifest.Src == "" {
		return Mark{}
	}
	m := Mark{Dest: r.Manifest.Dest, running: r.Pointer.Digest}
	if u.State().Unfinished {
		return m
	}
	if r.Manifest.Strategy == deployments.StrategyRelease {
		// LeadsTo isn't read from dest, which somebody may have changed meanwhile.
		if dir := u.switcher(r).Dir(r); dir != "" {
			m.LeadsTo, _ = filepath.EvalSymlinks(dir)
		}
		return m
	}
	m.LeadsTo, _ = filepath.EvalSymlinks(m.Dest)
	m.inode = inodeOf(m.LeadsTo)
	return m
}

// Changed reports whether dest is no longer as the deployment left it; false if LeadsTo is empty. found describes what
// something else deployed there. It is empty if dest hasn't changed, or is gone or leads nowhere.
func (m Mark) Changed() (found string, changed bool) {
	if m.LeadsTo == "" {
		return "", false
	}
	live, err := filepath.EvalSymlinks(m.Dest)
	switch last := lastDeployed(m.Dest); {
	case err != nil:
		return "", true
	case live != m.LeadsTo:
		return "dest leads to " + live, true
	case m.inode != 0 && inodeOf(live) != m.inode:
		return "dest is another directory than before", true
	case !last.IsZero() && last != m.running:
		return "release " + last.Short(), true
	}
	return "", false
}

func inodeOf(dir string) uint64 {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return 0
	}
	return st.Ino
}
