package mirror

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/sync/git/gittest"
)

// hooked makes the bare repository check pushes with CheckPush, as a real pre-receive hook.
func hooked(t *testing.T, unpackLimit, as string) *gittest.Origin {
	t.Helper()
	o := gittest.New(t)
	script := "#!/bin/sh\nKEDGE_TEST_AS=" + as + " exec '" + os.Args[0] + "'\n"
	if err := os.WriteFile(filepath.Join(o.Bare, "hooks", "pre-receive"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	o.Git(o.Bare, "config", "receive.unpackLimit", unpackLimit)
	return o
}

func TestCheckPush(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]string{"loose objects": "100", "a pack": "1"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := hooked(t, limit, "pre-receive")
			good := o.Push(map[string]string{"kedge.yaml": "prune: true\n", "prod/web/app.yaml": unitFile("app/1"),
				"prod/web/base.yaml": unitFile("base/1"), "prod/web/db.yaml": unitFile("db/1")})
			refused := func(what, ref string, words ...string) {
				t.Helper()
				out, err := o.Try(o.Work, "push", "-f", "origin", ref)
				if err == nil {
					t.Errorf("%s: the push was taken", what)
				}
				for _, w := range words {
					if !strings.Contains(out, w) {
						t.Errorf("%s: no %q in:\n%s", what, w, out)
					}
				}
				if at := o.Git(o.Bare, "rev-parse", "main"); at != good {
					t.Errorf("%s: main is at %s", what, at)
				}
			}
			o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/2") + "relaese: x\n", "prod/web/base.yaml": "release: base\n"})
			refused("a commit with mistakes", "HEAD:main", "branch main is not updated", "prod/web/app.yaml:2:1", "prod/web/base.yaml:1:")
			o.Git(o.Work, "push", "-q", "origin", "HEAD:refs/heads/draft") // another branch may hold what it likes

			o.Git(o.Work, "reset", "-q", "--hard", good)
			o.Commit(map[string]string{"prod/web/base.yaml": "", "prod/web/db.yaml": ""})
			refused("too many units removed", "HEAD:main", "removes 2 of 3 units (prod/web/base, prod/web/db)")
			o.Git(o.Work, "checkout", "-q", "--orphan", "new", good)
			o.Commit(map[string]string{"README.md": "a new beginning"})
			refused("a rewritten history", "HEAD:main", "does not descend")
			refused("the branch removed", ":main", "can't be removed")

			o.Git(o.Work, "checkout", "-q", "main")
			o.Git(o.Work, "reset", "-q", "--hard", good)
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
			// What came in a quarantine is found again, packed or not, when it is old.
			o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
		})
	}
}

func TestCheckPushReadsGitsLines(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	if err := CheckPush(t.Context(), o.Bare, "", strings.NewReader("nonsense\n"), nil); err == nil || !strings.Contains(err.Error(), "OLD NEW REF") {
		t.Errorf("error %v", err)
	}
	if err := CheckPush(t.Context(), o.Bare, "", strings.NewReader(""), nil); err != nil {
		t.Errorf("nothing pushed: %v", err)
	}
}
