package deploy

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/sync/command"
)

// SecretReader reads what manifests name under secrets.
type SecretReader interface {
	// Check returns an error if this node may not read one of the references.
	Check(refs map[string]deployments.SecretRef) error
	// Read returns the references' values, by the names of their variables. A value younger than maxAge need not
	// be read again. If maxAge is above 0, an older value is returned if reading fails.
	Read(ctx context.Context, refs map[string]deployments.SecretRef, maxAge time.Duration) (map[string]string, error)
}

// ErrSecretUnavailable means that a secret can't be read now. The release is not to blame: try again.
var ErrSecretUnavailable = errors.New("a secret can't be read")

const (
	// duringDeployment is the maximum age of values in a deployment. It is longer than deployments take: all steps use the
	// values that were read at the beginning, unless the agent restarts.
	duringDeployment = 24 * time.Hour
	// duringChecks is the maximum age of values for the checks of a live release.
	duringChecks = 5 * time.Minute
)

// checkSecrets returns an error for a secret of r that this node may not read.
func (u *Unit) checkSecrets(r *artifact.Release) error {
	if len(r.Manifest.Secrets) == 0 {
		return nil
	}
	if u.c.Secrets == nil {
		return errors.New("the release needs secrets, and this node may read none: allow them by secrets in agent.yaml, " +
			"or by --secrets")
	}
	return u.c.Secrets.Check(r.Manifest.Secrets)
}

// readSecrets reads r's secrets, and masks them from then on.
func (u *Unit) readSecrets(ctx context.Context, r *artifact.Release, maxAge time.Duration) (map[string]string, error) {
	if len(r.Manifest.Secrets) == 0 {
		return nil, nil
	}
	if err := u.checkSecrets(r); err != nil {
		return nil, fmt.Errorf("release %s: %w: %w", r.Pointer, ErrSecretUnavailable, err)
	}
	values, err := u.c.Secrets.Read(ctx, r.Manifest.Secrets, maxAge)
	if err != nil {
		return nil, fmt.Errorf("release %s: %w: %w", r.Pointer.Short(), ErrSecretUnavailable, err)
	}
	u.secrets.add(slices.Collect(maps.Values(values))...)
	return values, nil
}

// withSecrets returns env with r's secrets among its variables. A variable that env has already
// keeps its value. If reading the secrets fails, it returns env as it was, and the error.
func (u *Unit) withSecrets(
	ctx context.Context, env command.Env, r *artifact.Release, maxAge time.Duration,
) (command.Env, error) {
	values, err := u.readSecrets(ctx, r, maxAge)
	if err != nil || len(values) == 0 {
		return env, err
	}
	vars := maps.Clone(values)
	maps.Copy(vars, env.Vars)
	env.Vars, env.Mask = vars, u.secrets.now()
	return env, nil
}

// exec returns the probe of a live release's exec check. The check runs with secrets at most duringChecks old, or older
// ones while they can't be read. Without any value, the probe skips the check and passes. So an outage of the secrets'
// source makes no node unhealthy.
func (u *Unit) exec(c deployments.Check, env command.Env, r *artifact.Release) probe {
	return func(ctx context.Context) (string, error) {
		with, err := u.withSecrets(ctx, env, r, duringChecks)
		if err != nil {
			u.log.Warn("a health check counts as passed without being run, as its secrets can't be read",
				"check", nameOf(c), "error", err)
			return "", nil
		}
		return newProbe(c, with)(ctx)
	}
}
