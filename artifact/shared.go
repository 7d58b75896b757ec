package artifact

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// sharedSuffix, appended to dest, names the directory of the manifest's shared paths. It is never removed.
const sharedSuffix = ".shared"

// linkShared replaces m's shared paths in a staged tree by links to DEST.shared/PATH. If DEST.shared/PATH exists, the
// archive's content at PATH is dropped. If not, that content is moved there. If neither exists, an empty directory is
// made. DEST.shared may belong to anybody: links in it aren't followed out of it.
func (r *Releases) linkShared(staging string, m *deployments.Manifest) error {
	if len(m.Shared) == 0 {
		return nil
	}
	uid, gid, err := safefs.LookupOwner(m.Owner)
	if err != nil {
		return err
	}
	place, err := r.places.parent.OpenDest(r.dest+sharedSuffix, nil, true)
	if err != nil {
		return err
	}
	defer place.Close()
	tree, err := os.OpenRoot(staging)
	if err != nil {
		return err
	}
	defer tree.Close()
	shared, err := os.OpenRoot(place.Path(""))
	if err != nil {
		return err
	}
	defer shared.Close()
	s := sharer{
		staging: staging,
		tree:    tree,
		shared:  shared,
		name:    filepath.Base(r.dest) + sharedSuffix,
		uid:     uid,
		gid:     gid,
	}
	for _, p := range m.Shared {
		if err := s.share(p); err != nil {
			return fmt.Errorf("shared %q: %w", p, err)
		}
	}
	return durable.SyncDir(r.parent())
}

// sharer replaces the shared paths of one tree by links.
type sharer struct {
	staging      string // staging is the directory of tree
	tree, shared *os.Root
	name         string // name of the shared directory, which lies beside dest
	uid, gid     int
}

func (s *sharer) share(p string) error {
	// target climbs from the link to the directory that holds DEST.releases and DEST.shared.
	target := strings.Repeat("../", 2+strings.Count(p, "/")) + s.name + "/" + p
	here, err := s.tree.Lstat(p)
	if err == nil && here.Mode().Type() == fs.ModeSymlink {
		if there, err := s.tree.Readlink(p); err == nil && there == target {
			return nil // an earlier call made it, and was cut off later
		}
	}
	inTree := err == nil
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	_, err = s.shared.Lstat(p)
	switch {
	case err == nil:
	case !errors.Is(err, fs.ErrNotExist):
		return err
	case inTree:
		if err := s.move(p); err != nil {
			return err
		}
		inTree = false
	default:
		if err := s.make(p); err != nil {
			return err
		}
	}
	if inTree {
		if err := safefs.RemoveTree(filepath.Join(s.staging, p)); err != nil {
			return err
		}
	}
	if err := s.makeAbove(path.Dir(p)); err != nil {
		return err
	}
	if err := s.tree.Symlink(target, p); err != nil || s.uid < 0 && s.gid < 0 {
		return err
	}
	return s.tree.Lchown(p, s.uid, s.gid)
}

// makeAbove makes dir, which lies above a shared path, and the directories above dir, if the
// archive lacks them.
func (s *sharer) makeAbove(dir string) error {
	if _, err := s.tree.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.makeAbove(path.Dir(dir)); err != nil {
		return err
	}
	if err := s.tree.Mkdir(dir, 0o755); err != nil || s.uid < 0 && s.gid < 0 {
		return err
	}
	return s.tree.Lchown(dir, s.uid, s.gid)
}

// move moves the archive's content at p to the shared directory.
func (s *sharer) move(p string) error {
	if err := s.shared.MkdirAll(path.Dir(p), 0o755); err != nil {
		return err
	}
	from, err := s.tree.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := s.shared.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer to.Close()
	return safefs.PathError("rename", p, unix.Renameat(int(from.Fd()), path.Base(p), int(to.Fd()), path.Base(p)))
}

// make makes an empty shared directory that belongs to the tree's owner.
func (s *sharer) make(p string) error {
	if err := s.shared.MkdirAll(path.Dir(p), 0o755); err != nil {
		return err
	}
	parent, err := s.shared.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), path.Base(p), 0o755); err != nil {
		return safefs.PathError("mkdir", p, err)
	}
	if s.uid < 0 && s.gid < 0 {
		return nil
	}
	// The directory is opened, not named: the owner of the directory above could replace it by a link to any file.
	dir, err := safefs.OpenAt(int(parent.Fd()), path.Base(p), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return safefs.PathError("open", p, err)
	}
	defer unix.Close(dir)
	return safefs.PathError("chown", p, unix.Fchown(dir, s.uid, s.gid))
}
