package git

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/object"
	"golang.org/x/sys/unix"

	"kedge/deployments"
)

const (
	// maxTree bounds one directory's object, in bytes: some 300,000 entries.
	maxTree = 16 << 20
	// maxLinks bounds the symbolic links on the way to a file. maxTarget bounds a link's target, in bytes; Linux has the
	// same bound.
	maxLinks  = 20
	maxTarget = 4095
)

var (
	errTreeTooLarge = fmt.Errorf("the directory's list has more than %d bytes", maxTree)
	errWrongKind    = errors.New("the object is of another kind than its directory says")
	errNotFile      = errors.New("want the whole file: it is read by fs.ReadFile")
)

// tree is a directory of a commit for deployments.Load. Each object is read when it is needed. Symbolic links are
// followed within the commit. A submodule is shown as a directory with only .git in it, by which Load recognizes it.
type tree struct {
	objects *Objects
	top     plumbing.Hash // the commit's tree
	subdir  string        // the directory in top that is the root; ".": top itself

	// known caches directories by hash instead of path, as a hostile commit can have one directory at a million paths.
	known map[plumbing.Hash]map[string]object.TreeEntry
	// fault is the error of the first object that could not be read: the repository is at fault, not the commit.
	fault error
}

var (
	_ fs.ReadDirFS  = (*tree)(nil)
	_ fs.ReadFileFS = (*tree)(nil)
	_ fs.StatFS     = (*tree)(nil)
)

func newTree(objects *Objects, commit *object.Commit, below string) *tree {
	return &tree{objects: objects, top: commit.TreeHash, subdir: below,
		known: map[plumbing.Hash]map[string]object.TreeEntry{}}
}

// Open implements fs.FS. It always fails, as callers only read whole directories and files.
func (t *tree) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: errNotFile}
}

func (t *tree) Stat(name string) (fs.FileInfo, error) {
	e, err := t.find(name)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return e, nil
}

