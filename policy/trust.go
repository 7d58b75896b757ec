package policy

import (
	"bytes"
	"crypto/rsa"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

// Namespaces of SSH signatures. A signature for one namespace is not valid in another.
const (
	ManifestNamespace = "kedge-manifest" // ssh-keygen -Y sign -n kedge-manifest
	SnapshotNamespace = "kedge-snapshot"
	commitNamespace   = "git" // git's own
)

// ErrUntrusted means that a signature is missing, invalid, too weak, or not by an allowed signer.
var ErrUntrusted = errors.New("not signed by an allowed signer")

// Signers are the keys of an allowed_signers file: only their signatures count. The zero Signers accepts no signature.
type Signers struct{ all []signer }

// signer is one line of an allowed_signers file.
type signer struct {
	line                    int
	principals              string
	key                     ssh.PublicKey
	namespaces              []string  // patterns; empty: any
	validAfter, validBefore time.Time // zero: no bound
}

// Len returns the number of keys.
func (s Signers) Len() int { return len(s.all) }

// ParseSigners parses OpenSSH's allowed_signers format, as ssh-keygen(1) describes it: lines of PRINCIPALS
// [OPTIONS] KEYTYPE KEY, with the options namespaces, valid-after and valid-before. Certificate authorities are
// not supported. An error names the line.
func ParseSigners(data []byte) (Signers, error) {
	var s Signers
	for i, line := range strings.Split(string(bytes.TrimPrefix(data, []byte("\ufeff"))), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		one, err := parseSigner(line)
		if err != nil {
			return Signers{}, fmt.Errorf("line %d: %w", i+1, err)
		}
		one.line = i + 1
		s.all = append(s.all, one)
	}
	return s, nil
}

func parseSigner(line string) (signer, error) {
	var s signer
	var rest string
	if quoted, ok := strings.CutPrefix(line, `"`); ok {
		s.principals, rest, ok = strings.Cut(quoted, `"`)
		if !ok {
			return s, errors.New("a quote has no end")
		}
	} else if i := strings.IndexAny(line, " \t"); i > 0 {
		s.principals, rest = line[:i], line[i:]
	}
	key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(rest))
	if err != nil {
		return s, errors.New("want PRINCIPALS [OPTIONS] KEYTYPE KEY, as in alice@example.com ssh-ed25519 AAAA…")
	}
	if _, ok := key.(*ssh.Certificate); ok {
		return s, errors.New("it has a certificate: want a plain public key")
	}
	s.key = key
	for _, o := range options {
		name, value, _ := strings.Cut(o, "=")
		value = strings.Trim(value, `"`)
		switch strings.ToLower(name) {
		case "namespaces":
			s.namespaces = strings.Split(value, ",")
			for _, n := range s.namespaces {
				if _, err := path.Match(n, ""); n == "" || err != nil || strings.ContainsAny(n, "!\\[") {
					return s, fmt.Errorf("option namespaces: %q: want names, or patterns of * and ?", n)
				}
			}
		case "valid-after":
			s.validAfter, err = parseValid(value)
		case "valid-before":
			s.validBefore, err = parseValid(value)
		case "cert-authority":
			return s, errors.New("option cert-authority: certificate authorities are not supported: list each signer's own key")
		default:
			return s, fmt.Errorf("option %s is not known: want namespaces, valid-after or valid-before", name)
		}
		if err != nil {
			return s, fmt.Errorf("option %s: %w", name, err)
		}
	}
	return s, nil
}

