package safefs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrUnsafe means that dest leads out of where it may be, or that users who aren't trusted could redirect it. Whoever
// operates the node must put dest, or the owners and modes of its directories, right.
var ErrUnsafe = errors.New("dest is not safe to write to")

// maxLinks bounds the symbolic links on the way to a directory, as the kernel does.
const maxLinks = 40

// Place is a directory that is held open, so that nobody can redirect what is done in it.
type Place struct {
	dir  *os.File
	real string // where it lay when it was opened; for comparisons and messages
	// shown is its path as it was given. Path uses that if fixed is set: then only trusted users can replace a directory
	// on the way.
	shown string
	fixed bool
	trust trust
}

// trust says whose links and directories may lead to a place: root's, this process's user's (self), and those of the
// owner of / (top). Directories below bounds may also belong to the user owner (-1: none). Without bounds, directories
// may belong to anybody.
type trust struct {
	self, top int
	owner     int
}

// PlaceOptions are the rules that OpenPlace checks.
type PlaceOptions struct {
	// Within are the directories in or below which dest must lie after resolving links; empty: anywhere. Directories
	// between them and dest must belong to root, to this process's user, to the owner of /, or to Owner.
	Within []string
	// Owner is the manifest's owner: USER, USER:GROUP or :GROUP. It counts only with Within.
	Owner string
	// Create makes missing directories.
	Create bool
}

// OpenPlace opens the directory that dest lies in. It follows a symbolic link only if nobody but root, the owner of /
// and this process's user can have made it. So an application that owns dest's directory can't make an agent write
// outside of it. Any other link, or a breach of opt.Within, is an error that wraps ErrUnsafe.
func OpenPlace(dest string, opt PlaceOptions) (*Place, error) {
	t := trust{self: os.Geteuid(), owner: -1}
	if len(opt.Within) > 0 {
		var err error
		if t.owner, _, err = LookupOwner(opt.Owner); err != nil {
			return nil, err
		}
	}
	dest = filepath.Clean(dest)
	if !filepath.IsAbs(dest) {
		return nil, fmt.Errorf("dest %s is no absolute path: %w", dest, ErrUnsafe)
	}
	bounds, err := realDirs(opt.Within)
	if err != nil {
		return nil, err
	}
	p, err := openPath(filepath.Dir(dest), t, bounds, opt.Create)
	if err != nil {
		return nil, err
	}
	if real := filepath.Join(p.real, filepath.Base(dest)); len(bounds) > 0 && !isWithin(real, bounds) {
		p.Close()
		return nil, leadsOut(dest, real, opt.Within)
	}
	return p, nil
}

func leadsOut(dest, real string, within []string) error {
	return fmt.Errorf("dest %s leads to %s, outside of %s: %w", dest, real, strings.Join(within, ", "), ErrUnsafe)
}

// OpenDest opens dest, a directory in p that may belong to anybody. A link to a directory is followed if only trusted
// users can have made it, and if it leads into one of within (empty: anywhere). Any other link is an error that wraps
// ErrUnsafe. create makes a directory that is missing.
func (p *Place) OpenDest(dest string, within []string, create bool) (*Place, error) {
	below, err := p.walk(filepath.Base(dest), nil, create)
	if err != nil || len(within) == 0 {
		return below, err
	}
	bounds, err := realDirs(within)
	if err == nil && !isWithin(below.real, bounds) {
		err = leadsOut(dest, below.real, within)
	}
	if err != nil {
		below.Close()
		return nil, err
	}
	return below, nil
}

// Close releases the directory.
func (p *Place) Close() error { return p.dir.Close() }

// Path returns a path to name in the directory. While the place is open, that leads there even if other users rename
// directories.
func (p *Place) Path(name string) string { return p.path("self", name) }

// PathForTool is Path for use by a child process: it doesn't contain /proc/self, which would be the child's own.
func (p *Place) PathForTool(name string) string { return p.path(strconv.Itoa(os.Getpid()), name) }

func (p *Place) path(process, name string) string {
	if p.fixed {
		return filepath.Join(p.shown, name)
	}
	return filepath.Join("/proc", process, "fd", strconv.Itoa(int(p.dir.Fd())), name)
}

