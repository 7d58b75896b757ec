package mirror

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

// write gives git(1) its standard input, and returns what it says: the hash of what it made.
func (o *origin) write(in string, args ...string) string {
	o.tb.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env, cmd.Stdin = o.work, append(append(os.Environ(), gitEnv...), o.env...), strings.NewReader(in)
	out, err := cmd.CombinedOutput()
	if err != nil {
		o.tb.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (o *origin) blob(text string) string { return o.write(text, "hash-object", "-w", "--stdin") }

// literally makes an object that git(1) itself would not make.
func (o *origin) literally(kind, raw string) string {
	return o.write(raw, "hash-object", "-t", kind, "-w", "--literally", "--stdin")
}

// tree makes a directory's object of lines as git ls-tree prints them.
func (o *origin) tree(lines ...string) string {
	return o.write(strings.Join(lines, "\n")+"\n", "mktree")
}

// under puts a tree into directories.
func (o *origin) under(tree string, dirs ...string) string {
	for i := len(dirs) - 1; i >= 0; i-- {
		tree = o.tree("040000 tree " + tree + "\t" + dirs[i])
	}
	return tree
}

// loads reads a commit of the work clone, as the mirror would.
func (o *origin) loads(hash string) error {
	o.tb.Helper()
	in, err := openObjects(filepath.Join(o.work, ".git", "objects"))
	if err != nil {
		o.tb.Fatal(err)
	}
	defer in.Close()
	_, err = load(in, plumbing.NewHash(hash), nil)
	return err
}

// What a commit itself is at fault for is refused for good: as trouble of the repository it would be fetched anew for ever, and a
// pre-receive hook would let nothing on top of it.
func TestCommitsThatAreAtFault(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	const who = "author A <a@example.com> 1 +0000\ncommitter A <a@example.com> 1 +0000\n"
	empty, file := o.write("", "mktree"), o.blob("x")
	commit := func(tree string) string { return o.git(o.work, "commit-tree", "-m", "x", tree) }
	link := func(to string) string {
		return commit(o.under(o.tree("120000 blob "+o.blob(to)+"\tapp.yaml"), "prod", "web"))
	}
	bomb := o.tree("100644 blob " + file + "\tx")
	for range 12 {
		var lines []string
		for i := range 10 {
			lines = append(lines, fmt.Sprintf("040000 tree %s\td%d", bomb, i))
		}
		bomb = o.tree(lines...)
	}
	deep := o.tree("100644 blob " + file + "\tx")
	for range 200 {
		deep = o.under(deep, "d")
	}
	var many []string
	slow := o.blob(strings.Repeat("a: b\n", 2000))
	for i := range 5000 {
		many = append(many, fmt.Sprintf("100644 blob %s\tu%d.yaml", slow, i))
	}
	for name, c := range map[string]struct{ hash, says string }{
		"a link to nowhere": {link("nowhere"), "prod/web/app.yaml"},
		"a link to nothing": {link(""), "prod/web/app.yaml: file does not exist"},
		"a link into a submodule": {commit(o.under(o.tree("120000 blob "+o.blob("module/x")+"\tapp.yaml", "160000 commit "+strings.Repeat("1", 40)+"\tmodule"), "prod", "web")),
			"file does not exist"},
		"a link from the root": {commit(o.under(o.tree("120000 blob "+o.blob("/prod/web/good.yaml")+"\tapp.yaml", "100644 blob "+o.blob(unitFile("x"))+"\tgood.yaml"), "prod", "web")),
			"leads out of the repository"},
		"a link out of it":         {link("../../../secret"), "leads out of the repository"},
		"a link as long as a book": {link(strings.Repeat("x/../", 1000) + "app.yaml"), "more than 4095 bytes"},
		"a link to itself":         {link("app.yaml"), "too many symbolic links"},
		"a link to a directory":    {link("../web"), "is a directory"},
		"no tree":                  {o.literally("commit", who+"\nx"), "malformed commit"},
		"a bad tree":               {o.literally("commit", "tree x\n"+who+"\nx"), "malformed commit"},
		"nothing":                  {o.literally("commit", ""), "malformed commit"},
		"the tree of no object":    {o.literally("commit", "tree "+plumbing.ZeroHash.String()+"\n"+who+"\nx"), "of another kind"},
		"a file as its tree":       {o.literally("commit", "tree "+file+"\n"+who+"\nx"), "of another kind"},
		"a tree that is cut short": {o.literally("commit", "tree "+o.literally("tree", "100644 a")+"\n"+who+"\nx"), "malformed tree"},
		"a directory as a file": {commit(o.under(o.literally("tree", "100644 app.yaml\x00"+string(rawOf(empty))), "prod", "web")),
			"of another kind"},
		"a message without an end":             {o.literally("commit", "tree "+empty+"\n"+who+"\n"+strings.Repeat("x", maxFile)), "bytes"},
		"a list without an end":                {commit(o.literally("tree", strings.Repeat("100644 "+strings.Repeat("x", 4000)+"\x00"+string(rawOf(file)), maxTree/4000))), "the directory's list"},
		"10^12 directories":                    {commit(bomb), "files and directories"},
		"directories to the bottom of the sea": {commit(deep), "deeper than"},
		"5000 files full of mistakes":          {commit(o.under(o.tree(many...), "prod", "web")), "prod/web/u0.yaml:1:1"},
		"a unit whose name is not UTF-8":       {commit(o.under(o.literally("tree", "100644 caf\xe9.yaml\x00"+string(rawOf(file))), "prod", "web")), "in UTF-8"},
		"a unit of the other ending":           {commit(o.under(o.literally("tree", "100644 caf\xe9.yml\x00"+string(rawOf(file))), "prod", "web")), "in UTF-8"},
		"a name that is there twice":           {commit(o.under(o.literally("tree", "100644 app.yaml\x00"+string(rawOf(o.blob(unitFile("x"))))+"100644 app.yaml\x00"+string(rawOf(file))), "prod", "web")), "stands in"},
		"settings that are a directory":        {commit(o.under(empty, "kedge.yaml")), "it is a directory"},
	} {
		began := time.Now()
		err := o.loads(c.hash)
		if !errors.As(err, new(*badCommit)) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %.300v", name, err)
		}
		if took := time.Since(began); took > time.Minute {
			t.Errorf("%s: it took %v", name, took)
		}
	}
	// What is missing may yet come, and what looks odd may be good.
	if err := o.loads(o.literally("commit", "tree "+strings.Repeat("1", 40)+"\n"+who+"\nx")); err == nil || errors.As(err, new(*badCommit)) {
		t.Errorf("a missing tree: %v", err)
	}
	for name, raw := range map[string]string{
		"no author":                     "tree " + empty + "\n\nx",
		"a parent that is not there":    "tree " + empty + "\nparent " + strings.Repeat("1", 40) + "\n" + who + "\nx",
		"a name that is not UTF-8":      "tree " + o.literally("tree", "100644 caf\xe9\x00"+string(rawOf(file))) + "\n" + who + "\nx",
		"names that are no names":       "tree " + o.literally("tree", "40000 .\x00"+string(rawOf(empty))+"40000 ..\x00"+string(rawOf(empty))+"100644 a/b\x00"+string(rawOf(file))) + "\n" + who + "\nx",
		"NULs, and times out of bounds": "tree " + empty + "\nauthor A\x00 <a> 99999999999999999999 +9999\ncommitter\n\nx\x00y",
	} {
		if err := o.loads(o.literally("commit", raw)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func rawOf(hash string) []byte {
	h := plumbing.NewHash(hash)
	return h[:]
}

// A repo holds what its owners like beside units, and units by the ten thousand.
func TestLargeTrees(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	file, unit := o.blob("x"), o.blob(unitFile("x"))
	var docs, units []string
	for i := range 100_000 {
		docs = append(docs, fmt.Sprintf("100644 blob %s\tf%d.txt", file, i))
	}
	for i := range manyUnits {
		units = append(units, fmt.Sprintf("100644 blob %s\tu%d.yaml", unit, i))
	}
	top := o.tree("040000 tree "+o.tree(docs...)+"\tdocs", "040000 tree "+o.under(o.tree(units...), "web")+"\tprod")
	began := time.Now()
	if err := o.loads(o.git(o.work, "commit-tree", "-m", "x", top)); err != nil {
		t.Error(err)
	}
	t.Logf("it took %v", time.Since(began))
}
