package git

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/plumbing/storer"
)

// maxFile bounds a file that is read from a commit, in bytes: unit files have a few hundred, and whoever may push must not
// be able to fill the mirror's memory.
const maxFile = 1 << 20

// maxTree bounds one directory's object, in bytes: some 300,000 entries.
const maxTree = 16 << 20

var (
	errTooLarge     = fmt.Errorf("the file has more than %d bytes", maxFile)
	errTreeTooLarge = fmt.Errorf("the directory's list has more than %d bytes", maxTree)
	errWrongKind    = errors.New("the object is of another kind than its directory says")
)

// treeFS is a commit's tree as a file system: read-only, every object read when it is asked for. Symbolic links are followed
// within the commit; submodules are empty directories, as in git archive.
type treeFS struct {
	objects storer.EncodedObjectStorer
	root    plumbing.Hash
	when    time.Time // the commit's: every file's time

	mu    sync.Mutex
	known map[plumbing.Hash]*directory // read so far; by hash, as one that stands in a million places has a million paths
	fault error                        // the first object that could not be read: the repository's trouble, not the commit's
}

// directory is a tree object that was read.
type directory struct {
	entries []object.TreeEntry
	at      map[string]int // by name; of two with one name the first
}

var (
	_ fs.ReadDirFS  = (*treeFS)(nil)
	_ fs.ReadFileFS = (*treeFS)(nil)
	_ fs.StatFS     = (*treeFS)(nil)
	_ fs.ReadLinkFS = (*treeFS)(nil)
)

func newTreeFS(objects storer.EncodedObjectStorer, commit *object.Commit) *treeFS {
	return &treeFS{objects: objects, root: commit.TreeHash, when: commit.Committer.When.UTC(),
		known: map[plumbing.Hash]*directory{}}
}

func (t *treeFS) Open(name string) (fs.File, error) {
	info, err := t.find("open", name)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		entries, err := t.list(info)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return &treeDir{info: info, name: name, entries: entries}, nil
	}
	data, err := t.read(info)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &treeFile{info: info, Reader: bytes.NewReader(data)}, nil
}