// OpenPrivate opens the directory name in p, in which kedge stores what it relies on. With create, it makes a missing
// directory. Write permission is removed from all users but the owner. If that fails, or a user who isn't trusted owns
// the directory, the error wraps ErrUnsafe.
func (p *Place) OpenPrivate(name string, create bool) (*Place, error) {
	below, err := p.walk(name, nil, create)
	if err != nil {
		return nil, err
	}
	if err := below.restrict(); err != nil {
		below.Close()
		return nil, err
	}
	return below, nil
}

// MakePrivate makes an empty directory that others may move but not enter, and opens it. It first removes what lies
// under that name, such as what an earlier run left.
func (p *Place) MakePrivate(name string) (*Place, error) {
	if err := RemoveTree(p.Path(name)); err != nil {
		return nil, err
	}
	if err := os.Mkdir(p.Path(name), 0o700); err != nil {
		return nil, err
	}
	return p.OpenPrivate(name, false)
}

// restrict removes write permission on the directory from all users but the owner. If that fails, or a user who isn't
// trusted owns the directory, the error wraps ErrUnsafe.
func (p *Place) restrict() error {
	st, err := p.stat()
	if err != nil {
		return err
	}
	if !p.trust.has(st.Uid) {
		return fmt.Errorf(
			"%s belongs to user %d, who could change releases there: give it to root, or move it away: %w",
			p.shown,
			st.Uid,
			ErrUnsafe,
		)
	}
	if st.Mode&0o022 == 0 {
		return nil
	}
	if err := unix.Chmod(fmt.Sprintf("/proc/self/fd/%d", p.dir.Fd()), st.Mode&0o7755); err != nil {
		return fmt.Errorf("users other than its owner can write into %s, and its mode can't be changed (%w): %w",
			p.shown, err, ErrUnsafe)
	}
	return nil
}

func (p *Place) stat() (st unix.Stat_t, err error) {
	return st, unix.Fstat(int(p.dir.Fd()), &st)
}

func (t trust) has(uid uint32) bool {
	return uid == 0 || int(uid) == t.self || int(uid) == t.top
}

// replaceable reports whether untrusted users can replace an entry of the directory dir. In a sticky directory only the
// entry's owner and the directory's owner can.
func (t trust) replaceable(dir, entry *unix.Stat_t) bool {
	return t.plantable(dir) && (dir.Mode&unix.S_ISVTX == 0 || !t.has(dir.Uid) || !t.has(entry.Uid))
}

// plantable reports whether untrusted users can add an entry to a directory.
func (t trust) plantable(st *unix.Stat_t) bool {
	group := st.Mode&0o020 != 0 && st.Gid != 0 && int(st.Gid) != os.Getegid()
	return !t.has(st.Uid) || group || st.Mode&0o002 != 0
}

// realDirs returns dirs and, for each, the path that it has after trusted links are resolved. A directory that is
// missing, or behind an untrusted link, is returned only as it is.
func realDirs(dirs []string) (real []string, err error) {
	for _, dir := range dirs {
		dir = filepath.Clean(dir)
		real = append(real, dir)
		for _, at := range []string{dir, filepath.Dir(dir)} { // dest may be the bound itself, and a link
			p, err := openPath(at, trust{self: os.Geteuid(), owner: -1}, nil, false)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, ErrUnsafe) {
				continue
			}
			if err != nil {
				return nil, err
			}
			if p.real != at && at == dir {
				real = append(real, p.real)
			} else if p.real != at {
				real = append(real, filepath.Join(p.real, filepath.Base(dir)))
			}
			p.Close()
		}
	}
	return real, nil
}

// isWithin reports whether a clean path is one of dirs, or lies below one.
func isWithin(path string, dirs []string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool {
		return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
	})
}

// openPath opens a directory by its absolute path. Directories below bounds must belong to trusted users or to
// t.owner.
func openPath(path string, t trust, bounds []string, create bool) (*Place, error) {
	root, err := OpenDir("/")
	if err != nil {
		return nil, err
	}
	defer root.Close()
	p := &Place{dir: root, real: "/", shown: "/", fixed: true, trust: t}
	st, err := p.stat()
	if err != nil {
		return nil, err
	}
	p.trust.top = int(st.Uid)
	return p.walk(path, bounds, create)
}

