package backend

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"time"

	"kedge/kv"
)

// Viewer holds a watch's current view, and calls f when that changes. Not safe for concurrent use.
type Viewer struct {
	f      func(kv.View)
	log    *slog.Logger
	prefix string

	view   kv.View
	shown  bool
	causes Causes
	// foldersChanged is set if the folders changed since the view was last shown.
	foldersChanged bool
}

// NewViewer returns a viewer with an empty view. The prefix is only for its messages in log.
func NewViewer(prefix string, log *slog.Logger, f func(kv.View)) *Viewer {
	return &Viewer{f: f, log: log, prefix: prefix}
}

// View returns the current view, which the caller must not change.
func (v *Viewer) View() kv.View { return v.view }

// Set replaces the view's entries by those of an answer which proves that all other keys are
// absent, and clears Err. The entries must be sorted by key.
func (v *Viewer) Set(entries []kv.Entry) {
	changed := !v.view.Synced || !slices.EqualFunc(v.view.Entries, entries, SameEntry)
	v.view.Synced = true
	v.update(entries, changed, nil)
}

// Merge adds or replaces the entries of an answer that doesn't prove that other keys are absent. err says why not.
func (v *Viewer) Merge(entries []kv.Entry, err error) {
	known := make(map[string]bool, len(entries))
	for _, e := range entries {
		known[e.Key] = true
	}
	for _, e := range v.view.Entries {
		if !known[e.Key] {
			entries = append(entries, e)
		}
	}
	SortEntries(entries)
	v.update(entries, !slices.EqualFunc(v.view.Entries, entries, SameEntry), err)
}

// SetFolders sets the folder keys. The next Set, Merge or Fail shows them.
func (v *Viewer) SetFolders(folders []string) {
	v.foldersChanged = v.foldersChanged || !slices.Equal(v.view.Folders, folders)
	v.view.Folders = folders
}

// Fail keeps the entries, and sets err as the reason why they may be out of date.
func (v *Viewer) Fail(err error) { v.update(v.view.Entries, false, err) }

func (v *Viewer) update(entries []kv.Entry, changed bool, err error) {
	old := v.view.Err
	v.view.Entries = entries
	if (old == nil) != (err == nil) || v.view.Since.IsZero() {
		v.view.Since = time.Now()
	}
	v.view.Err = err
	news := v.causes.FirstOfKind(err)
	if v.shown && !changed && !news && !v.foldersChanged && sameKind(old, err) {
		return
	}
	switch {
	case err != nil && (news || !sameKind(old, err)):
		v.log.Warn("the store could not be read in full: what was read last stays in use", "prefix", v.prefix, "error", err)
	case err == nil && old != nil:
		v.log.Info("the store is read in full again", "prefix", v.prefix)
	}
	v.shown, v.foldersChanged = true, false
	shown := v.view
	shown.Entries = slices.Clone(entries)
	for i := range shown.Entries {
		shown.Entries[i].Value = bytes.Clone(shown.Entries[i].Value)
	}
	v.f(shown)
}

// SameEntry reports whether two entries have the same key, version, session and value.
func SameEntry(a, b kv.Entry) bool {
	return a.Key == b.Key && a.Version == b.Version && a.Session == b.Session && bytes.Equal(a.Value, b.Value)
}

// sameKind reports whether two errors are of one kind: nil, one of the kv errors that a watch's callers branch on, or
// another. Their texts may differ with every attempt.
func sameKind(a, b error) bool {
	for _, kind := range []error{kv.ErrDenied, kv.ErrNoFolder, kv.ErrUnavailable, kv.ErrTooLarge} {
		if errors.Is(a, kind) != errors.Is(b, kind) {
			return false
		}
	}
	return (a == nil) == (b == nil)
}
