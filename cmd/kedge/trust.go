package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hiddeco/sshsig"
	"golang.org/x/crypto/ssh"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/inputfile"
	"kedge/policy"
)

// manifestSigner returns sign, which signs as `ssh-keygen -Y sign -n kedge-manifest` does, and verify, which
// checks that the same key made a signature.
func manifestSigner(
	keyFile string,
) (sign func(manifest []byte) ([]byte, error), verify func(manifest, signature []byte) error, err error) {
	key, err := readSigningKey("--sign", keyFile)
	if err != nil {
		return nil, nil, err
	}
	ours, err := policy.ParseSigners(append([]byte("this-key "), ssh.MarshalAuthorizedKey(key.PublicKey())...))
	if err != nil {
		return nil, nil, fmt.Errorf("the signing key %s: %w", keyFile, err)
	}
	sign = func(manifest []byte) ([]byte, error) {
		signature, err := sshsig.Sign(bytes.NewReader(manifest), key, sshsig.HashSHA512, policy.ManifestNamespace)
		if err != nil {
			return nil, fmt.Errorf("signing the manifest: %w", err)
		}
		return sshsig.Armor(signature), nil
	}
	verify = func(manifest, signature []byte) error {
		_, err := ours.VerifyManifest(manifest, signature, time.Now())
		return err
	}
	return sign, verify, nil
}

// readSigningKey reads an SSH private key from the file that a setting, such as --sign, names. A key with a passphrase
// is an error.
func readSigningKey(setting, file string) (ssh.Signer, error) {
	pem, err := inputfile.ReadOnce(setting, file)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if errors.As(err, new(*ssh.PassphraseMissingError)) {
		hint := "use a key without a passphrase. Or publish without --sign, with created in the manifest, sign the " +
			"published manifest.yaml (ssh-keygen -Y sign -n " + policy.ManifestNamespace + " -f KEY manifest.yaml), and " +
			"upload manifest.yaml.sig beside it"
		if setting == "--snapshot-key" {
			hint = "the mirror signs by itself, with a key without a passphrase: ssh-keygen -t ed25519 -N '' -f snapshot.key"
		}
		return nil, hintError{fmt.Errorf("the signing key %s has a passphrase", file), hint}
	}
	if err != nil {
		return nil, fmt.Errorf("the signing key %s: %w", file, err)
	}
	return key, nil
}

// trustSigners returns a function that checks a manifest's signature: the object beside the manifest, with .sig
// appended to the name. A key in the allowed_signers file at the path file must have made the signature. kedge agent
// and kedge run call the function before they use a manifest. A mirror and kedge check call it before they accept a
// manifest. If no file is given (""), the function is nil: the pointer's digest is enough then.
func trustSigners(
	file string,
	objects *object.Client,
	log *slog.Logger,
) (func(context.Context, deployments.Pointer, []byte) error, error) {
	if file == "" {
		return nil, nil
	}
	data, err := inputfile.ReadOnce("--signers", file)
	if err != nil {
		return nil, err
	}
	signers, err := policy.ParseSigners(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return func(ctx context.Context, p deployments.Pointer, manifest []byte) error {
		var who string
		var rejected error // why the signature that was read last is rejected
		url, shown := deployments.BesideURL(p.URL, ".sig"), deployments.ShownURL(p.URL)
		_, err := objects.ReadPinned(ctx, url, artifact.MaxSignature, func(signature []byte) error {
			who, rejected = signers.VerifyManifest(manifest, signature, time.Now())
			return rejected
		})
		switch {
		case err == nil:
		case errors.Is(err, object.ErrNotFound):
			return fmt.Errorf("%w: %s has no signature, and signers are configured here: publish it with --sign",
				policy.ErrUntrusted, shown)
		case rejected != nil && errors.Is(err, rejected):
			return fmt.Errorf("the signature of %s: %w", shown, err)
		default:
			return fmt.Errorf("reading the signature of %s: %w", shown, err)
		}
		log.Debug("the manifest is signed", "url", shown, "by", who)
		return nil
	}, nil
}
