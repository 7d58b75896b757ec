package mirror

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-git/go-git/v5"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/storer"

	"kedge/deployments"
)

// LoadCommit reads a commit of the repository at path: a bare one, a clone, or a directory in a clone's work tree. rev is a hash,
// a branch, a tag, or what else gitrevisions(7) calls a commit-ish. An invalid tree is a deployments.Problems.
func LoadCommit(ctx context.Context, path, rev string) (*deployments.Tree, Commit, error) {
	if file, local := localPath(path); local {
		path = file
	} else {
		return nil, Commit{}, fmt.Errorf("repository %s is not on this machine: clone it first", redact(path))
	}
	dir, common, err := gitDir(path)
	for up := path; err != nil; dir, common, err = gitDir(up) {
		above, absErr := filepath.Abs(filepath.Join(up, ".."))
		if absErr != nil || above == up {
			return nil, Commit{}, fmt.Errorf("%s is not in a Git repository", path)
		}
		up = above
	}
	if err := checkFormat(common); err != nil {
		return nil, Commit{}, err
	}
	r, err := git.PlainOpenWithOptions(dir, &git.PlainOpenOptions{EnableDotGitCommonDir: true})
	if err != nil {
		return nil, Commit{}, fmt.Errorf("repository %s: %w", dir, err)
	}
	hash, err := r.ResolveRevision(plumbing.Revision(rev))
	if err != nil {
		return nil, Commit{}, fmt.Errorf("revision %q in %s: %w", rev, dir, err)
	}
	from, err := openObjects(filepath.Join(common, "objects"))
	if err != nil {
		return nil, Commit{}, err
	}
	defer from.Close()
	l, err := load(from, *hash, nil)
	if err != nil {
		return nil, Commit{}, err
	}
	return l.tree, l.Commit, ctx.Err()
}

// CheckPush is a pre-receive hook: it reads "OLD NEW REF" lines from stdin, as githooks(5) gives them, and refuses what the
// mirror would not take: an invalid tree, a rewritten history, a removal of too many units, the removal of the branch. Only
// branches are looked at: those given, or else main and the one that HEAD names. With releases it refuses as well what
// Releases.Check says of those that the push changes. It runs in the receiving repository's environment, where pushed objects lie in a
// quarantine.
func CheckPush(ctx context.Context, repoDir string, stdin io.Reader, releases *Releases, branches ...string) error {
	if dir := os.Getenv("GIT_DIR"); dir != "" {
		repoDir = within(repoDir, dir)
	}
	return checkPush(ctx, repoDir, os.Getenv, stdin, releases, branches)
}

func checkPush(ctx context.Context, repoDir string, env func(string) string, stdin io.Reader, releases *Releases, branches []string) error {
	dir, common, err := gitDir(repoDir)
	if err != nil {
		return err
	}
	if len(branches) == 0 {
		branches = []string{"main"}
		if r, err := git.PlainOpen(dir); err == nil {
			if head, err := r.Reference(plumbing.HEAD, false); err == nil && head.Target().IsBranch() {
				branches = append(branches, head.Target().Short())
			}
		}
	}
	var dirs []string
	for _, d := range append([]string{env("GIT_QUARANTINE_PATH"), env("GIT_OBJECT_DIRECTORY")}, filepath.SplitList(env("GIT_ALTERNATE_OBJECT_DIRECTORIES"))...) {
		if d != "" {
			dirs = append(dirs, within(repoDir, d))
		}
	}
	from, err := openObjects(append(dirs, filepath.Join(common, "objects"))...)
	if err != nil {
		return err
	}
	defer from.Close()
	var refusals []error
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || !plumbing.IsHash(fields[0]) || !plumbing.IsHash(fields[1]) {
			return fmt.Errorf("standard input: %q: want OLD NEW REF, as Git gives them to a pre-receive hook", lines.Text())
		}
		branch, ok := strings.CutPrefix(fields[2], "refs/heads/")
		if !ok || !slices.Contains(branches, branch) {
			continue
		}
		if err := checkUpdate(ctx, from, releases, plumbing.NewHash(fields[0]), plumbing.NewHash(fields[1])); err != nil {
			refusals = append(refusals, fmt.Errorf("branch %s is not updated:\n%w", branch, err))
		}
	}
	return errors.Join(append(refusals, lines.Err())...)
}

// Pushed gives the commit that a push made a branch's head, of a post-receive hook's "OLD NEW REF" lines; empty: it moved other
// references only, or removed the branch.
func Pushed(stdin io.Reader, branch string) (commit string, err error) {
	lines := bufio.NewScanner(stdin)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || !plumbing.IsHash(fields[1]) {
			return "", fmt.Errorf("standard input: %q: want OLD NEW REF, as Git gives them to a post-receive hook", lines.Text())
		}
		if fields[2] == "refs/heads/"+branch && !plumbing.NewHash(fields[1]).IsZero() {
			commit = fields[1]
		}
	}
	return commit, lines.Err()
}

// checkUpdate checks one branch's move; a zero hash stands for none.
func checkUpdate(ctx context.Context, from storer.EncodedObjectStorer, releases *Releases, was, is plumbing.Hash) error {
	if is.IsZero() {
		return errors.New("it is what the mirror follows, and can't be removed")
	}
	to, err := load(from, is, nil)
	if err != nil {
		return err
	}
	var before *deployments.Tree // nil: there is none that sets rules, or has releases that were looked at
	if !was.IsZero() {
		last, err := load(from, was, nil)
		switch {
		case errors.As(err, new(*badCommit)): // it was not taken
		case err != nil:
			return err
		default:
			before = last.tree
			m := move{from: last.Hash, rules: rulesOf(last), to: to}
			for _, u := range before.Units {
				m.had = append(m.had, u.ID)
			}
			if m.descends, err = descends(ctx, from, was, is); err != nil {
				return err
			}
			if err := refuse(m); err != nil {
				return err
			}
		}
	}
	if releases == nil {
		return nil
	}
	tree := *to.tree
	tree.Units = changed(before, to.tree)
	return releases.Check(ctx, &tree)
}
