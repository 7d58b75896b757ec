package git

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

// A work tree may be a stranger's: other files than regular ones are reported, and neither read nor waited for.
func TestHostileWorkTrees(t *testing.T) {
	t.Parallel()
	outside := filepath.Join(t.TempDir(), "secret.yaml")
	gittest.WriteFile(t, outside, unitFile("secret/1"))
	link := func(to string) func(string) error { return func(at string) error { return os.Symlink(to, at) } }
	for name, c := range map[string]struct {
		file string
		make func(at string) error
		says string
	}{
		"a link to a device":         {"prod/web/evil.yaml", link("/dev/zero"), "out of the repository"},
		"a link to a file beside":    {"prod/web/evil.yaml", link(outside), "out of the repository"},
		"a way up and out":           {"prod/web/evil.yaml", link("../../../x/../../../etc/passwd"), "out of the repository"},
		"a link to itself":           {"prod/web/evil.yaml", link("evil.yaml"), "evil.yaml"},
		"settings that are a device": {"kedge.yaml", link("/dev/zero"), "out of the repository"},
		"a pipe":                     {"prod/web/evil.yaml", func(at string) error { return unix.Mkfifo(at, 0o644) }, "want a file"},
		"a link to a pipe": {"prod/web/evil.yaml", func(at string) error {
			return errors.Join(unix.Mkfifo(filepath.Join(filepath.Dir(at), "pipe"), 0o644), os.Symlink("pipe", at))
		}, "want a file"},
		"a directory of pipes that a link leads to": {"link", link("/proc/self/fd"), ""},
		"a link to a directory of this machine":     {"other", link("/"), ""},
	} {
		work := gittest.New(t).Work
		if err := os.MkdirAll(filepath.Join(work, "prod/web"), 0o755); err != nil {
			t.Fatal(err)
		}
		gittest.WriteFile(t, filepath.Join(work, "prod/web/app.yaml"), unitFile("app/1"))
		if err := c.make(filepath.Join(work, c.file)); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { _, err := LoadDir(work, ""); done <- err }()
		select {
		case err := <-done:
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%s: %v; want %q", name, err, c.says)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it is still read", name)
		}
	}
}

// What became a pipe or a device after it was looked at is neither waited for nor read.
func TestWorkTreeFilesThatChange(t *testing.T) {
	t.Parallel()
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := unix.Mkfifo(filepath.Join(root.Name(), "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", filepath.Join(root.Name(), "device")); err != nil {
		t.Fatal(err)
	}
	const odd = "not a regular file"
	for name, says := range map[string]string{"pipe": odd, "device": "escapes", ".": odd} {
		done := make(chan error, 1)
		go func() { _, err := (&workTree{root: root, subdir: "."}).ReadFile(name); done <- err }()
		select {
		case err := <-done:
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v", name, err)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: it is still read", name)
		}
	}
}

// Links of a directory in a repository may lead to the rest of it, as the mirror follows them, even if only a part
// of the work tree is checked.
func TestWorkTreeLinksWithinTheRepository(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Commit(map[string]string{"deploy/prod/web/app.yaml": unitFile("app/1"), "units/db.yaml": unitFile("db/1")})
	symlink(t, o, "../../../units/db.yaml", "deploy/prod/web/db.yaml")
	for _, c := range [][2]string{{o.Work, "deploy"}, {filepath.Join(o.Work, "deploy"), ""}} {
		tree, err := LoadDir(c[0], c[1])
		if err != nil || len(tree.Units) != 2 ||
			tree.Units[1].ID != (deployments.UnitID{Stage: "prod", Role: "web", Unit: "db"}) {
			t.Errorf("%v: %+v, %v", c, tree, err)
		}
	}
}

// A work tree may have a stage of any name, and files that make it look like a bare repository.
func TestWorkTreesThatLookLikeRepositories(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Commit(map[string]string{"objects/web/app.yaml": unitFile("app/1"), "refs/web/app.yaml": unitFile("app/1"),
		"HEAD": "ref: refs/heads/main\n"})
	if c, err := LoadAt(t.Context(), o.Work, "HEAD", ""); err != nil || len(c.Tree.Units) != 2 {
		t.Errorf("%+v, %v", c, err)
	}
}
