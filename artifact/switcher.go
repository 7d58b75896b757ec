package artifact

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// ErrUntouched is in an error of Switch that changed nothing at dest.
var ErrUntouched = errors.New("dest was not touched")

// Switcher makes releases live at their dest by one strategy. Each method may be called again after it was cut
// off at any point.
type Switcher interface {
	// Stage makes rel lie complete on this disk; nothing at dest changes.
	Stage(ctx context.Context, rel *Release, opt StageOptions) error
	// Switch makes rel live at dest.
	Switch(ctx context.Context, rel *Release) error
	// SwitchBack makes rel live again after failed, or a part of it. It stages rel again if its tree is gone.
	// dirty says that a release before failed may have changed dest, too.
	SwitchBack(ctx context.Context, rel, failed *Release, dirty bool) error
	// Keep is called before anything is done for a unit's first release: Restore can put back then what is at dest.
	Keep(ctx context.Context, rel *Release) error
	// Restore puts back what was at dest before the first release, rel, and reports whether that is there now.
	Restore(ctx context.Context, rel *Release) (bool, error)
	// Live reports whether dest holds rel, as far as a few system calls can tell.
	Live(rel *Release) bool
	// Dir returns rel's directory, which commands find in KEDGE_RELEASE; empty if there is none.
	Dir(rel *Release) string
	// Compare says how what lies at dest, whoever put it there, differs from rel, which is staged; limit as Verify's.
	Compare(ctx context.Context, rel *Release, limit int64) ([]Difference, error)
	// Survey is called before rel's commands run, and Record after its post commands: what they made of the tree is the
	// release's from then on.
	Survey(ctx context.Context, rel *Release) error
	Record(ctx context.Context, rel *Release) error
	// Verify compares the live tree with rel; limit bounds what is read, in bytes a second (0: not).
	Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error)
	// Heal makes the live tree as rel says. What is left of the differences is what rel's commands had made, and
	// they alone can make again.
	Heal(ctx context.Context, rel *Release) (left []Difference, err error)
	// Prune removes what only releases need that are not protected, but the newest others, as many
	// as others says. Those in drop go first, whatever others says.
	Prune(rel *Release, others int, protect, drop []deployments.Digest) error
}

// SwitcherConfig configures a Switcher.
type SwitcherConfig struct {
	Objects *object.Client
	Log     *slog.Logger // nil: discard
	// Trees is a private directory for the unpacked trees of the strategies rsync and mv, and Made for what releases'
	// commands made, where the strategy keeps no directory of its own.
	Trees, Made string
	// Before is a private directory for what was at dest before the first release of the strategies rsync and mv; empty:
	// they keep nothing of it.
	Before string
	// RsyncVerbose are the options that say what rsync tells; nil: -v.
	RsyncVerbose []string
	// Within are the directories in which dest must lie: see PlaceOptions.
	Within []string
	// Owners says why an archive's file may not belong to whom the archive says; nil: it may to anybody.
	Owners func(uid, gid int) error
	// HashAlways has each file of the old release hashed before it is used. Otherwise one is taken as it is whose
	// inode, size, mtime and ctime are as when it was last written or hashed.
	HashAlways bool
	// Tool runs a program of the system, such as rsync, and returns its output; quiet: its lines aren't logged.
	Tool func(ctx context.Context, quiet bool, name string, args ...string) (output []byte, err error)
}

// NewSwitcher returns the Switcher of m's strategy and dest.
func NewSwitcher(m *deployments.Manifest, c SwitcherConfig) Switcher {
	switch {
	case m.Src == "":
		return commandsOnly{}
	case m.Strategy == deployments.StrategyRelease:
		releases := Open(m.Dest, c.Objects, c.Log).Bounded(c.Within, m.Owner, c.Owners)
		releases.hashAlways = c.HashAlways
		return linkSwitcher{releases}
	case m.Strategy == deployments.StrategyMv:
		return moveSwitcher{treeSwitcher{c}}
	default:
		return rsyncSwitcher{treeSwitcher{c}}
	}
}

// commandsOnly is the Switcher of manifests without src.
type commandsOnly struct{}

func (commandsOnly) Stage(context.Context, *Release, StageOptions) error           { return nil }
func (commandsOnly) Switch(context.Context, *Release) error                        { return nil }
func (commandsOnly) SwitchBack(_ context.Context, _, _ *Release, _ bool) error     { return nil }
func (commandsOnly) Keep(context.Context, *Release) error                          { return nil }
func (commandsOnly) Restore(context.Context, *Release) (bool, error)               { return false, nil }
func (commandsOnly) Live(*Release) bool                                            { return true }
func (commandsOnly) Dir(*Release) string                                           { return "" }
func (commandsOnly) Verify(context.Context, *Release, int64) ([]Difference, error) { return nil, nil }
func (commandsOnly) Survey(context.Context, *Release) error                        { return nil }
func (commandsOnly) Record(context.Context, *Release) error                        { return nil }
func (commandsOnly) Heal(context.Context, *Release) ([]Difference, error)          { return nil, nil }
func (commandsOnly) Prune(_ *Release, _ int, _, _ []deployments.Digest) error      { return nil }

// linkSwitcher is StrategyRelease: directories beside dest, and dest a link to one of them.
type linkSwitcher struct{ releases *Releases }

func (l linkSwitcher) Stage(ctx context.Context, rel *Release, opt StageOptions) error {
	_, err := l.releases.Stage(ctx, rel.Pointer, rel.Manifest, rel.Raw, opt)
	return err
}

