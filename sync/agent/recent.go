package agent

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// recentErrors keeps the newest error lines of a unit's log, for the unit's report.
type recentErrors struct {
	mu    sync.Mutex
	lines []deployments.LoggedError // the newest first
}

// add keeps a line as the newest, and drops an older line with the same text.
func (r *recentErrors) add(at time.Time, text string) {
	line := deployments.LoggedError{
		At:   at.UTC().Truncate(time.Second),
		Text: safetext.Cut(strings.Join(strings.Fields(text), " "), deployments.MaxErrorText),
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	lines := []deployments.LoggedError{line} // a new list, as reports share the old one
	for _, old := range r.lines {
		if old.Text != line.Text && len(lines) < deployments.MaxLoggedErrors {
			lines = append(lines, old)
		}
	}
	r.lines = lines
}

// newest returns the lines. They are never changed in place.
func (r *recentErrors) newest() []deployments.LoggedError {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.lines
}

// remembering is a slog.Handler that adds error lines to recent, and passes on all lines for which
// Handler is enabled.
type remembering struct {
	slog.Handler
	recent *recentErrors
}

func (h remembering) Handle(ctx context.Context, line slog.Record) error {
	if line.Level >= slog.LevelError {
		text := line.Message
		for _, name := range []string{"step", "check", "error"} {
			line.Attrs(func(a slog.Attr) bool {
				if a.Key == name && a.Value.String() != "" {
					text += ": " + a.Value.String()
				}
				return true
			})
		}
		h.recent.add(line.Time, text)
	}
	if !h.Handler.Enabled(ctx, line.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, line)
}

// Enabled reports true for error lines even if Handler leaves them out, as recent keeps them.
func (h remembering) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelError || h.Handler.Enabled(ctx, level)
}

func (h remembering) WithAttrs(attrs []slog.Attr) slog.Handler {
	return remembering{h.Handler.WithAttrs(attrs), h.recent}
}

func (h remembering) WithGroup(name string) slog.Handler {
	return remembering{h.Handler.WithGroup(name), h.recent}
}
