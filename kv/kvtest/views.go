package kvtest

import (
	"context"
	"errors"
	"path"
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

// Values returns the entries of a view as NAME=VALUE, separated by spaces. NAME is the last part of the key.
func Values(v kv.View) string {
	var all []string
	for _, e := range v.Entries {
		all = append(all, path.Base(e.Key)+"="+string(e.Value))
	}
	return strings.Join(all, " ")
}

// Healthy returns a function that reports whether a view is synced, is up to date and has these Values.
func Healthy(values string) func(kv.View) bool {
	return func(v kv.View) bool { return v.Synced && v.Err == nil && Values(v) == values }
}

// Troubled returns a function that reports whether a view has these Values and an error of this kind.
func Troubled(kind error, values string) func(kv.View) bool {
	return func(v kv.View) bool { return errors.Is(v.Err, kind) && Values(v) == values }
}

// Held returns a function that reports whether a view has these Values, and its first entry is held by a session.
func Held(values string) func(kv.View) bool {
	return func(v kv.View) bool {
		return Values(v) == values && len(v.Entries) > 0 && v.Entries[0].Session != ""
	}
}

// Await calls try until it succeeds. After a minute it fails the test.
func Await(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("wait for %s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Views collects the views of a watch.
type Views struct {
	mu    sync.Mutex
	views []kv.View
	more  wait.Signal
}

// Watch watches a prefix until the test ends.
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

// All returns every view so far.
func (w *Views) All() []kv.View {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.views)
}

// Await waits until the last view satisfies ok, and returns it. After patience it fails the test.
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

// Never fails the test if bad reports true for one of the views so far.
func (w *Views) Never(t *testing.T, what string, bad func(kv.View) bool) {
	t.Helper()
	if i := slices.IndexFunc(w.All(), bad); i >= 0 {
		t.Fatalf("%s: view %d: %+v", what, i, w.All()[i])
	}
}

// Present holds status/prod/web/NAME by a presence, with the value ready. The caller closes it.
func Present(t *testing.T, s kv.Store, name string) kv.Presence {
	t.Helper()
	p, err := s.Presence(t.Context(), name)
	if err == nil {
		err = p.Put(t.Context(), "status/prod/web/"+name, []byte("ready"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}
