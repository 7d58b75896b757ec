package git

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"kedge/policy"
	"kedge/sync/git/gittest"
)

// A good signature, moved to another place in the commit: it never makes another tree, or other parents, signed.
func TestMovedSignatures(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	file := filepath.Join(t.TempDir(), "ada")
	signers := filepath.Join(t.TempDir(), "signers")
	gittest.WriteFile(t, signers, "ada@example.com "+o.SignBy(file))
	verify, err := OpenSigners(signers, "", "")
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
		"as it was made":                  {of(good, header("gpgsig"), message), false},
		"another tree":                    {of(evil, header("gpgsig"), message), true},
		"another tree before":             {"tree " + evil + "\n" + of(good, header("gpgsig"), message), true},
		"another tree after":              {of(good, header("gpgsig")+"tree "+evil+"\n", message), true},
		"another parent after":            {of(good, header("gpgsig")+"parent "+head+"\n", message), true},
		"before the tree":                 {header("gpgsig") + of(evil, "", message), true},
		"in the message":                  {of(evil, "", header("gpgsig")+"\n"+message), true},
		"the whole commit in the message": {of(evil, header("gpgsig"), raw), true},
		"the whole commit in a header": {of(evil, "note "+strings.ReplaceAll(strings.TrimSuffix(raw,
			"\n"), "\n", "\n ")+"\n", message), true},
		"after another":                      {of(evil, "gpgsig nothing\n"+header("gpgsig"), message), true},
		"before another":                     {of(good, header("gpgsig")+"gpgsig nothing\n", message), true},
		"of another hash":                    {of(evil, header("gpgsig-sha256"), message), true},
		"of another hash, beside it":         {of(good, header("gpgsig")+header("gpgsig-sha256"), message), true},
		"in capitals":                        {of(good, header("GPGSIG"), message), true},
		"with a NUL":                         {of(evil+"\x00"+good, header("gpgsig"), message), true},
		"a carriage return ends the headers": {of(good, header("gpgsig")+"\r\ntree "+evil+"\n", message), true},
		"the signature of a tag": {of(evil, "gpgsig "+
			""+strings.ReplaceAll(strings.TrimSuffix("-----BEGIN"+tagSignature, "\n"), "\n", "\n ")+"\n", message), true},
		"a tag as a commit": {strings.Replace(tagged, "\n\n",
			"\ngpgsig "+strings.ReplaceAll(strings.TrimSuffix("-----BEGIN"+tagSignature, "\n"), "\n", "\n ")+"\n\n", 1), true},
		"a message that goes on beyond what is read": {of(good, header("gpgsig")+"", message+strings.Repeat("x",
			maxFile)), true},
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

// Whoever may push can wrap a signature in other text. The commit that results is refused; if one was taken all the
// same, the signer's own commit can follow it.
func TestSiblingsOfASignedCommit(t *testing.T) {
	t.Parallel()
	o := gittest.New(t)
	signersFile := filepath.Join(t.TempDir(), "signers")
	gittest.WriteFile(t, signersFile, "ada@example.com "+o.SignBy(filepath.Join(t.TempDir(), "ada")))
	signers, err := OpenSigners(signersFile, "", "")
	if err != nil {
		t.Fatal(err)
	}
	root := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	head := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	raw := o.Git(o.Work, "cat-file", "commit", head) + "\n"
	in := openWork(t, o)
	if _, err := in.Load(head, signers); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]string{
		"text after it": strings.Replace(raw, "-----END SSH SIGNATURE-----\n",
			"-----END SSH SIGNATURE-----\n and more\n", 1),
		"text before it": strings.Replace(raw, "gpgsig -----BEGIN", "gpgsig note\n -----BEGIN", 1),
		"a CR":           strings.Replace(raw, "-----BEGIN SSH SIGNATURE-----\n", "-----BEGIN SSH SIGNATURE-----\r\n", 1),
		"blanks":         strings.Replace(raw, "-----END SSH SIGNATURE-----\n", "-----END SSH SIGNATURE----- \n", 1),
		"twice": strings.Replace(raw, "-----END SSH SIGNATURE-----\n",
			"-----END SSH SIGNATURE-----\n -----END SSH SIGNATURE-----\n", 1),
	} {
		sibling := literally(o, "commit", c)
		if sibling == head {
			t.Fatalf("%s: the commit is the same", name)
		}
		if _, err := in.Load(sibling, signers); !errors.As(err, new(*BadCommit)) {
			t.Errorf("%s: %v", name, err)
		}
		for _, to := range []string{head, o.Commit(nil)} {
			if yes, err := in.Descends(t.Context(), sibling, to); !yes || err != nil {
				t.Errorf("%s: the signer's own commit does not follow it: %v, %v", name, yes, err)
			}
		}
		if yes, _ := in.Descends(t.Context(), sibling, root); yes {
			t.Errorf("%s: an older commit follows it", name)
		}
	}
	other := literally(o, "commit", strings.Replace(raw, "\n\nDeploy", "\n\nDeploy this", 1))
	if yes, err := in.Descends(t.Context(), other, head); yes || err != nil {
		t.Errorf("a commit with another message: %v, %v", yes, err)
	}
}

// A taken commit stays taken: a mirror that starts after a signer's key expired or was removed goes on with it, and
// takes nothing new.
func TestSignersThatAreGone(t *testing.T) {
	t.Parallel()
	for _, gone := range []string{"expired", "removed", "removed, and nothing is remembered"} {
		o := gittest.New(t)
		dir := t.TempDir()
		signersFile, memory := filepath.Join(dir, "signers"), filepath.Join(dir, "cache")
		ada := o.SignBy(filepath.Join(dir, "ada"))
		gittest.WriteFile(t, signersFile, "ada@example.com "+ada)
		open := func() *Signers {
			s, err := OpenSigners(signersFile, "", memory)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		now := time.Now().UTC()
		o.Env = []string{"GIT_COMMITTER_DATE=" + now.AddDate(0, 0, -3).Format(time.RFC3339)}
		taken := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
		o.Env = nil
		in := openWork(t, o)
		if _, err := in.Load(taken, open()); err != nil {
			t.Fatal(err)
		}
		next := o.Commit(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
		if gone == "expired" {
			gittest.WriteFile(t, signersFile, "ada@example.com valid-before=\""+now.AddDate(0, 0,
				-1).Format("20060102")+"Z\" "+ada)
			if err := os.RemoveAll(memory); err != nil {
				t.Fatal(err)
			}
		} else {
			gittest.WriteFile(t, signersFile, "bob@example.com "+
				""+strings.TrimSpace(string(ssh.MarshalAuthorizedKey(gittest.NewKey(t, filepath.Join(dir, "bob"), ""))))+"\n")
		}
		if strings.HasSuffix(gone, "remembered") {
			if err := os.RemoveAll(memory); err != nil {
				t.Fatal(err)
			}
		}
		_, err := in.LoadTaken(taken, open())
		if stays := !strings.HasSuffix(gone, "remembered"); stays != (err == nil) {
			t.Errorf("%s: what was taken: %v", gone, err)
		}
		for _, load := range []func(string, *Signers) (*Commit, error){in.Load, in.LoadTaken} {
			if _, err := load(next, open()); !errors.Is(err, policy.ErrUntrusted) {
				t.Errorf("%s: a commit that was never taken: %v", gone, err)
			}
		}
	}
}

func openWork(t *testing.T, o *gittest.Origin) *Objects {
	t.Helper()
	in, err := OpenObjects(filepath.Join(o.Work, ".git", "objects"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close() })
	return in
}
