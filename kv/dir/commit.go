package dir

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"kedge/deployments/durable"
	"kedge/kv"
	"kedge/kv/internal/backend"
)

// change is a commit's change of one key. Applying it twice is safe.
type change struct {
	Key    string
	Value  []byte `json:",omitempty"`
	Delete bool   `json:",omitempty"`
	// Holder is the session that holds the key from now on. DropHolder takes the key from its
	// holder, as Delete does. With none of these three, the holder stays as it was.
	Holder     string `json:"Hold,omitempty"`
	DropHolder bool   `json:"Unhold,omitempty"`
	// KeepValue leaves the value alone.
	KeepValue bool `json:"Keep,omitempty"`
}

func (d *Store) Commit(ctx context.Context, fence kv.Lease, ops ...kv.Op) error {
	if err := backend.CheckCommit(ops); err != nil {
		return err
	}
	if len(ops) == 0 {
		return nil
	}
	var held *lease
	if fence != nil {
		var ok bool
		if held, ok = fence.(*lease); !ok || held.store.dir != d.dir {
			return backend.ErrForeignLease
		}
	}
	err := d.withWriteLock(ctx, func() error {
		if held != nil && !held.valid() {
			held.lose()
			return kv.ErrLeaseLost
		}
		var changes []change
		for _, op := range ops {
			c, err := d.decide(op)
			if err != nil {
				return err
			}
			if c != nil {
				changes = append(changes, *c)
			}
		}
		return d.commit(changes)
	})
	if err != nil {
		return fmt.Errorf("commit %s: %w", ops[0].Key, err)
	}
	return nil
}

