package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kedge/deployments"
	"kedge/kv"
)

// Pin writes a pin for a unit or, if node isn't empty, for one of its nodes. It replaces an existing pin. It
// writes what one would type with `consul kv put`: a bare pointer or hold if that says everything, else JSON.
func Pin(ctx context.Context, store kv.Store, id deployments.UnitID, node string, pin deployments.Pin) error {
	key, err := pinKey(id, node)
	if err != nil {
		return err
	}
	return writePin(ctx, store, id, pin, func(value []byte) kv.Op { return kv.Put(key, value) })
}

// ReplacePin writes a unit's pin as Pin does, but only in place of the pin whose entry has the
// given version; 0: only if there is no pin. If somebody has changed the pin meanwhile, the error
// wraps kv.ErrConflict.
func ReplacePin(ctx context.Context, store kv.Store, id deployments.UnitID, version uint64, pin deployments.Pin) error {
	return writePin(ctx, store, id, pin, func(value []byte) kv.Op {
		if version == 0 {
			return kv.Create(kv.PinKey(id), value)
		}
		return kv.Replace(kv.PinKey(id), value, version)
	})
}

// writePin writes a pin of a unit or a node by the operation that op returns for its value.
func writePin(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	pin deployments.Pin,
	op func(value []byte) kv.Op,
) error {
	value, err := encodePin(pin)
	if err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	// Without these folder keys, which a mirror would make, the agents of this role can't tell a missing key from a lost
	// permission. An operator may lack the right to create some of these folders, and doesn't need it.
	for _, kind := range []string{kv.PinsPrefix, kv.DesiredPrefix} {
		err := store.EnsureFolders(ctx, kind, kv.RolePrefix(kind, id.Stage, id.Role))
		if err != nil && !errors.Is(err, kv.ErrDenied) {
			return fmt.Errorf("pin %s: %w", id, err)
		}
	}
	if err := store.Commit(ctx, nil, op(value)); err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	return nil
}

// CheckRecord returns an error if a unit has no record, probably because of a typo: a pin then has no effect. The error
// names a similar unit, if any. If the record can't be read, it returns nil. A name that no unit can have is an error.
func CheckRecord(ctx context.Context, store kv.Store, id deployments.UnitID) error {
	if err := id.Check(); err != nil {
		return err
	}
	_, err := store.Get(ctx, kv.DesiredKey(id))
	if !errors.Is(err, kv.ErrNotFound) {
		return nil // writing the pin will return the error
	}
	return noRecord(ctx, store, id)
}

func noRecord(ctx context.Context, store kv.Store, id deployments.UnitID) error {
	f, err := Read(ctx, store, Filter{})
	if err != nil {
		return fmt.Errorf("%s has no record", id)
	}
	i := slices.IndexFunc(f.Units, func(u Unit) bool { return u.ID == id })
	switch {
	case i < 0:
		return noUnit(f, id.String())
	case f.Units[i].Pin != nil || len(f.Units[i].Pins) > 0:
		return fmt.Errorf("%s has no record, only a pin: kedge unpin %[1]s, or add %[1]s.yaml to Git", id)
	}
	return fmt.Errorf("%s has no record, only nodes' reports: add %[1]s.yaml to Git", id)
}

// Unpin removes the pin of a unit or, if node isn't empty, of that node. It reports whether there
// was one. The result is also false if the token may not read pins. If the pin changes meanwhile,
// the error wraps kv.ErrConflict.
func Unpin(ctx context.Context, store kv.Store, id deployments.UnitID, node string) (bool, error) {
	key, err := pinKey(id, node)
	if err != nil {
		return false, err
	}
	entries, err := store.List(ctx, kv.RolePrefix(kv.PinsPrefix, id.Stage, id.Role))
	op := kv.Delete(key)
	i := slices.IndexFunc(entries, func(e kv.Entry) bool { return e.Key == key })
	switch {
	case errors.Is(err, kv.ErrDenied): // or there is no folder; the deletion fails if the token may not delete
	case errors.Is(err, kv.ErrTooLarge): // somebody's junk must not keep a pin in force
		pin, err := store.Get(ctx, key)
		switch {
		case errors.Is(err, kv.ErrNotFound):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("unpin %s: %w", id, err)
		}
		op, i = kv.DeleteIf(key, pin.Version), 0
	case err != nil:
		return false, fmt.Errorf("unpin %s: %w", id, err)
	case i < 0:
		return false, nil
	default:
		op = kv.DeleteIf(key, entries[i].Version)
	}
	if err := store.Commit(ctx, nil, op); err != nil {
		return false, fmt.Errorf("unpin %s: %w", id, err)
	}
	return i >= 0, nil
}

