package artifact

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// moveSwitcher implements StrategyMv: the tree is renamed to dest, which must not exist.
type moveSwitcher struct{ treeSwitcher }

func (m moveSwitcher) Switch(ctx context.Context, r *Release) error {
	parent, err := m.openParent(r)
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := removeAside(parent, r); err != nil {
		return err
	}
	return m.put(ctx, parent, r)
}

// put moves r's tree to dest; between file systems, it copies the tree. It first removes a link
// that strategy release left at dest. If the tree and dest both exist, the error wraps
// ErrUntouched. If only dest exists, put does nothing, as an earlier call has moved the tree.
func (m moveSwitcher) put(ctx context.Context, parent *safefs.Place, r *Release) error {
	dest, tree, beside := parent.Path(filepath.Base(r.Manifest.Dest)), m.tree(r), parent.Path(besideName(r))
	if err := m.removeReleaseLink(parent, r); err != nil {
		return fmt.Errorf("removing the link at dest: %w", err)
	}
	staged := safefs.Exists(tree) || safefs.Exists(beside)
	if safefs.Exists(dest) && !staged {
		return nil // an earlier call was cut off after the rename
	}
	if safefs.Exists(dest) {
		return fmt.Errorf("%w: %s exists, and sync_strategy mv needs a pre command that moves it away",
			ErrUntouched, r.Manifest.Dest)
	}
	if !safefs.Exists(beside) {
		err := durable.Rename(tree, dest)
		if !errors.Is(err, syscall.EXDEV) {
			return err
		}
		if err := m.copyBeside(ctx, parent, r); err != nil {
			return fmt.Errorf("copying the tree to a place beside dest: %w", err)
		}
	}
	if err := safefs.RemoveTree(tree); err != nil {
		return fmt.Errorf("removing the staged tree, after it was copied to a place beside dest: %w", err)
	}
	return durable.Rename(beside, dest)
}

// copyBeside copies r's tree beside dest. Until the copy is complete, it lies in a private
// directory, which others may move but not enter.
func (m moveSwitcher) copyBeside(ctx context.Context, parent *safefs.Place, r *Release) error {
	part := besideName(r) + ".part"
	private, err := parent.MakePrivate(part)
	if err != nil {
		return err
	}
	defer private.Close()
	if err := m.tool(ctx, "cp", "-a", m.tree(r), private.PathForTool("tree")); err != nil {
		return errors.Join(err, safefs.RemoveTree(parent.Path(part)))
	}
	if err := durable.SyncFS(private.Path("tree")); err != nil {
		return err
	}
	if err := durable.Rename(private.Path("tree"), parent.Path(besideName(r))); err != nil {
		return err
	}
	return safefs.RemoveTree(parent.Path(part))
}

func (m moveSwitcher) SwitchBack(ctx context.Context, r, failed *Release, dirty bool) error {
	parent, err := m.openParent(r)
	if err != nil {
		return err
	}
	defer parent.Close()
	dest, aside := parent.Path(filepath.Base(r.Manifest.Dest)), parent.Path(asideName(r))
	staged := safefs.Exists(m.tree(r)) || safefs.Exists(parent.Path(besideName(r)))
	elsewhere := failed.Manifest.Src == "" || failed.Manifest.Dest != r.Manifest.Dest
	unmoved := elsewhere ||
		failed.Manifest.Strategy == deployments.StrategyMv &&
			(safefs.Exists(m.tree(failed)) || safefs.Exists(parent.Path(besideName(failed))))
	if unmoved && !dirty && safefs.Exists(dest) && !safefs.Exists(aside) {
		return nil // the failed release was never moved to dest
	}
	if safefs.Exists(aside) && safefs.Exists(dest) && !staged {
		return m.discard(aside) // an earlier call was cut off after the last rename
	}
	if !staged {
		if err := m.Stage(ctx, r, StageOptions{}); err != nil {
			return fmt.Errorf("unpacking again the release to go back to: %w", err)
		}
	}
	if safefs.Exists(dest) && !safefs.Exists(aside) {
		if err := durable.Rename(dest, aside); err != nil {
			return err
		}
	}
	if err := m.put(ctx, parent, r); err != nil {
		return err
	}
	return m.discard(aside)
}

// Verify returns nothing: the tree was moved, and the running release may write into it.
func (m moveSwitcher) Verify(context.Context, *Release, int64) ([]Difference, error) {
	return nil, nil
}

// Heal unpacks r's tree again, as it was published, if dest is missing. It leaves an existing dest as it
// is.
func (m moveSwitcher) Heal(ctx context.Context, r *Release) ([]Difference, error) {
	if safefs.Exists(r.Manifest.Dest) {
		return nil, nil
	}
	if err := m.Stage(ctx, r, StageOptions{}); err != nil {
		return nil, fmt.Errorf("unpacking again the release that is gone: %w", err)
	}
	return nil, m.Switch(ctx, r)
}

// asideName returns the name, beside dest, to which strategy mv moves a failed release until its predecessor is back.
func asideName(rel *Release) string {
	return "." + filepath.Base(rel.Manifest.Dest) + ".kedge-failed"
}

// removeAside removes the failed release that an interrupted SwitchBack or Restore left beside dest. The next
// SwitchBack or Restore would take that release for one that it has moved aside itself.
func removeAside(parent *safefs.Place, rel *Release) error {
	if err := safefs.RemoveTree(parent.Path(asideName(rel))); err != nil {
		return fmt.Errorf("removing a release that failed before: %w", err)
	}
	return nil
}
