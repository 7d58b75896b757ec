package git

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

func TestLoadAt(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	first := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	second := o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	o.Git(o.Work, "tag", "-a", "-m", "One", "v1", first)
	linked := filepath.Join(t.TempDir(), "linked")
	o.Git(o.Work, "worktree", "add", "-q", "-b", "other", linked, first)
	for _, c := range []struct{ path, rev, hash, release string }{
		{o.Work, "HEAD", second, "app/2"},
		{o.Work, "HEAD~1", first, "app/1"},
		{o.Work, first[:10], first, "app/1"},
		{o.Work, "v1", first, "app/1"},
		{filepath.Join(o.Work, "prod", "web"), "main", second, "app/2"},
		{o.Bare, "main", second, "app/2"},
		{"file://" + o.Bare, "HEAD", second, "app/2"},
		{linked, "HEAD", first, "app/1"},
		{linked, "main", second, "app/2"},
	} {
		commit, err := LoadAt(t.Context(), c.path, c.rev, "")
		if err != nil {
			t.Errorf("%s %s: %v", c.path, c.rev, err)
			continue
		}
		if commit.Hash != c.hash || commit.Author != "Ada <ada@example.com>" || commit.Subject != "Deploy" ||
			len(commit.Tree.Units) != 1 || commit.Tree.Units[0].Release != pointer(c.release) {
			t.Errorf("%s %s: %+v, %+v", c.path, c.rev, commit, commit.Tree.Units)
		}
	}
	o.Commit(map[string]string{"prod/web/app.yaml": "x"})
	if _, err := LoadAt(t.Context(), o.Work, "HEAD", ""); !errors.As(err, new(deployments.Problems)) {
		t.Errorf("a bad commit: %v", err)
	}
	for _, rev := range []string{"nowhere", ""} {
		if _, err := LoadAt(t.Context(), o.Work, rev, ""); err == nil {
			t.Errorf("revision %q was found", rev)
		}
	}
	empty := t.TempDir()
	o.Git(empty, "init", "-q", "-b", "main")
	if _, err := LoadAt(t.Context(), empty, "HEAD", ""); err == nil ||
		!strings.Contains(err.Error(), "has no commit yet") {
		t.Errorf("an empty repository: %v", err)
	}
	if _, err := LoadAt(t.Context(), t.TempDir(), "HEAD", ""); err == nil || !strings.Contains(err.Error(),
		"not in a Git repository") {
		t.Errorf("no repository: %v", err)
	}
}
