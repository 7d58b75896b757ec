package safefs

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrChanging means that a file changed while it was read, or is not of the type or size that its reader expects.
var ErrChanging = errors.New("it changed while it was read")

// Dirs opens the files of one tree relative to descriptors of their directories. For consecutive files of a directory
// it walks the path once, one component at a time. It follows no symbolic link, so that nothing outside of the tree can
// be reached. A tree of 44,567 files took 0.26 of the system calls of os.Root, and 0.35 when files were linked. Not
// safe for concurrent use.
type Dirs struct {
	Top  *os.File // the tree; Close leaves it open
	path string   // path of the innermost open directory
	open []level
}

// level is an open directory.
type level struct {
	end int // length of its path
	fd  int
}

// At returns the directory that holds path p, open until the next call, and p's name there.
func (d *Dirs) At(p string) (dir int, name string, err error) {
	parent := Parent(p)
	if parent != d.path {
		if err := d.descend(parent); err != nil {
			return -1, "", err
		}
	}
	return d.innermost(), p[strings.LastIndexByte(p, '/')+1:], nil
}

func (d *Dirs) innermost() int {
	if n := len(d.open); n > 0 {
		return d.open[n-1].fd
	}
	return int(d.Top.Fd())
}

// descend opens the directory at path to, starting at the nearest open directory above it.
func (d *Dirs) descend(to string) error {
	for n := len(d.open); n > 0; n-- {
		above := d.path[:d.open[n-1].end]
		if to == above || strings.HasPrefix(to, above) && to[len(above)] == '/' {
			break
		}
		unix.Close(d.open[n-1].fd)
		d.open = d.open[:n-1]
	}
	d.path = to
	for {
		begin := 0
		if n := len(d.open); n > 0 {
			begin = min(d.open[n-1].end+1, len(to))
		}
		if begin == len(to) {
			return nil
		}
		end := len(to)
		if i := strings.IndexByte(to[begin:], '/'); i >= 0 {
			end = begin + i
		}
		fd, err := OpenAt(d.innermost(), to[begin:end], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		if err != nil {
			d.path = to[:max(begin-1, 0)]
			return PathError("open", to[:end], err)
		}
		d.open = append(d.open, level{end, fd})
	}
}

// Close closes the directories that are open, but not Top. The Dirs can be used again.
func (d *Dirs) Close() {
	for _, l := range d.open {
		unix.Close(l.fd)
	}
	d.open, d.path = nil, ""
}

// OpenFile opens a path of the tree, with the flags and mode of open(2); it refuses a symbolic link.
func (d *Dirs) OpenFile(p string, flags int, mode uint32) (fd int, err error) {
	dir, name, err := d.At(p)
	if err != nil {
		return -1, err
	}
	if fd, err = OpenAt(dir, name, flags|unix.O_NOFOLLOW, mode); err != nil {
		return -1, PathError("open", p, err)
	}
	return fd, nil
}

// Mkdir makes a directory; mode is subject to the umask.
func (d *Dirs) Mkdir(p string, mode uint32) error {
	dir, name, err := d.At(p)
	if err != nil {
		return err
	}
	return PathError("mkdir", p, unix.Mkdirat(dir, name, mode))
}

// Chmod sets the mode of a path. The caller must have made what lies there, and it must not be a symbolic link, which
// Chmod would follow.
func (d *Dirs) Chmod(p string, mode uint32) error {
	dir, name, err := d.At(p)
	if err != nil {
		return err
	}
	return PathError("chmod", p, unix.Fchmodat(dir, name, mode, 0))
}

// Symlink makes a symbolic link at p.
func (d *Dirs) Symlink(target, p string) error {
	dir, name, err := d.At(p)
	if err != nil {
		return err
	}
	return PathError("symlink", p, unix.Symlinkat(target, dir, name))
}

// Remove removes a file. A missing file is no error, but a missing directory above it is.
func (d *Dirs) Remove(p string) error {
	dir, name, err := d.At(p)
	if err != nil {
		return err
	}
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return PathError("remove", p, err)
	}
	return nil
}

// PathError returns err as an *fs.PathError, and nil if err is nil.
func PathError(op, p string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: p, Err: err}
}

// OpenDir opens a directory for reading. It follows symbolic links, and refuses what is no directory.
func OpenDir(dir string) (*os.File, error) {
	return os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
}

// OpenAt is openat(2) with O_CLOEXEC, repeated when a signal interrupts it. The error is a bare errno.
func OpenAt(dir int, name string, flags int, mode uint32) (fd int, err error) {
	for {
		if fd, err = unix.Openat(dir, name, flags|unix.O_CLOEXEC, mode); err != unix.EINTR {
			return fd, err
		}
	}
}

// WriteAll writes all of data to a file.
func WriteAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil && err != unix.EINTR {
			return err
		}
		data = data[max(n, 0):]
	}
	return nil
}

// ReadAll fills data from the file at an offset. If the file has become too short, the error is ErrChanging.
func ReadAll(fd int, data []byte, at int64) error {
	for len(data) > 0 {
		n, err := unix.Pread(fd, data, at)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n == 0:
			return ErrChanging
		}
		data, at = data[n:], at+int64(n)
	}
	return nil
}

// Parent returns the directory of a path of a tree, which must be clean and relative; empty: the tree itself.
func Parent(p string) string { return p[:max(strings.LastIndexByte(p, '/'), 0)] }
