package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kedge/sync/deploy"
)

const startingFile = "starting.json"

// starting is STATE/starting.json: since when this node tries to converge, in this boot of the machine. It is there
// from a start to the first convergence after it. Written by the agent alone.
type starting struct {
	Boot  string    `json:"boot"`
	Since time.Time `json:"since"`
}

// startingSince notes a start, and gives the time of the first since the node had last converged: one whose agent
// goes down again and again runs out of the time that a rollout gives it. Where nothing can be read or written, as
// on a full disk, it is this start.
func startingSince(dir string, now time.Time) time.Time {
	path := filepath.Join(dir, startingFile)
	var s starting
	data, err := os.ReadFile(path)
	if err == nil && json.Unmarshal(data, &s) == nil && s.Boot == deploy.BootID() && !s.Since.IsZero() &&
		!s.Since.After(now) {
		return s.Since
	}
	_ = writeJSON(path, starting{Boot: deploy.BootID(), Since: now})
	return now
}

// startedWell forgets the start, as the node has converged.
func startedWell(dir string) error {
	if err := os.Remove(filepath.Join(dir, startingFile)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
