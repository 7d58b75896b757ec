package policy

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"kedge/deployments/fuzzlimit"
)

// newKey makes a key pair: its signer, and its line as in a .pub file.
func newKey(t testing.TB) (ssh.Signer, string) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return key, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key.PublicKey())))
}

func sign(t testing.TB, key ssh.Signer, namespace, message string) []byte {
	t.Helper()
	s, err := sshsig.Sign(strings.NewReader(message), key, sshsig.HashSHA512, namespace)
	if err != nil {
		t.Fatal(err)
	}
	return sshsig.Armor(s)
}

func signersOf(t testing.TB, lines ...string) Signers {
	t.Helper()
	s, err := ParseSigners([]byte(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestVerifyManifest(t *testing.T) {
	t.Parallel()
	alice, aliceKey := newKey(t)
	mallory, malloryKey := newKey(t)
	const manifest = "src: s3://acme/web.tar\n"
	signed := sign(t, alice, ManifestNamespace, manifest)
	for _, c := range []struct {
		name, file, manifest string
		signature            []byte
		says                 string
	}{
		{"good", "alice " + aliceKey, manifest, signed, ""},
		{"good, the second line of its key", `alice namespaces="git" ` + aliceKey + "\n" + `alice namespaces="kedge-*" ` + aliceKey, manifest, signed, ""},
		{"valid now", `alice valid-after="20200101Z",valid-before="20300101Z" ` + aliceKey, manifest, signed, ""},
		{"not any more", `alice valid-before="20260101Z" ` + aliceKey, manifest, signed, "not valid at this time"},
		{"not yet", `alice valid-after="20270101Z" ` + aliceKey, manifest, signed, "not valid at this time"},
		{"not yet, in the third line", "\n# alice\n" + `alice valid-after="20270101Z" ` + aliceKey, manifest, signed,
			"line 3 of the allowed signers: the key SHA256:"},
		{"for something else", `alice namespaces="git,file" ` + aliceKey, manifest, signed, "may sign for git,file"},
		{"for something else, in a second line", "mallory " + malloryKey + "\n" + `alice namespaces="git" ` + aliceKey,
			manifest, signed, "line 2 of the allowed signers: the key SHA256:"},
		{"another manifest", "alice " + aliceKey, manifest + " ", signed, "of another content"},
		{"somebody else", "alice " + aliceKey, manifest, sign(t, mallory, ManifestNamespace, manifest), "not among the allowed signers"},
		{"a commit's signature", "alice " + aliceKey, manifest, sign(t, alice, "git", manifest), `namespace is "git"`},
		{"none", "alice " + aliceKey, manifest, nil, "no signature"},
		{"not one", "alice " + aliceKey, manifest, []byte("hello"), "not an SSH signature"},
		{"half of one", "alice " + aliceKey, manifest, signed[:len(signed)/2], "doesn't parse"},
		{"nobody may", "# nobody", manifest, signed, "not among"},
	} {
		t.Run(c.name, func(t *testing.T) {
			who, err := signersOf(t, c.file).VerifyManifest([]byte(c.manifest), c.signature, noon)
			switch {
			case c.says == "" && (err != nil || who != "alice"):
				t.Errorf("%q, %v", who, err)
			case c.says != "" && (!errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), c.says) || who != ""):
				t.Errorf("%q, %v; want an error that says %q", who, err, c.says)
			}
		})
	}
}

// What OpenSSH's own tool signs is taken, with each kind of key.
func TestVerifyManifestSignedByOpenSSH(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			key, file := filepath.Join(dir, "key"), filepath.Join(dir, "manifest.yaml")
			run(t, "ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "alice's key", "-f", key)
			manifest := []byte("src: s3://acme/web.tar\n")
			if err := os.WriteFile(file, manifest, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "ssh-keygen", "-q", "-Y", "sign", "-f", key, "-n", ManifestNamespace, file)
			signature, err := os.ReadFile(file + ".sig")
			if err != nil {
				t.Fatal(err)
			}
			public, err := os.ReadFile(key + ".pub")
			if err != nil {
				t.Fatal(err)
			}
			s := signersOf(t, "# who may", `alice@example.com namespaces="kedge-manifest" `+string(public))
			if who, err := s.VerifyManifest(manifest, signature, time.Now()); err != nil || who != "alice@example.com" {
				t.Errorf("%q, %v", who, err)
			}
			if _, err := s.VerifyManifest(append(manifest, '#'), signature, time.Now()); !errors.Is(err, ErrUntrusted) {
				t.Errorf("a changed manifest: %v", err)
			}
		})
	}
}

