package git

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/helper/chroot"
	"github.com/go-git/go-billy/v5/helper/mount"
	"github.com/go-git/go-billy/v5/memfs"
	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/config"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"github.com/go-git/go-git/v5/storage/filesystem/dotgit"

	"kedge/deployments/inputfile"
	"kedge/deployments/safetext"
	"kedge/sync/git/transport"
)

// ErrNoBranch means that the repository exists but has no such branch: nothing was pushed yet, or the branch has
// another name.
var ErrNoBranch = transport.ErrNoBranch

// ErrGap means that commits are missing between a branch's head and the beginning of its history.
var ErrGap = errors.New("the history has a gap")

// maxFile bounds a file, and a commit without its files, in bytes. Unit files have a few hundred, and whoever may push
// must not be able to exhaust the mirror's memory.
const maxFile = 1 << 20

var errTooLarge = fmt.Errorf("the file has more than %d bytes", maxFile)

// objectCache bounds the objects that one Objects caches, in bytes.
const objectCache = 8 * cache.MiByte

// Objects reads a repository's objects in place, from several object directories: the repository's own, those that
// objects/info/alternates names, and in a pre-receive hook the quarantine. It never writes. It doesn't use go-git's own
// support of alternates, which parses their indexes again for each object. An Objects is opened for one reading and
// then closed, as Git may repack at any time.
type Objects struct {
	storer.EncodedObjectStorer // the first directory's; its writing methods are not called
	dirs                       []*filesystem.Storage

	subdir   string // as Config.Path, clean; ".": the root
	filtered bool   // the repository may lack files larger than maxFile
}

// OpenObjects opens object directories, at least one, and the alternates that they name.
func OpenObjects(dirs ...string) (*Objects, error) {
	o := &Objects{subdir: "."}
	shared := cache.NewObjectLRU(objectCache)
	seen := map[string]bool{}
	for len(dirs) > 0 {
		dir := filepath.Clean(dirs[0])
		dirs = dirs[1:]
		if seen[dir] {
			continue
		}
		seen[dir] = true
		if info, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("object directory: %w", err)
		} else if !info.IsDir() {
			return nil, fmt.Errorf("object directory %s is not a directory", dir)
		}
		o.dirs = append(o.dirs, filesystem.NewStorageWithOptions(gitDirAround(dir), shared,
			filesystem.Options{LargeObjectThreshold: maxFile, KeepDescriptors: true}))
		more, err := alternates(dir)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, more...)
	}
	o.EncodedObjectStorer = o.dirs[0]
	return o, nil
}

// Close closes the packs.
func (o *Objects) Close() error {
	var errs []error
	for _, dir := range o.dirs {
		errs = append(errs, dir.Close())
	}
	return errors.Join(errs...)
}

// incompleteReason returns the reason why the repository may lack objects by design, with what to do about it; empty:
// it should have all objects.
func (o *Objects) incompleteReason() string {
	if o.filtered { // a cache: the server decides which objects it gets
		return "the server's repository may be a shallow clone: run git fetch --unshallow in it"
	}
	for _, dir := range o.dirs {
		root := dir.Filesystem().Root()
		if _, err := os.Stat(filepath.Join(root, "shallow")); err == nil {
			return "the repository is a shallow clone: run git fetch --unshallow in it"
		}
		if promised, err := filepath.Glob(filepath.Join(root, "objects", "pack", "*.promisor")); err == nil &&
			len(promised) > 0 {
			return "the repository is a partial clone: mirror one that was made without --filter"
		}
	}
	return ""
}

// explain adds the reason that incompleteReason returns to err, if err means that an object is missing. Other errors
// are returned as they are.
func (o *Objects) explain(err error) error {
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		if why := o.incompleteReason(); why != "" {
			return fmt.Errorf("%w (%s)", err, why)
		}
	}
	return err
}

// gitDirAround returns a file system in which dir is named "objects", as go-git only opens whole Git directories.
func gitDirAround(dir string) billy.Filesystem {
	if filepath.Base(dir) == "objects" {
		return osfs.New(filepath.Dir(dir))
	}
	return chroot.New(mount.New(memfs.New(), "objects", osfs.New(dir)), "")
}

// alternates returns the object directories that dir/info/alternates names, if it exists; see gitrepository-layout(5).
func alternates(dir string) ([]string, error) {
	text, err := inputfile.Read("alternates of an object directory", filepath.Join(dir, "info", "alternates"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var more []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case filepath.IsAbs(line):
			more = append(more, line)
		default:
			more = append(more, filepath.Join(dir, line))
		}
	}
	return more, nil
}

func (o *Objects) EncodedObject(kind plumbing.ObjectType, h plumbing.Hash) (found plumbing.EncodedObject, err error) {
	err = o.first(func(dir *filesystem.Storage) error {
		found, err = dir.EncodedObject(kind, h)
		return err
	})
	return found, err
}

func (o *Objects) EncodedObjectSize(h plumbing.Hash) (size int64, err error) {
	err = o.first(func(dir *filesystem.Storage) error {
		size, err = dir.EncodedObjectSize(h)
		return err
	})
	return size, err
}

func (o *Objects) HasEncodedObject(h plumbing.Hash) error {
	return o.first(func(dir *filesystem.Storage) error { return dir.HasEncodedObject(h) })
}

// first calls ask with one directory after another, and returns the first result that isn't plumbing.ErrObjectNotFound.
// A nil result means that the directory has the object. If no directory has it, first returns
// plumbing.ErrObjectNotFound.
func (o *Objects) first(ask func(*filesystem.Storage) error) error {
	for _, dir := range o.dirs {
		if err := ask(dir); !errors.Is(err, plumbing.ErrObjectNotFound) {
			return err
		}
	}
	return plumbing.ErrObjectNotFound
}

