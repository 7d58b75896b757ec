package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/deployments"
	"kedge/kv"
	"kedge/sync/mirror"
)

// Pin writes a pin for a unit, or for one node of it where node isn't empty, over whatever pin was there. What it writes is what
// `consul kv put` would: a bare pointer or hold where there is no more to say, else JSON.
func Pin(ctx context.Context, store kv.Store, id deployments.UnitID, node string, pin deployments.Pin) error {
	key, err := pinKey(id, node)
	if err != nil {
		return err
	}
	value, err := encodePin(pin)
	if err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	// Where no mirror ever ran, the agents of this role can't tell a missing key from a lost permission yet. An operator may not
	// write in all of these places, nor needs to.
	for _, kind := range []string{kv.PinsPrefix, kv.DesiredPrefix} {
		err := store.EnsureFolders(ctx, kind, kv.RolePrefix(kind, id.Stage, id.Role))
		if err != nil && !errors.Is(err, kv.ErrDenied) {
			return fmt.Errorf("pin %s: %w", id, err)
		}
	}
	if err := store.Commit(ctx, nil, kv.Put(key, value)); err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	return nil
}

// Unpin removes a unit's pin, or that of one node of it, and says whether there was one.
func Unpin(ctx context.Context, store kv.Store, id deployments.UnitID, node string) (bool, error) {
	key, err := pinKey(id, node)
	if err != nil {
		return false, err
	}
	entries, err := store.List(ctx, kv.RolePrefix(kv.PinsPrefix, id.Stage, id.Role))
	op := kv.Delete(key)
	i := slices.IndexFunc(entries, func(e kv.Entry) bool { return e.Key == key })
	switch {
	case errors.Is(err, kv.ErrDenied): // or there is no folder: whoever may delete it finds out
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

// encodePin writes what ParsePin reads.
func encodePin(pin deployments.Pin) ([]byte, error) {
	release := "hold"
	if !pin.Hold {
		release = pin.Release.String()
	}
	value := []byte(release)
	if pin.Reason != "" || pin.By != "" || !pin.Until.IsZero() {
		fields := struct {
			Release string `json:"release"`
			Reason  string `json:"reason,omitempty"`
			By      string `json:"by,omitempty"`
			Until   string `json:"until,omitempty"`
		}{Release: release, Reason: pin.Reason, By: pin.By}
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

// verbs are the orders that a mirror takes.
var verbs = []string{"promote", "pause", "resume", "abort", "retry"}

// Control asks the mirror for promote, pause, resume, abort or retry of a unit. An order that the mirror has yet to take is replaced.
func Control(ctx context.Context, store kv.Store, id deployments.UnitID, verb string) error {
	if err := id.Check(); err != nil {
		return err
	}
	if !slices.Contains(verbs, verb) {
		return fmt.Errorf("%q is not one of %s", verb, strings.Join(verbs, ", "))
	}
	if _, err := store.Get(ctx, kv.DesiredKey(id)); errors.Is(err, kv.ErrNotFound) {
		return fmt.Errorf("%s %s: the store has no record of it: %w", verb, id, err)
	} else if err != nil {
		return fmt.Errorf("%s %s: %w", verb, id, err)
	}
	if err := store.Commit(ctx, nil, kv.Put(kv.ControlKey(id), []byte(verb))); err != nil {
		return fmt.Errorf("%s %s: %w", verb, id, err)
	}
	return nil
}

// History gives what a unit was told to run, the newest first: the generations that the mirror keeps. An entry that doesn't parse is
// there with its generation, and says so in its Note.
func History(ctx context.Context, store kv.Store, id deployments.UnitID) ([]mirror.History, error) {
	if err := id.Check(); err != nil {
		return nil, err
	}
	prefix := kv.HistoryPrefixOf(id)
	entries, err := store.List(ctx, prefix)
	if errors.Is(err, kv.ErrDenied) {
		// A unit without history has no folder, its role has, and else the whole.
		for _, wider := range []string{kv.RolePrefix(kv.HistoryPrefix, id.Stage, id.Role), kv.HistoryPrefix} {
			if entries, err = store.List(ctx, wider); !errors.Is(err, kv.ErrDenied) {
				break
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("history of %s: %w", id, err)
	}
	history := []mirror.History{}
	for _, e := range entries {
		if strings.HasPrefix(e.Key, prefix) {
			history = append(history, readHistory(e))
		}
	}
	slices.SortFunc(history, newestFirst)
	return history, nil
}

// Rollback pins a unit to the last good release before the one that it is told to run, by its pin or else its record, and gives
// that pin. Of the releases that the record and the history know, one that a node has in quarantine isn't good.
func Rollback(ctx context.Context, store kv.Store, id deployments.UnitID, reason, by string) (deployments.Pin, error) {
	if err := id.Check(); err != nil {
		return deployments.Pin{}, err
	}
	f, err := Read(ctx, store, Filter{Stage: id.Stage, Role: id.Role, Unit: id.Unit})
	if err != nil {
		return deployments.Pin{}, err
	}
	if len(f.Units) == 0 || f.Units[0].Record == nil {
		return deployments.Pin{}, fmt.Errorf("rollback: the store has no good record of %s; see kedge status", id)
	}
	history, err := History(ctx, store, id)
	if err != nil && !errors.Is(err, kv.ErrDenied) {
		return deployments.Pin{}, err
	}
	release, err := lastGood(&f.Units[0], history)
	if err != nil {
		return deployments.Pin{}, fmt.Errorf("rollback of %s: %w", id, err)
	}
	pin := deployments.Pin{Release: release, Reason: reason, By: by}
	return pin, Pin(ctx, store, id, "", pin)
}

// lastGood chooses what Rollback goes back to; pure. history is sorted, the newest first.
func lastGood(u *Unit, history []mirror.History) (deployments.Pointer, error) {
	bad := map[deployments.Digest]bool{}
	for _, n := range u.Nodes {
		for _, d := range n.Report.Quarantined {
			bad[d] = true
		}
	}
	// What was told, the newest first; of each time also what was good then.
	told := []deployments.Pointer{u.Record.Target, u.Record.Stable}
	for _, h := range history {
		told = append(told, h.Release, h.Stable)
	}
	from := u.Record.Target
	if u.Pin != nil && !u.Pin.Hold {
		from = u.Pin.Release
	}
	// Only what is older counts. A release that came back later lies behind its first place: this is where one rollback after another
	// goes on.
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
	return deployments.Pointer{}, fmt.Errorf("no other release that was good is known: name one with kedge pin %s URL@sha256:HEX", u.ID)
}
