package git

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/plumbing"

	"kedge/sync/git/transport"
)

// LoadAt reads a commit of the repository at path: a bare one, a clone, or a directory in a clone's work tree. rev is a
// hash, a branch, a tag, or another commit-ish that go-git resolves; below is as Config.Path. The error of an invalid
// tree wraps a deployments.Problems. No signature is checked.
func LoadAt(ctx context.Context, path, rev, below string) (*Commit, error) {
	if file, local := localPath(path); local {
		path = file
	} else {
		return nil, fmt.Errorf("repository %s is not on this machine: clone it first", transport.Redact(path))
	}
	dir, common, err := gitDir(path)
	for up := path; err != nil; dir, common, err = gitDir(up) {
		above, absErr := filepath.Abs(filepath.Join(up, ".."))
		if absErr != nil || above == up {
			return nil, fmt.Errorf("%s is not in a Git repository", path)
		}
		up = above
	}
	if err := checkFormat(common); err != nil {
		return nil, err
	}
	r, err := git.PlainOpenWithOptions(dir, &git.PlainOpenOptions{EnableDotGitCommonDir: true})
	if err != nil {
		return nil, fmt.Errorf("repository %s: %w", dir, err)
	}
	hash, err := r.ResolveRevision(plumbing.Revision(rev))
	if errors.Is(err, plumbing.ErrReferenceNotFound) && rev == "HEAD" {
		return nil, fmt.Errorf("%s has no commit yet: commit first", path)
	}
	if err != nil {
		return nil, fmt.Errorf("revision %q in %s: %w", rev, dir, err)
	}
	from, err := OpenObjects(filepath.Join(common, "objects"))
	if err != nil {
		return nil, err
	}
	defer from.Close()
	if from.subdir, err = cleanPath(below); err != nil {
		return nil, err
	}
	c, err := from.Load(hash.String(), nil)
	if err != nil {
		return nil, err
	}
	return c, ctx.Err()
}

// OpenReceiving opens the repository in which a pre-receive hook runs, with the quarantine that holds the pushed
// objects. It also returns the branches that a mirror is likely to follow: main, and the one that HEAD names, if HEAD
// can be read. below is as Config.Path, and env returns the hook's environment variables. The caller closes in.
func OpenReceiving(repoDir, below string, env func(string) string) (in *Objects, branches []string, err error) {
	if dir := env("GIT_DIR"); dir != "" {
		repoDir = within(repoDir, dir)
	}
	dir, common, err := gitDir(repoDir)
	if err != nil {
		return nil, nil, err
	}
	branches = []string{"main"}
	if r, err := git.PlainOpen(dir); err == nil {
		if head, err := r.Reference(plumbing.HEAD, false); err == nil && head.Target().IsBranch() {
			branches = append(branches, head.Target().Short())
		}
	}
	var dirs []string
	for _, d := range append([]string{env("GIT_QUARANTINE_PATH"), env("GIT_OBJECT_DIRECTORY")},
		filepath.SplitList(env("GIT_ALTERNATE_OBJECT_DIRECTORIES"))...) {
		if d != "" {
			dirs = append(dirs, within(repoDir, d))
		}
	}
	if below, err = cleanPath(below); err != nil {
		return nil, nil, err
	}
	if in, err = OpenObjects(append(dirs, filepath.Join(common, "objects"))...); err != nil {
		return nil, nil, err
	}
	in.subdir = below
	return in, branches, nil
}

// Update is a branch's update in a push. Old and New are the branch's heads before and after the push. Old is empty if
// the push makes the branch, New if the push removes it.
type Update struct{ Branch, Old, New string }

// ReadUpdates reads "OLD NEW REF" lines, as githooks(5) describes for pre-receive and post-receive. It ignores
// references that aren't branches.
func ReadUpdates(stdin io.Reader) (all []Update, err error) {
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || !plumbing.IsHash(fields[0]) || !plumbing.IsHash(fields[1]) {
			return nil, fmt.Errorf("standard input: %q: want OLD NEW REF, as Git gives them to its hooks", lines.Text())
		}
		if branch, ok := strings.CutPrefix(fields[2], "refs/heads/"); ok {
			all = append(all, Update{branch, unlessZero(fields[0]), unlessZero(fields[1])})
		}
	}
	return all, lines.Err()
}

// Pushed reads a post-receive hook's lines, and returns the commit that the push made the branch's head. commit is
// empty if the push only moved other references, or removed the branch.
func Pushed(stdin io.Reader, branch string) (commit string, err error) {
	updates, err := ReadUpdates(stdin)
	for _, u := range updates {
		if u.Branch == branch && u.New != "" {
			commit = u.New
		}
	}
	return commit, err
}

// IsHash reports whether a text has the form of a full hash: 40 hexadecimal digits.
func IsHash(text string) bool { return plumbing.IsHash(text) }

// unlessZero returns a hash, or "" for Git's zero hash.
func unlessZero(hash string) string {
	if plumbing.NewHash(hash).IsZero() {
		return ""
	}
	return hash
}
