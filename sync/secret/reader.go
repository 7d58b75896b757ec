// Package secret reads the values that a manifest names by reference, on the node that runs its commands.
//
//	file:/PATH                  the file's content, without a newline (LF or CRLF) at its end
//	credential:NAME             NAME in $CREDENTIALS_DIRECTORY, where systemd puts LoadCredential= and the like
//	ssm:NAME                    a parameter of AWS Systems Manager, decrypted
//	secretsmanager:NAME#FIELD   a secret of AWS Secrets Manager: a field of its JSON, or without #FIELD all of it
//	vault:PATH#FIELD            a field at a path of Vault's API: secret/data/app in a KV mount of version 2, kv/app in
//	                            one of version 1
//
// AWS is reached as the agent reaches S3: environment, profile, instance role, AWS_ENDPOINT_URL_SSM. Vault is reached
// by its own variables VAULT_ADDR, VAULT_NAMESPACE, VAULT_CACERT, VAULT_TLS_SERVER_NAME and VAULT_TOKEN. Without
// VAULT_TOKEN, the token is read from the file VAULT_TOKEN_FILE or ~/.vault-token at each request, so that a Vault
// agent may renew it.
//
// Nothing is read that the node's own configuration doesn't allow. Values are kept in memory alone; errors name the
// reference and never a value.
package secret

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
)

const (
	// maxValue bounds a value, in bytes. Linux allows 128 KiB for one variable.
	maxValue = 64 << 10
	// readWithin bounds the reading of one secret of AWS or Vault, retries included.
	readWithin = 20 * time.Second
)

// ErrNotAllowed means that the node's configuration doesn't allow a reference. Trying again doesn't help.
var ErrNotAllowed = errors.New("the node's configuration doesn't allow it")

// Reader reads secrets for one node. It is safe for concurrent use.
type Reader struct {
	allowed []string
	log     *slog.Logger
	aws     awsConfig

	mu    sync.Mutex // held while reading, so that references with one name share a request
	known map[string]known
}

// known is a source's answer for a name, with all fields.
type known struct {
	raw string
	at  time.Time
}

// New returns a Reader that allows the references that an entry of allowed covers. An entry is a
// reference, a reference without its #FIELD, or the first whole path segments of references. An
// invalid entry is an error.
func New(allowed []string, log *slog.Logger) (*Reader, error) {
	for _, a := range allowed {
		if err := deployments.CheckSecretPrefix(a); err != nil {
			return nil, err
		}
	}
	return &Reader{allowed: allowed, log: log, known: map[string]known{}}, nil
}

// Check returns an error that wraps ErrNotAllowed for the first reference, sorted by variable, that the node's
// configuration doesn't allow; nil: it allows all.
func (r *Reader) Check(refs map[string]deployments.SecretRef) error {
	for _, name := range slices.Sorted(maps.Keys(refs)) {
		if _, ok := refs[name].Within(r.allowed); !ok {
			return fmt.Errorf("secret %s (%s): %w: name it under secrets in agent.yaml", name, refs[name], ErrNotAllowed)
		}
	}
	return nil
}

// Read returns the values of references, by the names of their variables: all, or an error. A secret that was read less
// than maxAge ago is not read again. If maxAge is above 0, and a secret can't be read again, its last known value
// counts.
func (r *Reader) Read(
	ctx context.Context, refs map[string]deployments.SecretRef, maxAge time.Duration,
) (map[string]string, error) {
	if err := r.Check(refs); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	begun := time.Now()
	values := make(map[string]string, len(refs))
	for _, name := range slices.Sorted(maps.Keys(refs)) {
		value, err := r.read(ctx, refs[name], begun.Add(-maxAge), maxAge > 0)
		if err != nil {
			return nil, fmt.Errorf("secret %s (%s): %w", name, refs[name], err)
		}
		values[name] = value
	}
	return values, nil
}

// read returns the value of one reference, read at since or later. If its source fails, stale allows an older value.
func (r *Reader) read(ctx context.Context, ref deployments.SecretRef, since time.Time, stale bool) (string, error) {
	source, name, field := ref.Parts()
	key := source + ":" + name
	k, had := r.known[key]
	if !had || k.at.Before(since) {
		raw, err := r.fetch(ctx, ref, source, name)
		switch {
		case err == nil:
			k = known{raw, time.Now()}
			r.known[key] = k
		case had && stale:
			r.log.Warn("a secret can't be read again: its last value is used", "secret", string(ref), "error", err)
		default:
			return "", err
		}
	}
	value, err := pick(source, k.raw, field)
	if err != nil {
		return "", err
	}
	switch {
	case value == "":
		return "", errors.New("it is empty")
	case len(value) > maxValue:
		return "", fmt.Errorf("it has %d bytes, at most %d are allowed", len(value), maxValue)
	case strings.ContainsRune(value, 0):
		return "", errors.New("it contains a NUL, which no variable can hold")
	}
	return value, nil
}

// fetch reads everything that the source has under a name.
func (r *Reader) fetch(ctx context.Context, ref deployments.SecretRef, source, name string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, readWithin, fmt.Errorf("no answer within %s", readWithin))
	defer cancel()
	var raw string
	var err error
	switch source {
	case deployments.SecretFile:
		entry, _ := ref.Within(r.allowed)
		raw, err = readFile(name, strings.TrimPrefix(entry, source+":"))
	case deployments.SecretCredential:
		raw, err = readCredential(name)
	case deployments.SecretSSM:
		raw, err = r.aws.parameter(ctx, name)
	case deployments.SecretManager:
		raw, err = r.aws.secret(ctx, name)
	case deployments.SecretVault:
		raw, err = readVault(ctx, name)
	default:
		err = fmt.Errorf("unknown source %q", source)
	}
	if err != nil && ctx.Err() != nil {
		return "", fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return raw, err
}
