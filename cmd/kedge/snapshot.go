package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/hiddeco/sshsig"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/deployments/inputfile"
	"kedge/kv"
	"kedge/policy"
)

// snapshotWriter returns the function by which a mirror saves the records of desired/ as one object at url, signed with
// the key in keyFile. The function is nil if url is empty.
func snapshotWriter(url, keyFile string, objects *object.Client) (func(context.Context, []kv.Entry) error, error) {
	if url == "" {
		return nil, nil
	}
	if keyFile == "" {
		return nil, hintError{
			errors.New("--snapshot needs --snapshot-key: nodes take only signed snapshots"),
			"ssh-keygen -t ed25519 -N '' -f snapshot.key",
		}
	}
	key, err := readSigningKey("--snapshot-key", keyFile)
	if err != nil {
		return nil, err
	}
	sign := func(text []byte) ([]byte, error) {
		signature, err := sshsig.Sign(bytes.NewReader(text), key, sshsig.HashSHA512, policy.SnapshotNamespace)
		if err != nil {
			return nil, fmt.Errorf("signing the snapshot: %w", err)
		}
		return sshsig.Armor(signature), nil
	}
	return func(ctx context.Context, desired []kv.Entry) error {
		s := deployments.Snapshot{URL: url, At: time.Now().UTC().Truncate(time.Second), Records: map[string]string{}}
		for _, e := range desired {
			s.Records[e.Key] = string(e.Value)
		}
		data, err := s.Encode(sign)
		if err != nil {
			return err
		}
		return objects.Replace(ctx, url, data, "application/json")
	}, nil
}

// snapshotAhead is how far a mirror's clock may be ahead of a node's for the node to take its snapshot.
const snapshotAhead = 10 * time.Minute

var errSnapshotSigners = errors.New(
	"a snapshot needs snapshot_signers: without them, whoever can write the object decides what this node runs",
)

// snapshotReader returns the function by which an agent reads the snapshot; nil if url is empty. The snapshot must be
// signed by a key in signersFile, and must name url as its own. It may be at most maxAge old, and at most snapshotAhead
// in the future. Without these checks, whoever can write the object could put back an old snapshot.
func snapshotReader(
	url, signersFile string,
	maxAge time.Duration,
	objects *object.Client,
	log *slog.Logger,
) (func(context.Context) ([]kv.Entry, error), error) {
	if url == "" {
		return nil, nil
	}
	if signersFile == "" {
		return nil, errSnapshotSigners
	}
	text, err := inputfile.ReadOnce("--snapshot-signers", signersFile)
	if err != nil {
		return nil, err
	}
	signers, err := policy.ParseSigners(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", signersFile, err)
	}
	shown := deployments.ShownURL(url)
	return func(ctx context.Context) ([]kv.Entry, error) {
		data, err := objects.ReadAll(ctx, url, deployments.MaxSnapshot)
		if err != nil {
			return nil, err
		}
		now, who := time.Now(), ""
		s, err := deployments.ParseSnapshot(data, func(text, signature []byte) (err error) {
			who, err = signers.VerifySnapshot(text, signature, now)
			return err
		})
		switch {
		case err != nil:
			return nil, fmt.Errorf("%s: %w", shown, err)
		case s.URL != url:
			return nil, fmt.Errorf("%s: the snapshot was made for %s", shown, deployments.ShownURL(s.URL))
		case now.Sub(s.At) > maxAge:
			return nil, fmt.Errorf("%s: the snapshot of %s is %v old, snapshot_max_age is %v: see whether the mirror writes it",
				shown, s.At.Format(time.RFC3339), now.Sub(s.At).Round(time.Minute), maxAge)
		case s.At.Sub(now) > snapshotAhead:
			return nil, fmt.Errorf("%s: the snapshot is dated %s, ahead of this node's clock: correct that clock, or "+
				"the mirror's", shown, s.At.Format(time.RFC3339))
		}
		var entries []kv.Entry
		for key, record := range s.Records {
			if strings.HasPrefix(key, kv.DesiredPrefix) { // no pins and orders, which are for the present
				entries = append(entries, kv.Entry{Key: key, Value: []byte(record)})
			}
		}
		slices.SortFunc(entries, func(a, b kv.Entry) int { return strings.Compare(a.Key, b.Key) })
		log.Info("read the snapshot: its signature and age are valid",
			"url", shown, "signer", who, "created", s.At, "records", len(entries))
		return entries, nil
	}, nil
}
