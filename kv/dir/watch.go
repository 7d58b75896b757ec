package dir

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

const (
	// sessionPoll is how often a watch checks whether the processes that hold its entries live, as the end of a
	// flock isn't notified.
	sessionPoll = 500 * time.Millisecond
	// safetyPoll is how often a watch reads without a notification: network file systems, among others, send none.
	safetyPoll = 5 * time.Second
	// troublePoll is how often a watch tries again to read a store that failed. blindPoll is how often it reads if
	// notifications don't work at all.
	troublePoll = 250 * time.Millisecond
	blindPoll   = 200 * time.Millisecond
)

func (d *Store) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	if err := backend.CheckPrefix(prefix); err != nil {
		return fmt.Errorf("watch: %w", err)
	}
	v := backend.NewViewer(filepath.Join(d.dir, prefix), d.log, f)
	var changed <-chan struct{} // nil: nothing is notified
	visit := func(string) {}
	changes, err := d.notifier.subscribe()
	if err != nil {
		d.log.Warn("polling the directory: the kernel can't report its changes", "dir", d.dir, "error", err)
	} else {
		defer changes.end()
		changed = changes.signal.C()
		visit = func(dir string) {
			if err := changes.watchDir(dir); err != nil {
				d.log.Debug("could not watch a directory", "dir", dir, "error", err)
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
		if changed == nil {
			poll = blindPoll
		}
		switch {
		case err != nil:
			v.Fail(fmt.Errorf("watch %s: %w", prefix, err))
			poll = troublePoll
		case s.unsteady:
			poll = 5 * time.Millisecond
		default:
			v.Set(s.entries)
			if slices.ContainsFunc(s.entries, func(e kv.Entry) bool { return e.Session != "" }) {
				poll = min(poll, sessionPoll)
			}
		}
		t := time.NewTimer(poll)
		select {
		case <-ctx.Done():
		case <-changed:
		case <-t.C:
		}
		t.Stop()
	}
	return ctx.Err()
}

func (d *Store) ignoredEvent(path string) bool {
	if filepath.Dir(path) == d.path(heldDir) || path == d.dir {
		return false
	}
	return ignoredFile(strings.TrimSuffix(filepath.Base(path), "@"))
}
