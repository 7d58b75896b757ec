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

// createdTolerance is how far ahead of the node's clock a signed release may say that it was made.
const createdTolerance = time.Hour

// Floors are a node's version floors: when the newest signed release was made that was settled on, by unit, by the
// release's name and by its dest. A unit that is renamed, removed or has lost its journal doesn't lose them. The agent
// alone writes their file; a nil *Floors keeps none.
type Floors struct {
	path string

	mu   sync.Mutex
	file floorsFile
}

// floorsFile is STATE/floors.json.
type floorsFile struct {
	Format int                  `json:"format"` // 1
	Made   map[string]time.Time `json:"made"`   // by what it is of, as "name app" or "dest /srv/app"
}

// OpenFloors reads the floors that are kept at path. A damaged file is put aside: the units' journals make up for it.
func OpenFloors(path string, log *slog.Logger) (*Floors, error) {
	f := &Floors{path: path, file: floorsFile{Format: 1, Made: map[string]time.Time{}}}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"*"))
	if err != nil {
		return nil, err
	}
	for _, aside := range left { // what a kill left of a write
		os.Remove(aside)
	}
	file, err := durable.ReadState[floorsFile](path, nil)
	var damaged *durable.DamagedError
	switch {
	case errors.As(err, &damaged):
		log.Error("the version floors are damaged: putting them aside", "kept", damaged.Kept, "error", damaged.Err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("reading the version floors: %w", err)
	case err == nil && file.Made != nil:
		f.file = file
	}
	return f, nil
}

// floorKeys returns the keys under which a release's floors are kept.
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

// highest returns the newest floor of keys, and the key that has it; zero: there is none.
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

// raise makes durable that keys admit nothing that was made before a time; it never lowers a floor.
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

// OlderError is why a node with signers refuses a release: it was made before one that the node has settled on.
type OlderError struct {
	Created, Floor time.Time
	Of             string // what has the floor: "name app", "dest /srv/app", "unit prod/web/app"
}

func (e *OlderError) Error() string {
	made := "it does not say when it was made"
	if !e.Created.IsZero() {
		made = "made at " + e.Created.Format(time.RFC3339)
	}
	// Short: a report has 300 bytes.
	return fmt.Sprintf("%s, older than that of %s on which this node has settled for %s: "+
		"publish it anew as a new version, or pin it where the agent has allow_older_pins",
		made, e.Floor.Format(time.RFC3339), e.Of)
}

// FutureError says that a release that was settled on claims to be made later than the node's clock: what counts as
// older than it are releases made before Settled.
type FutureError struct{ Created, Settled time.Time }

func (e *FutureError) Error() string {
	return fmt.Sprintf("it says that it was made at %s, which is ahead of this node's clock: releases made before %s are "+
		"refused from now on. Correct the clock of whoever publishes, or this node's",
		e.Created.Format(time.RFC3339), e.Settled.Format(time.RFC3339))
}

// settledAt returns the floor that a release made at created leaves, at a node's time: its own, but never one
// ahead of the clock, which would refuse all that is published from then on.
func settledAt(created, now time.Time) time.Time {
	if created.After(now.Add(createdTolerance)) {
		return now.UTC().Truncate(time.Second)
	}
	return created
}

// order refuses a release that is older than the newest that was settled on: an old signature stays good, and whoever
// writes the store must not bring back what was replaced for a hole in it, under whatever name.
func (u *Unit) order(r *artifact.Release) error {
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

// Settle notes what runs, and has passed its health checks, as settled on: where Trust is set, no older release is
// admitted from now on, also after a restart. A release whose rollout may still turn back is not to be settled on. A
// *FutureError says that it is noted, and that the release's own time was not believed.
func (u *Unit) Settle() error {
	r, err := u.settled()
	if err != nil || r == nil || u.c.Trust == nil || !u.j.Confirmed {
		return err
	}
	u.at("before settle")
	created := r.Manifest.Created
	floor := settledAt(created, time.Now())
	if !floor.Equal(created) {
		if was := u.j.Ahead; was != nil && was.Digest == r.Pointer.Digest {
			floor = was.Settled // a later start must not refuse what was published since
		} else if err := u.save(func(j *journal) { j.Ahead = &ahead{r.Pointer.Digest, floor} }); err != nil {
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
	u.at("settled")
	if !floor.Equal(created) {
		return &FutureError{Created: created, Settled: floor}
	}
	return nil
}

// ahead is a release that was settled on though it says that it was made later than the node's clock.
type ahead struct {
	Digest  deployments.Digest `json:"digest"`
	Settled time.Time          `json:"settled"` // the node's clock; what counts as its time
}

// newestFile is where versions before this one kept Newest beside the journal.
const newestFile = "newest"

// keepFloor brings the floor that the unit's journal has, or an earlier version kept beside it, to the node's: for
// what runs, where that is known. A time ahead of the clock is not believed.
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
		now = info.ModTime() // a machine without a clock of its own has yet to learn the time
	}
	if newest = settledAt(newest, now); newest.Before(u.j.Newest) {
		u.log.Warn("the version floor is ahead of this node's clock: lowering it", "was", u.j.Newest, "floor", newest)
		if err := u.save(func(j *journal) { j.Newest = newest }); err != nil {
			return err
		}
	}
	if u.c.Floors == nil {
		return nil
	}
	var m *deployments.Manifest
	if r, err := u.recall(u.j.Running); err == nil && r != nil {
		m = r.Manifest
	}
	if err := u.c.Floors.raise(floorKeys(u.c.ID, m), newest); err != nil {
		return err
	}
	if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("removing what an earlier version kept: %w", err)
	}
	return nil
}
