package policy

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Keyring holds OpenPGP public keys: those whose signatures on commits count, beside Signers.
type Keyring struct{ keys openpgp.EntityList }

// Len is how many keys may sign.
func (k Keyring) Len() int { return len(k.keys) }

// ParseKeyring reads armoured blocks of public keys, as `gpg --armor --export` prints them, one after the other.
func ParseKeyring(data []byte) (Keyring, error) {
	const begin = "-----BEGIN PGP PUBLIC KEY BLOCK-----"
	var k Keyring
	_, rest, found := strings.Cut(string(data), begin)
	if !found {
		return k, errors.New("it has no block of OpenPGP public keys: want what gpg --armor --export KEY prints")
	}
	for i, block := range strings.Split(rest, begin) {
		keys, err := openpgp.ReadArmoredKeyRing(strings.NewReader(begin + block))
		if err != nil {
			return Keyring{}, fmt.Errorf("block %d: %w", i+1, err)
		}
		k.keys = append(k.keys, keys...)
	}
	return k, nil
}

// VerifyCommit checks the OpenPGP signature that git made over a commit's payload, and returns the name of who made it. A key must
// neither have expired nor be revoked now, and SHA-1 counts for nothing.
func (k Keyring) VerifyCommit(payload, signature []byte, now time.Time) (who string, err error) {
	signer, err := openpgp.CheckArmoredDetachedSignature(k.keys, bytes.NewReader(payload), bytes.NewReader(signature),
		&packet.Config{Time: func() time.Time { return now }})
	if err != nil {
		return "", fmt.Errorf("%w: its OpenPGP signature: %w", ErrUntrusted, err)
	}
	if id := signer.PrimaryIdentity(); id != nil {
		return id.Name, nil
	}
	return fmt.Sprintf("%X", signer.PrimaryKey.Fingerprint), nil
}

// IsPGP reports whether a signature on a commit is an OpenPGP one.
func IsPGP(signature []byte) bool {
	return bytes.Contains(signature, []byte("-----BEGIN PGP SIGNATURE-----"))
}
