package deploy

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os/user"
	"path/filepath"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/command"
)

var (
	// ErrRefused means that this node may not use the release: for its bounds, for its age, or for another unit's dest. Trying again
	// doesn't help.
	ErrRefused = errors.New("refused by this node")
	// ErrQuarantined means that the release failed on this node, and wasn't tried again.
	ErrQuarantined = errors.New("the release failed on this node before: name another, or retry it")
)

// admit fetches p's manifest, and lets it in where its digest, its signature and this node's bounds allow.
func (u *Unit) admit(ctx context.Context, p deployments.Pointer) (*artifact.Release, error) {
	r, err := u.fetch(ctx, p)
	if err != nil {
		return nil, err
	}
	return r, u.allow(ctx, r)
}

// allow reports why r may not be used here.
func (u *Unit) allow(ctx context.Context, r *artifact.Release) error {
	if u.c.Trust != nil {
		if err := u.c.Trust(ctx, r.Pointer, r.Raw); err != nil {
			return fmt.Errorf("release %s: %w", r.Pointer, err)
		}
	}
	if err := u.order(r); err != nil {
		return fmt.Errorf("release %s: %w: %w", r.Pointer.Digest.Short(), ErrRefused, err)
	}
	if err := within(u.c.Bounds, r); err != nil {
		return fmt.Errorf("release %s: %w: %w", r.Pointer, ErrRefused, err)
	}
	if u.c.Claim != nil && r.Manifest.Src != "" {
		if err := u.c.Claim(r.Manifest.Dest); err != nil {
			return fmt.Errorf("release %s: %w: %w", r.Pointer.Digest.Short(), ErrRefused, err)
		}
	}
	return nil
}

// fetch returns p's manifest, from this unit's own copy where there is one.
func (u *Unit) fetch(ctx context.Context, p deployments.Pointer) (*artifact.Release, error) {
	if r, err := u.recall(p); err == nil && r != nil && sha256.Sum256(r.Raw) == p.Digest {
		m, err := deployments.ParseManifest(r.Raw, p.URL, command.LookupEnv)
		if err != nil {
			return nil, fmt.Errorf("manifest of %s: %w", p, err)
		}
		return &artifact.Release{Pointer: p, Manifest: m, Raw: r.Raw}, nil
	}
	m, raw, err := artifact.FetchManifest(ctx, u.c.Objects, p, command.LookupEnv)
	if err != nil {
		return nil, err
	}
	return &artifact.Release{Pointer: p, Manifest: m, Raw: raw}, nil
}

// within reports the first thing of r that bounds don't allow.
func within(b policy.Bounds, r *artifact.Release) error {
	m := r.Manifest
	if m.Src != "" && (!filepath.IsAbs(m.Dest) || filepath.Clean(m.Dest) != m.Dest || m.Dest == "/") {
		return fmt.Errorf("dest %q is not a clean absolute path below /", m.Dest)
	}
	if m.ExcludeFrom != "" && !filepath.IsLocal(m.ExcludeFrom) {
		return fmt.Errorf("exclude_from %q leads out of the archive", m.ExcludeFrom)
	}
	return b.Check(r.Pointer, m, userNames)
}

// userNames gives a user's name and number on this node, and what the manifest calls it; "" is the agent's own.
func userNames(name string) []string {
	var u *user.User
	var err error
	if name == "" {
		u, err = user.Current()
	} else if u, err = user.Lookup(name); err != nil {
		u, err = user.LookupId(name)
	}
	var names []string
	if name != "" {
		names = append(names, name)
	}
	if err == nil {
		names = append(names, u.Username, u.Uid)
	}
	return names
}