// gitDir returns the Git directory of the bare repository, clone or linked work tree at path: path, path/.git, or what
// the file path/.git names. common has the objects and branches; it differs from dir only for a linked work tree.
func gitDir(path string) (dir, common string, err error) {
	if path, err = filepath.Abs(path); err != nil {
		return "", "", err
	}
	dirs := []string{path}
	if _, err := os.Lstat(filepath.Join(path, ".git")); err == nil { // a work tree, where "objects" may be a stage
		dirs = []string{filepath.Join(path, ".git")}
	}
	for _, dir = range dirs {
		if info, err := os.Stat(filepath.Join(dir, "objects")); err == nil && info.IsDir() {
			return dir, dir, nil
		}
	}
	text, err := inputfile.Read("repository", filepath.Join(path, ".git"))
	if err != nil {
		if _, statErr := os.Stat(path); statErr != nil {
			cause := new(fs.PathError)
			errors.As(statErr, &cause)
			return "", "", fmt.Errorf("repository %s: %w", path, cause.Err)
		}
		return "", "", fmt.Errorf("%s is not a Git repository", path)
	}
	dir, ok := strings.CutPrefix(strings.TrimSpace(string(text)), "gitdir: ")
	if !ok {
		return "", "", fmt.Errorf("%s is not a Git repository", path)
	}
	dir = within(path, dir)
	text, err = inputfile.Read("linked work tree", filepath.Join(dir, "commondir"))
	if errors.Is(err, fs.ErrNotExist) {
		return dir, dir, nil
	}
	if err != nil {
		return "", "", err
	}
	return dir, within(dir, strings.TrimSpace(string(text))), nil
}

func within(dir, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(dir, path)
}

// checkFormat refuses repositories that go-git would misread: see extensions in git-config(1).
func checkFormat(gitDir string) error {
	text, err := inputfile.Read("repository", filepath.Join(gitDir, "config"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	c, err := config.ReadConfig(bytes.NewReader(text))
	if err != nil {
		return fmt.Errorf("repository: %s/config: %w", gitDir, err)
	}
	extensions := c.Raw.Section("extensions")
	if format := extensions.Option("objectformat"); format != "" && !strings.EqualFold(format, "sha1") {
		return fmt.Errorf("repository %s has the object format %s: only sha1 can be mirrored", gitDir, format)
	}
	if refs := extensions.Option("refstorage"); refs != "" && !strings.EqualFold(refs, "files") {
		return fmt.Errorf("repository %s keeps its refs as %s: only files can be mirrored (git refs migrate "+
			"--ref-format=files)", gitDir, refs)
	}
	return nil
}

// branchHead returns the hash of a branch's newest commit in the Git directory dir. The error wraps ErrNoBranch if
// there is no such branch.
func branchHead(dir, branch string) (string, error) {
	refs := dotgit.New(osfs.New(dir))
	name := plumbing.NewBranchReferenceName(branch)
	for range 5 { // a branch may be a symbolic ref
		ref, err := refs.Ref(name)
		switch {
		case errors.Is(err, plumbing.ErrReferenceNotFound) || errors.Is(err, fs.ErrNotExist):
			return "", missing(branch, dir, branches(dir))
		case err != nil:
			return "", fmt.Errorf("branch %s of %s: %w", branch, dir, err)
		case ref.Type() == plumbing.HashReference:
			return ref.Hash().String(), nil
		}
		name = ref.Target()
	}
	return "", fmt.Errorf("branch %s of %s: too many symbolic refs", branch, dir)
}

// branches returns the full names of the branches of the Git directory dir; none if its references can't be read.
func branches(dir string) (names []string) {
	refs, _ := dotgit.New(osfs.New(dir)).Refs()
	for _, ref := range refs {
		if ref.Name().IsBranch() {
			names = append(names, ref.Name().String())
		}
	}
	return names
}

// maxBranches and maxNames bound the branches that an error names.
const (
	maxBranches = 5
	maxNames    = 300 // in bytes
)

// missing returns an error that wraps ErrNoBranch, for a branch that the repository at address doesn't have. The error
// lists up to maxBranches of the branches that exist. existing has the full names of all branches; missing changes it.
func missing(branch, address string, existing []string) error {
	if len(existing) == 0 {
		return fmt.Errorf("%w: %s in %s, which is empty: push to it", ErrNoBranch, branch, address)
	}
	slices.Sort(existing)
	for i, name := range existing {
		existing[i] = strings.TrimPrefix(name, "refs/heads/")
	}
	more := ""
	if n := len(existing) - maxBranches; n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	return fmt.Errorf("%w: %s in %s, which has %s%s (--branch names another)", ErrNoBranch, branch, address,
		safetext.Line(strings.Join(existing[:min(len(existing), maxBranches)], ", "), maxNames), more)
}

// CheckLocal returns an error if a repository's address names a path on this machine, and no repository is there.
func CheckLocal(address string) error {
	path, local := localPath(address)
	if !local {
		return nil
	}
	_, _, err := gitDir(path)
	return err
}

// scpLike matches [USER@]HOST:PATH, as git accepts it if there is no file of that name.
var scpLike = regexp.MustCompile(`^([A-Za-z0-9._-]+@)?[A-Za-z0-9.-]+:.+$`)

// localPath returns the path of a repository's address. local reports whether the address is a path on this machine; if
// not, path is empty.
func localPath(address string) (path string, local bool) {
	if path, ok := strings.CutPrefix(address, "file://"); ok {
		return path, true
	}
	if strings.Contains(address, "://") {
		return "", false
	}
	if _, err := os.Stat(address); err != nil && scpLike.MatchString(address) {
		return "", false
	}
	return address, true
}
