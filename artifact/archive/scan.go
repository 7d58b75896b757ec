package archive

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"kedge/artifact/safefs"
	"kedge/deployments"
)

// Scan lists a tree in the order of the archive. It reads no content: each file's Sum is EmptyDigest, and offsets are
// 0. What a release can't contain is an error, but not a symbolic link that leaves the tree: see CheckTargets.
func Scan(ctx context.Context, top *os.File) ([]Entry, error) {
	s := &scanner{ctx: ctx, seen: map[inode]int{}}
	// Another descriptor, as reading the directory must not move top's read position.
	dir, err := safefs.OpenAt(int(top.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, safefs.PathError("open", top.Name(), err)
	}
	err = s.walk(os.NewFile(uintptr(dir), top.Name()), "")
	return s.entries, err
}

type inode struct{ dev, ino uint64 }

type scanner struct {
	ctx     context.Context
	entries []Entry
	seen    map[inode]int // the first entry of a file that has several names
}

// walk adds the content of dir, and closes dir. prefix is its path with a slash, or "" for the tree itself.
func (s *scanner) walk(dir *os.File, prefix string) error {
	defer dir.Close()
	if err := s.ctx.Err(); err != nil {
		return err
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		p := prefix + name
		if err := CheckPath(p); err != nil {
			return err
		}
		if len(s.entries) == maxEntries {
			return fmt.Errorf("the tree has more than %d entries", maxEntries)
		}
		e, err := s.entry(int(dir.Fd()), name, p)
		if err != nil {
			return err
		}
		s.entries = append(s.entries, e)
		if e.Kind != Dir {
			continue
		}
		fd, err := safefs.OpenAt(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			return safefs.PathError("open", p, err)
		}
		if err := s.walk(os.NewFile(uintptr(fd), p), p+"/"); err != nil {
			return err
		}
	}
	return nil
}

func (s *scanner) entry(dir int, name, p string) (Entry, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return Entry{}, safefs.PathError("stat", p, err)
	}
	e := Entry{Path: p, Mode: fs.FileMode(st.Mode & 0o777)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		e.Kind, e.Mode = Dir, modeOf(st.Mode)
	case unix.S_IFLNK:
		e.Kind, e.Mode = Symlink, fs.ModePerm
		target := make([]byte, maxPath+1)
		n, err := unix.Readlinkat(dir, name, target)
		if err != nil {
			return Entry{}, safefs.PathError("readlink", p, err)
		}
		e.Target = string(target[:n])
		return e, checkTargetText(p, e.Target)
	case unix.S_IFREG:
		if st.Mode&(unix.S_ISUID|unix.S_ISGID) != 0 {
			return Entry{}, fmt.Errorf("%q is setuid or setgid, which a release may not have", p)
		}
		e.Size, e.Sum = st.Size, EmptyDigest
		if st.Nlink > 1 {
			key := inode{uint64(st.Dev), st.Ino}
			if first, ok := s.seen[key]; ok {
				e.Kind, e.Original, e.Size, e.Sum = Hardlink, first, 0, deployments.Digest{}
			} else {
				s.seen[key] = len(s.entries)
			}
		}
	default:
		return Entry{}, fmt.Errorf("%q is neither a file, a directory nor a symbolic link (%s)", p, typeOf(st.Mode))
	}
	return e, nil
}

// typeOf names the type of a file that a release can't contain.
func typeOf(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFIFO:
		return "a pipe"
	case unix.S_IFSOCK:
		return "a socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "a device"
	}
	return fmt.Sprintf("type %#o", mode&unix.S_IFMT)
}
