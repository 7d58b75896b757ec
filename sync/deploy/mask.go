package deploy

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// maxMasked bounds the values that a unit masks; the oldest are dropped.
const maxMasked = 1000

// secrets are the values of variables and secrets in the manifests that a unit has read. Its log, journal, errors
// and state must not show them. Safe for concurrent use.
type secrets struct {
	mu     sync.Mutex
	values []string
	mask   atomic.Pointer[deployments.Mask]
}

// add masks values from now on.
func (s *secrets) add(values ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.values)
	for _, v := range values {
		if !slices.Contains(s.values, v) {
			s.values = append(s.values, v)
		}
	}
	if len(s.values) == before {
		return
	}
	s.values = s.values[max(0, len(s.values)-maxMasked):]
	s.mask.Store(deployments.NewMask(s.values))
}

// now returns the current mask; nil: there is nothing to mask.
func (s *secrets) now() *deployments.Mask { return s.mask.Load() }

// text masks the values in a text, and secrets in its URLs.
func (s *secrets) text(t string) string { return safetext.URLs(s.now().Text(t)) }

// error masks an error's text. errors.Is and errors.As still find what it wraps.
func (s *secrets) error(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	if shown := s.text(text); shown != text {
		return &shownError{err, shown}
	}
	return err
}

type shownError struct {
	err  error
	text string
}

func (e *shownError) Error() string { return e.text }
func (e *shownError) Unwrap() error { return e.err }

// masking is a slog.Handler that masks secrets.
type masking struct {
	next    slog.Handler
	secrets *secrets
}

func (h masking) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h masking) Handle(ctx context.Context, r slog.Record) error {
	mask := h.secrets.now()
	if mask == nil {
		return h.next.Handle(ctx, r)
	}
	masked := slog.NewRecord(r.Time, r.Level, mask.Text(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		masked.AddAttrs(maskAttr(mask, a))
		return true
	})
	return h.next.Handle(ctx, masked)
}

func (h masking) WithAttrs(attrs []slog.Attr) slog.Handler {
	masked := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		masked[i] = maskAttr(h.secrets.now(), a)
	}
	return masking{h.next.WithAttrs(masked), h.secrets}
}

func (h masking) WithGroup(name string) slog.Handler {
	return masking{h.next.WithGroup(name), h.secrets}
}

func maskAttr(mask *deployments.Mask, a slog.Attr) slog.Attr {
	v := a.Value.Resolve()
	switch v.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(mask.Text(v.String()))
	case slog.KindGroup:
		group := slices.Clone(v.Group())
		for i := range group {
			group[i] = maskAttr(mask, group[i])
		}
		a.Value = slog.GroupValue(group...)
	case slog.KindAny:
		text := fmt.Sprint(v.Any())
		if masked := mask.Text(text); masked != text {
			a.Value = slog.StringValue(masked)
		}
	}
	return a
}

// masked returns a probe whose errors show no secrets.
func (u *Unit) masked(p probe) probe {
	return func(ctx context.Context) (string, error) {
		identity, err := p(ctx)
		return identity, u.secrets.error(err)
	}
}
