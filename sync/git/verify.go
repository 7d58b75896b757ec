package git

import (
	"fmt"
	"os"
	"time"

	"kedge/policy"
)

// NewVerifier checks commits against an allowed_signers file and a file of OpenPGP keys. They are read anew for each commit, so that
// a signer can be added, or taken out, while the mirror runs. Without either no signature is asked for.
func NewVerifier(signersFile, keyringFile string) (Verifier, error) {
	if signersFile == "" && keyringFile == "" {
		return nil, nil
	}
	read := func() (signers policy.Signers, keys policy.Keyring, err error) {
		if signersFile != "" {
			signers, err = readSigners(signersFile)
		}
		if err == nil && keyringFile != "" {
			keys, err = readKeyring(keyringFile)
		}
		return signers, keys, err
	}
	if _, _, err := read(); err != nil {
		return nil, err
	}
	return func(payload, signature []byte) error {
		signers, keys, err := read()
		if err != nil {
			return err
		}
		if keyringFile != "" && policy.IsPGP(signature) {
			_, err = keys.VerifyCommit(payload, signature, time.Now())
			return err
		}
		_, err = signers.VerifyCommit(payload, signature, time.Now())
		return err
	}, nil
}

func readKeyring(file string) (policy.Keyring, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return policy.Keyring{}, fmt.Errorf("OpenPGP keys: %w", err)
	}
	keys, err := policy.ParseKeyring(data)
	if err != nil {
		return policy.Keyring{}, fmt.Errorf("OpenPGP keys: %s: %w", file, err)
	}
	return keys, nil
}

func readSigners(file string) (policy.Signers, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return policy.Signers{}, fmt.Errorf("allowed signers: %w", err)
	}
	signers, err := policy.ParseSigners(data)
	if err != nil {
		return policy.Signers{}, fmt.Errorf("allowed signers: %s: %w", file, err)
	}
	if signers.Len() == 0 {
		return policy.Signers{}, fmt.Errorf("allowed signers: %s names nobody who may sign commits", file)
	}
	return signers, nil
}