func pinKey(id deployments.UnitID, node string) (string, error) {
	if err := id.Check(); err != nil {
		return "", err
	}
	if node == "" {
		return kv.PinKey(id), nil
	}
	if err := deployments.CheckSegment("node", node); err != nil {
		return "", err
	}
	return kv.NodePinKey(id, node), nil
}

func encodePin(pin deployments.Pin) ([]byte, error) {
	release := "hold"
	if !pin.Hold {
		release = pin.Release.String()
	}
	value := []byte(release)
	if pin.Reason != "" || pin.By != "" || !pin.Until.IsZero() || pin.AtOnce {
		fields := struct {
			Release string `json:"release"`
			Reason  string `json:"reason,omitempty"`
			By      string `json:"by,omitempty"`
			Until   string `json:"until,omitempty"`
			AtOnce  bool   `json:"at_once,omitempty"`
		}{Release: release, Reason: pin.Reason, By: pin.By, AtOnce: pin.AtOnce}
		if !pin.Until.IsZero() {
			fields.Until = pin.Until.UTC().Format("2006-01-02T15:04:05Z")
		}
		var err error
		if value, err = json.Marshal(fields); err != nil {
			return nil, err
		}
	}
	// A pin that doesn't parse would stop every node of the unit.
	if _, err := deployments.ParsePin(value); err != nil {
		return nil, err
	}
	return value, nil
}

