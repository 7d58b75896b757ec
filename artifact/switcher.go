package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"kedge/artifact/object"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// ErrUntouched, wrapped in an error of Switcher.Switch, means that Switch changed nothing at dest.
var ErrUntouched = errors.New("dest was not touched")

// Switcher makes releases live at their dest by one strategy. Each method may be called again after it was cut off
// at any point.
type Switcher interface {
	// Stage makes rel complete on this disk. It changes dest only if rel is live there and damaged.
	Stage(ctx context.Context, rel *Release, opt StageOptions) error
	// Switch makes rel, which must be staged, live at dest.
	Switch(ctx context.Context, rel *Release) error
	// SwitchBack makes rel live again, however far the deployment of failed has come. It stages rel
	// again if rel's tree is gone. The caller sets dirty if an earlier deployment, which was
	// superseded, may have changed dest, too.
	SwitchBack(ctx context.Context, rel, failed *Release, dirty bool) error
	// Keep stores what the strategy needs for Restore to put back what is at dest now. The caller must call it before a
	// deployment changes anything, and only while none of the unit's releases is live.
	Keep(ctx context.Context, rel *Release) error
	// Restore puts back what was at dest before rel, the unit's first release. It returns true if dest then holds that.
	Restore(ctx context.Context, rel *Release) (bool, error)
	// IsLive reports whether dest holds rel. With rsync and mv, it only reports whether dest is a
	// directory or a link to one; without src, it returns true.
	IsLive(rel *Release) bool
	// Dir returns rel's directory, which commands find in the variable KEDGE_RELEASE. With rsync and mv, it is always
	// dest. It is empty without src and, with strategy release, if rel isn't complete on this disk.
	Dir(rel *Release) string
	// Compare returns how the tree at dest, whoever put it there, differs from rel, which must be staged. limit is
	// Verify's.
	Compare(ctx context.Context, rel *Release, limit int64) ([]Difference, error)
	// RecordBefore records how rel's tree differs from its archive before rel's commands run, so
	// that RecordAfter leaves these differences out. With rsync and mv, it records nothing.
	RecordBefore(ctx context.Context, rel *Release) error
	// RecordAfter records what rel's commands, up to and including the post commands, changed in
	// rel's tree. From then on, these changes belong to the release. With mv, it records nothing.
	RecordAfter(ctx context.Context, rel *Release) error
	// Verify returns how rel's tree differs from rel. What rel's commands changed is compared with
	// how they left it. With strategy release, it reads rel's own directory; with rsync, dest. It
	// returns nothing with mv. With rsync, it returns nothing if rel's unpacked tree is gone, and
	// at most maxExtra of the paths that rel doesn't have. limit bounds the bytes read in a second
	// (0: unbounded); rsync ignores it.
	Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error)
	// Heal makes the tree at dest equal to rel. With mv, it only puts back a tree that is missing.
	// left are the remaining differences: those that only rel's commands can remove.
	Heal(ctx context.Context, rel *Release) (left []Difference, err error)
	// Prune removes what interrupted copies left beside dest, except complete copies of rel and of
	// the releases in protect. With strategy release, it also removes stored releases. It keeps the
	// live one, those in protect and, of all others that aren't in drop, the newest keep.
	Prune(rel *Release, keep int, protect, drop []deployments.Digest) error
}

// SwitcherConfig configures a Switcher.
type SwitcherConfig struct {
	Objects *object.Client
	Log     *slog.Logger // nil: discard
	// Trees is a private directory for unpacked trees of the strategies rsync and mv. Changes is a private directory for
	// records of what releases' commands made, with rsync; empty: nothing is recorded.
	Trees, Changes string
	// Before is a private directory for what was at dest before the first release of the strategies rsync and mv;
	// empty: it is not kept.
	Before string
	// RsyncVerbose are rsync's options for its output; nil: -v.
	RsyncVerbose []string
	// Within are the directories in which dest must lie: see safefs.PlaceOptions.
	Within []string
	// CheckOwner returns an error if a path of an archive may not get the owner that the archive
	// gives it; nil: any owner is allowed.
	CheckOwner func(uid, gid int) error
	// HashAlways makes the Switcher hash each file of the old release before using it. If it is false, a file is trusted
	// if its inode, size, mtime and ctime are the same as when it was last written or hashed.
	HashAlways bool
	// Tool runs a system program, such as rsync, in the C locale. It returns at least the beginning
	// and the end of the program's output. If all is not nil, Tool writes the whole output to all
	// as it comes, and doesn't log its lines.
	Tool func(ctx context.Context, all io.Writer, name string, args ...string) (output []byte, err error)
}

