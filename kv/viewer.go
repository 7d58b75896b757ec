package kv

import (
	"bytes"
	"errors"
	"log/slog"
	"slices"
	"time"
)

// viewer keeps what a watch knows, and tells f when that changes.
type viewer struct {
	f      func(View)
	log    *slog.Logger
	prefix string

	view  View
	shown bool
}

func newViewer(prefix string, log *slog.Logger, f func(View)) *viewer {
	return &viewer{f: f, log: log, prefix: prefix}
}

// set adopts entries that were read for certain. They are sorted.
func (v *viewer) set(entries []Entry) {
	changed := !v.view.Settled || !slices.EqualFunc(v.view.Entries, entries, sameEntry)
	v.view.Settled = true
	v.update(entries, changed, nil)
}

// merge adopts entries of an answer that says nothing about those that are missing in it, and why.
func (v *viewer) merge(entries []Entry, err error) {
	known := make(map[string]bool, len(entries))
	for _, e := range entries {
		known[e.Key] = true
	}
	for _, e := range v.view.Entries {
		if !known[e.Key] {
			entries = append(entries, e)
		}
	}
	sortEntries(entries)
	v.update(entries, !slices.EqualFunc(v.view.Entries, entries, sameEntry), err)
}

// fail keeps what is known, and says why it may be out of date.
func (v *viewer) fail(err error) { v.update(v.view.Entries, false, err) }

func (v *viewer) update(entries []Entry, changed bool, err error) {
	old := v.view.Err
	v.view.Entries = entries
	if (old == nil) != (err == nil) || v.view.Since.IsZero() {
		v.view.Since = time.Now()
	}
	v.view.Err = err
	if v.shown && !changed && sameTrouble(old, err) {
		return
	}
	switch {
	case err != nil && !sameTrouble(old, err):
		v.log.Warn("the view of the store may be out of date", "prefix", v.prefix, "error", err)
	case err == nil && old != nil:
		v.log.Info("the view of the store is up to date again", "prefix", v.prefix)
	}
	v.shown = true
	shown := v.view
	shown.Entries = slices.Clone(entries)
	for i := range shown.Entries {
		shown.Entries[i].Value = bytes.Clone(shown.Entries[i].Value)
	}
	v.f(shown)
}

func sameEntry(a, b Entry) bool {
	return a.Key == b.Key && a.Version == b.Version && a.Session == b.Session && bytes.Equal(a.Value, b.Value)
}

// sameTrouble tells whether two errors call for the same of a caller; their texts may differ with every attempt.
func sameTrouble(a, b error) bool {
	for _, kind := range []error{ErrDenied, ErrUnavailable} {
		if errors.Is(a, kind) != errors.Is(b, kind) {
			return false
		}
	}
	return (a == nil) == (b == nil)
}