// History returns the unit's generations that the mirror keeps, newest first. An entry that doesn't
// parse has only its generation, and a Note that says so. A pin is listed once, in the oldest
// generation that has it.
func History(ctx context.Context, store kv.Store, id deployments.UnitID) ([]deployments.History, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	prefix := kv.HistoryPrefixOf(id)
	entries, err := store.List(ctx, prefix)
	if errors.Is(err, kv.ErrDenied) {
		// A unit without history has no folder of its own. Its role's folder is read instead or, if that is missing, the
		// whole history's.
		for _, wider := range []string{kv.RolePrefix(kv.HistoryPrefix, id.Stage, id.Role), kv.HistoryPrefix} {
			if entries, err = store.List(ctx, wider); !errors.Is(err, kv.ErrDenied) {
				break
			}
		}
		if errors.Is(err, kv.ErrTooLarge) { // the token may read the wider history, so this unit has none
			entries, err = nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("reading the history of %s: %w", id, err)
	}
	history := []deployments.History{}
	for _, e := range entries {
		if strings.HasPrefix(e.Key, prefix) {
			history = append(history, readHistory(e))
		}
	}
	slices.SortFunc(history, newestFirst)
	deployments.MergePins(history)
	return history, nil
}

// RollbackOptions are the fields, apart from the release, of the pin that Rollback writes.
type RollbackOptions struct {
	Reason, By string
	AtOnce     bool
}

// Rollback pins a unit to the last good release before the current one, and returns the pin. The
// current release is that of the unit's pin, if a pin other than a hold is in force, or else the
// record's target. Rollback chooses among the releases of the record and of the history. A release
// isn't good if a node has it in quarantine, or if it failed and was not tried again later. If no
// release is good, that is an error.
func Rollback(
	ctx context.Context,
	store kv.Store,
	id deployments.UnitID,
	opt RollbackOptions,
) (deployments.Pin, error) {
	if err := id.Check(); err != nil {
		return deployments.Pin{}, err
	}
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil {
		return deployments.Pin{}, err
	}
	unread := f.CheckComplete() // unread parts may hide the pin, or what failed on the nodes
	switch {
	case unread != nil:
		return deployments.Pin{}, fmt.Errorf("rollback of %s: %w: name a release with kedge pin", id, unread)
	case len(f.Units) == 0:
		return deployments.Pin{}, fmt.Errorf("rollback: %w", NoUnit(ctx, store, id))
	case f.Units[0].Record == nil:
		return deployments.Pin{}, fmt.Errorf("rollback: the store has no valid record of %s: see kedge status", id)
	}
	history, err := History(ctx, store, id)
	if err != nil && !errors.Is(err, kv.ErrDenied) {
		return deployments.Pin{}, err
	}
	release, err := lastGood(&f.Units[0], history, f.At)
	if err != nil {
		return deployments.Pin{}, fmt.Errorf("rollback of %s: %w", id, err)
	}
	pin := deployments.Pin{Release: release, Reason: opt.Reason, By: opt.By, AtOnce: opt.AtOnce}
	return pin, Pin(ctx, store, id, "", pin)
}

// lastGood returns the release that Rollback pins u to. It is an error if there is none. It has no side effects.
func lastGood(u *Unit, history []deployments.History, now time.Time) (deployments.Pointer, error) {
	bad := map[deployments.Digest]bool{}
	if p := u.Record.Rollout; p != nil {
		bad[p.Failed] = true
	}
	again := map[deployments.Digest]bool{} // releases that were tried again later, and may have become good
	for _, h := range history {
		if !again[h.Failed] {
			bad[h.Failed] = true
		}
		again[h.Release.Digest] = true
	}
	for _, n := range u.Nodes {
		for _, d := range n.Report.Quarantined {
			bad[d] = true
		}
	}
	// Releases that nodes were told to run, newest first, each followed by the one that was stable then.
	told := []deployments.Pointer{u.Record.Target, u.Record.Stable}
	for _, h := range history {
		told = append(told, h.Release, h.Stable)
	}
	from := u.Record.Target
	if u.Pinned(now) && !u.Pin.Hold {
		from = u.Pin.Release
	}
	// Only releases before from count, so that repeated rollbacks go further back. A release that nodes were told to run
	// again after from doesn't count.
	i := max(0, slices.Index(told, from))
	seen := map[deployments.Pointer]bool{{}: true, from: true}
	for _, p := range told[:i] {
		seen[p] = true
	}
	for _, p := range told[i:] {
		if !seen[p] && !bad[p.Digest] {
			return p, nil
		}
		seen[p] = true
	}
	return deployments.Pointer{}, fmt.Errorf(
		"no older release is known that has not failed: name one with kedge pin %s URL@sha256:HEX",
		u.ID,
	)
}

// NoUnit returns the error that the store knows no such unit. It names a similar unit, or those that there are.
func NoUnit(ctx context.Context, store kv.Store, id deployments.UnitID) error {
	f, err := Read(ctx, store, Filter{})
	if err != nil {
		return fmt.Errorf("no unit %s", id)
	}
	return noUnit(f, id.String())
}

func noUnit(f *Fleet, name string) error {
	if err := f.CheckComplete(); err != nil {
		return fmt.Errorf("no unit %s among those that can be read: %w", name, err)
	}
	var known []string
	for _, u := range f.Units {
		if strings.Count(name, "/") < 2 { // the name of a stage or role
			known = append(known, strings.Join(strings.Split(u.ID.String(), "/")[:strings.Count(name, "/")+1], "/"))
			continue
		}
		known = append(known, u.ID.String())
	}
	slices.Sort(known)
	known = slices.Compact(known)
	if near := deployments.Nearest(name, slices.Values(known)); near != "" {
		return fmt.Errorf("no unit %s: did you mean %s?", name, near)
	}
	if len(known) == 0 && !f.CommitTaken() {
		return fmt.Errorf("no unit %s: the store has none yet, and no mirror has taken a commit yet%s", name, f.refusal())
	}
	if len(known) == 0 {
		return fmt.Errorf("no unit %s: the store has none yet%s", name, f.refusal())
	}
	if len(known) == 1 {
		return fmt.Errorf("no unit %s: there is only %s%s", name, known[0], f.refusal())
	}
	return fmt.Errorf("no unit %s: there are %s%s", name, firstFew(known), f.refusal())
}

// firstFew lists at most ten names, and says how many more there are.
func firstFew(names []string) string {
	const shown = 10
	more := ""
	if len(names) > shown {
		more = fmt.Sprintf(" and %d more", len(names)-shown)
		names = names[:shown]
	}
	return strings.Join(names, ", ") + more
}

// CheckSelected returns an error if f has no units because the store has none that filter selects;
// f was read with this filter. It returns nil if f has units, if filter is empty, or if a part of
// the store can't be read.
func CheckSelected(ctx context.Context, store kv.Store, f *Fleet, filter Filter) error {
	if len(f.Units) > 0 || filter == (Filter{}) || len(f.incomplete) > 0 {
		return nil
	}
	all, err := Read(ctx, store, Filter{})
	if err != nil {
		return nil // f has what could be read
	}
	return noUnit(all, strings.Trim(filter.Stage+"/"+filter.Role+"/"+filter.Unit, "/"))
}
