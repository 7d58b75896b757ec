package artifact

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments"
)

// restorer restores what a release's commands made, in a newly unpacked tree or the live one. What the live tree has as
// the commands left it is carried over, files by hard links. All else is made from the record, if the record suffices.
type restorer struct {
	tree *os.Root
	live *os.Root // nil: it is missing
	// late makes carry leave paths alone that the new tree has already.
	late bool
	// inPlace is set if tree and live are the same tree: a path that is as the commands left it stays.
	inPlace bool
}

// openRestorer opens the tree to restore, at dir, and the live tree, at live, which may be missing or the same tree.
func openRestorer(dir, live string) (r *restorer, err error) {
	r = &restorer{}
	if r.tree, err = os.OpenRoot(dir); err != nil {
		return nil, err
	}
	r.inPlace = dir == live
	if r.live, err = os.OpenRoot(live); err != nil && !errors.Is(err, fs.ErrNotExist) {
		r.close()
		return nil, err
	}
	return r, nil
}

func (r *restorer) close() {
	r.tree.Close()
	if r.live != nil {
		r.live.Close()
	}
}

// restoreChanges restores in the tree at dir what commands made, as far as it can, from the live
// tree and from the record in made. It ends at the first error.
func restoreChanges(dir, live string, made []commandChange) error {
	r, err := openRestorer(dir, live)
	if err != nil {
		return err
	}
	defer r.close()
	for i := range made {
		if err := r.restore(&made[i]); err != nil {
			return fmt.Errorf("restoring %q, which the release's commands made: %w", made[i].Path, err)
		}
	}
	return nil
}

// restoreLate carries over what was added, while the release was healed, to directories that the
// commands had made. By then the new tree at dir is live, and the tree that it replaced lies at old.
func restoreLate(dir, old string, made []commandChange) error {
	r, err := openRestorer(dir, old)
	if err != nil || r.live == nil {
		return err
	}
	defer r.close()
	r.late = true
	for i := range made {
		if m := &made[i]; m.Type == typeDir && m.whole() && changeAt(r.live, m.Path).Type == typeDir {
			if err := r.carry(m.Path); err != nil {
				return err
			}
		}
	}
	return nil
}

// canRestore reports whether m's path can be restored after something else has changed or removed it. A file whose
// content the commands made needs a record of that content. A directory that they made can't be restored.
func (m *commandChange) canRestore() bool {
	switch {
	case m.Type == typeFile && (m.whole() || m.Sum != nil):
		return m.ContentKept
	case m.Type == typeDir && m.whole():
		return false // its content isn't known
	}
	return true
}

// unrestorable returns the paths of differences that can't be restored: commands made them, and canRestore is false.
func unrestorable(made []commandChange, differences []Difference) pathSet {
	gone := pathSet{}
	for i := range made {
		if !made[i].canRestore() {
			gone.add(made[i].Path)
		}
	}
	found := pathSet{}
	for _, d := range differences {
		if gone[d.Path] {
			found.add(d.Path)
		}
	}
	return found
}

func (r *restorer) restore(m *commandChange) error {
	if m.Path == "." {
		return nil // the top directory keeps its own mode and owner: see Manifest.DestMode
	}
	switch {
	case m.Type == "":
		return r.remove(m.Path)
	case m.isTransient() && (r.live == nil || changeAt(r.live, m.Path).Type != m.Type):
		return nil
	case m.Type == typeFile && !m.whole() && m.Sum == nil:
		return r.attributes(m)
	case m.Type == typeDir && !m.whole():
		return r.attributes(m)
	case m.Type == typeLink:
		return r.link(m)
	}
	if r.live != nil && r.asLeft(m) {
		if !r.inPlace {
			if err := r.carry(m.Path); err != nil {
				return err
			}
		}
		return r.mode(m)
	}
	if m.Type != typeFile || !m.ContentKept {
		return nil // lost: verify reports it
	}
	if err := r.clear(m.Path); err != nil {
		return err
	}
	if err := r.tree.WriteFile(m.Path, m.Content, 0o600); err != nil {
		return err
	}
	return r.attributes(m)
}

// asLeft reports whether the live tree still has m's path as the commands left it. The type must be the same and, if a
// digest was recorded, the content. r.live must not be nil.
func (r *restorer) asLeft(m *commandChange) bool {
	if changeAt(r.live, m.Path).Type != m.Type {
		return false
	}
	if m.Sum == nil {
		return true
	}
	sum, err := sumOf(r.live, m.Path)
	return err == nil && sum == *m.Sum
}

// clear removes what lies at a path, and makes the directories above it.
func (r *restorer) clear(p string) error {
	if err := r.remove(p); err != nil {
		return err
	}
	return r.tree.MkdirAll(path.Dir(p), 0o755)
}

