package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kedge/artifact/object"
	"kedge/deployments"
	"kedge/kv"
	"kedge/policy"
	"kedge/sync/fleet"
)

// BridgeOptions are the options of Bridge.
type BridgeOptions struct {
	Objects *object.Client
	Store   kv.Store
	// URL is the manifest that the event names.
	URL string
	// Bounds say, by their sources, which manifests an event may name.
	Bounds policy.Bounds
	// To is the URL below which the manifest is copied.
	To string
	// Naming derives the unit from the manifest's URL. If it sets stage, role and unit, that URL doesn't matter.
	Naming Naming
}

// bridgeName is the author of pins that Bridge writes. Bridge replaces another author's pin only after its end.
const bridgeName = "kedge bridge"

// Bridged is the result of an event.
type Bridged struct {
	Unit    deployments.UnitID
	Pointer deployments.Pointer
	// Pinned is set if the event became a pin, as a running mirror owns the record.
	Pinned bool
	// Changed is set unless the record or pin had that value already.
	Changed bool
}

// Bridge makes a unit's agents follow an event, like the nodes that still run stretcher. It copies
// the manifest, which old scripts overwrite, to a key that doesn't change. The copy's pointer
// becomes the unit's record or, if a mirror runs, its pin. A repeated event changes nothing; of two
// concurrent ones the later wins. While a mirror runs, it is an error if the unit has no record, or
// if somebody else's pin hasn't expired, unless that pin names the same release.
func Bridge(ctx context.Context, o BridgeOptions) (Bridged, error) {
	var b Bridged
	if err := o.Naming.check(); err != nil {
		return b, err
	}
	id, err := o.Naming.UnitOf(o.URL)
	if err != nil {
		whole := deployments.UnitID{Stage: o.Naming.Stage, Role: o.Naming.Role, Unit: o.Naming.Unit}
		if whole.Check() != nil {
			return b, err
		}
		id = whole
	}
	b.Unit = id
	if err := deployments.CheckURL(o.URL); err != nil {
		return b, fmt.Errorf("manifest %q: %w", deployments.ShownURL(o.URL), err)
	}
	if err := o.Bounds.CheckSource(o.URL); err != nil {
		return b, fmt.Errorf("the event's manifest: %w", err)
	}
	raw, err := o.Objects.ReadAll(ctx, o.URL, deployments.MaxManifest)
	if err != nil {
		return b, fmt.Errorf("reading the event's manifest: %w", err)
	}
	if _, err := deployments.ParseTemplate(raw, o.URL); err != nil {
		return b, fmt.Errorf("no node would take %s: %w", deployments.ShownURL(o.URL), err)
	}
	if b.Pointer, err = CopyByDigest(ctx, o.Objects, o.To, id, o.URL, raw); err != nil {
		return b, err
	}
	running, err := mirrorRuns(ctx, o.Store)
	if err != nil {
		return b, err
	}
	if running {
		b.Pinned = true
		b.Changed, err = writePin(
			ctx,
			o.Store,
			id,
			deployments.Pin{Release: b.Pointer, By: bridgeName, Reason: "an event named " + deployments.ShownURL(o.URL)},
		)
	} else {
		b.Changed, err = writeRecord(ctx, o.Store, id, b.Pointer)
	}
	if err != nil {
		return b, fmt.Errorf("handing the event on to %s: %w", id, err)
	}
	return b, nil
}

// mirrorRuns reports whether a mirror holds the lease; false if no mirror has ever run. If the token may not read that,
// the error wraps kv.ErrDenied. Servers before Consul 1.4 answer such a token as if no mirror ran.
func mirrorRuns(ctx context.Context, store kv.Store) (bool, error) {
	e, err := store.Get(ctx, kv.MirrorLease)
	if errors.Is(err, kv.ErrNotFound) {
		return false, nil
	}
	return e.Session != "", err
}

// clockSkew is how long after its end a pin of somebody else may still be in force on a node whose
// clock is behind.
const clockSkew = time.Minute

// writePin writes a pin, unless the unit is pinned to that release already. It returns an error if
// the unit has no record, if the unit's pin doesn't parse, or if somebody else's pin may still be
// in force.
func writePin(
	ctx context.Context, store kv.Store, id deployments.UnitID, pin deployments.Pin,
) (changed bool, err error) {
	if err := fleet.CheckRecord(ctx, store, id); err != nil {
		return false, err
	}
	for range 5 {
		e, err := store.Get(ctx, kv.PinKey(id))
		if err != nil && !errors.Is(err, kv.ErrNotFound) {
			return false, err
		}
		if err == nil {
			was, err := deployments.ParsePin(e.Value)
			own, ended := was.By == pin.By, err == nil && was.Expired(time.Now())
			switch {
			case ended && (own || was.Expired(time.Now().Add(-clockSkew))): // no node follows it any more
			case err == nil && !ended && was.Release == pin.Release:
				return false, nil
			case err != nil || !own:
				return false, fmt.Errorf(
					"somebody has pinned the unit, and a pin takes precedence over an event: see kedge explain, or kedge unpin %s",
					id,
				)
			}
		}
		if err := fleet.ReplacePin(ctx, store, id, e.Version, pin); !errors.Is(err, kv.ErrConflict) {
			return err == nil, err
		}
	}
	return false, fmt.Errorf("the pin of %s keeps changing: %w", id, kv.ErrConflict)
}

// writeRecord writes a bare pointer as the record, as a person would, unless the record has that target already.
func writeRecord(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	p deployments.Pointer,
) (changed bool, err error) {
	for range 5 {
		e, err := store.Get(ctx, kv.DesiredKey(id))
		var op kv.Op
		switch {
		case errors.Is(err, kv.ErrNotFound):
			op = kv.Create(kv.DesiredKey(id), []byte(p.String()))
		case err != nil:
			return false, err
		default:
			if was, err := deployments.ParseRecord(e.Value); err == nil && was.Target == p {
				return false, nil
			}
			op = kv.Replace(e.Key, []byte(p.String()), e.Version)
		}
		// Agents need these folder keys to tell absence from a lost permission.
		for _, kind := range []string{kv.DesiredPrefix, kv.PinsPrefix} {
			err := store.EnsureFolders(ctx, kind, kv.RolePrefix(kind, id.Stage, id.Role))
			if err != nil && !errors.Is(err, kv.ErrDenied) {
				return false, err
			}
		}
		if err = store.Commit(ctx, nil, op); !errors.Is(err, kv.ErrConflict) {
			return true, err
		}
	}
	return false, fmt.Errorf("the record of %s keeps changing: %w", id, kv.ErrConflict)
}
