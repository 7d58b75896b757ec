package artifact

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"kedge/deployments"
	"kedge/deployments/durable"
)

// sharedDir is where the manifest's shared paths lie: beside dest, and never removed.
func (r *Releases) sharedDir() string { return r.dest + ".shared" }

// linkShared puts links to DEST.shared/PATH in the place of m's shared paths in a tree that is to
// lie in DEST.releases/NAME. What the archive has at such a path becomes the shared one if there is
// none yet, and is dropped otherwise.
func (r *Releases) linkShared(staging string, m *deployments.Manifest) error {
	if len(m.Shared) == 0 {
		return nil
	}
	uid, gid, err := ownerOf(m.Owner)
	if err != nil {
		return err
	}
	if err := os.Mkdir(r.sharedDir(), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	tree, err := os.OpenRoot(staging)
	if err != nil {
		return err
	}
	defer tree.Close()
	shared, err := os.OpenRoot(r.sharedDir())
	if err != nil {
		return err
	}
	defer shared.Close()
	for _, p := range m.Shared {
		if err := r.shareOne(tree, shared, staging, p, uid, gid); err != nil {
			return fmt.Errorf("shared %q: %w", p, err)
		}
	}
	return durable.SyncDir(filepath.Dir(r.dest))
}

func (r *Releases) shareOne(tree, shared *os.Root, staging, p string, uid, gid int) error {
	// As many steps up as lead from the link to the directory of DEST.releases and DEST.shared.
	target := strings.Repeat("../", 2+strings.Count(p, "/")) + filepath.Base(r.sharedDir()) + "/" + p
	here, err := tree.Lstat(p)
	if err == nil && here.Mode().Type() == fs.ModeSymlink {
		if there, err := tree.Readlink(p); err == nil && there == target {
			return nil // it was cut off after it
		}
	}
	inTree := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err = shared.Lstat(p)
	switch {
	case err == nil:
	case !errors.Is(err, fs.ErrNotExist):
		return err
	default:
		if err := shared.MkdirAll(path.Dir(p), 0o755); err != nil {
			return err
		}
		if inTree {
			if err := os.Rename(filepath.Join(staging, p), filepath.Join(r.sharedDir(), p)); err != nil {
				return err
			}
			inTree = false
			break
		}
		if err := shared.Mkdir(p, 0o755); err != nil {
			return err
		}
		if err := shared.Lchown(p, uid, gid); err != nil && (uid >= 0 || gid >= 0) {
			return err
		}
	}
	if inTree {
		if err := removeTree(filepath.Join(staging, p)); err != nil {
			return err
		}
	}
	if err := tree.MkdirAll(path.Dir(p), 0o755); err != nil {
		return err
	}
	return tree.Symlink(target, p)
}
