package deploy

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	"kedge/deployments"
	"kedge/deployments/safetext"
)

// maxMasked bounds the values that a unit masks; the oldest are dropped.
const maxMasked = 1000

// secrets are the values of variables and secrets in the manifests that a unit has read. The unit's log, journal,
// errors and state must not show them. It is safe for concurrent use.
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

// log returns a handler that masks the values in what it passes on to next.
func (s *secrets) log(next slog.Handler) slog.Handler {
	return safetext.NewChanger(next, func(t string) string { return s.now().Text(t) })
}

// masked returns a probe whose errors show no secrets.
func (u *Unit) masked(p probe) probe {
	return func(ctx context.Context) (string, error) {
		identity, err := p(ctx)
		return identity, u.secrets.error(err)
	}
}