func (l linkSwitcher) Switch(_ context.Context, rel *Release) error {
	r, leave, err := l.releases.enter(false)
	if err != nil {
		return fmt.Errorf("finding the release to switch to: %w", err)
	}
	defer leave()
	if err := removeAside(r.held.parent, rel); err != nil {
		return err
	}
	found, err := r.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release to switch to: %w", err)
	}
	return r.Switch(found)
}

func (l linkSwitcher) SwitchBack(ctx context.Context, rel, _ *Release, _ bool) error {
	if _, err := l.releases.Find(rel.Pointer.Digest); errors.Is(err, ErrNoRelease) {
		if err := l.Stage(ctx, rel, StageOptions{}); err != nil {
			return fmt.Errorf("staging again the release to go back to: %w", err)
		}
	}
	return l.Switch(ctx, rel)
}

// Keep has nothing to do: the first switch moves what is at dest in among the releases.
func (l linkSwitcher) Keep(context.Context, *Release) error { return nil }

func (l linkSwitcher) Restore(context.Context, *Release) (bool, error) { return l.releases.restore() }

func (l linkSwitcher) Live(rel *Release) bool {
	dir := l.Dir(rel)
	if dir == "" {
		return false
	}
	got, err := filepath.EvalSymlinks(rel.Manifest.Dest)
	if err != nil {
		return false
	}
	want, err := filepath.EvalSymlinks(dir)
	return err == nil && got == want
}

func (l linkSwitcher) Dir(rel *Release) string {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return ""
	}
	return found.Dir
}

func (l linkSwitcher) Verify(ctx context.Context, rel *Release, limit int64) ([]Difference, error) {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if errors.Is(err, ErrNoRelease) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	if err != nil {
		return nil, err
	}
	return l.releases.Verify(ctx, found, limit)
}

// Heal exchanges the release's directory, if something in it differs or it is gone, for one that is staged again,
// and leads dest back to it.
func (l linkSwitcher) Heal(ctx context.Context, rel *Release) (left []Difference, err error) {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if errors.Is(err, ErrNoRelease) {
		found = rel.in(l.releases)
		if err := l.releases.Heal(ctx, found); err != nil {
			return nil, err
		}
		left, err = l.releases.Verify(ctx, found, 0)
		return left, errors.Join(err, l.Switch(ctx, rel))
	}
	if err != nil {
		return nil, err
	}
	left, err = l.releases.Verify(ctx, found, 0)
	if err != nil || len(left) > 0 && l.releases.heals(found, left) {
		if err := l.releases.Heal(ctx, found); err != nil {
			return nil, err
		}
		if left, err = l.releases.Verify(ctx, found, 0); err != nil {
			return nil, err
		}
	}
	return left, l.releases.Switch(found)
}

func (l linkSwitcher) Survey(ctx context.Context, rel *Release) error {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release to survey: %w", err)
	}
	return l.releases.Survey(ctx, found)
}

func (l linkSwitcher) Record(ctx context.Context, rel *Release) error {
	found, err := l.releases.Find(rel.Pointer.Digest)
	if err != nil {
		return fmt.Errorf("finding the release whose commands ran: %w", err)
	}
	return l.releases.Record(ctx, found)
}

func (l linkSwitcher) Prune(_ *Release, others int, protect, drop []deployments.Digest) error {
	return l.releases.pruneBut(others, protect, drop)
}

// asideName is where strategy mv puts a release that failed, beside dest, until the one before it is back.
func asideName(rel *Release) string {
	return "." + filepath.Base(rel.Manifest.Dest) + ".kedge-failed"
}

// removeAside removes the remains of a restore that was cut short: the next one would take them for a step of its own.
func removeAside(parent *Place, rel *Release) error {
	if err := removeTree(parent.Path(asideName(rel))); err != nil {
		return fmt.Errorf("removing a release that failed before: %w", err)
	}
	return nil
}

// PruneTrees removes all of SwitcherConfig.Trees but the trees of keep.
func PruneTrees(dir string, keep []deployments.Digest) error { return removeBut(dir, "", keep) }

// PruneMade removes the files of SwitcherConfig.Made but those of the releases in keep.
func PruneMade(dir string, keep []deployments.Digest) error {
	names := make([]string, 0, 2*len(keep))
	for _, d := range keep {
		names = append(names, d.String()+madeSuffix, d.String()+beforeSuffix)
	}
	return removeOthers(dir, names)
}

// ReadRelease reads a file of WriteRelease's.
func ReadRelease(path string) (*Release, error) {
	var rel Release
	return &rel, readRecord(path, &rel, &rel)
}

// WriteRelease keeps rel in a private file, durable once it returns.
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

// PruneReleases removes all files that WriteRelease wrote as DIR/DIGEST.json, but those of the releases in keep.
func PruneReleases(dir string, keep []deployments.Digest) error {
	return removeBut(dir, recordSuffix, keep)
}

// removeBut removes all of dir but DIGEST+suffix of keep.
func removeBut(dir, suffix string, keep []deployments.Digest) error {
	names := make([]string, 0, len(keep))
	for _, d := range keep {
		names = append(names, d.String()+suffix)
	}
	return removeOthers(dir, names)
}

// removeOthers removes all of dir but the names to keep.
func removeOthers(dir string, keep []string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if !slices.Contains(keep, e.Name()) {
			err = errors.Join(err, removeTree(filepath.Join(dir, e.Name())))
		}
	}
	return err
}
