package destwatch

import (
	"context"
	"log/slog"
	"strings"
	"testing"

	"kedge/deployments"
)

var app = deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}

// An agent that ends while it opens a unit doesn't warn of a watch that it no longer needs.
func TestNoWarningAtTheEnd(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	w := New(slog.New(slog.NewTextHandler(&log, nil)))
	w.Watch(t.TempDir()+"/first", app, func() {})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	w.Run(ctx)
	w.Watch(t.TempDir()+"/second", app, func() {})
	if log.Len() > 0 {
		t.Errorf("it logs %s", log.String())
	}
	w = New(slog.New(slog.NewTextHandler(&log, nil)))
	w.Run(ctx)
	if w.Watch(t.TempDir()+"/late", app, func() {}); w.watcher != nil || log.Len() > 0 {
		t.Errorf("a watch after the end opens an inotify that nobody closes, and logs %q", log.String())
	}
	w = New(slog.New(slog.NewTextHandler(&log, nil)))
	w.Watch(t.TempDir()+"/missing/dest", app, func() {})
	if !strings.Contains(log.String(), "verify_every") {
		t.Errorf("of a directory that can't be watched it logs %q", log.String())
	}
	w.Run(ctx)
}