// walk opens the directory at path, starting at p, which stays open. For an absolute path the caller must pass the
// Place of /. Directories in bounds need an owner who is trusted: see enter. create makes missing directories.
func (p *Place) walk(path string, bounds []string, create bool) (*Place, error) {
	shown := path
	if !filepath.IsAbs(path) {
		shown = filepath.Join(p.shown, path)
	}
	fd, err := OpenAt(int(p.dir.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, PathError("open", shown, err)
	}
	w := &walk{
		fd:     fd,
		real:   p.real,
		trust:  p.trust,
		fixed:  p.fixed,
		bounds: bounds,
		create: create,
		todo:   strings.Split(path, "/"),
	}
	for len(w.todo) > 0 && err == nil {
		name := w.todo[0]
		w.todo = w.todo[1:]
		err = w.step(name)
	}
	if err != nil {
		unix.Close(w.fd)
		return nil, fmt.Errorf("opening %s: %w", shown, err)
	}
	return &Place{dir: os.NewFile(uintptr(w.fd), shown), real: w.real, shown: shown, fixed: w.fixed, trust: p.trust}, nil
}

// walk is the state of resolving a directory's path.
type walk struct {
	fd     int
	real   string
	trust  trust
	fixed  bool // so far, only trusted users can replace a directory on the way
	bounds []string
	create bool
	links  int
	todo   []string
}

// step resolves name, the next part of the path, in the current directory. It makes a missing directory if create is
// set, enters a directory, and follows a link that only trusted users can have made. Any other link is an error that
// wraps ErrUnsafe.
func (w *walk) step(name string) error {
	var here unix.Stat_t
	if err := unix.Fstat(w.fd, &here); err != nil {
		return PathError("stat", w.real, err)
	}
	switch name {
	case "", ".":
		return nil
	case "..": // only in trusted links; all directories above are trusted
		return w.enter(name, filepath.Dir(w.real))
	}
	path := filepath.Join(w.real, name)
	var st unix.Stat_t
	err := unix.Fstatat(w.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) && w.create {
		if err := unix.Mkdirat(w.fd, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return PathError("mkdir", path, err)
		}
		err = unix.Fstatat(w.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	switch {
	case err != nil:
		return PathError("stat", path, err)
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		if !w.fixed || w.trust.plantable(&here) || !w.trust.has(st.Uid) {
			return fmt.Errorf("%s is a symbolic link that users other than root could have made (the link belongs to user %d, "+
				"its directory to user %d, with mode %#o): set dest to the path that it leads to: %w", path, st.Uid, here.Uid,
				here.Mode&0o7777, ErrUnsafe)
		}
		return w.follow(name, path)
	}
	w.fixed = w.fixed && !w.trust.replaceable(&here, &st)
	return w.enter(name, path)
}

// enter makes the directory name the current one; path is its whole path. If it lies below the bounds, it must belong
// to a trusted user or to the release's owner, else the error wraps ErrUnsafe.
func (w *walk) enter(name, path string) error {
	fd, err := OpenAt(w.fd, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return PathError("open", path, err)
	}
	unix.Close(w.fd)
	w.fd, w.real = fd, path
	if len(w.bounds) == 0 || !isWithin(path, w.bounds) || slices.Contains(w.bounds, path) {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return PathError("stat", path, err)
	}
	if !w.trust.has(st.Uid) && int(st.Uid) != w.trust.owner {
		return fmt.Errorf(
			"%s belongs to user %d, neither root nor the release's owner: give it to one of them, or name that user as owner: %w",
			path,
			st.Uid,
			ErrUnsafe,
		)
	}
	return nil
}

// follow resolves a link that a trusted user made.
func (w *walk) follow(name, path string) error {
	if w.links++; w.links > maxLinks {
		return PathError("open", path, unix.ELOOP)
	}
	target := make([]byte, unix.PathMax+1)
	n, err := unix.Readlinkat(w.fd, name, target)
	if err != nil {
		return PathError("readlink", path, err)
	}
	to := string(target[:n])
	w.todo = append(strings.Split(to, "/"), w.todo...)
	if !filepath.IsAbs(to) {
		return nil
	}
	fd, err := OpenAt(unix.AT_FDCWD, "/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return PathError("open", "/", err)
	}
	unix.Close(w.fd)
	w.fd, w.real = fd, "/"
	return nil
}
