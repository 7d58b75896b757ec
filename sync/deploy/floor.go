package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"time"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// createdTolerance is how far ahead of the node's clock a signed release's Created is still believed.
const createdTolerance = time.Hour

// Floors are a node's version floors, by unit, by the release's name and by its dest. A floor is the time at which the
// newest release was made of those that Git has rolled out to the end (see floorAt). A node with Trust refuses releases
// that were made before it. A release that only pins brought raises no floor. Floors survive when a unit is renamed,
// removed or loses its journal. Only the agent writes their file. A nil *Floors stores none.
type Floors struct {
	path string

	mu   sync.Mutex
	file floorsFile
}

// floorsFile is the content of STATE/floors.json.
type floorsFile struct {
	Format int                  `json:"format"` // always 1
	Made   map[string]time.Time `json:"made"`   // by key, as "name app" or "dest /srv/app"
}

// OpenFloors reads the floors stored at path, if that exists. A damaged file is set aside: the units' journals have
// their floors, too.
func OpenFloors(path string, log *slog.Logger) (*Floors, error) {
	f := &Floors{path: path, file: floorsFile{Format: 1, Made: map[string]time.Time{}}}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"*"))
	if err != nil {
		return nil, err
	}
	for _, aside := range left { // temporary files of a write that was killed
		os.Remove(aside)
	}
	file, err := durable.ReadState[floorsFile](path, nil)
	var damaged *durable.DamagedError
	switch {
	case errors.As(err, &damaged):
		log.Error("the file of version floors is damaged and was renamed: going on with the floors in the units' journals",
			"kept", damaged.Kept, "error", damaged.Err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("reading the version floors: %w", err)
	case err == nil && file.Made != nil:
		f.file = file
	}
	return f, nil
}

// floorKeys returns the keys of a release's floors, the unit's first. If m is nil, it returns only the unit's key.
func floorKeys(id deployments.UnitID, m *deployments.Manifest) []string {
	keys := []string{"unit " + id.String()}
	if m != nil && m.Name != "" {
		keys = append(keys, "name "+m.Name)
	}
	if m != nil && m.Src != "" && m.Dest != "" {
		keys = append(keys, "dest "+filepath.Clean(m.Dest))
	}
	return keys
}

