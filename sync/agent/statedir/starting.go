package statedir

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"time"

	"kedge/sync/deploy"
)

// starting is starting.json: since when this node has tried to converge, in this boot of the
// machine. The file exists from a start of the agent until Started.
type starting struct {
	Boot  string    `json:"boot"`
	Since time.Time `json:"since"`
}

// StartingSince returns the time of the agent's first start since Started was last called, in this
// boot of the machine. So a node whose agent keeps restarting runs out of the time that a rollout
// gives it. StartingSince returns now if this is the first such start, or if an earlier start left
// no usable file, as on a full disk.
func (d *Dir) StartingSince(now time.Time) time.Time {
	var s starting
	data, err := os.ReadFile(d.Path(startingFile))
	if err == nil && json.Unmarshal(data, &s) == nil && s.Boot == deploy.BootID() && !s.Since.IsZero() &&
		!s.Since.After(now) {
		return s.Since
	}
	_ = writeJSON(d.Path(startingFile), starting{Boot: deploy.BootID(), Since: now})
	return now
}

// Started records that every unit has converged, or can't go on by itself: StartingSince begins
// anew.
func (d *Dir) Started() error {
	if err := os.Remove(d.Path(startingFile)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
