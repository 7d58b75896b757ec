package dir_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/deployments/tooltest"
	"kedge/kv"
	"kedge/kv/dir"
	"kedge/kv/kvtest"
)

func watchedDir(t *testing.T) (dir string, s kv.Store, views *kvtest.Views) {
	t.Helper()
	root := storePath(t)
	s = open(t, root)
	if err := s.EnsureFolders(t.Context(), "pins/prod/web/"); err != nil {
		t.Fatal(err)
	}
	views = kvtest.Watch(t, s, "pins/prod/web/")
	views.Await(t, "the start", kvtest.Healthy(""))
	return root, s, views
}

func sh(t *testing.T, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

// What people do with files is what they mean, and what their editors leave beside them counts for nothing.
func TestByHand(t *testing.T) {
	t.Parallel()
	dir, _, views := watchedDir(t)
	for _, step := range []struct{ script, want string }{
		{"echo v1 > pins/prod/web/app", "app=v1\n"},
		{"printf v2 > pins/prod/web/app", "app=v2"},
		{"echo v3 > new && mv new pins/prod/web/app", "app=v3\n"},
		{"sed -i s/v3/v4/ pins/prod/web/app", "app=v4\n"},
		// As vim writes: the old file becomes the backup, the new one is written beside a swap file.
		{"cd pins/prod/web; touch .app.swp; mv app app~; echo v5 > app; rm app~ .app.swp", "app=v5\n"},
		{"cd pins/prod/web; touch '#app#' app.swp app.tmp .app.un~; ln -s app link; mkfifo fifo; echo v6 > app", "app=v6\n"},
		{"mkdir pins/prod/web/base; echo n > pins/prod/web/base/web-1", "app=v6\n web-1=n\n"},
		{"mv pins/prod/web/base pins/prod/web/base@; echo b > pins/prod/web/base", "app=v6\n base=b\n web-1=n\n"},
		{"rm -r pins/prod/web/base@ pins/prod/web/base", "app=v6\n"},
		// A clock that was wrong: it isn't a file that somebody is about to write.
		{"rm pins/prod/web/app; touch -d 2099-01-01 pins/prod/web/app", "app="},
		{"rm pins/prod/web/app", ""},
		{"rm -r pins/prod", ""},
		{"mkdir -p pins/prod/web; echo v7 > pins/prod/web/app", "app=v7\n"},
	} {
		sh(t, dir, step.script)
		views.Await(t, step.script, kvtest.Healthy(step.want))
	}
	views.Never(t, "trouble", func(v kv.View) bool { return v.Err != nil || !v.Synced })
}

// With and without the @, a directory may be there twice. A key is one key all the same.
func TestTwice(t *testing.T) {
	t.Parallel()
	dir, s, views := watchedDir(t)
	sh(t, dir, "cd pins/prod/web; mkdir -p app/x app@/x; echo plain > app/web-1; echo at > app@/web-1; echo 1 > app/x/one; echo 2 > app@/x/two")
	views.Await(t, "the keys", kvtest.Healthy("web-1=plain\n one=1\n two=2\n"))
	if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v1"))); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "room for a value", kvtest.Healthy("app=v1 web-1=plain\n one=1\n two=2\n"))
	if info, err := os.Stat(filepath.Join(dir, "pins/prod/web/app")); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("a value that not everybody may read: %v, %v", info, err)
	}
	sh(t, dir, "cd pins/prod/web; rm app; mkdir app; echo again > app/web-1")
	if err := s.Commit(t.Context(), nil, kv.Delete("pins/prod/web/app/web-1")); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "the deletion", kvtest.Healthy("one=1\n two=2\n"))
}

// A shell empties the file before it writes. Nobody must see that as an empty pin.
func TestSlowWriter(t *testing.T) {
	t.Parallel()
	dir, _, views := watchedDir(t)
	path := filepath.Join(dir, "pins/prod/web/app")
	for i := range 10 {
		value := strings.Repeat("x", i+1)
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Millisecond) // the writer's slowness is the test
		if _, err := f.WriteString(value); err != nil {
			t.Fatal(err)
		}
		f.Close()
		views.Await(t, value, kvtest.Healthy("app="+value))
	}
	views.Never(t, "an empty pin was seen", func(v kv.View) bool { return kvtest.Values(v) == "app=" })
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "a file that stays empty", kvtest.Healthy("app="))
}

