package kvtest

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
)

func mustFolders(t *testing.T, s kv.Store, prefixes ...string) {
	t.Helper()
	if err := s.EnsureFolders(t.Context(), prefixes...); err != nil {
		t.Fatal(err)
	}
}

func mustCommit(t *testing.T, s kv.Store, lease kv.Lease, ops ...kv.Op) {
	t.Helper()
	if err := s.Commit(t.Context(), lease, ops...); err != nil {
		t.Fatal(err)
	}
}

func mustLease(t *testing.T, s kv.Store, key string) kv.Lease {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	l, err := s.Lease(ctx, key, "holder", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Release(context.Background()) })
	return l
}

func version(t *testing.T, s kv.Store, key string) uint64 {
	t.Helper()
	e, err := s.Get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return e.Version
}

func list(t *testing.T, s kv.Store, prefix string) string {
	t.Helper()
	entries, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	return keysOf(entries)
}

func keysOf(entries []kv.Entry) string {
	var all []string
	for _, e := range entries {
		all = append(all, e.Key+"="+string(e.Value))
	}
	return strings.Join(all, " ")
}

// Views collects what a watch says.
type Views struct {
	mu    sync.Mutex
	views []kv.View
	more  wait.Signal
}

// Watch watches until the test ends.
func Watch(t *testing.T, s kv.Store, prefix string) *Views {
	t.Helper()
	w := &Views{more: wait.NewSignal()}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- s.Watch(ctx, prefix, func(v kv.View) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.views = append(w.views, v)
			w.more.Set()
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("the watch of %q ended with %v", prefix, err)
		}
	})
	return w
}

// All gives every view so far.
func (w *Views) All() []kv.View {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.views)
}

// Await waits until the last view is as wanted, and returns it.
func (w *Views) Await(t *testing.T, what string, ok func(kv.View) bool) kv.View {
	t.Helper()
	deadline := time.After(patience)
	for {
		all := w.All()
		if len(all) > 0 && ok(all[len(all)-1]) {
			return all[len(all)-1]
		}
		select {
		case <-w.more.C():
		case <-deadline:
			t.Fatalf("waited for %s, and saw %d views, at last %+v", what, len(all), slices.Concat(all[max(0, len(all)-1):]))
		}
	}
}
