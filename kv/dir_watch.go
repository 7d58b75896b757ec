package kv

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// sessionPoll is how often a watch looks whether the processes that hold its entries live: a flock that ends tells nobody.
	sessionPoll = 500 * time.Millisecond
	// safetyPoll is for file systems whose changes aren't notified, like network ones.
	safetyPoll = 5 * time.Second
	// troublePoll is how often a watch tries again to read a store that it couldn't, and blindPoll how often it reads
	// where it can't be notified at all.
	troublePoll = 250 * time.Millisecond
	blindPoll   = 200 * time.Millisecond
)

func (d *dirStore) Watch(ctx context.Context, prefix string, f func(View)) error {
	if err := checkPrefix(prefix); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	v := newViewer(filepath.Join(d.dir, prefix), d.log, f)
	var events chan fsnotify.Event
	var failures chan error
	visit := func(string) {}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		d.log.Warn("the directory is polled, as its changes can't be notified", "dir", d.dir, "error", err)
	} else {
		defer notify.Close()
		events, failures = notify.Events, notify.Errors
		visit = func(dir string) {
			if err := notify.Add(dir); err != nil {
				d.log.Debug("a directory can't be watched", "dir", dir, "error", err)
			}
		}
	}
	for ctx.Err() == nil {
		visit(d.path(heldDir))
		s, err := d.scan(ctx, prefix, visit)
		if ctx.Err() != nil {
			break
		}
		poll := safetyPoll
		if events == nil {
			poll = blindPoll
		}
		switch {
		case err != nil:
			v.fail(fmt.Errorf("watch %s: %w", prefix, err))
			poll = troublePoll
		case s.unsteady:
			poll = 5 * time.Millisecond
		default:
			v.set(s.entries)
			if slices.ContainsFunc(s.entries, func(e Entry) bool { return e.Session != "" }) {
				poll = min(poll, sessionPoll)
			}
		}
		if !d.awaitChange(ctx, events, failures, poll) {
			break
		}
	}
	return ctx.Err()
}

// awaitChange returns true after a change of files that matter, or after poll; false when ctx ended.
func (d *dirStore) awaitChange(ctx context.Context, events <-chan fsnotify.Event, failures <-chan error, poll time.Duration) bool {
	t := time.NewTimer(poll)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-t.C:
			return true
		case <-failures: // events were lost
			return true
		case e := <-events:
			if e.Op == fsnotify.Chmod || d.ignoredEvent(e.Name) {
				continue
			}
			return true
		}
	}
}

func (d *dirStore) ignoredEvent(path string) bool {
	if filepath.Dir(path) == d.path(heldDir) || path == d.dir {
		return false
	}
	return ignoredFile(strings.TrimSuffix(filepath.Base(path), "@"))
}
