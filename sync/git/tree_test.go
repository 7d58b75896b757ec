package git

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"

	"kedge/sync/git/gittest"
)

func TestTree(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Commit(map[string]string{
		"kedge.yaml": "prune: true\n", "README.md": "read me",
		"prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1"),
		// Git sorts "web/" after "web-2", and fs.FS before it.
		"prod/web-2/app.yaml": unitFile("app/1"), "prod/web.txt": "text",
	})
	link := func(to, name string) {
		if err := os.Symlink(to, filepath.Join(o.Work, name)); err != nil {
			t.Fatal(err)
		}
	}
	link("web/app.yaml", "prod/link.yaml")
	link("./other", "alias")
	link("prod/web", "other")
	o.Git(o.Work, "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",module")
	o.Git(o.Work, "add", "prod", "alias", "other")
	o.Git(o.Work, "commit", "-q", "-m", "Add links and a submodule")

	fsys := openTree(t, o, ".")
	var seen []string
	if err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		seen = append(seen, name+" "+d.Type().String()[:1])
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want := ". d,README.md -,alias L,kedge.yaml -,module d,module/.git -,other L,prod d,prod/link.yaml L,prod/web d," +
		"prod/web/app.yaml -,prod/web/base.yaml -,prod/web-2 d,prod/web-2/app.yaml -,prod/web.txt -"
	if got := strings.Join(seen, ","); got != want {
		t.Errorf("the walk saw %s\nwant %s", got, want)
	}
	for _, name := range []string{"prod/web/app.yaml", "prod/link.yaml", "alias/app.yaml"} {
		if data, err := fs.ReadFile(fsys, name); err != nil || string(data) != unitFile("app/1") {
			t.Errorf("%s: %q, %v", name, data, err)
		}
		if info, err := fs.Stat(fsys, name); err != nil || info.Size() != int64(len(unitFile("app/1"))) ||
			info.Name() != filepath.Base(name) {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if data, err := fs.ReadFile(openTree(t, o, "prod/web"), "base.yaml"); err != nil ||
		string(data) != unitFile("base/1") {
		t.Errorf("base.yaml below prod/web: %q, %v", data, err)
	}
	for _, name := range []string{"prod/web/app.yaml/below", "module/x", "nowhere"} {
		if _, err := fs.Stat(fsys, name); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"prod", "alias", "module"} {
		if info, err := fs.Stat(fsys, name); err != nil || info.Name() != name || !info.IsDir() {
			t.Errorf("%s: %v, %v", name, info, err)
		}
		if _, err := fs.ReadFile(fsys, name); err == nil {
			t.Errorf("directory %s was read", name)
		}
	}
}

func TestTreeKeepsLinksInside(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	for name, to := range map[string]string{"up": "../secret", "root": "/etc/passwd", "loop": "loop",
		"around": "there", "there": "around/x", "gone": "nowhere"} {
		if err := os.Symlink(to, filepath.Join(o.Work, name)); err != nil {
			t.Fatal(err)
		}
	}
	o.Commit(nil)
	fsys := openTree(t, o, ".")
	for _, name := range []string{"up", "root", "loop", "around", "gone", "up/x", "../secret", "/etc/passwd"} {
		if data, err := fs.ReadFile(fsys, name); err == nil {
			t.Errorf("%s gave %q", name, data)
		}
	}
}

func TestTreeBoundsFiles(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Commit(map[string]string{"big.yaml": strings.Repeat("# padding\n", maxFile/10+1),
		"fits.yaml": strings.Repeat("x", maxFile)})
	for _, packed := range []bool{false, true} {
		if packed {
			o.Git(o.Work, "gc", "-q")
		}
		fsys := openTree(t, o, ".")
		if _, err := fs.ReadFile(fsys, "big.yaml"); !errors.Is(err, errTooLarge) {
			t.Errorf("packed %v: a file of over 1 MiB: %v", packed, err)
		}
		if data, err := fs.ReadFile(fsys, "fits.yaml"); err != nil || len(data) != maxFile {
			t.Errorf("packed %v: a file of 1 MiB: %d bytes, %v", packed, len(data), err)
		}
	}
}

// openTree opens a directory of the work clone's HEAD.
func openTree(t *testing.T, o *gittest.Origin, below string) *tree {
	t.Helper()
	from, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	commit, err := object.GetCommit(from, plumbing.NewHash(o.Git(o.Work, "rev-parse", "HEAD")))
	if err != nil {
		t.Fatal(err)
	}
	return newTree(from, commit, below)
}

// Files that look like units but would be ignored are refused, both by the mirror and by kedge check on the work
// tree.
func TestUnitsThatWouldPassUnseen(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		make func(t *testing.T, o *gittest.Origin)
		says string // empty: it is fine
	}{
		"a link to a role": {func(t *testing.T, o *gittest.Origin) { symlink(t, o, "web", "prod/api") },
			"prod/api: it is a symbolic link"},
		"a link to a stage": {func(t *testing.T, o *gittest.Origin) { symlink(t, o, "prod", "staging") },
			"staging: it is a symbolic link"},
		"a link to a stage, with a dot": {func(t *testing.T, o *gittest.Origin) { symlink(t, o, "prod", "prod.eu") },
			"prod.eu: it is a symbolic link"},
		"a link to documents": {func(t *testing.T, o *gittest.Origin) { symlink(t, o, "docs", "manual") }, ""},
		"a link to a file": {func(t *testing.T, o *gittest.Origin) {
			symlink(t, o, "app.yaml",
				"prod/web/other.yaml")
		}, ""},
		"a submodule for a role": {func(t *testing.T, o *gittest.Origin) { submodule(t, o, "prod/api") },
			"prod/api: it is a submodule"},
		"a submodule beside": {func(t *testing.T, o *gittest.Origin) { submodule(t, o, "tools") }, ""},
	} {
		o := gittest.New(t)
		o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/1"), "docs/README.md": "x"})
		c.make(t, o)
		o.Git(o.Work, "commit", "-q", "-m", "Deploy")
		_, work := LoadDir(o.Work, "")
		for where, err := range map[string]error{"the commit": loads(o, o.Git(o.Work, "rev-parse", "HEAD")),
			"the work tree": work} {
			if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("%s, in %s: %v; want %q", name, where, err, c.says)
			}
		}
	}
}