func TestVanishes(t *testing.T) {
	t.Parallel()
	dir, s, views := watchedDir(t)
	sh(t, dir, "echo v1 > pins/prod/web/app")
	views.Await(t, "the pin", kvtest.Healthy("app=v1\n"))
	lease, err := s.Lease(t.Context(), "mirror/lease", "x", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "the trouble", kvtest.Troubled(kv.ErrUnavailable, "app=v1\n"))
	for what, err := range map[string]error{
		"commit":         s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", nil)),
		"ensure folders": s.EnsureFolders(t.Context(), "pins/prod/web/"),
		"get":            func() error { _, err := s.Get(t.Context(), "pins/prod/web/app"); return err }(),
		"list":           func() error { _, err := s.List(t.Context(), "pins/"); return err }(),
	} {
		if !errors.Is(err, kv.ErrUnavailable) {
			t.Errorf("%s without the directory: %v", what, err)
		}
	}
	select {
	case <-lease.Context().Done():
	case <-time.After(10 * time.Second):
		t.Error("the lease goes on without the directory")
	}
	if _, err := os.Stat(dir); err == nil {
		t.Fatal("the store made a directory in place of the one that vanished")
	}
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "the return", kvtest.Healthy("app=v1\n"))
	sh(t, dir, "echo v2 > pins/prod/web/app")
	views.Await(t, "a change after the return", kvtest.Healthy("app=v2\n"))
	views.Never(t, "the pin vanished", func(v kv.View) bool { return v.Err != nil && len(v.Entries) == 0 })
}

// The store's own files can go too: nothing that people wrote is lost with them.
func TestWithoutItsFiles(t *testing.T) {
	t.Parallel()
	dir, s, views := watchedDir(t)
	sh(t, dir, "echo v1 > pins/prod/web/app; mv .kedge ../gone")
	views.Await(t, "the pin", kvtest.Healthy("app=v1\n"))
	if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v2")), kv.Put("pins/prod/web/b", []byte("v2"))); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "a commit", kvtest.Healthy("app=v2 b=v2"))
	sh(t, dir, "rmdir .kedge/*/") // as a cleaner of old, empty directories does
	if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v2.1")), kv.Delete("pins/prod/web/b")); err != nil {
		t.Fatal(err)
	}
	sh(t, dir, "rmdir .kedge/*/")
	views.Await(t, "another", kvtest.Healthy("app=v2.1"))
	if entries, err := s.List(t.Context(), "pins/"); err != nil || len(entries) != 1 {
		t.Fatalf("list: %v, %v", entries, err)
	}

	// A journal that can't be read is no crash's doing. It is kept, and stops nothing.
	sh(t, dir, "echo nonsense > .kedge/journal; echo v3 > pins/prod/web/app")
	views.Await(t, "a change", kvtest.Healthy("app=v3\n"))
	if kept, _ := filepath.Glob(filepath.Join(dir, ".kedge", "journal.bad-*")); len(kept) != 1 {
		t.Fatalf("kept: %v", kept)
	}
}

// A presence's entries come back by themselves: their writer writes on change only.
func TestPresenceComesBack(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	views := kvtest.Watch(t, s, "status/")
	p := kvtest.Present(t, s, "web-1")
	if err := p.Put(t.Context(), "status/prod/db/web-1", []byte("ready")); err != nil {
		t.Fatal(err)
	}
	both := kvtest.Held("web-1=ready web-1=ready")
	views.Await(t, "the entries", both)
	for _, script := range []string{
		"rm status/prod/web/web-1",
		"echo x > status/prod/web/web-1",
		"rm .kedge/sessions/*",
		"mkdir ../old; mv .kedge status ../old",
		"mv ../kv ../older; mkdir ../kv",
	} {
		before := views.Await(t, "both", both)
		sh(t, path, script)
		views.Await(t, "their return after "+script, func(v kv.View) bool {
			return both(v) && !slices.EqualFunc(v.Entries, before.Entries, func(a, b kv.Entry) bool { return a.Version == b.Version && a.Session == b.Session })
		})
	}
	if err := p.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "its leave", kvtest.Healthy(""))
}

// A key whose file a person removes while Get reads it has no value; that isn't a failure of the
// store.
func TestGetWhileItIsRemovedByHand(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	file := filepath.Join(path, "a")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = os.WriteFile(file, []byte("v"), 0o644)
				_ = os.Remove(file)
			}
		}
	}()
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		if _, err := s.Get(t.Context(), "a"); err != nil && !errors.Is(err, kv.ErrNotFound) {
			t.Error(err)
			break
		}
	}
	close(stop)
	<-stopped
}

// A commit that is refused for one of its keys changes nothing and stops nobody. Not even a privileged process makes it
// true later.
func TestDeniedCommitLeavesNothing(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	// The child may be another user, from whom the test's own directory is closed.
	if err := os.Chmod(filepath.Dir(filepath.Dir(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(filepath.Join(path, "theirs"), 0o700) }) // so that it can be removed
	child := kvtest.StartChild(t, "denied", path)
	child.Expect(t, "done")
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, open(t, path)); got != "own/a=new own/b=new theirs/a=old" {
		t.Errorf("the store holds %s", got)
	}
}