func (t *treeFS) ReadFile(name string) ([]byte, error) {
	info, err := t.find("read", name)
	if err != nil {
		return nil, err
	}
	data, err := t.read(info)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

func (t *treeFS) ReadDir(name string) ([]fs.DirEntry, error) {
	info, err := t.find("readdir", name)
	if err != nil {
		return nil, err
	}
	entries, err := t.list(info)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	return entries, nil
}

func (t *treeFS) Stat(name string) (fs.FileInfo, error) {
	info, err := t.find("stat", name)
	if err != nil {
		return nil, err
	}
	return info, nil
}

func (t *treeFS) Lstat(name string) (fs.FileInfo, error) {
	info, err := t.walk("lstat", name, false)
	if err != nil {
		return nil, err
	}
	return info, nil
}

func (t *treeFS) ReadLink(name string) (string, error) {
	info, err := t.walk("readlink", name, false)
	if err != nil {
		return "", err
	}
	if info.mode.Type() != fs.ModeSymlink {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	to, err := t.target(info)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return to, nil
}

// find walks down to name, through symbolic links, and gives what is there. The name in info is that of name itself.
func (t *treeFS) find(op, name string) (*treeInfo, error) {
	return t.walk(op, name, true)
}

func (t *treeFS) walk(op, name string, follow bool) (*treeInfo, error) {
	fail := func(err error) (*treeInfo, error) {
		return nil, &fs.PathError{Op: op, Path: name, Err: err}
	}
	if !fs.ValidPath(name) {
		return fail(fs.ErrInvalid)
	}
	info, parts := t.top(), split(name)
	var above []string // the way to what parts are below, without links
	for links := 0; len(parts) > 0; {
		if !info.IsDir() || info.submodule {
			return fail(fs.ErrNotExist)
		}
		tree, err := t.directory(info.hash)
		if err != nil {
			return fail(err)
		}
		i, found := tree.at[parts[0]]
		if !found {
			return fail(fs.ErrNotExist)
		}
		info = t.info(tree.entries[i])
		if info.mode.Type() != fs.ModeSymlink || !follow && len(parts) == 1 {
			above, parts = append(above, parts[0]), parts[1:]
			continue
		}
		if links++; links > maxLinks {
			return fail(errors.New("too many symbolic links"))
		}
		to, err := t.target(info)
		if err != nil {
			return fail(err)
		}
		target := path.Join(strings.Join(above, "/"), to)
		if path.IsAbs(to) || !fs.ValidPath(target) {
			return fail(errors.New("a symbolic link leads out of the repository"))
		}
		info, above, parts = t.top(), nil, append(split(target), parts[1:]...)
	}
	info.name = path.Base(name)
	return info, nil
}

// top is the commit's own directory.
func (t *treeFS) top() *treeInfo {
	return &treeInfo{fs: t, name: ".", hash: t.root, mode: fs.ModeDir | 0o555}
}

// target reads where a symbolic link leads to.
func (t *treeFS) target(link *treeInfo) (string, error) {
	to, err := t.blob(link)
	if err == nil && len(to) == 0 {
		err = fs.ErrNotExist
	}
	if err == nil && len(to) > maxTarget {
		err = fmt.Errorf("a symbolic link leads to a path of more than %d bytes", maxTarget)
	}
	return string(to), err
}

// maxLinks bounds the symbolic links on the way to a file, and maxTarget where one leads to, in bytes: what Linux makes is no longer.
const (
	maxLinks  = 20
	maxTarget = 4095
)

// split gives a clean path's elements; none for the root.
func split(name string) []string {
	if name == "." {
		return nil
	}
	return strings.Split(name, "/")
}

// directory reads a tree object.
func (t *treeFS) directory(hash plumbing.Hash) (*directory, error) {
	t.mu.Lock()
	known := t.known[hash]
	t.mu.Unlock()
	if known != nil {
		return known, nil
	}
	o, err := t.object(plumbing.TreeObject, hash)
	if err != nil {
		return nil, err
	}
	if o.Size() > maxTree {
		return nil, errTreeTooLarge
	}
	tree, err := object.DecodeTree(t.objects, o)
	if errors.Is(err, object.ErrMalformedTree) {
		return nil, fmt.Errorf("tree %s: %w", hash, err)
	}
	if err != nil {
		return nil, t.failed(fmt.Errorf("tree %s: %w", hash, err))
	}
	d := &directory{entries: tree.Entries, at: make(map[string]int, len(tree.Entries))}
	for i, e := range d.entries {
		if _, twice := d.at[e.Name]; !twice {
			d.at[e.Name] = i
		}
	}
	t.mu.Lock()
	t.known[hash] = d
	t.mu.Unlock()
	return d, nil
}

// object finds one. That it is missing is the repository's trouble; that it is of another kind, the commit's own.
func (t *treeFS) object(kind plumbing.ObjectType, hash plumbing.Hash) (plumbing.EncodedObject, error) {
	o, err := t.objects.EncodedObject(kind, hash)
	switch {
	case err == nil:
		return o, nil
	case hash.IsZero(), errors.Is(err, plumbing.ErrObjectNotFound) && t.objects.HasEncodedObject(hash) == nil:
		return nil, fmt.Errorf("%s %s: %w", kind, hash, errWrongKind)
	}
	return nil, t.failed(fmt.Errorf("%s %s: %w", kind, hash, err))
}

func (t *treeFS) list(info *treeInfo) ([]fs.DirEntry, error) {
	if !info.IsDir() {
		return nil, errors.New("not a directory")
	}
	if info.submodule {
		return nil, nil
	}
	tree, err := t.directory(info.hash)
	if err != nil {
		return nil, err
	}
	entries := make([]fs.DirEntry, 0, len(tree.entries))
	for _, e := range tree.entries {
		// A hostile tree may hold any bytes as a name. What fs.FS can't name, nothing can open either: it is passed over, but not where
		// somebody might take it for a unit.
		switch ext := path.Ext(e.Name); {
		case fs.ValidPath(e.Name) && !strings.Contains(e.Name, "/") && e.Name != ".":
			entries = append(entries, t.info(e))
		case ext == ".yaml", ext == ".yml":
			return nil, fmt.Errorf("%q is no name of a file, in UTF-8", e.Name)
		}
	}
	// Git sorts directories as if their names ended in "/"; fs.ReadDir sorts by name.
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return entries, nil
}

func (t *treeFS) info(e object.TreeEntry) *treeInfo {
	info := &treeInfo{fs: t, name: e.Name, hash: e.Hash, mode: 0o444}
	switch e.Mode {
	case filemode.Dir:
		info.mode = fs.ModeDir | 0o555
	case filemode.Submodule:
		info.mode, info.submodule = fs.ModeDir|0o555, true
	case filemode.Executable:
		info.mode = 0o555
	case filemode.Symlink:
		info.mode = fs.ModeSymlink | 0o777
	}
	return info
}

func (t *treeFS) read(info *treeInfo) ([]byte, error) {
	if info.IsDir() {
		return nil, errors.New("is a directory")
	}
	return t.blob(info)
}

func (t *treeFS) blob(info *treeInfo) ([]byte, error) {
	o, err := t.object(plumbing.BlobObject, info.hash)
	if err != nil {
		return nil, err
	}
	if o.Size() > maxFile { // what is larger was not read into memory: see openObjects
		return nil, errTooLarge
	}
	r, err := o.Reader()
	if err != nil {
		return nil, t.failed(fmt.Errorf("blob %s: %w", info.hash, err))
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxFile+1))
	if err != nil {
		return nil, t.failed(fmt.Errorf("blob %s: %w", info.hash, err))
	}
	if len(data) > maxFile {
		return nil, errTooLarge
	}
	return data, nil
}

// failed notes that the repository itself could not be read.
func (t *treeFS) failed(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fault == nil {
		t.fault = err
	}
	return err
}

// treeInfo is both fs.FileInfo and fs.DirEntry.
type treeInfo struct {
	fs        *treeFS
	name      string
	hash      plumbing.Hash
	mode      fs.FileMode
	submodule bool
}

func (i *treeInfo) Name() string               { return i.name }
func (i *treeInfo) Mode() fs.FileMode          { return i.mode }
func (i *treeInfo) Type() fs.FileMode          { return i.mode.Type() }
func (i *treeInfo) IsDir() bool                { return i.mode.IsDir() }
func (i *treeInfo) ModTime() time.Time         { return i.fs.when }
func (i *treeInfo) Sys() any                   { return nil }
func (i *treeInfo) Info() (fs.FileInfo, error) { return i, nil }
func (i *treeInfo) String() string             { return fs.FormatFileInfo(i) }

func (i *treeInfo) Size() int64 {
	if i.IsDir() {
		return 0
	}
	size, err := i.fs.objects.EncodedObjectSize(i.hash)
	if err != nil {
		return 0 // whoever reads the file sees the error
	}
	return size
}

// treeFile is an open file.
type treeFile struct {
	info *treeInfo
	*bytes.Reader
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *treeFile) Close() error               { return nil }

// treeDir is an open directory.
type treeDir struct {
	info    *treeInfo
	name    string
	entries []fs.DirEntry // what ReadDir has still to give
}

func (d *treeDir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *treeDir) Close() error               { return nil }

func (d *treeDir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.name, Err: errors.New("is a directory")}
}

func (d *treeDir) ReadDir(n int) ([]fs.DirEntry, error) {
	if n > 0 && len(d.entries) == 0 {
		return nil, io.EOF
	}
	if n <= 0 || n > len(d.entries) {
		n = len(d.entries)
	}
	given := d.entries[:n:n]
	d.entries = d.entries[n:]
	return given, nil
}
