package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/deployments/durable"
	"kedge/kv"
)

const lastKnownFile = "last-known.json"

// lastKnown is STATE/last-known.json: what the store last held for this node, for a boot while it is away. The
// agent alone writes it, and before it acts on what is in it, so that a node never goes back to something older by
// restarting.
type lastKnown struct {
	Format   int                     `json:"format"` // 1
	Prefixes map[string]knownEntries `json:"prefixes"`
}

// knownEntries are the keys below one prefix that concern this node, their values byte by byte.
type knownEntries struct {
	At      time.Time         `json:"at"` // when they were first seen to be so; the node's clock
	Entries map[string][]byte `json:"entries"`
	// Generations are the highest that the node has acted on, by key; also of records that are gone.
	Generations map[string]int64 `json:"generations,omitempty"`
}

// readLastKnown reads dir's file; it is empty where there is none. One that is damaged is put aside: a node that
// lost its memory waits for the store, as at its first boot.
func readLastKnown(dir string, log *slog.Logger) (lastKnown, error) {
	empty := lastKnown{Format: 1, Prefixes: map[string]knownEntries{}}
	path := filepath.Join(dir, lastKnownFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return empty, nil
	}
	if err != nil {
		return empty, fmt.Errorf("reading the last known state: %w", err)
	}
	var k lastKnown
	if err = json.Unmarshal(data, &k); err == nil && k.Format != 1 {
		err = fmt.Errorf("it has format %d, this kedge reads format 1", k.Format)
	}
	if err == nil {
		if k.Prefixes == nil {
			k.Prefixes = empty.Prefixes
		}
		return k, nil
	}
	log.Error("the last known state is damaged: putting it aside", "kept", path+".bad", "error", err)
	if err := os.Rename(path, path+".bad"); err != nil {
		return empty, fmt.Errorf("putting the damaged last known state aside: %w", err)
	}
	return empty, nil
}

// set notes entries for prefix, and says whether that is news.
func (k *lastKnown) set(prefix string, entries []kv.Entry, floors map[string]int64, now time.Time) bool {
	was, ok := k.Prefixes[prefix]
	same := ok && len(was.Entries) == len(entries) && maps.Equal(was.Generations, floors)
	for _, e := range entries {
		v, there := was.Entries[e.Key]
		same = same && there && string(v) == string(e.Value)
	}
	if same {
		return false
	}
	next := knownEntries{At: now, Generations: maps.Clone(floors), Entries: make(map[string][]byte, len(entries))}
	for _, e := range entries {
		next.Entries[e.Key] = slices.Clone(e.Value)
	}
	k.Prefixes[prefix] = next
	return true
}

// get returns what is known of prefix, sorted by key.
func (k *lastKnown) get(prefix string) (entries []kv.Entry, at time.Time, ok bool) {
	known, ok := k.Prefixes[prefix]
	for key, value := range known.Entries {
		entries = append(entries, kv.Entry{Key: key, Value: value})
	}
	sortEntries(entries)
	return entries, known.At, ok
}

func (k *lastKnown) write(dir string) error {
	if err := writeJSON(filepath.Join(dir, lastKnownFile), k); err != nil {
		return fmt.Errorf("writing the last known state: %w", err)
	}
	return nil
}

// writeJSON replaces path in one step, durable once it returns: written aside, synced, renamed, its directory synced.
func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o600)
}

// removeLeftovers removes what a kill left of files that were being written aside.
func removeLeftovers(dir string) error {
	for _, name := range []string{nameFile, lastKnownFile, startingFile} {
		left, err := filepath.Glob(filepath.Join(dir, "."+name+"*"))
		if err != nil {
			return err
		}
		for _, path := range left {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("removing what a kill left: %w", err)
			}
		}
	}
	return nil
}
