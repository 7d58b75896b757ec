package backend_test

import (
	"errors"
	"fmt"
	"log/slog"
	"testing"

	"kedge/kv"
	"kedge/kv/internal/backend"
)

// noFolder is an error as kv/consul makes one.
type noFolder struct{}

func (noFolder) Error() string { return "the answer lacks the folder key" }
func (noFolder) Is(target error) bool {
	return target == kv.ErrDenied || target == kv.ErrNoFolder
}

// A cause that comes back within one outage is shown if callers tell it from the one before it.
func TestViewerShowsEachKindOfError(t *testing.T) {
	t.Parallel()
	denied := fmt.Errorf("%w: 403", kv.ErrDenied)
	away := fmt.Errorf("%w: refused", kv.ErrUnavailable)
	tooMuch := &backend.TooMuchError{Prefix: "pins/", Sample: "pins/junk"}
	for _, steps := range [][]error{
		{noFolder{}, denied, noFolder{}},
		{denied, noFolder{}, denied},
		{away, tooMuch, away},
		{tooMuch, away, tooMuch},
		{noFolder{}, away, noFolder{}},
	} {
		var shown error
		v := backend.NewViewer("pins/", slog.New(slog.DiscardHandler), func(v kv.View) { shown = v.Err })
		for i, err := range steps {
			if v.Fail(err); !errors.Is(shown, err) {
				t.Errorf("%v: after step %d the view shows %v", steps, i, shown)
			}
		}
	}
}

// An error of the same kind is news only once, as its text may differ with every attempt.
func TestViewerShowsAKindOnce(t *testing.T) {
	t.Parallel()
	shown := 0
	v := backend.NewViewer("pins/", slog.New(slog.DiscardHandler), func(kv.View) { shown++ })
	for port := range 5 {
		v.Fail(fmt.Errorf("%w: dial 127.0.0.1:%d", kv.ErrUnavailable, port))
	}
	if shown != 1 {
		t.Errorf("one outage was shown %d times", shown)
	}
}
