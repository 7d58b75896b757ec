package cache

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"time"

	"kedge/deployments/durable"
	"kedge/kv"
)

// lastKnown is last-known.json: what this node last took from the store, for a boot while the store is away.
type lastKnown struct {
	Format int `json:"format"` // 1
	// Node is the name by which the pins were chosen; empty in files of earlier versions.
	Node     string                  `json:"node,omitempty"`
	Prefixes map[string]knownEntries `json:"prefixes"`
}

// knownEntries has the keys below one prefix that concern this node, with their exact values.
type knownEntries struct {
	At      time.Time         `json:"at"` // when this last changed, by the node's own clock
	Entries map[string][]byte `json:"entries"`
	// Generations are the highest that the node has acted on, by key, also of records that are gone.
	Generations map[string]int64 `json:"generations,omitempty"`
}

// readLastKnown reads a file; the state is empty if there is none. A damaged file is moved aside: the node then waits
// for the store or a snapshot, as at its first boot.
func readLastKnown(path string, log *slog.Logger) (lastKnown, error) {
	k, err := durable.ReadState[lastKnown](path, nil)
	var damaged *durable.DamagedError
	switch {
	case errors.As(err, &damaged):
		log.Error("the last known state is damaged and was renamed: waiting for the store or a snapshot",
			"kept", damaged.Kept, "error", damaged.Err)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return lastKnown{}, fmt.Errorf("reading the last known state: %w", err)
	}
	k.Format = 1
	if k.Prefixes == nil {
		k.Prefixes = map[string]knownEntries{}
	}
	return k, nil
}

// rename changes the name by which pins are chosen, and reports whether that changes anything. Pins
// chosen by another name are dropped: the new name may have a pin of its own, which was never seen.
// Pins of a file without a name stay.
func (k *lastKnown) rename(node string) bool {
	was := k.Node
	k.Node = node
	if was == "" || was == node {
		return was != node
	}
	maps.DeleteFunc(k.Prefixes, func(prefix string, _ knownEntries) bool {
		return strings.HasPrefix(prefix, kv.PinsPrefix)
	})
	return true
}

// set replaces the entries and generations of prefix, and reports whether they changed.
func (k *lastKnown) set(prefix string, entries []kv.Entry, generations map[string]int64, now time.Time) bool {
	was, ok := k.Prefixes[prefix]
	same := ok && len(was.Entries) == len(entries) && maps.Equal(was.Generations, generations)
	for _, e := range entries {
		v, there := was.Entries[e.Key]
		same = same && there && string(v) == string(e.Value)
	}
	if same {
		return false
	}
	next := knownEntries{At: now, Generations: maps.Clone(generations), Entries: make(map[string][]byte, len(entries))}
	for _, e := range entries {
		next.Entries[e.Key] = slices.Clone(e.Value)
	}
	k.Prefixes[prefix] = next
	return true
}

// get returns the entries of prefix, sorted by key, and when they last changed; ok is false if the file has none.
func (k *lastKnown) get(prefix string) (entries []kv.Entry, at time.Time, ok bool) {
	known, ok := k.Prefixes[prefix]
	for key, value := range known.Entries {
		entries = append(entries, kv.Entry{Key: key, Value: value})
	}
	sortEntries(entries)
	return entries, known.At, ok
}

// write replaces the file in one durable step.
func (k *lastKnown) write(file string) error {
	data, err := json.Marshal(k)
	if err == nil {
		err = durable.WriteFile(file, data, 0o600)
	}
	if err != nil {
		return fmt.Errorf("writing the last known state: %w", err)
	}
	return nil
}
