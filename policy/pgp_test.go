package policy

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"golang.org/x/crypto/ssh"
)

// What somebody with enough machines could have made is no signature, though it fits and its key is listed.
func TestWeakSignaturesDoNotCount(t *testing.T) {
	t.Parallel()
	const payload = "tree 1\n\nmessage\n"
	for name, c := range map[string]struct {
		bits int
		hash crypto.Hash
		says string // empty: it counts
	}{
		"RSA of 2048 bits with SHA-256": {2048, crypto.SHA256, ""},
		"RSA of 1024 bits":              {1024, crypto.SHA256, "1024 bits"},
	} {
		key, err := openpgp.NewEntity("Ada", "", "ada@example.com", &packet.Config{RSABits: c.bits,
			Algorithm: packet.PubKeyAlgoRSA})
		if err != nil {
			t.Fatal(err)
		}
		var public, signature bytes.Buffer
		w, err := armor.Encode(&public, openpgp.PublicKeyType, nil)
		if err := errors.Join(err, key.Serialize(w), w.Close()); err != nil {
			t.Fatal(err)
		}
		if err := openpgp.ArmoredDetachSign(&signature, key, strings.NewReader(payload),
			&packet.Config{DefaultHash: c.hash}); err != nil {
			t.Fatal(err)
		}
		keys, err := ParseKeyring(public.Bytes())
		if err != nil {
			t.Fatal(err)
		}
		_, err = keys.VerifyCommit([]byte(payload), signature.Bytes(), time.Now())
		if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, ErrUntrusted) ||
			!strings.Contains(err.Error(), c.says)) {
			t.Errorf("OpenPGP, %s: %v", name, err)
		}
	}
	for bits, good := range map[int]bool{1024: false, 2048: true} {
		private, err := rsa.GenerateKey(rand.Reader, bits)
		if err != nil {
			t.Fatal(err)
		}
		key, err := ssh.NewSignerFromKey(private)
		if err != nil {
			t.Fatal(err)
		}
		signers := signersOf(t, "ada "+string(ssh.MarshalAuthorizedKey(key.PublicKey())))
		_, err = signers.VerifyCommit([]byte(payload), sign(t, key, commitNamespace, payload), time.Now())
		if good && err != nil || !good && (!errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "1024 bits")) {
			t.Errorf("SSH, RSA of %d bits: %v", bits, err)
		}
	}
}

// gpg itself, asked to, signs with SHA-1.
func TestSHA1DoesNotCount(t *testing.T) {
	t.Parallel()
	home, err := os.MkdirTemp("", "kedge-gpg-") // short: gpg's agent listens at a socket in it
	if err != nil {
		t.Fatal(err)
	}
	run := func(in, name string, args ...string) []byte {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Env, cmd.Stdin = append(os.Environ(), "GNUPGHOME="+home), strings.NewReader(in)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s %q: %v", name, args, err)
		}
		return out
	}
	t.Cleanup(func() {
		run("", "gpgconf", "--kill", "all")
		if err := os.RemoveAll(home); err != nil {
			t.Error(err)
		}
	})
	gpg := func(in string, args ...string) []byte {
		return run(in, "gpg", append([]string{"--batch", "--quiet", "--passphrase", "", "--pinentry-mode",
			"loopback"}, args...)...)
	}
	gpg("", "--quick-gen-key", "Ada <ada@example.com>", "rsa2048", "sign", "never")
	keys, err := ParseKeyring(gpg("", "--armor", "--export"))
	if err != nil {
		t.Fatal(err)
	}
	const payload = "tree 1\n\nmessage\n"
	for digest, good := range map[string]bool{"SHA1": false, "SHA512": true} {
		signature := gpg(payload, "--digest-algo", digest, "--allow-weak-digest-algos", "--armor", "--detach-sign")
		_, err := keys.VerifyCommit([]byte(payload), signature, time.Now())
		if good && err != nil || !good && (!errors.Is(err, ErrUntrusted) || !strings.Contains(err.Error(), "SHA-1")) {
			t.Errorf("%s: %v", digest, err)
		}
	}
}
