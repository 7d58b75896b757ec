package safefs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrMounted means that a path was neither moved nor removed because something is mounted there or below.
var ErrMounted = errors.New("it is a mount point, which is left alone with its content: unmount it first")

// maxOpenLevels bounds the descriptors for removing a deep tree: deeper directories are first moved to its top.
const maxOpenLevels = 64

// RemoveTree removes the tree at path, even if its owner may not write into its directories. It
// follows no symbolic link, and never crosses a mount point, including bind mounts of the same file
// system. Mount points and the directories above them stay. The error names the first three paths
// that could not be removed. If these three are all mount points, it also names the first other
// path; if none of them is, the first mount point. It wraps ErrMounted if it names a mount point;
// ExceptMounts returns the other failures. A missing tree is no error.
func RemoveTree(path string) error {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENAMETOOLONG) {
		return nil // removing it would be an error on a read-only file system; what is too long can't be there
	}
	if err != nil {
		return err
	}
	parent, err := OpenDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	return RemoveAt(int(parent.Fd()), filepath.Base(path), path)
}

// RemoveAt is RemoveTree for the entry name of an open directory. path names it in errors.
func RemoveAt(dir int, name, path string) error {
	r := remover{top: -1}
	r.remove(dir, name, path, 0)
	return errors.Join(r.errs...)
}

// EmptyDir removes the content of dir, as RemoveTree does. A missing dir is an error.
func EmptyDir(dir string) error {
	d, err := OpenDir(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	r := remover{top: int(d.Fd())}
	r.empty(d, dir, 0)
	return errors.Join(r.errs...)
}

// ExceptMounts returns the failures in an error of RemoveTree that aren't ErrMounted; nil: there
// are none.
func ExceptMounts(err error) error {
	joined, many := err.(interface{ Unwrap() []error })
	if !many {
		if errors.Is(err, ErrMounted) {
			return nil
		}
		return err
	}
	var others []error
	for _, e := range joined.Unwrap() {
		others = append(others, ExceptMounts(e))
	}
	return errors.Join(others...)
}

// remover removes one tree.
type remover struct {
	top   int // descriptor of the tree's top; -1: not open yet
	moved int
	// failed counts the failures. errs has the first few of them, and in any case the first of a mount
	// point and the first of another kind. If failed rises while a directory is emptied, the directory
	// is not empty.
	failed int
	errs   []error
}

func (r *remover) addError(path string, err error) {
	r.failed++
	firstOfKind := !slices.ContainsFunc(r.errs, func(e error) bool {
		return errors.Is(e, ErrMounted) == errors.Is(err, ErrMounted)
	})
	if len(r.errs) < 3 || firstOfKind {
		r.errs = append(r.errs, PathError("remove", path, err))
	}
}

// remove removes the entry name of the directory dir. path is for errors.
func (r *remover) remove(dir int, name, path string, level int) {
	err := unix.Unlinkat(dir, name, 0)
	if errors.Is(err, unix.EACCES) && unix.Fchmod(dir, 0o700) == nil {
		err = unix.Unlinkat(dir, name, 0)
	}
	switch {
	case err == nil || errors.Is(err, unix.ENOENT):
		return
	case errors.Is(err, unix.EBUSY):
		r.addError(path, ErrMounted)
		return
	// some file systems return EPERM for a directory
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		r.addError(path, err)
		return
	}
	notRemoved := err
	fd, err := openBelow(dir, name)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) { // no directory: unlinkat said why it stays
		err = notRemoved
	}
	if err != nil {
		r.addError(path, err)
		return
	}
	d := os.NewFile(uintptr(fd), path)
	defer d.Close()
	if level >= maxOpenLevels {
		r.moved++
		err := unix.Renameat(dir, name, r.top, fmt.Sprintf(".kedge-deep-%d", r.moved))
		if err != nil {
			r.addError(path, err)
		}
		return
	}
	if r.top < 0 {
		r.top = fd
	}
	before := r.failed
	r.empty(d, path, level)
	if r.failed > before {
		return // it isn't empty
	}
	if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		if errors.Is(err, unix.EBUSY) {
			err = ErrMounted
		}
		r.addError(path, err)
	}
}

// empty removes what can be removed of the content of the directory d.
func (r *remover) empty(d *os.File, path string, level int) {
	for {
		if _, err := d.Seek(0, io.SeekStart); err != nil {
			r.addError(path, err)
			return
		}
		names, err := d.Readdirnames(1024)
		if err != nil && !errors.Is(err, io.EOF) {
			r.addError(path, err)
		}
		before := r.failed
		for _, name := range names {
			r.remove(int(d.Fd()), name, filepath.Join(path, name), level+1)
		}
		if len(names) == 0 || r.failed > before {
			return
		}
	}
}

// openBelow opens the directory name in dir for reading. It follows no link and crosses no mount. If the directory's
// mode keeps its owner from reading or changing it, openBelow sets the mode 0700.
func openBelow(dir int, name string) (fd int, err error) {
	path, err := openInMount(dir, name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return -1, err
	}
	defer unix.Close(path)
	self := fmt.Sprintf("/proc/self/fd/%d", path) // the directory that was checked, whatever has its name by now
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return -1, err
	}
	if st.Mode&0o700 != 0o700 {
		_ = unix.Chmod(self, 0o700) // if this fails, opening or emptying it returns the error
	}
	return OpenAt(unix.AT_FDCWD, self, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

// openInMount opens name in dir if it lies in the same mount as dir; otherwise the error is ErrMounted. Without
// openat2 (before Linux 5.6, or forbidden by a seccomp filter) it compares the kernel's mount IDs.
func openInMount(dir int, name string, flags int) (fd int, err error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS,
	}
	for {
		fd, err = unix.Openat2(dir, name, &how)
		switch {
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.EXDEV):
			return -1, ErrMounted
		case !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM):
			return fd, err
		}
		break
	}
	if fd, err = OpenAt(dir, name, flags|unix.O_NOFOLLOW, 0); err != nil {
		return -1, err
	}
	above, err := mountOf(dir)
	here, err2 := mountOf(fd)
	if err = errors.Join(err, err2); err == nil && above != here {
		err = ErrMounted
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// mountOf returns the ID of the mount that an open file lies in: see fdinfo in proc(5).
func mountOf(fd int) (string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if id, ok := strings.CutPrefix(line, "mnt_id:"); ok {
			return strings.TrimSpace(id), nil
		}
	}
	return "", errors.New("the kernel does not say which mount a file lies in")
}

// MountsBelow returns the paths, relative to dir, of the mounts in dir; "." is dir itself. A missing dir has none.
func MountsBelow(dir string) ([]string, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var found []string
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 5 {
			continue
		}
		if at := unescapeMount(fields[4]); at == real || strings.HasPrefix(at, real+"/") {
			rel, err := filepath.Rel(real, at)
			if err != nil {
				return nil, err
			}
			found = append(found, rel)
		}
	}
	return found, lines.Err()
}

// unescapeMount decodes a path of mountinfo, in which space, tab, newline and backslash are escaped as \ and three
// octal digits.
func unescapeMount(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// NoMounts returns ErrMounted, wrapped, if dir is or has a mount point: it must then be neither moved nor removed.
func NoMounts(dir string) error {
	found, err := MountsBelow(dir)
	if err == nil && len(found) > 0 {
		err = PathError("move", filepath.Join(dir, found[0]), ErrMounted)
	}
	return err
}

// Exists reports whether something can be seen at path, even if it is a dangling symbolic link.
func Exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