// NewSwitcher returns the Switcher of m's strategy and dest. If m has no src, the Switcher does nothing.
func NewSwitcher(m *deployments.Manifest, c SwitcherConfig) Switcher {
	switch {
	case m.Src == "":
		return commandsOnly{}
	case m.Strategy == deployments.StrategyRelease:
		releases := Open(m.Dest, c.Objects, c.Log).WithBounds(c.Within, m.Owner, c.CheckOwner)
		releases.hashAlways = c.HashAlways
		return linkSwitcher{releases}
	case m.Strategy == deployments.StrategyMv:
		return moveSwitcher{treeSwitcher{c}}
	default:
		return rsyncSwitcher{treeSwitcher{c}}
	}
}

// commandsOnly is the Switcher for manifests without src.
type commandsOnly struct{}

func (commandsOnly) Stage(context.Context, *Release, StageOptions) error           { return nil }
func (commandsOnly) Switch(context.Context, *Release) error                        { return nil }
func (commandsOnly) SwitchBack(_ context.Context, _, _ *Release, _ bool) error     { return nil }
func (commandsOnly) Keep(context.Context, *Release) error                          { return nil }
func (commandsOnly) Restore(context.Context, *Release) (bool, error)               { return false, nil }
func (commandsOnly) IsLive(*Release) bool                                          { return true }
func (commandsOnly) Dir(*Release) string                                           { return "" }
func (commandsOnly) Verify(context.Context, *Release, int64) ([]Difference, error) { return nil, nil }
func (commandsOnly) RecordBefore(context.Context, *Release) error                  { return nil }
func (commandsOnly) RecordAfter(context.Context, *Release) error                   { return nil }
func (commandsOnly) Heal(context.Context, *Release) ([]Difference, error)          { return nil, nil }
func (commandsOnly) Prune(_ *Release, _ int, _, _ []deployments.Digest) error      { return nil }

// PruneTrees removes everything in dir (SwitcherConfig.Trees or Before) but trees and spools of the releases in keep.
func PruneTrees(dir string, keep []deployments.Digest) error {
	var names []string
	for _, d := range keep {
		names = append(names, d.String())
		spools, err := filepath.Glob(globLiteral.Replace(filepath.Join(dir, d.String()+partSuffix+archiveSuffix)) + "*")
		if err != nil {
			return err
		}
		for _, s := range spools {
			names = append(names, filepath.Base(s))
		}
	}
	return removeOthers(dir, names)
}

// PruneChanges removes everything in dir (SwitcherConfig.Changes) but the records of the releases in keep.
func PruneChanges(dir string, keep []deployments.Digest) error {
	names := make([]string, 0, 2*len(keep))
	for _, d := range keep {
		names = append(names, d.String()+changesSuffix, d.String()+beforeSuffix)
	}
	return removeOthers(dir, names)
}

// ReadRelease reads a file that WriteRelease wrote. If the file is missing, the error wraps fs.ErrNotExist. With an
// error, the Release must not be used.
func ReadRelease(path string) (*Release, error) {
	var rel Release
	return &rel, readRecord(path, &rel, &rel)
}

// WriteRelease stores rel, without Dir, in a private file that is durable when WriteRelease returns.
func WriteRelease(path string, rel *Release) error {
	data, err := json.Marshal(rel)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o600)
}

// PruneReleases removes everything in dir but the files DIGEST.json that WriteRelease wrote for the releases in keep.
func PruneReleases(dir string, keep []deployments.Digest) error {
	return removeBut(dir, recordSuffix, keep)
}

// removeBut removes all entries of dir but DIGEST+suffix of keep.
func removeBut(dir, suffix string, keep []deployments.Digest) error {
	names := make([]string, 0, len(keep))
	for _, d := range keep {
		names = append(names, d.String()+suffix)
	}
	return removeOthers(dir, names)
}

// removeOthers removes all entries of dir but the names in keep. A missing dir is no error.
func removeOthers(dir string, keep []string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			err = errors.Join(err, safefs.RemoveTree(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
