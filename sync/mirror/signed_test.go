package mirror

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-git/go-git/v5/plumbing"
)

// signs makes o sign its commits with the key in file, and returns the public key's line.
func signs(t *testing.T, o *origin, file string) string {
	t.Helper()
	newKey(t, file, "")
	public, err := exec.Command("ssh-keygen", "-y", "-f", file).Output()
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file+".pub", string(public))
	signsWith(o, file)
	return string(public)
}

func signsWith(o *origin, file string) {
	o.git(o.work, "config", "gpg.format", "ssh")
	o.git(o.work, "config", "user.signingkey", file+".pub")
	o.git(o.work, "config", "commit.gpgsign", "true")
}

func TestOnlySignedCommitsAreTaken(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	dir := t.TempDir()
	store := dirStore(t)
	signers := filepath.Join(dir, "signers")
	writeFile(t, signers, "# who may deploy\nada@example.com namespaces=\"git\" "+signs(t, o, filepath.Join(dir, "ada")))
	root := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: store, Repo: o.bare, SignedBy: signers})
	m.at(root)
	head := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	m.at(head)
	was := desired(t, store)

	o.git(o.work, "config", "commit.gpgsign", "false")
	m.refuses(o.push(map[string]string{"prod/web/app.yaml": unitFile("evil/1")}), "it has none")
	sameDesired(t, store, was)

	eve := signs(t, o, filepath.Join(dir, "eve"))
	m.refuses(o.push(map[string]string{"prod/web/app.yaml": unitFile("evil/2")}), "not among the allowed signers")
	sameDesired(t, store, was)

	// A signature that was good, on another commit.
	raw := o.git(o.work, "cat-file", "commit", head)
	forged := strings.Replace(raw, "\n\nDeploy", "\n\nDeploy this", 1)
	writeFile(t, filepath.Join(dir, "forged"), forged+"\n")
	hash := o.git(o.work, "hash-object", "-t", "commit", "-w", filepath.Join(dir, "forged"))
	o.git(o.work, "push", "-q", "-f", "origin", hash+":refs/heads/main")
	m.refuses(hash, "by the key of ada@example.com")
	sameDesired(t, store, was)

	// An old commit, whose signature is good, brought back by force, without the key.
	o.git(o.work, "push", "-q", "-f", "origin", root+":refs/heads/main")
	m.refuses(root, "does not descend")
	sameDesired(t, store, was)

	// The state that the mirror left is no way around it either.
	m.stop()
	evil := o.git(o.work, "rev-parse", "HEAD")
	o.git(o.work, "push", "-q", "-f", "origin", evil+":refs/heads/main")
	put(t, store, "mirror/state", `{"head":"`+evil+`"}`)
	m = start(t, Config{Store: store, Repo: o.bare, SignedBy: signers})
	m.status(func(s Status) bool { return s.Refused == evil })
	sameDesired(t, store, was)

	// Whoever is added to the file may sign from then on.
	o.git(o.work, "reset", "-q", "--hard", head)
	next := o.forcePush(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	m.refuses(next, "not among the allowed signers")
	ada, err := exec.Command("ssh-keygen", "-y", "-f", filepath.Join(dir, "ada")).Output()
	if err != nil {
		t.Fatal(err)
	}
	put(t, store, "mirror/state", `{"head":"`+head+`"}`)
	m.stop()
	writeFile(t, signers, "ada@example.com "+string(ada)+"eve@example.com "+eve)
	m = start(t, Config{Store: store, Repo: o.bare, SignedBy: signers})
	m.at(next)
	m.runs("prod/web/app", "app/3")
}

// forcePush commits files and pushes them by force.
func (o *origin) forcePush(files map[string]string) string {
	o.tb.Helper()
	hash := o.commit(files)
	o.git(o.work, "push", "-q", "-f", "origin", "HEAD:main")
	return hash
}

