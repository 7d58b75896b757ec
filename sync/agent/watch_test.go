package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"

	"kedge/deployments"
	"kedge/kv"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

// slowPins is a store that shows pins later than records.
type slowPins struct {
	kv.Store
	kv.Namer
	open chan struct{}
}

func (s slowPins) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	if strings.HasPrefix(prefix, kv.PinsPrefix) {
		select {
		case <-s.open:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return s.Store.Watch(ctx, prefix, f)
}

// The store's records aren't combined with the pins that a node remembers: a pin may have come while the node was
// down.
func TestPinThatCameWhileTheNodeWasDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.publish("app", "1"), w.publish("app", "2")
	w.put(kv.DesiredKey(app), one.String())
	a := w.start()
	a.awaitRunning(app, one)
	a.stop()
	w.put(kv.PinKey(app), "hold")
	w.put(kv.DesiredKey(app), two.String())
	pins := make(chan struct{})
	a = w.start(func(c *Config) { c.Store = slowPins{Store: w.store, open: pins} })
	await(t, "the record", func() (bool, string) { return a.Status().Sources[0].From == "store", w.log.String() })
	steadily(t, "its pins aren't known", func() (bool, string) { return w.live("app") == "1", w.live("app") })
	close(pins)
	a.awaitState(app, deployments.StateHeld)
	if v := w.live("app"); v != "1" {
		t.Errorf("it runs %s", v)
	}
}

// unmade is a store without folder keys, in which the first try to make one fails.
type unmade struct {
	kv.Store
	tries atomic.Int32
	made  chan struct{}
}

func (s *unmade) EnsureFolders(context.Context, ...string) error {
	switch s.tries.Add(1) {
	case 1, 2:
		return kv.ErrUnavailable
	case 4: // both
		close(s.made)
	}
	return nil
}

func (s *unmade) Watch(ctx context.Context, prefix string, f func(kv.View)) error {
	f(kv.View{Err: fmt.Errorf("list %s: %w", prefix, kv.ErrDenied)})
	select {
	case <-s.made:
	case <-ctx.Done():
		return ctx.Err()
	}
	return s.Store.Watch(ctx, prefix, f)
}

func TestFolderKeysAreMadeOnceThatCanBe(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.publish("app", "1")
	w.put(kv.DesiredKey(app), p.String())
	a := w.start(func(c *Config) { c.Store = &unmade{Store: w.store, made: make(chan struct{})} })
	a.awaitRunning(app, p)
}

func TestCycles(t *testing.T) {
	t.Parallel()
	got := cycles(map[string][]string{
		"a": {"b"}, "b": {"c"}, "c": {"a"}, // a circle
		"d": {"a"}, // behind it, not on it
		"e": {"e"}, // itself
		"f": {"g"}, "g": nil, "h": {"missing", "f"},
	})
	want := map[string]string{
		"a": "a after b after c after a",
		"b": "b after c after a after b",
		"c": "c after a after b after c",
		"e": "e after e",
	}
	for name, circle := range want {
		if got[name] != circle {
			t.Errorf("circle of %s is %q, want %q", name, got[name], circle)
		}
	}
	if len(got) != len(want) {
		t.Errorf("circles are %q", got)
	}
}

func TestOneLine(t *testing.T) {
	t.Parallel()
	got := oneLine(errors.New("first\n\tsecond " + strings.Repeat("ü", 400)))
	if len(got) > 300 || strings.ContainsAny(got, "\n\t") || !strings.HasPrefix(got, "first second ü") {
		t.Errorf("%d bytes: %q", len(got), got)
	}
}
