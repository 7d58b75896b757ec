package mirror

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"
)

// newVerifier checks commits against an allowed_signers file, in the format that ssh-keygen(1) describes. The file is read anew
// for each commit, so that a signer can be added, or taken out, while the mirror runs. An empty name asks for no signatures.
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
		return verifySSH(signers, payload, signature, time.Now())
	}, nil
}

// signer is a line of an allowed_signers file.
type signer struct {
	name          string // its principals, for people
	key           ssh.PublicKey
	after, before time.Time // zero: no bound
}

func readSigners(file string) ([]signer, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("allowed signers: %w", err)
	}
	signers, err := parseSigners(data)
	if err != nil {
		return nil, fmt.Errorf("allowed signers: %s:%w", file, err)
	}
	if len(signers) == 0 {
		return nil, fmt.Errorf("allowed signers: %s names nobody who may sign commits", file)
	}
	return signers, nil
}

// parseSigners reads PRINCIPALS [OPTIONS] KEYTYPE KEY lines, and leaves out those whose namespaces lack git.
func parseSigners(data []byte) ([]signer, error) {
	var signers []signer
	for i, line := range strings.Split(string(data), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, rest, _ := strings.Cut(line, " ")
		key, _, options, _, err := ssh.ParseAuthorizedKey([]byte(rest))
		if err != nil {
			return nil, fmt.Errorf("%d: want PRINCIPALS [OPTIONS] KEYTYPE KEY: %w", i+1, err)
		}
		s, git := signer{name: name, key: key}, true
		for _, o := range options {
			option, value, _ := strings.Cut(o, "=")
			value = strings.Trim(value, `"`)
			switch strings.ToLower(option) {
			case "namespaces":
				git = slices.Contains(strings.Split(value, ","), "git")
			case "valid-after":
				s.after, err = parseTime(value)
			case "valid-before":
				s.before, err = parseTime(value)
			default:
				err = errors.New("it is not supported")
			}
			if err != nil {
				return nil, fmt.Errorf("%d: option %s: %w", i+1, o, err)
			}
		}
		if git {
			signers = append(signers, s)
		}
	}
	return signers, nil
}

// parseTime reads YYYYMMDD[HHMM[SS]][Z]; without Z in the local zone, as ssh-keygen does.
func parseTime(s string) (time.Time, error) {
	zone := time.Local
	if cut, ok := strings.CutSuffix(s, "Z"); ok {
		s, zone = cut, time.UTC
	}
	for _, layout := range []string{"20060102", "200601021504", "20060102150405"} {
		if len(layout) == len(s) {
			return time.ParseInLocation(layout, s, zone)
		}
	}
	return time.Time{}, fmt.Errorf("%q: want YYYYMMDD[HHMM[SS]][Z]", s)
}

// verifySSH accepts a signature that one of signers made over payload as git does, with a key that is valid now: a commit's own
// time is its author's word.
func verifySSH(signers []signer, payload, signature []byte, now time.Time) error {
	switch {
	case len(signature) == 0:
		return errors.New("it has none, and this mirror takes signed commits only")
	case !bytes.Contains(signature, []byte("BEGIN SSH SIGNATURE")):
		return errors.New("it is not an SSH signature: git config gpg.format ssh")
	}
	parsed, err := sshsig.Unarmor(signature)
	if err != nil {
		return err
	}
	for _, s := range signers {
		if !bytes.Equal(s.key.Marshal(), parsed.PublicKey.Marshal()) {
			continue
		}
		if !s.after.IsZero() && now.Before(s.after) || !s.before.IsZero() && !now.Before(s.before) {
			err = fmt.Errorf("the key %s of %s is not valid at this time", ssh.FingerprintSHA256(s.key), s.name)
			continue
		}
		if err := sshsig.Verify(bytes.NewReader(payload), parsed, s.key, parsed.HashAlgorithm, "git"); err != nil {
			return fmt.Errorf("by the key of %s: %w", s.name, err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("it was made with the key %s, which is not among the allowed signers", ssh.FingerprintSHA256(parsed.PublicKey))
}
