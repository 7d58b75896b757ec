package statedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"kedge/deployments"
	"kedge/sync/deploy"
)

// oldFailuresFile is where earlier versions kept the failure keys that are now in each unit's journal.
const oldFailuresFile = "failures.json"

// moveOldFailures moves the failure keys of an earlier version into the units' journals, and removes the file, even a
// damaged one. A release whose key is lost counts as failed under the next request for it.
func (d *Dir) moveOldFailures(log *slog.Logger) error {
	path := d.Path(oldFailuresFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the failures that an earlier version recorded: %w", err)
	}
	var old struct {
		Units map[string]map[deployments.Digest]struct {
			Key string `json:"claim"`
		} `json:"units"`
	}
	if err := json.Unmarshal(data, &old); err != nil {
		log.Warn("the old list of failures is damaged: removing it", "file", path, "error", err)
	}
	for name, failures := range old.Units {
		var id deployments.UnitID
		if id.UnmarshalText([]byte(name)) != nil {
			continue
		}
		u, err := deploy.Open(deploy.Config{ID: id, Dir: d.UnitDir(id), Log: log})
		if err != nil {
			return err
		}
		for digest, f := range failures {
			if err := u.SetKey(digest, f.Key); err != nil {
				return err
			}
		}
	}
	return os.Remove(path)
}
