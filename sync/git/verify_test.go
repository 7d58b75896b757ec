package git

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"kedge/sync/git/gittest"
)

// A good signature, moved to where somebody might look for it: none of it makes another tree, or other parents, of a signed commit.
func TestMovedSignatures(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	file := filepath.Join(t.TempDir(), "ada")
	signers := filepath.Join(t.TempDir(), "signers")
	gittest.WriteFile(t, signers, "ada@example.com "+o.SignBy(file))
	verify, err := NewVerifier(signers, "")
	if err != nil {
		t.Fatal(err)
	}
	head := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	o.Git(o.Work, "tag", "-s", "-m", "One", "v1")
	o.Git(o.Work, "config", "commit.gpgsign", "false")
	o.Commit(map[string]string{"prod/web/app.yaml": unitFile("evil/1")})
	evil := o.Git(o.Work, "rev-parse", "HEAD^{tree}")
	good := o.Git(o.Work, "rev-parse", head+"^{tree}")

	raw := o.Git(o.Work, "cat-file", "commit", head) + "\n"
	payload, signature := splitSignature([]byte(raw))
	header := func(name string) string {
		return name + " " + strings.ReplaceAll(strings.TrimSuffix(string(signature), "\n"), "\n", "\n ") + "\n"
	}
	before, message, _ := strings.Cut(string(payload), "\n\n")
	of := func(tree, more, message string) string {
		return strings.Replace(before, good, tree, 1) + "\n" + more + "\n" + message
	}
	tag := o.Git(o.Work, "cat-file", "tag", "v1") + "\n"
	tagged, tagSignature, _ := strings.Cut(tag, "-----BEGIN")
	for name, c := range map[string]struct {
		raw string
		bad bool
	}{
		"as it was made":                             {of(good, header("gpgsig"), message), false},
		"another tree":                               {of(evil, header("gpgsig"), message), true},
		"another tree before":                        {"tree " + evil + "\n" + of(good, header("gpgsig"), message), true},
		"another tree after":                         {of(good, header("gpgsig")+"tree "+evil+"\n", message), true},
		"another parent after":                       {of(good, header("gpgsig")+"parent "+head+"\n", message), true},
		"before the tree":                            {header("gpgsig") + of(evil, "", message), true},
		"in the message":                             {of(evil, "", header("gpgsig")+"\n"+message), true},
		"the whole commit in the message":            {of(evil, header("gpgsig"), raw), true},
		"the whole commit in a header":               {of(evil, "note "+strings.ReplaceAll(strings.TrimSuffix(raw, "\n"), "\n", "\n ")+"\n", message), true},
		"after another":                              {of(evil, "gpgsig nothing\n"+header("gpgsig"), message), true},
		"before another":                             {of(good, header("gpgsig")+"gpgsig nothing\n", message), true},
		"of another hash":                            {of(evil, header("gpgsig-sha256"), message), true},
		"of another hash, beside it":                 {of(good, header("gpgsig")+header("gpgsig-sha256"), message), true},
		"in capitals":                                {of(good, header("GPGSIG"), message), true},
		"with a NUL":                                 {of(evil+"\x00"+good, header("gpgsig"), message), true},
		"a carriage return ends the headers":         {of(good, header("gpgsig")+"\r\ntree "+evil+"\n", message), true},
		"the signature of a tag":                     {of(evil, "gpgsig "+strings.ReplaceAll(strings.TrimSuffix("-----BEGIN"+tagSignature, "\n"), "\n", "\n ")+"\n", message), true},
		"a tag as a commit":                          {strings.Replace(tagged, "\n\n", "\ngpgsig "+strings.ReplaceAll(strings.TrimSuffix("-----BEGIN"+tagSignature, "\n"), "\n", "\n ")+"\n\n", 1), true},
		"a message that goes on beyond what is read": {of(good, header("gpgsig")+"", message+strings.Repeat("x", maxFile)), true},
	} {
		hash := literally(o, "commit", c.raw)
		in, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := in.Load(hash, verify)
		in.Close()
		switch {
		case c.bad && !errors.As(err, new(*BadCommit)):
			t.Errorf("%s: %+v, %v", name, l, err)
		case !c.bad && (err != nil || l.Tree.Units[0].Release != pointer("app/1")):
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}
