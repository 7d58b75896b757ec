package artifact

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments/durable"
)

// forget removes what Keep stored.
func (t treeSwitcher) forget() error {
	if t.c.Before == "" {
		return nil
	}
	return safefs.RemoveTree(t.c.Before)
}

// keptTree returns the path of the copy of what was at dest before the strategy rsync wrote over it.
func (s rsyncSwitcher) keptTree() string { return filepath.Join(s.c.Before, "tree") }

// Keep copies what is at dest, and removes an earlier copy. It leaves out excluded files and mounts,
// which rsync doesn't change. It copies nothing if dest is missing, empty or no directory, if the
// archive lacks the file of exclude_from, or if Before isn't configured. If the disk has no room
// for the copy, that is an error.
func (s rsyncSwitcher) Keep(ctx context.Context, r *Release) error {
	if err := s.forget(); s.c.Before == "" || err != nil {
		return err
	}
	dest, err := s.open(r, false)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil // dest is no directory, so nothing is served from it
	}
	if err != nil {
		return err
	}
	defer dest.Close()
	if found, err := os.ReadDir(dest.Path("")); err != nil || len(found) == 0 {
		return err
	}
	args, err := s.args(r, dest)
	if errors.Is(err, ErrUntouched) {
		return nil // the archive lacks the file of exclude_from, so that the switch will fail
	}
	if err != nil {
		return err
	}
	mounts, err := excludeMounts(dest)
	if err != nil {
		return err
	}
	args = append(args, mounts...)
	part := filepath.Join(s.c.Before, "part")
	if err := os.MkdirAll(part, 0o700); err != nil {
		return err
	}
	args = append(args, "-H", dest.PathForTool("")+"/", part+"/")
	err = s.checkCopy(ctx, part, args)
	if err == nil {
		err = s.tool(ctx, "rsync", args...)
	}
	if err != nil { // a copy that failed may take the space that the live tree needs
		return errors.Join(
			fmt.Errorf("keeping a copy of what is at %s before the first release: %w", r.Manifest.Dest, err), s.forget())
	}
	if err := durable.SyncFS(part); err != nil {
		return err
	}
	return durable.Rename(part, s.keptTree())
}

// checkCopy returns an error if dir's disk has no room for what rsync would copy with args.
func (s rsyncSwitcher) checkCopy(ctx context.Context, dir string, args []string) error {
	output, err := s.c.Tool(ctx, io.Discard, "rsync", append([]string{"--dry-run", "--stats", "--no-h"}, args...)...)
	if err != nil {
		return err
	}
	found := transferSize.FindSubmatch(output)
	if found == nil {
		return errors.New("rsync --stats does not say how much it would copy")
	}
	size, err := strconv.ParseInt(string(found[1]), 10, 64)
	if err != nil {
		return err
	}
	return checkFree(dir, "the copy", size)
}

var transferSize = regexp.MustCompile(`(?m)^Total transferred file size: ([0-9]+) bytes$`)

// Restore has rsync make dest equal to the copy that Keep made, and returns false if there is no copy. It leaves
// excluded files and mounts alone, which the copy lacks.
func (s rsyncSwitcher) Restore(ctx context.Context, r *Release) (bool, error) {
	if s.c.Before == "" || !safefs.Exists(s.keptTree()) {
		return false, nil
	}
	if err := s.Stage(ctx, r, StageOptions{}); err != nil { // exclude_from names a file in r's tree
		return false, err
	}
	dest, err := s.open(r, true)
	if err != nil {
		return false, err
	}
	defer dest.Close()
	args, err := s.args(r, dest)
	if err != nil {
		return false, err
	}
	if err := s.tool(ctx, "rsync", append(args, "-H", s.keptTree()+"/", dest.PathForTool("")+"/")...); err != nil {
		return false, fmt.Errorf("putting back what was at %s before the first release: %w", r.Manifest.Dest, err)
	}
	return true, durable.SyncFS(dest.Path(""))
}

// identity returns text that distinguishes a file from every other that exists. If its file system
// records birth times, the text of a later file with the same inode differs, too.
func identity(path string) (string, error) {
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_BTIME, &st)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d:%d %d %d.%d\n", st.Dev_major, st.Dev_minor, st.Ino, st.Btime.Sec, st.Btime.Nsec), nil
}

func (m moveSwitcher) keptIdentity() string { return filepath.Join(m.c.Before, "identity") }

// Keep stores the identity of what lies at dest, for Restore. A pre command is expected to move
// that away, as the release can't be moved there otherwise. If nothing lies there, or Before isn't
// configured, Keep stores nothing.
func (m moveSwitcher) Keep(_ context.Context, r *Release) error {
	if err := m.forget(); m.c.Before == "" || err != nil {
		return err
	}
	parent, err := m.openParent(r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	id, err := identity(parent.Path(filepath.Base(r.Manifest.Dest)))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.c.Before, 0o700); err != nil {
		return err
	}
	return durable.WriteFile(m.keptIdentity(), []byte(id), 0o600)
}

// Restore moves back what Keep identified, and removes what took its place. It returns false if
// what Keep identified no longer lies in dest's parent directory, or if Keep stored nothing.
func (m moveSwitcher) Restore(_ context.Context, r *Release) (bool, error) {
	if m.c.Before == "" {
		return false, nil
	}
	want, err := os.ReadFile(m.keptIdentity())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	parent, err := m.openParent(r)
	if err != nil {
		return false, err
	}
	defer parent.Close()
	dest, aside := parent.Path(filepath.Base(r.Manifest.Dest)), parent.Path(asideName(r))
	if id, err := identity(dest); err == nil && id == string(want) {
		return true, m.discard(aside) // an earlier call was cut off after the last rename
	}
	siblings, err := os.ReadDir(parent.Path(""))
	if err != nil {
		return false, err
	}
	for _, s := range siblings {
		moved := parent.Path(s.Name())
		if id, err := identity(moved); err != nil || id != string(want) {
			continue
		}
		if safefs.Exists(dest) {
			if err := errors.Join(m.discard(aside), durable.Rename(dest, aside)); err != nil {
				return false, err
			}
		}
		if err := durable.Rename(moved, dest); err != nil {
			return false, err
		}
		return true, m.discard(aside)
	}
	if m.c.Log != nil {
		m.c.Log.Warn("what was at dest before the first release can't be put back: the pre commands removed it, or "+
			"moved it out of dest's directory", "dest", r.Manifest.Dest)
	}
	return false, nil
}

// discard removes the failed release at aside. If something is mounted in it, discard leaves that
// and only logs it: a mount must not prevent the restore.
func (m moveSwitcher) discard(aside string) error {
	err := safefs.RemoveTree(aside)
	if errors.Is(err, safefs.ErrMounted) && m.c.Log != nil {
		m.c.Log.Warn("left a failed release beside dest, as something is mounted in it", "error", err)
	}
	return safefs.ExceptMounts(err)
}
