package mirror

import (
	"fmt"
	"os"
	"time"

	"kedge/policy"
)

// newVerifier checks commits against an allowed_signers file. The file is read anew for each commit, so that a signer can be
// added, or taken out, while the mirror runs. An empty name asks for no signatures.
func newVerifier(file string) (verifier, error) {
	if file == "" {
		return nil, nil
	}
	if _, err := readSigners(file); err != nil {
		return nil, err
	}
	return func(payload, signature []byte) error {
		signers, err := readSigners(file)
		if err != nil {
			return err
		}
		_, err = signers.VerifyCommit(payload, signature, time.Now())
		return err
	}, nil
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