// highest returns the key among keys that has the newest floor, and that floor; zero: there is none.
func (f *Floors) highest(keys []string) (of string, made time.Time) {
	if f == nil {
		return "", time.Time{}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, key := range keys {
		if at := f.file.Made[key]; at.After(made) {
			of, made = key, at
		}
	}
	return of, made
}

// raise raises the floors of keys to a time, durably. It never lowers one.
func (f *Floors) raise(keys []string, made time.Time) error {
	if f == nil || made.IsZero() {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	next := floorsFile{Format: 1, Made: maps.Clone(f.file.Made)}
	for _, key := range keys {
		if made.After(next.Made[key]) {
			next.Made[key] = made.UTC()
		}
	}
	if maps.Equal(next.Made, f.file.Made) {
		return nil
	}
	data, err := json.MarshalIndent(next, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the version floors: %w", err)
	}
	if err := durable.WriteFile(f.path, data, 0o600); err != nil {
		return fmt.Errorf("writing the version floors: %w", err)
	}
	f.file = next
	return nil
}

// OlderError means that a node with signers refuses a release that was made before the node's version floor.
type OlderError struct {
	Created, Floor time.Time
	Of             string // what has the floor: "name app", "dest /srv/app", "unit prod/web/app"
}

func (e *OlderError) Error() string {
	made := "its manifest has no time of creation, which counts as"
	if !e.Created.IsZero() {
		made = "made at " + e.Created.Format(time.RFC3339) + ","
	}
	// The text is short, as an error in a report has 300 bytes.
	return fmt.Sprintf("%s before this node's version floor, %s (of %s): "+
		"publish it anew as a new version, or pin it where the agent has allow_older_pins",
		made, e.Floor.Format(time.RFC3339), e.Of)
}

// FutureError means that a release says it was made later than the node's clock allows (createdTolerance). It raised
// the version floor to Floor, a time by the node's clock, instead of Created.
type FutureError struct{ Created, Floor time.Time }

func (e *FutureError) Error() string {
	return fmt.Sprintf("the running release says that it was made at %s, ahead of this node's clock: releases made "+
		"before %s are refused from now on. Correct the clock of whoever publishes, or this node's",
		e.Created.Format(time.RFC3339), e.Floor.Format(time.RFC3339))
}

// floorAt returns the version floor for a release made at created. That is created or, if created is more than
// createdTolerance after now, now in whole seconds. A floor far ahead would refuse all that is published until then.
func floorAt(created, now time.Time) time.Time {
	if created.After(now.Add(createdTolerance)) {
		return now.UTC().Truncate(time.Second)
	}
	return created
}

// checkFloor returns an error if a release was made before the version floor, unless Trust is nil
// or Older allows it. An old signature stays valid. Without this check, whoever writes the store
// could bring back a release that was replaced because of a vulnerability, under any name.
func (u *Unit) checkFloor(r *artifact.Release) error {
	if u.c.Trust == nil {
		return nil
	}
	keys := floorKeys(u.c.ID, r.Manifest)
	of, floor := u.c.Floors.highest(keys)
	if u.j.Newest.After(floor) {
		of, floor = keys[0], u.j.Newest
	}
	created := r.Manifest.Created
	if floor.IsZero() || !created.Before(floor) || u.c.Older != nil && u.c.Older(r.Pointer) {
		return nil
	}
	return &OlderError{Created: created, Floor: floor, Of: of}
}

// RaiseFloor raises the version floor to when the running release was made, if Trust is set and the release has passed
// its health checks. From then on only Config.Older admits older releases, even after a restart. Call it once the
// release's rollout can no longer turn back. A *FutureError means that the floor was raised, but only to the node's
// time.
func (u *Unit) RaiseFloor() error {
	r, err := u.liveRelease()
	if err != nil || r == nil || u.c.Trust == nil || !u.j.Confirmed {
		return err
	}
	u.at("before floor")
	created := r.Manifest.Created
	floor := floorAt(created, time.Now())
	if !floor.Equal(created) {
		if was := u.j.Ahead; was != nil && was.Digest == r.Pointer.Digest {
			floor = was.Floor // a later start must not refuse what was published since
		} else if err := u.save(func(j *journal) { j.Ahead = &aheadOfClock{r.Pointer.Digest, floor} }); err != nil {
			return err
		}
		u.at("ahead kept")
	}
	if err := u.c.Floors.raise(floorKeys(u.c.ID, r.Manifest), floor); err != nil {
		return err
	}
	u.at("floors raised")
	if floor.After(u.j.Newest) {
		if err := u.save(func(j *journal) { j.Newest = floor }); err != nil {
			return err
		}
	}
	u.at("floor kept")
	if !floor.Equal(created) {
		return &FutureError{Created: created, Floor: floor}
	}
	return nil
}

// aheadOfClock is a release that raised the version floor although its Created is ahead of the node's clock.
type aheadOfClock struct {
	Digest deployments.Digest `json:"digest"`
	// Floor is when the release first raised the floor, by the node's clock.
	Floor time.Time `json:"settled"`
}

// newestFile is where earlier versions stored Newest beside the journal.
const newestFile = "newest"

// keepFloor raises the node's floors to the floor in the unit's journal, or to the one in an earlier version's file if
// that is newer. It raises the unit's floor and, if the running release is known, those of the release's name and dest.
// A floor too far ahead of the clock is lowered first: see floorAt.
func (u *Unit) keepFloor() error {
	newest := u.j.Newest
	file := filepath.Join(u.c.Dir, newestFile)
	if data, err := os.ReadFile(file); err == nil {
		if at, err := time.Parse(time.RFC3339Nano, string(bytes.TrimSpace(data))); err == nil && at.After(newest) {
			newest = at
		}
	}
	now := time.Now()
	if info, err := os.Stat(filepath.Join(u.c.Dir, journalFile)); err == nil && info.ModTime().After(now) {
		now = info.ModTime() // a machine without a battery-backed clock may not know the time yet
	}
	if newest = floorAt(newest, now); newest.Before(u.j.Newest) {
		u.log.Warn("the version floor is ahead of this node's clock: lowering it", "was", u.j.Newest, "floor", newest)
		if err := u.save(func(j *journal) { j.Newest = newest }); err != nil {
			return err
		}
	}
	if u.c.Floors == nil {
		return nil
	}
	var m *deployments.Manifest
	if r, err := u.remembered(u.j.Running); err == nil && r != nil {
		m = r.Manifest
	}
	if err := u.c.Floors.raise(floorKeys(u.c.ID, m), newest); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing the version floor of an earlier kedge: %w", err)
	}
	return nil
}
