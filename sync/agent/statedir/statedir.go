// Package statedir keeps an agent's facts about its node on disk, each in its own file. A file is replaced in one
// durable step, so that a kill leaves either the old or the new one.
package statedir

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"kedge/deployments"
	"kedge/deployments/durable"
)

const (
	lockFile     = "lock"
	nodeFile     = "node.json"
	startingFile = "starting.json"
	// LastKnownFile belongs to package cache, FloorsFile to package deploy, SocketFile to the agent.
	LastKnownFile = "last-known.json"
	FloorsFile    = "floors.json"
	SocketFile    = "agent.sock"
)

// SocketPath returns the path of the agent's Unix socket in the state directory path. The agent answers only the user
// root there.
func SocketPath(path string) string { return filepath.Join(path, SocketFile) }

// Dir is an agent's state directory, which one process holds at a time.
type Dir struct {
	path string
	lock *os.File
}

// Open creates the directory at path if there is none, and locks it; it returns ErrLocked if
// another agent holds it. It removes temporary files that a kill left, and moves the failures of an
// earlier version into the units' journals. Close unlocks the directory.
func Open(path string, log *slog.Logger) (*Dir, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	lock, err := takeLock(path)
	if err != nil {
		return nil, err
	}
	d := &Dir{path: path, lock: lock}
	if err = d.removeLeftovers(); err == nil {
		err = d.moveOldFailures(log)
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// Close unlocks the directory.
func (d *Dir) Close() error { return dropLock(d.lock) }

// Path returns the path of a file in the directory.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// UnitDir returns the directory of a unit's journal, which package deploy writes.
func (d *Dir) UnitDir(id deployments.UnitID) string {
	return d.Path(filepath.Join("units", id.Stage, id.Role, id.Unit))
}

// Units returns the units of a role whose directories aren't empty. It removes empty ones, whose unit never had a
// release.
func (d *Dir) Units(stage, role string) ([]deployments.UnitID, error) {
	entries, err := os.ReadDir(d.Path(filepath.Join("units", stage, role)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var ids []deployments.UnitID
	for _, e := range entries {
		id := deployments.UnitID{Stage: stage, Role: role, Unit: e.Name()}
		if e.IsDir() && id.Check() == nil && os.Remove(d.UnitDir(id)) != nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// node is node.json: the name that the store's agent last gave a host.
type node struct {
	Host string `json:"host"`
	Node string `json:"node"`
}

// NodeName returns the name that the store's agent last gave this host; empty: unknown, or it can't
// be read. A name saved by another host doesn't count: this disk may be a copy of that host's.
func (d *Dir) NodeName(host string) string {
	var n node
	data, err := os.ReadFile(d.Path(nodeFile))
	if err != nil || json.Unmarshal(data, &n) != nil || n.Host != host || deployments.CheckSegment("node", n.Node) != nil {
		return ""
	}
	return n.Node
}

// SetNodeName saves the name that the store's agent gives this host.
func (d *Dir) SetNodeName(host, name string) error {
	return writeJSON(d.Path(nodeFile), node{host, name})
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o600)
}

// removeLeftovers removes the temporary files that a kill left of this package's and package cache's files.
func (d *Dir) removeLeftovers() error {
	for _, name := range []string{nodeFile, LastKnownFile, startingFile} {
		left, err := filepath.Glob(d.Path("." + name + "*"))
		if err != nil {
			return err
		}
		for _, path := range left {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("removing an unfinished file of an earlier run: %w", err)
			}
		}
	}
	return nil
}