func (t *tree) ReadFile(name string) ([]byte, error) {
	e, err := t.find(name)
	if err == nil && e.IsDir() {
		err = errors.New("is a directory")
	}
	var data []byte
	if err == nil {
		data, err = t.blob(e.hash)
	}
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// ReadDir lists a directory, sorted by name. Git itself sorts directories as if their names ended in "/".
func (t *tree) ReadDir(name string) ([]fs.DirEntry, error) {
	fail := func(err error) ([]fs.DirEntry, error) {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	dir, err := t.find(name)
	switch {
	case err != nil:
		return fail(err)
	case !dir.IsDir():
		return fail(errors.New("not a directory"))
	case dir.git == filemode.Submodule:
		return []fs.DirEntry{&entry{tree: t, name: ".git", git: filemode.Regular}}, nil
	}
	found, err := t.directory(dir.hash)
	if err != nil {
		return fail(err)
	}
	entries := make([]fs.DirEntry, 0, len(found))
	for name, e := range found {
		// A hostile tree may contain any bytes as a name. Names that are invalid in fs.FS can't be opened either:
		// they are ignored, unless somebody might take one for a unit.
		switch ext := path.Ext(name); {
		case fs.ValidPath(name) && !strings.Contains(name, "/") && name != ".":
			entries = append(entries, t.entry(name, e))
		case ext == ".yaml", ext == ".yml":
			return fail(fmt.Errorf("%q is not a file name in UTF-8", name))
		}
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

// find returns the entry at the path name, following symbolic links. The entry's name is the last element of the path,
// even if a link leads to another name.
func (t *tree) find(name string) (*entry, error) {
	if !fs.ValidPath(name) {
		return nil, fs.ErrInvalid
	}
	at, parts := t.root(), split(path.Join(t.subdir, name))
	var above []string // the path to the directory that parts start from, without links
	for links := 0; len(parts) > 0; {
		if at.git != filemode.Dir {
			return nil, fs.ErrNotExist
		}
		dir, err := t.directory(at.hash)
		if err != nil {
			return nil, err
		}
		e, found := dir[parts[0]]
		if !found {
			return nil, fs.ErrNotExist
		}
		at = t.entry(parts[0], e)
		if at.git != filemode.Symlink {
			above, parts = append(above, parts[0]), parts[1:]
			continue
		}
		if links++; links > maxLinks {
			return nil, errors.New("too many symbolic links")
		}
		target, err := t.target(at.hash, above)
		if err != nil {
			return nil, err
		}
		at, above, parts = t.root(), nil, append(split(target), parts[1:]...)
	}
	at.name = path.Base(name)
	return at, nil
}

func (t *tree) root() *entry { return &entry{tree: t, name: ".", hash: t.top, git: filemode.Dir} }

// target returns the path in the commit to which a symbolic link leads. link is the hash of the link's content. above
// has the elements of the path to the link's directory. A link that leads out of the commit is an error.
func (t *tree) target(link plumbing.Hash, above []string) (string, error) {
	to, err := t.blob(link)
	switch {
	case err != nil:
		return "", err
	case len(to) == 0:
		return "", fs.ErrNotExist
	case len(to) > maxTarget:
		return "", fmt.Errorf("a symbolic link leads to a path of more than %d bytes", maxTarget)
	}
	target := path.Join(strings.Join(above, "/"), string(to))
	if path.IsAbs(string(to)) || !fs.ValidPath(target) {
		return "", errors.New("a symbolic link leads out of the repository")
	}
	return target, nil
}

// split returns a clean path's elements; none for the root.
func split(name string) []string {
	if name == "." {
		return nil
	}
	return strings.Split(name, "/")
}

// directory reads a tree object. It fails if a name occurs twice; Git itself makes no such tree.
func (t *tree) directory(hash plumbing.Hash) (map[string]object.TreeEntry, error) {
	if known := t.known[hash]; known != nil {
		return known, nil
	}
	o, err := t.object(plumbing.TreeObject, hash)
	if err != nil {
		return nil, err
	}
	if o.Size() > maxTree {
		return nil, errTreeTooLarge
	}
	raw, err := object.DecodeTree(t.objects, o)
	if errors.Is(err, object.ErrMalformedTree) {
		return nil, fmt.Errorf("tree %s: %w", hash, err)
	}
	if err != nil {
		return nil, t.recordFault(fmt.Errorf("tree %s: %w", hash, err))
	}
	entries := make(map[string]object.TreeEntry, len(raw.Entries))
	for _, e := range raw.Entries {
		if _, twice := entries[e.Name]; twice {
			return nil, fmt.Errorf("tree %s: %q occurs twice", hash, e.Name)
		}
		entries[e.Name] = e
	}
	t.known[hash] = entries
	return entries, nil
}

func (t *tree) blob(hash plumbing.Hash) ([]byte, error) {
	o, err := t.object(plumbing.BlobObject, hash)
	if err != nil {
		return nil, err
	}
	if o.Size() > maxFile { // larger objects were not read into memory: see OpenObjects
		return nil, errTooLarge
	}
	r, err := o.Reader()
	if err != nil {
		return nil, t.recordFault(fmt.Errorf("blob %s: %w", hash, err))
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, t.recordFault(fmt.Errorf("blob %s: %w", hash, err))
	}
	if len(data) > maxFile {
		return nil, errTooLarge
	}
	return data, nil
}

// object returns the object with a hash, which must be of a kind. An object of another kind, or a
// zero hash, is an error of the commit. A blob that a filtered repository lacks is errTooLarge. Any
// other object that can't be read is an error of the repository: see recordFault.
func (t *tree) object(kind plumbing.ObjectType, hash plumbing.Hash) (plumbing.EncodedObject, error) {
	o, err := t.objects.EncodedObject(kind, hash)
	missing := errors.Is(err, plumbing.ErrObjectNotFound)
	switch {
	case err == nil:
		return o, nil
	case hash.IsZero(), missing && t.objects.HasEncodedObject(hash) == nil:
		return nil, fmt.Errorf("%s %s: %w", kind, hash, errWrongKind)
	case missing && kind == plumbing.BlobObject && t.objects.filtered:
		return nil, errTooLarge
	}
	return nil, t.recordFault(fmt.Errorf("%s %s: %w", kind, hash, err))
}

// recordFault records in fault that the repository itself could not be read, and returns err.
func (t *tree) recordFault(err error) error {
	if t.fault == nil {
		t.fault = err
	}
	return err
}

func (t *tree) entry(name string, e object.TreeEntry) *entry {
	return &entry{tree: t, name: name, hash: e.Hash, git: e.Mode}
}

// entry is a file, directory, symbolic link or submodule of a tree.
type entry struct {
	tree *tree
	name string
	hash plumbing.Hash
	git  filemode.FileMode
}

func (e *entry) Name() string               { return e.name }
func (e *entry) Type() fs.FileMode          { return e.Mode().Type() }
func (e *entry) IsDir() bool                { return e.Mode().IsDir() }
func (e *entry) ModTime() time.Time         { return time.Time{} }
func (e *entry) Sys() any                   { return nil }
func (e *entry) Info() (fs.FileInfo, error) { return e, nil }

func (e *entry) Mode() fs.FileMode {
	switch e.git {
	case filemode.Dir, filemode.Submodule:
		return fs.ModeDir | 0o555
	case filemode.Symlink:
		return fs.ModeSymlink | 0o777
	}
	return 0o444
}

func (e *entry) Size() int64 {
	size, err := e.tree.objects.EncodedObjectSize(e.hash)
	if err != nil {
		return 0 // reading the file will return the error
	}
	return size
}

// LoadDir reads a work tree, or a directory in it, as it is, committed or not; below is as Config.Path. Symbolic links
// are followed only within the repository. Only regular files are read, as the tree may be a stranger's, with links to
// devices. The error of an invalid tree wraps a deployments.Problems.
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
	tree, err := deployments.Load(&workTree{root: root, subdir: inside})
	prefix(below, tree, err)
	return tree, err
}

// workTreeOf returns the top of the work tree that contains dir, and the path from there to dir. Outside of a work
// tree, top is dir itself and inside is ".".
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

// workTree is a directory of a work tree for deployments.Load.
type workTree struct {
	root   *os.Root // the whole work tree
	subdir string
}

var (
	_ fs.ReadDirFS  = (*workTree)(nil)
	_ fs.ReadFileFS = (*workTree)(nil)
	_ fs.StatFS     = (*workTree)(nil)
)

// Open implements fs.FS. It always fails, as callers only read whole directories and files.
func (t *workTree) Open(name string) (fs.File, error) {
	return nil, &fs.PathError{Op: "open", Path: name, Err: errNotFile}
}

func (t *workTree) Stat(name string) (fs.FileInfo, error) {
	at := path.Join(t.subdir, name)
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
	return fs.ReadDir(t.root.FS(), path.Join(t.subdir, name))
}

func (t *workTree) ReadFile(name string) ([]byte, error) {
	data, err := t.read(path.Join(t.subdir, name))
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// read reads a regular file of up to maxFile bytes. It refuses other kinds: opening a pipe would wait for its writer,
// and a device may never end.
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
		return nil, errors.New("it is not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = errTooLarge
	}
	return data, err
}

// prefix puts the name of a directory, below, in front of the file names in tree, so that they are
// paths in the whole repository. It does the same in err if err wraps a deployments.Problems.
func prefix(below string, tree *deployments.Tree, err error) {
	if below == "." {
		return
	}
	if tree != nil {
		for i := range tree.Units {
			tree.Units[i].Place.File = path.Join(below, tree.Units[i].Place.File)
		}
	}
	problems := deployments.Problems(nil)
	_ = errors.As(err, &problems)
	for i := range problems {
		problems[i].File = path.Join(below, problems[i].File)
	}
}

// cleanPath returns the clean form of a Config.Path, "." for the root; an error if it leads out of the repository.
func cleanPath(name string) (string, error) {
	clean := path.Clean(strings.Trim(name, "/"))
	if !fs.ValidPath(clean) {
		return "", fmt.Errorf("path %q: want a directory of the repository, such as deploy", name)
	}
	return clean, nil
}