func symlink(t *testing.T, o *gittest.Origin, to, name string) {
	t.Helper()
	if err := os.Symlink(to, filepath.Join(o.Work, name)); err != nil {
		t.Fatal(err)
	}
	o.Git(o.Work, "add", name)
}

// submodule adds a submodule as git submodule add does, without another repository.
func submodule(t *testing.T, o *gittest.Origin, name string) {
	t.Helper()
	dir := filepath.Join(o.Work, name)
	if err := os.MkdirAll(filepath.Join(dir, "lib", "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	gittest.WriteFile(t, filepath.Join(dir, ".git"), "gitdir: elsewhere\n")
	gittest.WriteFile(t, filepath.Join(dir, "lib", "x", "values.yaml"), "a: 1\n")
	o.Git(o.Work, "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+","+name)
}

// In a monorepo the mirror reads what is below Config.Path, and names files by their paths in the repository.
func TestPath(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	head := o.Push(map[string]string{"deploy/kedge.yaml": "prune: true\n", "deploy/prod/web/app.yaml": unitFile("app/1"),
		"charts/app/values/x.yaml": "a: 1", "compose.yaml": "services: {}", "kedge.yaml/x": "y"})
	symlink(t, o, "../../../charts/app/values/x.yaml", "deploy/prod/web/link.yaml")
	o.Git(o.Work, "commit", "-q", "-m", "Deploy")
	wrong := o.Git(o.Work, "rev-parse", "HEAD")
	for _, below := range []string{"deploy", "/deploy/", "./deploy"} {
		b := openBranch(t, Config{Repo: o.Bare, Branch: "refs/heads/main", Path: below})
		c := reads(t, b, head)
		if len(c.Tree.Units) != 1 || c.Tree.Units[0].Place.File != "deploy/prod/web/app.yaml" || !c.Tree.Settings.Prune {
			t.Errorf("below %s: %+v", below, c.Tree)
		}
		tree, err := LoadDir(o.Work, below)
		if err == nil || !strings.Contains(err.Error(), "deploy/prod/web/link.yaml:1:1") {
			t.Errorf("the work tree: %+v, %v", tree, err)
		}
		if _, err := LoadAt(t.Context(), o.Work, wrong, below); err == nil || !strings.Contains(err.Error(),
			"deploy/prod/web/link.yaml:1:1") {
			t.Errorf("a link to a file beside that is no unit: %v", err)
		}
		if c, err := LoadAt(t.Context(), o.Work, head, below); err != nil || len(c.Tree.Units) != 1 {
			t.Errorf("LoadAt: %+v, %v", c, err)
		}
		in, _, err := OpenReceiving(o.Bare, below, env())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Load(head, nil); err != nil {
			t.Errorf("in a hook: %v", err)
		}
		in.Close()
	}
	if _, err := LoadAt(t.Context(), o.Work, head, "nowhere"); !errors.As(err, new(*BadCommit)) ||
		!strings.Contains(err.Error(), "no directory nowhere") {
		t.Errorf("a path that isn't there: %v", err)
	}
	if _, err := Open(Config{Repo: o.Bare, Branch: "main", Path: "../deploy", Env: env()}); err == nil {
		t.Error("a path that leads out of the repository was taken")
	}
}
