package deploy

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"kedge/artifact"
	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/policy"
	"kedge/sync/command"
)

var (
	// ErrRefused means that this node can't use the release: its manifest isn't valid with this
	// node's variables, or bounds, secrets, its age or another unit's dest forbid it. Trying again
	// helps only once one of these has changed.
	ErrRefused = errors.New("refused by this node")
	// ErrQuarantined means that the release failed on this node before, and wasn't tried again.
	ErrQuarantined = errors.New("the release failed on this node before: name another, or retry it")
)

// admit reads p's manifest, and returns its release if digest, signature, age, bounds, secrets and dest allow it here.
// Source and signature are checked before variables of the environment are put into the manifest.
func (u *Unit) admit(ctx context.Context, p deployments.Pointer) (*artifact.Release, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, u.manifestWithin, errManifestLate)
	defer cancel()
	raw, err := u.read(ctx, p)
	var r *artifact.Release
	if err == nil {
		r, err = u.admitBytes(ctx, p, raw)
	}
	if err != nil && errors.Is(context.Cause(ctx), errManifestLate) {
		err = fmt.Errorf("release %s: %w", p, errManifestLate)
	}
	return r, err
}

// manifestWithin bounds the time for reading a manifest and its signature.
const manifestWithin = time.Minute

var errManifestLate = fmt.Errorf("its manifest and signature were not read within %v: %w", manifestWithin,
	object.ErrUnavailable)

// admitBytes is admit for a manifest that was already read, whose source and digest the caller has checked.
func (u *Unit) admitBytes(ctx context.Context, p deployments.Pointer, raw []byte) (*artifact.Release, error) {
	if err := u.trust(ctx, p, raw); err != nil {
		return nil, err
	}
	r, err := u.parse(p, raw)
	if err != nil { // a retry can't help: the digest pins the bytes, and this process's variables don't change
		return nil, fmt.Errorf("release %s: %w: %w", p.Short(), ErrRefused, err)
	}
	return r, u.checkPermitted(r)
}

// allow returns an error if r, which was admitted before, may no longer be used here.
func (u *Unit) allow(ctx context.Context, r *artifact.Release) error {
	if err := u.trust(ctx, r.Pointer, r.Raw); err != nil {
		return err
	}
	return u.checkPermitted(r)
}

// trust returns the error of Config.Trust for a manifest's bytes; nil if Trust is nil. It must be called before the
// bytes are parsed.
func (u *Unit) trust(ctx context.Context, p deployments.Pointer, raw []byte) error {
	if u.c.Trust == nil {
		return nil
	}
	if err := u.c.Trust(ctx, p, raw); err != nil {
		return fmt.Errorf("release %s: %w", p, err)
	}
	return nil
}

// checkPermitted returns an error if this node refuses r: it is too old, or bounds, secrets or
// another unit's dest forbid it. If it returns nil, Config.Claim has reserved the dest of r.
func (u *Unit) checkPermitted(r *artifact.Release) error {
	if err := u.checkFloor(r); err != nil {
		return fmt.Errorf("release %s: %w: %w", r.Pointer.Short(), ErrRefused, err)
	}
	if err := bounded(u.c.Bounds, r); err != nil {
		return fmt.Errorf("release %s: %w: %w", r.Pointer, ErrRefused, err)
	}
	if err := u.checkSecrets(r); err != nil {
		return fmt.Errorf("release %s: %w: %w", r.Pointer, ErrRefused, err)
	}
	if u.c.Claim != nil && r.Manifest.Src != "" {
		if err := u.c.Claim(r.Manifest.Dest); err != nil {
			return fmt.Errorf("release %s: %w: %w", r.Pointer.Short(), ErrRefused, err)
		}
	}
	return nil
}

