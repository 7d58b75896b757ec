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
	"sync"

	"kedge/deployments"
)

const failuresFile = "failures.json"

// failure is why, and under which claim, a release failed on this node. A claim names the record's generation and retry, or the
// pin's text: another claim lets it be tried once more.
type failure struct {
	Claim string `json:"claim"`
	Error string `json:"error,omitempty"`
}

// failures is STATE/failures.json: what the quarantined releases of each unit failed under. That they are quarantined is in each
// unit's journal; what is missing here, after a crash between the two, counts as failed under the claim of the moment.
type failures struct {
	dir string

	mu     sync.Mutex
	Format int                                       `json:"format"` // 1
	Units  map[string]map[deployments.Digest]failure `json:"units"`
}

func readFailures(dir string, log *slog.Logger) (*failures, error) {
	empty := &failures{dir: dir, Format: 1, Units: map[string]map[deployments.Digest]failure{}}
	path := filepath.Join(dir, failuresFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return empty, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading what failed on this node: %w", err)
	}
	f := &failures{dir: dir}
	if err = json.Unmarshal(data, f); err == nil && f.Format != 1 {
		err = fmt.Errorf("it has format %d, this kedge reads format 1", f.Format)
	}
	if err == nil {
		if f.Units == nil {
			f.Units = empty.Units
		}
		return f, nil
	}
	log.Error("the list of failures is damaged: putting it aside", "kept", path+".bad", "error", err)
	if err := os.Rename(path, path+".bad"); err != nil {
		return nil, fmt.Errorf("putting the damaged list of failures aside: %w", err)
	}
	return empty, nil
}

func (f *failures) get(id deployments.UnitID, d deployments.Digest) (failure, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	got, ok := f.Units[id.String()][d]
	return got, ok
}

func (f *failures) set(id deployments.UnitID, d deployments.Digest, why failure) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	unit := f.Units[id.String()]
	if unit == nil {
		unit = map[deployments.Digest]failure{}
		f.Units[id.String()] = unit
	}
	unit[d] = why
	return f.write()
}

// keep drops all of a unit's failures but those of quarantined digests.
func (f *failures) keep(id deployments.UnitID, quarantined []deployments.Digest) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	unit := f.Units[id.String()]
	n := len(unit)
	maps.DeleteFunc(unit, func(d deployments.Digest, _ failure) bool { return !slices.Contains(quarantined, d) })
	if len(unit) == n {
		return nil
	}
	if len(unit) == 0 {
		delete(f.Units, id.String())
	}
	return f.write()
}

func (f *failures) write() error {
	if err := writeJSON(filepath.Join(f.dir, failuresFile), f); err != nil {
		return fmt.Errorf("writing what failed on this node: %w", err)
	}
	return nil
}
