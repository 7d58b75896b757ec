package git

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments/durable"
	"kedge/deployments/inputfile"
	"kedge/policy"
)

// Signers checks the signatures of commits against an allowed_signers file, a file of OpenPGP keys, or both. It reads
// them again for each commit, so that a signer can be added or removed while the mirror runs.
type Signers struct {
	signersFile, keyringFile string // empty: not given
	memory                   string // the file of the commits whose signatures were valid; empty: there is none

	mu sync.Mutex // guards the file memory
}

const (
	// memoryFile is the name of Signers.memory in the cache's directory.
	memoryFile = "verified"
	// maxRemembered bounds the commits in memoryFile.
	maxRemembered = 100
)

// OpenSigners returns Signers for these files; nil if neither is named: then signatures are not required. It reads the
// files once, to report early if one is wrong. The hashes of the last maxRemembered commits with valid signatures are
// remembered in dir; empty: nowhere.
func OpenSigners(signersFile, keyringFile, dir string) (*Signers, error) {
	if signersFile == "" && keyringFile == "" {
		return nil, nil
	}
	s := &Signers{signersFile: signersFile, keyringFile: keyringFile}
	if dir != "" {
		s.memory = filepath.Join(dir, memoryFile)
	}
	_, _, err := s.read()
	return s, err
}

func (s *Signers) read() (signers policy.Signers, keys policy.Keyring, err error) {
	if s.signersFile != "" {
		signers, err = readSigners(s.signersFile)
	}
	if err == nil && s.keyringFile != "" {
		keys, err = readKeyring(s.keyringFile)
	}
	return signers, keys, err
}

// verify returns an error unless the signature is valid now, and remembers the commit if it is.
func (s *Signers) verify(hash string, payload, signature []byte, _ time.Time) error {
	if err := s.check(payload, signature, time.Now()); err != nil {
		return err
	}
	_ = s.rememberSigned(hash) // for verifyTaken; an error is ignored, as a full disk must not refuse a good commit
	return nil
}

// verifyTaken checks a commit that was taken before, whose signer's key may have expired or been removed since. The
// signature must be valid now or at the commit's time, or this machine must remember that it was valid. New commits are
// never checked by verifyTaken.
func (s *Signers) verifyTaken(hash string, payload, signature []byte, when time.Time) error {
	err := s.check(payload, signature, time.Now())
	if err == nil || s.check(payload, signature, when) == nil {
		return nil
	}
	if remembered, readErr := s.remembered(); readErr == nil && slices.Contains(remembered, hash) {
		return nil
	}
	return err
}

func (s *Signers) check(payload, signature []byte, now time.Time) error {
	if err := checkForm(signature); err != nil {
		return err
	}
	signers, keys, err := s.read()
	if err != nil {
		return err
	}
	if s.keyringFile != "" && policy.IsPGP(signature) {
		_, err = keys.VerifyCommit(payload, signature, now)
		return err
	}
	_, err = signers.VerifyCommit(payload, signature, now)
	return err
}

// checkForm returns an error if there is text around a signature, or if the signature has carriage returns. Git writes
// neither. With either, anybody could make further commits with the same signature.
func checkForm(signature []byte) error {
	text := string(bytes.TrimSuffix(signature, []byte("\n")))
	if text == "" {
		return nil // the commit isn't signed: VerifyCommit returns the error for that
	}
	if strings.Contains(text, "\r") {
		return fmt.Errorf("%w: the signature has carriage returns, which Git doesn't write", policy.ErrUntrusted)
	}
	lines := strings.Split(text, "\n")
	kind, begins := strings.CutPrefix(lines[0], "-----BEGIN ")
	ends := "-----END " + kind
	if !begins || slices.Index(lines, ends) != len(lines)-1 {
		return fmt.Errorf("%w: the signature isn't one block from BEGIN to END, with no text around it", policy.ErrUntrusted)
	}
	return nil
}

func (s *Signers) remembered() ([]string, error) {
	if s.memory == "" {
		return nil, nil
	}
	data, err := os.ReadFile(s.memory)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(data)), err
}

func (s *Signers) rememberSigned(hash string) error {
	if s.memory == "" {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.remembered()
	if err == nil && !slices.Contains(all, hash) {
		all = append(all, hash)
		all = all[max(0, len(all)-maxRemembered):]
		err = os.MkdirAll(filepath.Dir(s.memory), 0o700)
		err = errors.Join(err, durable.WriteFile(s.memory, []byte(strings.Join(all, "\n")+"\n"), 0o600))
	}
	if err != nil {
		return fmt.Errorf("remember that the commit is signed: %w", err)
	}
	return nil
}

func readKeyring(file string) (policy.Keyring, error) {
	data, err := inputfile.Read("--signed-by-pgp", file)
	if err != nil {
		return policy.Keyring{}, err
	}
	keys, err := policy.ParseKeyring(data)
	if err != nil {
		return policy.Keyring{}, fmt.Errorf("OpenPGP keys: %s: %w", file, err)
	}
	return keys, nil
}

func readSigners(file string) (policy.Signers, error) {
	data, err := inputfile.Read("--signed-by", file)
	if err != nil {
		return policy.Signers{}, err
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
