package kvtest_test

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"kedge/kv"
	"kedge/kv/dir"
	"kedge/kv/kvtest"
)

func openDir(tb testing.TB, path string) kv.Store {
	tb.Helper()
	s, err := dir.Open(path, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

func TestFaultyPassesTheContract(t *testing.T) {
	t.Parallel()
	kvtest.Run(t, func(t *testing.T) kvtest.Backend {
		dir := t.TempDir()
		file := func(key string) string { return filepath.Join(dir, filepath.FromSlash(key)) }
		return kvtest.Backend{
			Open: func(tb testing.TB) kv.Store { return kvtest.Faulty(openDir(tb, dir)) },
			PutByHand: func(tb testing.TB, key, value string) {
				if err := os.WriteFile(file(key), []byte(value), 0o644); err != nil {
					tb.Fatal(err)
				}
			},
			DeleteByHand: func(tb testing.TB, key string) {
				if err := os.Remove(file(key)); err != nil {
					tb.Fatal(err)
				}
			},
		}
	})
}

func TestFaulty(t *testing.T) {
	t.Parallel()
	real := openDir(t, t.TempDir())
	s := kvtest.Faulty(real)
	ctx := t.Context()
	if err := s.EnsureFolders(ctx, "d/"); err != nil {
		t.Fatal(err)
	}
	has := func(key string) bool {
		_, err := real.Get(ctx, key)
		return err == nil
	}

	s.FailWrites(func(n int, keys []string) kvtest.When { return []kvtest.When{kvtest.Before, kvtest.After, 0}[n] })
	if err := s.Commit(ctx, nil, kv.Put("d/before", nil)); !errors.Is(err, kv.ErrUnavailable) || has("d/before") {
		t.Fatalf("a write that fails before: %v, written: %v", err, has("d/before"))
	}
	if err := s.Commit(ctx, nil, kv.Put("d/after", nil)); !errors.Is(err, kv.ErrUnavailable) || !has("d/after") {
		t.Fatalf("a write that fails after: %v, written: %v", err, has("d/after"))
	}
	if err := s.Commit(ctx, nil, kv.Put("d/good", nil)); err != nil {
		t.Fatal(err)
	}
	if got, want := s.Writes(), map[string]int{"d/after": 1, "d/good": 1}; !maps.Equal(got, want) {
		t.Fatalf("counted %v, want %v", got, want)
	}

	s.FailWrites(nil)
	views := kvtest.Watch(t, s, "d/")
	views.Await(t, "the start", func(v kv.View) bool { return v.Synced && len(v.Entries) == 2 })
	s.SetDown(kv.ErrUnavailable)
	views.Await(t, "the trouble", func(v kv.View) bool { return errors.Is(v.Err, kv.ErrUnavailable) && len(v.Entries) == 2 })
	if err := s.Commit(ctx, nil, kv.Put("d/down", nil)); !errors.Is(err, kv.ErrUnavailable) {
		t.Fatalf("a write while the store is down: %v", err)
	}
	if err := real.Commit(ctx, nil, kv.Put("d/meanwhile", nil)); err != nil {
		t.Fatal(err)
	}
	s.SetDown(nil)
	views.Await(t, "the recovery", func(v kv.View) bool { return v.Err == nil && len(v.Entries) == 3 })
}