// remove removes a path of the tree; it refuses a mount.
func (r *restorer) remove(p string) error {
	parent, err := r.tree.Open(path.Dir(p))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	return safefs.RemoveAt(int(parent.Fd()), path.Base(p), p)
}

// attributes sets a path's owner and, but for a link, mode as the commands left them, if its type is still the same.
func (r *restorer) attributes(m *commandChange) error {
	if changeAt(r.tree, m.Path).Type != m.Type {
		return nil
	}
	if err := r.chown(m.Path, m.UID, m.GID); err != nil || m.Type == typeLink {
		return err
	}
	return r.tree.Chmod(m.Path, m.Mode)
}

// mode sets a file's mode to the recorded one, if the file's content is as the commands left it. If
// this process may not do that, as with another user's file, Verify goes on reporting the mode. A file
// with another content, or whose content isn't recorded, is left alone: its application may have
// replaced it, with a mode of its own.
func (r *restorer) mode(m *commandChange) error {
	now := changeAt(r.tree, m.Path)
	if m.isTransient() || now.Type != typeFile || now.Mode == m.Mode {
		return nil
	}
	if m.Sum == nil { // asLeft has compared nothing
		info, err := r.tree.Lstat(m.Path)
		if err != nil || !m.ContentKept || info.Size() != int64(len(m.Content)) {
			return nil
		}
		if data, err := r.tree.ReadFile(m.Path); err != nil || !bytes.Equal(data, m.Content) {
			return nil
		}
	}
	err := r.tree.Chmod(m.Path, m.Mode)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	return err
}

// link makes the symbolic link that the commands left. It makes the link under another name and
// renames it, so that a wrong link, through which something may be reading, is replaced at once.
func (r *restorer) link(m *commandChange) error {
	now := changeAt(r.tree, m.Path)
	if now.Type == typeLink && now.Target == m.Target {
		return nil
	}
	aside := path.Join(path.Dir(m.Path), ".kedge-"+deployments.DigestOf([]byte(m.Path)).Short())
	if err := r.clear(aside); err != nil {
		return err
	}
	if err := r.tree.Symlink(m.Target, aside); err != nil {
		return err
	}
	err := r.chown(aside, m.UID, m.GID)
	if err == nil && now.Type == typeDir { // a link can't be renamed over it
		err = r.remove(m.Path)
	}
	if err == nil {
		err = r.tree.Rename(aside, m.Path)
	}
	if err != nil {
		return errors.Join(err, r.remove(aside))
	}
	return nil
}

// chown sets the owner of a path. It does nothing if the owner is right already, so that only a real change needs
// root's rights.
func (r *restorer) chown(p string, uid, gid int) error {
	if now := changeAt(r.tree, p); now.UID == uid && now.GID == gid {
		return nil
	}
	return r.tree.Lchown(p, uid, gid)
}

// carry brings the live tree's path p, if it still exists, into the new tree. Files and links are
// hard-linked; directories are made anew, with all that is in them.
func (r *restorer) carry(p string) error {
	info, err := r.live.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it was removed meanwhile
	}
	if err != nil {
		return err
	}
	there := r.late && changeAt(r.tree, p).Type != ""
	if !info.IsDir() {
		if there {
			return nil
		}
		return r.share(p)
	}
	if !there {
		if err := r.clear(p); err != nil {
			return err
		}
		if err := r.tree.Mkdir(p, 0o700); err != nil {
			return err
		}
	}
	entries, err := fs.ReadDir(r.live.FS(), p)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := r.carry(path.Join(p, e.Name())); err != nil {
			return err
		}
	}
	if there {
		return nil
	}
	was := changeAt(r.live, p)
	if err := r.chown(p, was.UID, was.GID); err != nil {
		return err
	}
	return r.tree.Chmod(p, info.Mode())
}

// share hard-links one file of the live tree into the new one.
func (r *restorer) share(p string) error {
	if err := r.clear(p); err != nil {
		return err
	}
	from, err := r.live.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := r.tree.Open(path.Dir(p))
	if err != nil {
		return err
	}
	defer to.Close()
	err = unix.Linkat(int(from.Fd()), path.Base(p), int(to.Fd()), path.Base(p), 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return safefs.PathError("link", p, err)
}

// keepOwners gives each path of a new tree the owner of the same path in the live one, if both are of the same type.
// It is for releases whose manifest names no owner: their commands may have set owners.
func keepOwners(dir, live string) error {
	tree, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer tree.Close()
	old, err := os.OpenRoot(live)
	if err != nil {
		return err
	}
	defer old.Close()
	return fs.WalkDir(tree.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		now, was := changeAt(tree, p), changeAt(old, p)
		if was.Type != now.Type || was.UID == now.UID && was.GID == now.GID {
			return nil
		}
		if err := tree.Lchown(p, was.UID, was.GID); err != nil || now.Type == typeLink {
			return err
		}
		return tree.Chmod(p, now.Mode)
	})
}
