package dir

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// One inotify instance tells each watch of its own directories, for as long as any is asked for.
func TestNotifier(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := &notifier{log: slog.New(slog.DiscardHandler), ignored: func(path string) bool { return strings.HasSuffix(path, ".tmp") }}
	write := func(name string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	ask := func(dirs ...string) *subscription {
		t.Helper()
		c, err := n.subscribe()
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range dirs {
			if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := c.watchDir(filepath.Join(dir, d)); err != nil {
				t.Fatal(err)
			}
		}
		return c
	}
	told := func(c *subscription, what string) {
		t.Helper()
		select {
		case <-c.signal.C():
		case <-time.After(10 * time.Second):
			t.Fatalf("not told of %s", what)
		}
	}
	// quiet fails where c was told of what was written before name, of which all are told in turn.
	quiet := func(c *subscription, what string) {
		t.Helper()
		select {
		case <-c.signal.C():
			t.Fatalf("told of %s", what)
		default:
		}
	}
	first, second := ask("a", "both"), ask("b", "both")
	if len(n.subscriptions) != 2 || len(n.watcher.WatchList()) != 3 {
		t.Fatalf("%d ask for %v", len(n.subscriptions), n.watcher.WatchList())
	}
	write("a/x")
	told(first, "its directory")
	quiet(second, "another's directory")
	write("both/x.tmp")
	write("both/x")
	told(first, "a directory of both")
	told(second, "a directory of both")

	first.end()
	if len(n.watcher.WatchList()) != 2 {
		t.Errorf("the kernel watches %v still", n.watcher.WatchList())
	}
	if err := os.RemoveAll(filepath.Join(dir, "both")); err != nil {
		t.Fatal(err)
	}
	told(second, "its directory's end")
	third := ask("both")
	write("both/x")
	told(third, "a directory that was made anew")
	third.end()
	second.end()
	if n.watcher != nil {
		t.Error("it is open though nobody asks")
	}
	told(func() *subscription { c := ask("a"); write("a/y"); return c }(), "what is asked for anew")
}