// Commits that the real gpg signed: by a key that counts, by another, by one that expired, and SSH signers beside them.
func TestCommitsSignedByOpenPGP(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	dir, err := os.MkdirTemp("", "kedge-gpg-") // short: gpg's agent listens at a socket in it
	if err != nil {
		t.Fatal(err)
	}
	o.env = append(o.env, "GNUPGHOME="+dir)
	gpg := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("gpg", append([]string{"--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"}, args...)...)
		cmd.Env = append(os.Environ(), "GNUPGHOME="+dir)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("gpg %q: %v", args, err)
		}
		return string(out)
	}
	t.Cleanup(func() {
		cmd := exec.Command("gpgconf", "--kill", "all")
		cmd.Env = append(os.Environ(), "GNUPGHOME="+dir)
		if err := errors.Join(cmd.Run(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	gpg("--quick-gen-key", "Ada <ada@example.com>", "ed25519", "sign", "never")
	gpg("--quick-gen-key", "Eve <eve@example.com>", "ed25519", "sign", "never")
	gpg("--faked-system-time", "20200101T000000", "--quick-gen-key", "Old <old@example.com>", "ed25519", "sign", "1d")
	keys := filepath.Join(dir, "keys.asc")
	writeFile(t, keys, gpg("--armor", "--export", "ada@example.com")+gpg("--armor", "--export", "old@example.com"))
	signsAs := func(who string) {
		o.git(o.work, "config", "gpg.format", "openpgp")
		o.git(o.work, "config", "user.signingkey", who)
		o.git(o.work, "config", "commit.gpgsign", "true")
	}
	signers := filepath.Join(dir, "signers")
	writeFile(t, signers, "bob@example.com "+signs(t, o, filepath.Join(dir, "bob")))

	signsAs("ada@example.com")
	store := dirStore(t)
	first := o.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: store, Repo: o.bare, SignedBy: signers, SignedByPGP: keys})
	m.at(first)
	signsWith(o, filepath.Join(dir, "bob"))
	m.at(o.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")}))
	was := desired(t, store)

	signsAs("eve@example.com")
	m.refuses(o.push(map[string]string{"prod/web/app.yaml": unitFile("evil/1")}), "its OpenPGP signature")
	sameDesired(t, store, was)

	// gpg itself would not sign with a key that has expired, but for its clock.
	wrapper := filepath.Join(dir, "gpg-then")
	writeFile(t, wrapper, "#!/bin/sh\nexec gpg --faked-system-time 20200101T010000 \"$@\"\n")
	if err := os.Chmod(wrapper, 0o700); err != nil {
		t.Fatal(err)
	}
	o.git(o.work, "config", "gpg.program", wrapper)
	signsAs("old@example.com")
	m.refuses(o.push(map[string]string{"prod/web/app.yaml": unitFile("old/1")}), "expired")
	sameDesired(t, store, was)

	if _, err := New(Config{Store: store, Repo: o.bare, SignedByPGP: signers}); err == nil || !strings.Contains(err.Error(), "gpg --armor --export") {
		t.Errorf("a file without keys: %v", err)
	}
}

// A good signature, moved to where somebody might look for it: none of it makes another tree, or other parents, of a signed commit.
func TestMovedSignatures(t *testing.T) {
	t.Parallel()
	o := newOrigin(t)
	file := filepath.Join(t.TempDir(), "ada")
	signers := filepath.Join(t.TempDir(), "signers")
	writeFile(t, signers, "ada@example.com "+signs(t, o, file))
	verify, err := newVerifier(signers, "")
	if err != nil {
		t.Fatal(err)
	}
	head := o.commit(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	o.git(o.work, "tag", "-s", "-m", "One", "v1")
	o.git(o.work, "config", "commit.gpgsign", "false")
	o.commit(map[string]string{"prod/web/app.yaml": unitFile("evil/1")})
	evil := o.git(o.work, "rev-parse", "HEAD^{tree}")
	good := o.git(o.work, "rev-parse", head+"^{tree}")

	raw := o.git(o.work, "cat-file", "commit", head) + "\n"
	payload, signature := splitSignature([]byte(raw))
	header := func(name string) string {
		return name + " " + strings.ReplaceAll(strings.TrimSuffix(string(signature), "\n"), "\n", "\n ") + "\n"
	}
	before, message, _ := strings.Cut(string(payload), "\n\n")
	of := func(tree, more, message string) string {
		return strings.Replace(before, good, tree, 1) + "\n" + more + "\n" + message
	}
	tag := o.git(o.work, "cat-file", "tag", "v1") + "\n"
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
		hash := o.literally("commit", c.raw)
		in, err := openObjects(filepath.Join(o.work, ".git", "objects"))
		if err != nil {
			t.Fatal(err)
		}
		l, err := load(in, plumbing.NewHash(hash), verify)
		in.Close()
		switch {
		case c.bad && !errors.As(err, new(*badCommit)):
			t.Errorf("%s: %+v, %v", name, l, err)
		case !c.bad && (err != nil || l.tree.Units[0].Release != pointer("app/1")):
			t.Errorf("%s: %+v, %v", name, l, err)
		}
	}
}
