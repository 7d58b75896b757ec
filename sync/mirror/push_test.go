package mirror

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/deployments"
)

// hooked makes the bare repository check pushes with CheckPush, as a real pre-receive hook.
func hooked(t *testing.T, unpackLimit, as string) *origin {
	t.Helper()
	o := newOrigin(t)
	script := "#!/bin/sh\nKEDGE_TEST_AS=" + as + " exec '" + os.Args[0] + "'\n"
	if err := os.WriteFile(filepath.Join(o.bare, "hooks", "pre-receive"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	o.git(o.bare, "config", "receive.unpackLimit", unpackLimit)
	return o
}

func TestCheckPush(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]string{"loose objects": "100", "a pack": "1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := hooked(t, limit, "pre-receive")
			good := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1")})
			refused := func(what, ref string, words ...string) {
				t.Helper()
				out, err := o.try(o.work, "push", "-f", "origin", ref)
				if err == nil {
					t.Errorf("%s: the push was taken", what)
				}
				for _, w := range words {
					if !strings.Contains(out, w) {
						t.Errorf("%s: no %q in:\n%s", what, w, out)
					}
				}
				if at := o.git(o.bare, "rev-parse", "main"); at != good {
					t.Errorf("%s: main is at %s", what, at)
				}
			}
			o.commit(map[string]string{"prod/web/app.yaml": unitFile("app/2") + "relaese: x\n", "prod/web/base.yaml": "release: base\n"})
			refused("a commit with mistakes", "HEAD:main", "branch main is not updated", "prod/web/app.yaml:2:1", "prod/web/base.yaml:1:")
			o.git(o.work, "push", "-q", "origin", "HEAD:refs/heads/draft") // another branch may hold what it likes

			o.git(o.work, "reset", "-q", "--hard", good)
			o.commit(map[string]string{"prod/web/base.yaml": ""})
			refused("too many units removed", "HEAD:main", "removes 1 of 2 units (prod/web/base)")
			o.git(o.work, "checkout", "-q", "--orphan", "new", good)
			o.commit(map[string]string{"README.md": "a new beginning"})
			refused("a rewritten history", "HEAD:main", "does not descend")
			refused("the branch removed", ":main", "can't be removed")

			o.git(o.work, "checkout", "-q", "main")
			o.git(o.work, "reset", "-q", "--hard", good)
			o.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
			// What came in a quarantine is found again, packed or not, when it is old.
			o.push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
		})
	}
}

func TestCheckPushReadsGitsLines(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	if err := CheckPush(t.Context(), o.bare, strings.NewReader("nonsense\n"), nil); err == nil || !strings.Contains(err.Error(), "OLD NEW REF") {
		t.Errorf("error %v", err)
	}
	if err := CheckPush(t.Context(), o.bare, strings.NewReader(""), nil); err != nil {
		t.Errorf("nothing pushed: %v", err)
	}
}

func TestLoadCommit(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	first := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	second := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	o.git(o.work, "tag", "-a", "-m", "One", "v1", first)
	linked := filepath.Join(t.TempDir(), "linked")
	o.git(o.work, "worktree", "add", "-q", "-b", "other", linked, first)
	for _, c := range []struct{ path, rev, hash, release string }{
		{o.work, "HEAD", second, "app/2"},
		{o.work, "HEAD~1", first, "app/1"},
		{o.work, first[:10], first, "app/1"},
		{o.work, "v1", first, "app/1"},
		{filepath.Join(o.work, "prod", "web"), "main", second, "app/2"},
		{o.bare, "main", second, "app/2"},
		{"file://" + o.bare, "HEAD", second, "app/2"},
		{linked, "HEAD", first, "app/1"},
		{linked, "main", second, "app/2"},
	} {
		tree, commit, err := LoadCommit(t.Context(), c.path, c.rev)
		if err != nil {
			t.Errorf("%s %s: %v", c.path, c.rev, err)
			continue
		}
		if commit.Hash != c.hash || commit.Author != "Ada <ada@example.com>" || commit.Subject != "Deploy" || len(tree.Units) != 1 || tree.Units[0].Release != pointer(c.release) {
			t.Errorf("%s %s: %+v, %+v", c.path, c.rev, commit, tree.Units)
		}
	}
	o.commit(map[string]string{"prod/web/app.yaml": "x"})
	if _, _, err := LoadCommit(t.Context(), o.work, "HEAD"); !errors.As(err, new(deployments.Problems)) {
		t.Errorf("a bad commit: %v", err)
	}
	for _, rev := range []string{"nowhere", ""} {
		if _, _, err := LoadCommit(t.Context(), o.work, rev); err == nil {
			t.Errorf("revision %q was found", rev)
		}
	}
	if _, _, err := LoadCommit(t.Context(), t.TempDir(), "HEAD"); err == nil || !strings.Contains(err.Error(), "not in a Git repository") {
		t.Errorf("no repository: %v", err)
	}
}
