package git

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"

	"kedge/sync/git/gittest"
)

func TestTreeFS(t *testing.T) {
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
	if err := os.WriteFile(filepath.Join(o.Work, "run"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	o.Git(o.Work, "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",module")
	o.Git(o.Work, "add", "prod", "run", "alias", "other")
	o.Git(o.Work, "commit", "-q", "-m", "Add a link, a program and a submodule")

	fsys := openTree(t, o, "HEAD")
	if err := fstest.TestFS(fsys, "kedge.yaml", "README.md", "run", "module", "prod/web/app.yaml", "prod/web/base.yaml", "prod/web-2/app.yaml", "prod/web.txt"); err != nil {
		t.Fatal(err)
	}
	if data, err := fs.ReadFile(fsys, "prod/web/app.yaml"); err != nil || string(data) != unitFile("app/1") {
		t.Errorf("prod/web/app.yaml: %q, %v", data, err)
	}
	if to, err := fs.ReadLink(fsys, "prod/link.yaml"); err != nil || to != "web/app.yaml" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if data, err := fs.ReadFile(fsys, "alias/app.yaml"); err != nil || string(data) != unitFile("app/1") {
		t.Errorf("alias/app.yaml, through two links: %q, %v", data, err)
	}
	if info, err := fs.Stat(fsys, "alias"); err != nil || info.Name() != "alias" || !info.IsDir() {
		t.Errorf("alias: %v, %v", info, err)
	}
	if info, err := fs.Stat(fsys, "run"); err != nil || info.Mode() != 0o555 {
		t.Errorf("run: %v, %v", info, err)
	}
	if _, err := fs.Stat(fsys, "prod/web/app.yaml/below"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a path below a file: %v", err)
	}
}

func TestTreeFSKeepsLinksInside(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	for name, to := range map[string]string{"up": "../secret", "root": "/etc/passwd", "loop": "loop", "around": "there", "there": "around/x", "gone": "nowhere"} {
		if err := os.Symlink(to, filepath.Join(o.Work, name)); err != nil {
			t.Fatal(err)
		}
	}
	o.Commit(nil)
	fsys := openTree(t, o, "HEAD")
	for _, name := range []string{"up", "root", "loop", "around", "gone", "up/x", "../secret", "/etc/passwd"} {
		if data, err := fs.ReadFile(fsys, name); err == nil {
			t.Errorf("%s gave %q", name, data)
		}
	}
}

func TestTreeFSBoundsFiles(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	o.Commit(map[string]string{"big.yaml": strings.Repeat("# padding\n", maxFile/10+1), "fits.yaml": strings.Repeat("x", maxFile)})
	for _, packed := range []bool{false, true} {
		if packed {
			o.Git(o.Work, "gc", "-q")
		}
		fsys := openTree(t, o, "HEAD")
		if _, err := fs.ReadFile(fsys, "big.yaml"); !errors.Is(err, errTooLarge) {
			t.Errorf("packed %v: a file of over 1 MiB: %v", packed, err)
		}
		if data, err := fs.ReadFile(fsys, "fits.yaml"); err != nil || len(data) != maxFile {
			t.Errorf("packed %v: a file of 1 MiB: %d bytes, %v", packed, len(data), err)
		}
	}
}

// openTree opens a commit of the work clone.
func openTree(t *testing.T, o *gittest.Origin, rev string) *treeFS {
	t.Helper()
	from, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { from.Close() })
	commit, err := object.GetCommit(from, plumbing.NewHash(o.Git(o.Work, "rev-parse", rev)))
	if err != nil {
		t.Fatal(err)
	}
	return newTreeFS(from, commit)
}