// parseValid parses YYYYMMDD[HHMM[SS]][Z]. Without Z the time is in the local zone, as for ssh-keygen.
func parseValid(s string) (time.Time, error) {
	digits, zone := s, time.Local
	if cut, ok := strings.CutSuffix(s, "Z"); ok {
		digits, zone = cut, time.UTC
	}
	for _, layout := range []string{"20060102", "200601021504", "20060102150405"} {
		if t, err := time.ParseInLocation(layout, digits, zone); err == nil && len(layout) == len(digits) {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q: want YYYYMMDD[HHMM[SS]][Z]", s)
}

// VerifyManifest checks a detached signature over a manifest's bytes, as ssh-keygen -Y sign -n kedge-manifest makes it,
// and returns the signer's principals. The key must be valid now: a signature's own time proves nothing, because the
// signer chooses it. Every error wraps ErrUntrusted.
func (s Signers) VerifyManifest(manifest, signature []byte, now time.Time) (principal string, err error) {
	if len(bytes.TrimSpace(signature)) == 0 {
		return "", fmt.Errorf("%w: the manifest has no signature", ErrUntrusted)
	}
	return s.verify(manifest, signature, ManifestNamespace, now)
}

// VerifySnapshot checks a mirror's signature of a snapshot of the desired state, as VerifyManifest does a manifest's.
func (s Signers) VerifySnapshot(snapshot, signature []byte, now time.Time) (principal string, err error) {
	return s.verify(snapshot, signature, SnapshotNamespace, now)
}

// VerifyCommit checks the SSH signature that git made over a commit's payload, which is the commit without its gpgsig
// header. The result is as VerifyManifest's.
func (s Signers) VerifyCommit(payload, signature []byte, now time.Time) (principal string, err error) {
	switch {
	case len(bytes.TrimSpace(signature)) == 0:
		return "", fmt.Errorf("%w: the commit has no signature, and only signed ones are accepted", ErrUntrusted)
	case bytes.Contains(signature, []byte("BEGIN PGP")):
		return "", fmt.Errorf(
			"%w: the commit has an OpenPGP signature, and the mirror has no OpenPGP keys: give it some by --signed-by-pgp, "+
				"or sign by SSH (git config gpg.format ssh)",
			ErrUntrusted,
		)
	}
	return s.verify(payload, signature, commitNamespace, now)
}

func (s Signers) verify(message, signature []byte, namespace string, now time.Time) (string, error) {
	if !bytes.Contains(signature, []byte("BEGIN SSH SIGNATURE")) {
		return "", fmt.Errorf("%w: the signature is not an SSH signature", ErrUntrusted)
	}
	sig, err := sshsig.Unarmor(bytes.TrimSpace(signature))
	if err != nil {
		return "", fmt.Errorf("%w: the signature doesn't parse: %w", ErrUntrusted, err)
	}
	if sig.Namespace != namespace {
		return "", fmt.Errorf("%w: the signature's namespace is %q, not %q: sign with ssh-keygen -Y sign -n %[3]s",
			ErrUntrusted, sig.Namespace, namespace)
	}
	if sig.Signature.Format == ssh.KeyAlgoRSA {
		return "", fmt.Errorf("%w: the signature uses SHA-1: sign with rsa-sha2-512, or with an ed25519 key", ErrUntrusted)
	}
	if bits := rsaBits(sig.PublicKey); bits > 0 && bits < minRSA {
		return "", fmt.Errorf(
			"%w: the RSA key has %d bits: sign with one of at least %d bits, or with an ed25519 key",
			ErrUntrusted,
			bits,
			minRSA,
		)
	}
	key := sig.PublicKey.Marshal()
	finger := ssh.FingerprintSHA256(sig.PublicKey)
	refused := fmt.Errorf("%w: the signature's key %s is not among the allowed signers", ErrUntrusted, finger)
	for _, one := range s.all {
		if !bytes.Equal(one.key.Marshal(), key) {
			continue
		}
		switch {
		case !one.signs(namespace):
			refused = fmt.Errorf("%w: line %d of the allowed signers: the key %s of %s may sign for %s, not for %s",
				ErrUntrusted, one.line, finger, one.principals, strings.Join(one.namespaces, ","), namespace)
			continue
		case !one.validAfter.IsZero() && now.Before(one.validAfter),
			!one.validBefore.IsZero() && !now.Before(one.validBefore):
			refused = fmt.Errorf("%w: line %d of the allowed signers: the key %s of %s is not valid at this time",
				ErrUntrusted, one.line, finger, one.principals)
			continue
		}
		if err := sshsig.Verify(bytes.NewReader(message), sig, one.key, sig.HashAlgorithm, namespace); err != nil {
			return "", fmt.Errorf("%w: the signature by the key of %s is of another content: %w",
				ErrUntrusted, one.principals, err)
		}
		return one.principals, nil
	}
	return "", refused
}

// minRSA is the least size of an accepted RSA key, in bits.
const minRSA = 2048

// rsaBits returns the size of an RSA key, and 0 for keys of other kinds.
func rsaBits(key ssh.PublicKey) int {
	if c, ok := key.(ssh.CryptoPublicKey); ok {
		if k, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok {
			return k.N.BitLen()
		}
	}
	return 0
}

func (s signer) signs(namespace string) bool {
	for _, pattern := range s.namespaces {
		if ok, _ := path.Match(pattern, namespace); ok {
			return true
		}
	}
	return len(s.namespaces) == 0
}