// In a sticky directory, which all may write, only a file's owner may replace or remove it.
func TestCommitDeniedByStickyDirectory(t *testing.T) {
	t.Parallel()
	tooltest.NeedRoot(t)
	path := storePath(t)
	// The child becomes another user, from whom the test's own directory is closed.
	if err := os.Chmod(filepath.Dir(filepath.Dir(path)), 0o755); err != nil {
		t.Fatal(err)
	}
	child := kvtest.StartChild(t, "sticky", path)
	child.Expect(t, "done")
	if err := child.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, open(t, path)); got != "mine/a=new own/held=new theirs/a=old theirs/b=new" {
		t.Errorf("the store holds %s", got)
	}
}

// Whether a holder lives may be unknown, as when too many files are open. Then nobody may take its entry.
func TestUnknownHolderKeepsItsEntry(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	s := open(t, path)
	// This session's file exists, and can't be opened.
	sh(t, path, `ln -s LOOP .kedge/sessions/LOOP; printf LOOP > .kedge/held/mirror@lease`)
	sh(t, path, `mkdir mirror; echo x > mirror/lease`)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	var logged strings.Builder
	waiting, err := dir.Open(path, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := waiting.Lease(ctx, "mirror/lease", "second", 10*time.Second); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the lease of a holder that may live: %v", err)
	}
	if n := strings.Count(logged.String(), "sessions/LOOP"); n != 1 {
		t.Errorf("why it waits was logged %d times:\n%s", n, logged.String())
	}
	if e, err := s.Get(t.Context(), "mirror/lease"); !errors.Is(err, kv.ErrUnavailable) {
		t.Errorf("get: %+v, %v", e, err)
	}
	kvtest.Present(t, s, "web-1") // another session's begin doesn't remove it
	if _, err := os.Lstat(filepath.Join(path, ".kedge/sessions/LOOP")); err != nil {
		t.Error(err)
	}
	// What a power cut may leave of the record names no session.
	sh(t, path, `printf '\0\0\0' > .kedge/held/mirror@lease`)
	l, err := s.Lease(t.Context(), "mirror/lease", "third", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(t.Context()); err != nil {
		t.Error(err)
	}
}

// A process that is stopped in the middle of a commit keeps the lock. That is trouble to be told of, not to wait in
// for ever.
func TestLockHeldByStopped(t *testing.T) {
	t.Parallel()
	dir, s, views := watchedDir(t)
	lock, err := os.Open(filepath.Join(dir, ".kedge", "lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	sh(t, dir, "echo v1 > pins/prod/web/app")
	if _, err := s.Get(t.Context(), "pins/prod/web/app"); !errors.Is(err, kv.ErrUnavailable) {
		t.Errorf("get: %v", err)
	}
	views.Await(t, "the trouble", kvtest.Troubled(kv.ErrUnavailable, ""))
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "the pin", kvtest.Healthy("app=v1\n"))
}

// The directory may be a link to where it is.
func TestLinked(t *testing.T) {
	t.Parallel()
	real, link := t.TempDir(), filepath.Join(t.TempDir(), "kv")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	s := open(t, link)
	views := kvtest.Watch(t, s, "pins/")
	if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v1"))); err != nil {
		t.Fatal(err)
	}
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))
	sh(t, real, "mv .kedge ../gone; echo v2 > pins/prod/web/app")
	views.Await(t, "the change", kvtest.Healthy("app=v2\n"))
	if err := s.Commit(t.Context(), nil, kv.Put("pins/prod/web/app", []byte("v3"))); err != nil {
		t.Fatal(err)
	}
}

// Whole directories are put in place by a rename, too.
func TestSwapped(t *testing.T) {
	t.Parallel()
	dir, _, views := watchedDir(t)
	for _, n := range []string{"1", "2", "3"} {
		sh(t, dir, "mkdir next; echo v"+n+" > next/app; mv pins/prod/web ../old"+n+"; mv next pins/prod/web")
		views.Await(t, "the swap", kvtest.Healthy("app=v"+n+"\n"))
		start := time.Now()
		sh(t, dir, "echo w"+n+" > pins/prod/web/app")
		views.Await(t, "a change", kvtest.Healthy("app=w"+n+"\n"))
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("the change after the swap took %v: it was not notified", took)
		}
	}
}

// A lease fences its own store.
func TestLeaseOfAnother(t *testing.T) {
	t.Parallel()
	s, other := open(t, storePath(t)), open(t, storePath(t))
	l, err := other.Lease(t.Context(), "mirror/lease", "test", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release(t.Context())
	if err := s.Commit(t.Context(), l, kv.Put("desired/k", nil)); err == nil {
		t.Error("one store's lease is good for another")
	}
}

func TestOpen(t *testing.T) {
	t.Parallel()
	path := storePath(t)
	if got := open(t, path).String(); got != "directory "+path {
		t.Errorf("the store calls itself %q", got)
	}
	odd := filepath.Join(t.TempDir(), "a b#c%20?d")
	open(t, odd)
	if _, err := os.Stat(odd); err != nil {
		t.Errorf("the directory's name was changed: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := dir.Open(file, nil); err == nil {
		t.Error("open took a file for a directory")
	}
}