// read returns the bytes of p's manifest, if bounds allow its source. It reads them from storage,
// unless the unit has an intact copy.
func (u *Unit) read(ctx context.Context, p deployments.Pointer) ([]byte, error) {
	if err := u.c.Bounds.CheckSource(p.URL); err != nil {
		return nil, fmt.Errorf("release %s: %w: %w", p.Short(), ErrRefused, err)
	}
	if r, err := u.remembered(p); err == nil && r != nil && sha256.Sum256(r.Raw) == p.Digest {
		return r.Raw, nil
	}
	return artifact.ReadManifest(ctx, u.c.Objects, p)
}

// parse parses a manifest's bytes, with this node's variables, whose values are masked from then on.
func (u *Unit) parse(p deployments.Pointer, raw []byte) (*artifact.Release, error) {
	m, err := deployments.ParseManifest(raw, p.URL, command.LookupEnv)
	if err != nil {
		return nil, fmt.Errorf("manifest %s: %w", deployments.ShownURL(p.URL), err)
	}
	u.secrets.add(m.Sensitive...)
	return &artifact.Release{Pointer: p, Manifest: m, Raw: raw}, nil
}

// bounded returns an error for the first thing of r that the bounds forbid. Whatever the bounds are, it forbids a dest
// that isn't a clean absolute path below /, and an exclude_from outside the archive.
func bounded(b policy.Bounds, r *artifact.Release) error {
	m := r.Manifest
	if m.Src != "" && (!filepath.IsAbs(m.Dest) || filepath.Clean(m.Dest) != m.Dest || m.Dest == "/") {
		return fmt.Errorf("dest %q is not a clean absolute path below /", m.Dest)
	}
	if m.ExcludeFrom != "" && !filepath.IsLocal(m.ExcludeFrom) {
		return fmt.Errorf("exclude_from %q leads out of the archive", m.ExcludeFrom)
	}
	return b.Check(r.Pointer, m, func(name string) []string {
		if group, ok := strings.CutPrefix(name, ":"); ok {
			return groupNames(group, b.Users)
		}
		return userNames(name)
	})
}

// groupNames returns a group's name and number on this node, and the names of those users that are in the group. For an
// unknown group it returns the given name as both.
func groupNames(name string, users []string) []string {
	g, err := user.LookupGroup(name)
	if err != nil {
		g, err = user.LookupGroupId(name)
	}
	if err != nil {
		g = &user.Group{Name: name, Gid: name}
	}
	names := []string{g.Name, g.Gid}
	for _, u := range users {
		if slices.Contains(groupsOf(u), g.Gid) {
			names = append(names, u)
		}
	}
	return names
}

// groupsOf returns the numbers of the groups of a user, who is given by name or number. If the system knows no such
// user, it returns the text that was given, as if that were a group's number.
func groupsOf(name string) []string {
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	if err != nil {
		return []string{name}
	}
	groups, _ := u.GroupIds() // after an error, the primary group alone counts
	return append(groups, u.Gid)
}

// ownersOf returns a check of the user and group, by number, to which a file of an archive belongs. The check allows
// the bounds' users and their groups, and the agent's own user and group. If the bounds name no users, ownersOf returns
// nil: every owner is allowed.
func ownersOf(b policy.Bounds) func(uid, gid int) error {
	if len(b.Users) == 0 {
		return nil
	}
	uids, gids := map[string]bool{strconv.Itoa(os.Geteuid()): true}, map[string]bool{strconv.Itoa(os.Getegid()): true}
	for _, name := range b.Users {
		uids[name] = true
		if u, err := user.Lookup(name); err == nil {
			uids[u.Uid] = true
		}
		for _, g := range groupsOf(name) {
			gids[g] = true
		}
	}
	return func(uid, gid int) error {
		if !uids[strconv.Itoa(uid)] || !gids[strconv.Itoa(gid)] {
			return fmt.Errorf(
				"it belongs to %d:%d, and the agent allows only users %s and their groups: set owner in the manifest",
				uid,
				gid,
				strings.Join(b.Users, ", "),
			)
		}
		return nil
	}
}

// userNames returns the name in the manifest and, if the user is known, the user's name and number
// here. The name "" is the agent's own user.
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