func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func TestVerifyCommit(t *testing.T) {
	t.Parallel()
	alice, key := newKey(t)
	s := signersOf(t, "alice "+key)
	const payload = "tree 123\n\nDeploy 1.2\n"
	if who, err := s.VerifyCommit([]byte(payload), sign(t, alice, "git", payload), noon); err != nil || who != "alice" {
		t.Errorf("%q, %v", who, err)
	}
	for _, c := range []struct {
		signature []byte
		says      string
	}{
		{nil, "the commit has no signature"},
		{sign(t, alice, ManifestNamespace, payload), "namespace is"},
		{[]byte("-----BEGIN PGP SIGNATURE-----\n"), "gpg.format ssh"},
		{bytes.ToUpper(sign(t, alice, "git", payload)), "doesn't parse"},
	} {
		if _, err := s.VerifyCommit([]byte(payload), c.signature, noon); !errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v, want %q in it", err, c.says)
		}
	}
}

func TestParseSigners(t *testing.T) {
	t.Parallel()
	_, key := newKey(t)
	for _, c := range []struct {
		name, text string
		want       int
		says       string
	}{
		{"plain", "ada " + key + "\n", 1, ""},
		{"with tabs and CRLF", "\ufeffada\t" + key + "\r\nbob\t" + key + "\r\n", 2, ""},
		{"quoted principals", `"ada lovelace,bob" ` + key, 1, ""},
		{"comments and blank lines", "# x\n\n  ada " + key + " a comment\n", 1, ""},
		{"bounded in time", `ada valid-after="20200101",valid-before="20300101120000Z" ` + key, 1, ""},
		{"nothing", "", 0, ""},
		{"a bad time", `ada valid-after="2020" ` + key, 0, "line 1: option valid-after"},
		{"a time with a letter", `ada valid-after="2020010x" ` + key, 0,
			`line 1: option valid-after: "2020010x": want YYYYMMDD`},
		{"a day that is none", `ada valid-before="20200230" ` + key, 0,
			`line 1: option valid-before: "20200230": want YYYYMMDD`},
		{"an authority", "ada " + key + "\nca cert-authority " + key, 0, "line 2: option cert-authority: certificate authorities are not supported"},
		{"an unknown option", "ada from=\"x\" " + key, 0, "line 1: option from"},
		{"a namespace that is refused", `ada namespaces="!git" ` + key, 0, "line 1: option namespaces"},
		{"no key", "ada\n", 0, "line 1: want PRINCIPALS"},
		{"a key alone", key, 0, "line 1: want PRINCIPALS"},
		{"an open quote", `"ada ` + key, 0, "line 1: a quote has no end"},
	} {
		s, err := ParseSigners([]byte(c.text))
		if c.says == "" && (err != nil || s.Len() != c.want) || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %d signers, %v", c.name, s.Len(), err)
		}
	}
}

func FuzzParseSigners(f *testing.F) {
	alice, key := newKey(f)
	signature := sign(f, alice, ManifestNamespace, "x")
	f.Add([]byte("ada "+key), signature)
	f.Add([]byte(`"a b" namespaces="x,y*",valid-after="20200101" `+key), signature[:40])
	f.Fuzz(func(t *testing.T, file, signature []byte) {
		fuzzlimit.Run(t, file, func() {
			s, err := ParseSigners(file)
			if err != nil {
				return
			}
			if who, err := s.VerifyManifest([]byte("y"), signature, noon); err == nil {
				t.Errorf("%q signed what it never saw", who)
			}
		})
	})
}
