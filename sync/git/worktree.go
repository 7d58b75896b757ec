package git

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kedge/deployments"
)

// LoadDir reads a work tree as it is, committed or not; below is as Config.Path. As in a commit, symbolic links are
// followed within the repository alone, and nothing but a regular file is read: the tree may be a stranger's, with
// links to devices in it.
func LoadDir(dir, below string) (*deployments.Tree, error) {
	below, err := cleanPath(below)
	if err != nil {
		return nil, err
	}
	top, inside, err := workTreeOf(filepath.Join(dir, below))
	if err != nil {
		return nil, fmt.Errorf("reading the deployments repo: %w", err)
	}
	root, err := os.OpenRoot(top)
	if err != nil {
		return nil, fmt.Errorf("reading the deployments repo: %w", err)
	}
	defer root.Close()
	tree, err := deployments.Load(&workTree{root: root, below: inside})
	prefix(below, tree, err)
	return tree, err
}

// workTreeOf returns the top of the work tree that a directory lies in, and the way down to it; outside of one, the
// directory itself.
func workTreeOf(dir string) (top, inside string, err error) {
	if dir, err = filepath.Abs(dir); err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return "", "", err
	}
	for top = dir; ; top = filepath.Dir(top) {
		if _, err := os.Lstat(filepath.Join(top, ".git")); err == nil {
			inside, err := filepath.Rel(top, dir)
			return top, filepath.ToSlash(inside), err
		}
		if top == filepath.Dir(top) {
			return dir, ".", nil
		}
	}
}

// workTree is a directory of a work tree, as deployments.Load walks and reads it.
type workTree struct {
	root  *os.Root // of the whole work tree
	below string
}

var (
	_ fs.ReadDirFS  = (*workTree)(nil)
	_ fs.ReadFileFS = (*workTree)(nil)
	_ fs.StatFS     = (*workTree)(nil)
)

// Open is there for fs.FS: whoever reads the tree asks for whole directories and files.
func (t *workTree) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: errNotFile}
}

func (t *workTree) Stat(name string) (fs.FileInfo, error) {
	at := path.Join(t.below, name)
	info, err := t.root.Stat(at)
	if err == nil {
		return info, nil
	}
	if link, lerr := t.root.Lstat(at); lerr == nil && link.Mode().Type() == fs.ModeSymlink {
		err = fmt.Errorf("the symbolic link leads nowhere, or out of the repository: %w", errors.Unwrap(err))
	}
	return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
}

func (t *workTree) ReadDir(name string) ([]fs.DirEntry, error) {
	return fs.ReadDir(t.root.FS(), path.Join(t.below, name))
}

func (t *workTree) ReadFile(name string) ([]byte, error) {
	data, err := t.read(path.Join(t.below, name))
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// read reads a regular file: opening a pipe would wait for its writer, and a device may have no end.
func (t *workTree) read(name string) ([]byte, error) {
	f, err := t.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	switch info, err := f.Stat(); {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is no regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = errTooLarge
	}
	return data, err
}
