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
		"kedge.yaml": "prune: true\n", "README.md": "read me", "prod/web/app.yaml": unitFile("app/1"), "prod/web/base.yaml": unitFile("base/1"),
		// Git sorts "web/" behind "web-2", and fs.FS before it.
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
		if info, err := fs.Stat(fsys, name); err != nil || info.Size() != int64(len(unitFile("app/1"))) || info.Name() != filepath.Base(name) {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if data, err := fs.ReadFile(openTree(t, o, "prod/web"), "base.yaml"); err != nil || string(data) != unitFile("base/1") {
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
	for name, to := range map[string]string{"up": "../secret", "root": "/etc/passwd", "loop": "loop", "around": "there", "there": "around/x", "gone": "nowhere"} {
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
	o.Commit(map[string]string{"big.yaml": strings.Repeat("# padding\n", maxFile/10+1), "fits.yaml": strings.Repeat("x", maxFile)})
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
