package git

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"

	"kedge/deployments"
	"kedge/sync/git/gittest"
)

// A commit that is itself at fault is refused finally: as an error of the repository it would be fetched again for
// ever, and a pre-receive hook would let nothing on top of it.
func TestCommitsThatAreAtFault(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	const who = "author A <a@example.com> 1 +0000\ncommitter A <a@example.com> 1 +0000\n"
	empty, file := o.Write("", "mktree"), blob(o, "x")
	commit := func(dir string) string { return o.Git(o.Work, "commit-tree", "-m", "x", dir) }
	link := func(to string) string {
		return commit(under(o, mktree(o, "120000 blob "+blob(o, to)+"\tapp.yaml"), "prod", "web"))
	}
	bomb := mktree(o, "100644 blob "+file+"\tx")
	for range 12 {
		var lines []string
		for i := range 10 {
			lines = append(lines, fmt.Sprintf("040000 tree %s\td%d", bomb, i))
		}
		bomb = mktree(o, lines...)
	}
	deep := mktree(o, "100644 blob "+file+"\tx")
	for range 200 {
		deep = under(o, deep, "d")
	}
	var many []string
	slow := blob(o, strings.Repeat("a: b\n", 2000))
	for i := range 5000 {
		many = append(many, fmt.Sprintf("100644 blob %s\tu%d.yaml", slow, i))
	}
	for name, c := range map[string]struct{ hash, says string }{
		"a link to nowhere": {link("nowhere"), "prod/web/app.yaml"},
		"a link to nothing": {link(""), "prod/web/app.yaml: file does not exist"},
		"a link into a submodule": {commit(under(o, mktree(o, "120000 blob "+blob(o, "module/x")+"\tapp.yaml",
			"160000 commit "+strings.Repeat("1", 40)+"\tmodule"), "prod", "web")),
			"file does not exist"},
		"a link from the root": {commit(under(o, mktree(o, "120000 blob "+blob(o,
			"/prod/web/good.yaml")+"\tapp.yaml", "100644 blob "+blob(o, unitFile("x"))+"\tgood.yaml"), "prod", "web")),
			"leads out of the repository"},
		"a link out of it":         {link("../../../secret"), "leads out of the repository"},
		"a link as long as a book": {link(strings.Repeat("x/../", 1000) + "app.yaml"), "more than 4095 bytes"},
		"a link to itself":         {link("app.yaml"), "too many symbolic links"},
		"a link to a directory":    {link("../web"), "is a directory"},
		"no tree":                  {literally(o, "commit", who+"\nx"), "malformed commit"},
		"a bad tree":               {literally(o, "commit", "tree x\n"+who+"\nx"), "malformed commit"},
		"nothing":                  {literally(o, "commit", ""), "malformed commit"},
		"the tree of no object": {literally(o, "commit", "tree "+plumbing.ZeroHash.String()+"\n"+who+"\nx"),
			"of another kind"},
		"a tag": {o.Write(fmt.Sprintf("object %s\ntype commit\ntag x\ntagger A <a@example.com> 1 +0000\n\nx\n",
			commit(empty)), "mktag"), "is no commit"},
		"a tree":             {empty, "is no commit"},
		"a file":             {file, "is no commit"},
		"a file as its tree": {literally(o, "commit", "tree "+file+"\n"+who+"\nx"), "of another kind"},
		"a tree that is cut short": {literally(o, "commit", "tree "+literally(o, "tree",
			"100644 a")+"\n"+who+"\nx"), "malformed tree"},
		"a directory as a file": {commit(under(o, literally(o, "tree",
			"100644 app.yaml\x00"+string(rawOf(empty))), "prod", "web")),
			"of another kind"},
		"a message without an end": {literally(o, "commit",
			"tree "+empty+"\n"+who+"\n"+strings.Repeat("x", maxFile)), "bytes"},
		"a list without an end": {commit(literally(o, "tree",
			strings.Repeat("100644 "+strings.Repeat("x", 4000)+"\x00"+string(rawOf(file)),
				maxTree/4000))), "the directory's list"},
		"10^12 directories":                    {commit(bomb), "files and directories"},
		"directories to the bottom of the sea": {commit(deep), "deeper than"},
		"5000 files full of mistakes":          {commit(under(o, mktree(o, many...), "prod", "web")), "prod/web/u0.yaml:1:1"},
		"a unit whose name is not UTF-8": {commit(under(o, literally(o, "tree",
			"100644 caf\xe9.yaml\x00"+string(rawOf(file))), "prod", "web")), "in UTF-8"},
		"a unit of the other ending": {commit(under(o, literally(o, "tree",
			"100644 caf\xe9.yml\x00"+string(rawOf(file))), "prod", "web")), "in UTF-8"},
		"a name that is there twice": {commit(under(o, literally(o, "tree",
			"100644 app.yaml\x00"+string(rawOf(blob(o,
				unitFile("x"))))+"100644 app.yaml\x00"+string(rawOf(file))), "prod", "web")), "occurs twice"},
		"settings that are a directory": {commit(under(o, empty, "kedge.yaml")), "it is a directory"},
	} {
		began := time.Now()
		err := loads(o, c.hash)
		if !errors.As(err, new(*BadCommit)) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %.300v", name, err)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("%s: it took %v", name, took)
		}
	}
	// A missing object may yet come, and what looks odd may be valid.
	if err := loads(o, literally(o, "commit", "tree "+strings.Repeat("1", 40)+"\n"+who+"\nx")); err == nil ||
		errors.As(err, new(*BadCommit)) {
		t.Errorf("a missing tree: %v", err)
	}
	for name, raw := range map[string]string{
		"no author":                  "tree " + empty + "\n\nx",
		"a parent that is not there": "tree " + empty + "\nparent " + strings.Repeat("1", 40) + "\n" + who + "\nx",
		"a name that is not UTF-8": "tree " + literally(o, "tree",
			"100644 caf\xe9\x00"+string(rawOf(file))) + "\n" + who + "\nx",
		"names that are no names": "tree " + literally(o, "tree",
			"40000 .\x00"+string(rawOf(empty))+"40000 ..\x00"+string(rawOf(empty))+
				"100644 a/b\x00"+string(rawOf(file))) + "\n" + who + "\nx",
		"NULs, and times out of bounds": "tree " + empty +
			"\nauthor A\x00 <a> 99999999999999999999 +9999\ncommitter\n\nx\x00y",
	} {
		if err := loads(o, literally(o, "commit", raw)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func rawOf(hash string) []byte {
	h := plumbing.NewHash(hash)
	return h[:]
}

// A repo may contain other files besides units, and units by the ten thousand.
func TestLargeTrees(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	file, unit := blob(o, "x"), blob(o, unitFile("x"))
	var docs, units []string
	for i := range 100_000 {
		docs = append(docs, fmt.Sprintf("100644 blob %s\tf%d.txt", file, i))
	}
	for i := range deployments.MaxUnits {
		units = append(units, fmt.Sprintf("100644 blob %s\tu%d.yaml", unit, i))
	}
	top := mktree(o, "040000 tree "+mktree(o, docs...)+"\tdocs", "040000 tree "+under(o, mktree(o, units...),
		"web")+"\tprod")
	began := time.Now()
	if err := loads(o, o.Git(o.Work, "commit-tree", "-m", "x", top)); err != nil {
		t.Error(err)
	}
	t.Logf("it took %v", time.Since(began))
}