// decide returns an operation's change; nil: it changes nothing. The error is ErrConflict if its condition fails.
func (d *Store) decide(op kv.Op) (*change, error) {
	var now *fileValue
	if path, ok := d.find(op.Key); ok {
		v, err := readValue(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err == nil {
			now = &v
		}
	}
	switch op.Kind {
	case kv.OpCreate:
		if now != nil {
			return nil, fmt.Errorf("%w: %s exists already", kv.ErrConflict, op.Key)
		}
	case kv.OpReplace, kv.OpDeleteIf:
		if now == nil {
			return nil, fmt.Errorf("%w: %s does not exist", kv.ErrConflict, op.Key)
		}
		if now.version != op.Version {
			return nil, fmt.Errorf("%w: %s has another version", kv.ErrConflict, op.Key)
		}
	}
	switch {
	case op.Kind == kv.OpDelete && now == nil:
		return nil, nil
	case op.Kind == kv.OpDelete || op.Kind == kv.OpDeleteIf:
		return &change{Key: op.Key, Delete: true}, nil
	case now != nil && bytes.Equal(now.value, op.Value):
		return nil, nil // as in Consul, an unchanged value wakes nobody
	}
	return &change{Key: op.Key, Value: op.Value}, nil
}

// commit makes all of the changes or none. The caller must hold the store's lock exclusively. Several
// changes count as made once the journal is in place. If commit fails after that, the error is
// ErrUnavailable, and the next process that takes the lock finishes the changes. A single change
// needs no journal.
func (d *Store) commit(changes []change) error {
	if err := d.prepare(changes); err != nil {
		return err
	}
	if len(changes) > 1 {
		data, err := json.Marshal(changes)
		if err != nil {
			return err
		}
		d.step("journal")
		if err := durable.WriteFileVia(d.path(tempDir), d.path(journalFile), data, 0o644); err != nil {
			return err
		}
		d.step("journalled")
		if err := d.finishJournal(); err != nil {
			return fmt.Errorf("%w: %w", kv.ErrUnavailable, err)
		}
		return nil
	}
	return d.apply(changes)
}

// prepare returns an error if this process may not make the changes in directories that apply would make. A journalled
// commit that nobody but root can finish would stop every other process. prepare creates missing directories, and moves
// a directory aside that has the name of a key's file, which changes no key.
func (d *Store) prepare(changes []change) error {
	checked := map[string]bool{}
	for i, c := range changes {
		var paths []string
		if i == 1 { // several changes have a journal
			paths = append(paths, d.path(journalFile))
		}
		held := d.path(heldDir + "/" + heldName(c.Key))
		if c.Holder != "" || (c.DropHolder || c.Delete) && isFile(held) {
			paths = append(paths, held)
		}
		switch {
		case c.Delete:
			paths = append(paths, d.files(c.Key)...)
		case !c.KeepValue:
			path, err := d.preparePath(c.Key)
			if err != nil {
				return err
			}
			paths = append(paths, path)
		}
		for _, path := range paths {
			dir := filepath.Dir(path)
			if !checked[dir] {
				checked[dir] = true
				const mode = unix.R_OK | unix.W_OK | unix.X_OK // apply reads a directory to sync it
				if err := unix.Faccessat(unix.AT_FDCWD, dir, mode, unix.AT_EACCESS); err != nil {
					return fmt.Errorf("read and write in %s: %w", dir, err)
				}
			}
			if err := checkSticky(dir, path); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkSticky returns an error that wraps fs.ErrPermission if dir has the sticky bit and this process
// may therefore not replace or remove the file at path, which is another user's. It returns nil if
// there is no such file, and any other error of looking at dir or path.
func checkSticky(dir, path string) error {
	var in, file unix.Stat_t
	if err := unix.Stat(dir, &in); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	switch err := unix.Lstat(path, &file); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("look at %s: %w", path, err)
	case in.Mode&unix.S_ISVTX != 0 && !mayReplace(os.Geteuid(), in.Uid, file.Uid):
		return fmt.Errorf("replace %s, another user's file in a sticky directory: %w", path, fs.ErrPermission)
	}
	return nil
}

// mayReplace reports whether a user may replace or remove a file in a sticky directory, given the owners of both.
func mayReplace(euid int, dir, file uint32) bool {
	return euid == 0 || euid == int(dir) || euid == int(file)
}

// finishJournal completes the journalled commit, if there is one: the caller's, or that of a
// process that failed or was killed in it. The caller must hold the store's lock exclusively. No
// temporary file is then in use, so finishJournal removes them all. A journal that isn't valid JSON
// is set aside, without an error.
func (d *Store) finishJournal() error {
	left, err := os.ReadDir(d.path(tempDir))
	if err != nil {
		return err
	}
	for _, f := range left {
		if err := os.Remove(d.path(tempDir + "/" + f.Name())); err != nil {
			return err
		}
	}
	data, err := os.ReadFile(d.path(journalFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var changes []change
	if err := json.Unmarshal(data, &changes); err != nil {
		// The journal was renamed into place whole, so no crash damaged it. Moving it away keeps the evidence.
		kept := d.path(fmt.Sprintf("%s.bad-%d", journalFile, time.Now().Unix()))
		d.log.Error("the store's journal of an interrupted commit can't be read: the journal is renamed, and the commit lost",
			"file", d.path(journalFile), "kept", kept, "error", err)
		return os.Rename(d.path(journalFile), kept)
	}
	if err := d.apply(changes); err != nil {
		return fmt.Errorf("finish a commit: %w", err)
	}
	d.step("forget the journal")
	if err := os.Remove(d.path(journalFile)); err != nil {
		return err
	}
	return durable.SyncDir(d.path(metaDir))
}

// apply puts changes in place, one after the other. When it returns nil, all but the changes of holders are on disk.
func (d *Store) apply(changes []change) error {
	staged, err := d.stage(changes)
	if err != nil {
		return err
	}
	touched := map[string]bool{}
	for i, c := range changes {
		d.step("apply " + c.Key)
		if err := d.applyHolder(c); err != nil {
			return err
		}
		switch {
		case c.Delete:
			for _, path := range d.files(c.Key) {
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
				touched[filepath.Dir(path)] = true
			}
		case staged[i] != "":
			path, err := d.preparePath(c.Key)
			if err != nil {
				return err
			}
			if err := os.Rename(staged[i], path); err != nil {
				return err
			}
			touched[filepath.Dir(path)] = true
		}
	}
	var group errgroup.Group
	for dir := range touched {
		group.Go(func() error { return durable.SyncDir(dir) })
	}
	return group.Wait()
}

// stage writes the changed values to temporary files, in parallel, as each waits for the disk. It returns the name of
// each change's file; empty: the change writes no value, or the key has that value already.
func (d *Store) stage(changes []change) ([]string, error) {
	staged := make([]string, len(changes))
	var group errgroup.Group
	group.SetLimit(16)
	for i, c := range changes {
		if c.Delete || c.KeepValue {
			continue
		}
		group.Go(func() error {
			if path, ok := d.find(c.Key); ok {
				if now, err := readValue(path); err == nil && bytes.Equal(now.value, c.Value) {
					return nil
				}
			}
			f, err := os.CreateTemp(d.path(tempDir), "value-")
			if err != nil {
				return err
			}
			defer f.Close()
			staged[i] = f.Name()
			if _, err := f.Write(c.Value); err != nil {
				return err
			}
			if err := f.Chmod(0o644); err != nil {
				return err
			}
			return f.Sync()
		})
	}
	return staged, group.Wait()
}

// applyHolder records who holds the key now, if that changes. The record need not survive a power
// cut: no session does.
func (d *Store) applyHolder(c change) error {
	path := d.path(heldDir + "/" + heldName(c.Key))
	if c.DropHolder || c.Delete {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if c.Holder == "" {
		return nil
	}
	if now, err := os.ReadFile(path); err == nil && string(now) == c.Holder {
		return nil
	}
	temp := d.path(tempDir + "/held")
	if err := os.WriteFile(temp, []byte(c.Holder), 0o644); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
