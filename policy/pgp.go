package policy

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

// Keyring holds the OpenPGP public keys whose signatures on commits count, besides Signers.
type Keyring struct{ keys openpgp.EntityList }

// ParseKeyring parses armoured blocks of public keys, as `gpg --armor --export` prints them.
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

// VerifyCommit checks the OpenPGP signature that git made over a commit's payload, and returns the signer's name or, if
// the key has none, its fingerprint. The key must be neither expired nor revoked now. Signatures by digests below
// SHA-256, or by RSA keys below minRSA, are refused. Every error wraps ErrUntrusted.
func (k Keyring) VerifyCommit(payload, signature []byte, now time.Time) (who string, err error) {
	signer, err := k.verify(payload, signature, now)
	if err != nil {
		return "", fmt.Errorf("%w: the commit's OpenPGP signature: %w", ErrUntrusted, err)
	}
	if id := signer.PrimaryIdentity(); id != nil {
		return id.Name, nil
	}
	return fmt.Sprintf("%X", signer.PrimaryKey.Fingerprint), nil
}

func (k Keyring) verify(payload, signature []byte, now time.Time) (*openpgp.Entity, error) {
	block, err := armor.Decode(bytes.NewReader(signature))
	if err != nil {
		return nil, err
	}
	made, signer, err := openpgp.VerifyDetachedSignature(k.keys, bytes.NewReader(payload), block.Body,
		&packet.Config{Time: func() time.Time { return now }})
	if err != nil {
		return nil, err
	}
	return signer, checkStrength(made, signer)
}

// checkStrength returns an error if a valid signature proves nothing, as somebody with enough computing power could
// have forged it.
func checkStrength(made *packet.Signature, signer *openpgp.Entity) error {
	switch made.Hash {
	case crypto.SHA256, crypto.SHA384, crypto.SHA512, crypto.SHA3_256, crypto.SHA3_512:
	default:
		return fmt.Errorf("it uses %v: sign with SHA-256 or better (gpg --digest-algo SHA512)", made.Hash)
	}
	for _, key := range (openpgp.EntityList{signer}).KeysById(*made.IssuerKeyId) {
		if bits, err := key.PublicKey.BitLength(); err == nil && isRSA(key.PublicKey.PubKeyAlgo) && bits < minRSA {
			return fmt.Errorf("the RSA key has %d bits: sign with one of at least %d bits", bits, minRSA)
		}
	}
	return nil
}

func isRSA(kind packet.PublicKeyAlgorithm) bool {
	return kind == packet.PubKeyAlgoRSA || kind == packet.PubKeyAlgoRSASignOnly || kind == packet.PubKeyAlgoRSAEncryptOnly
}

// IsPGP reports whether a signature on a commit is an OpenPGP one.
func IsPGP(signature []byte) bool {
	return bytes.Contains(signature, []byte("-----BEGIN PGP SIGNATURE-----"))
}
