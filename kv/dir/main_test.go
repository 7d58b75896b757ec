package dir_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"kedge/kv"
	"kedge/kv/dir"
	"kedge/kv/kvtest"
)

func TestMain(m *testing.M) {
	at := func(path string) (kv.Store, error) { return dir.Open(path, nil) }
	kvtest.Main(m, map[string]kvtest.Job{
		"lease":    kvtest.LeaseJob(at),
		"presence": kvtest.PresenceJob(at),
		"commits":  commitForEver,
		"crash":    crash,
		"denied":   denied,
		"sticky":   sticky,
	})
}

// commitForEver commits as fast as it can, each time two keys, one of two others and a deletion.
func commitForEver(ctx context.Context, args []string) error {
	s, err := dir.Open(args[0], nil)
	if err != nil {
		return err
	}
	fmt.Println("held")
	for n := 0; ; n++ {
		v := fmt.Append(nil, n)
		err := s.Commit(ctx, nil, kv.Put("d/a", v), kv.Put("d/b", v), kv.Put(fmt.Sprint("d/n", n%2), v),
			kv.Delete(fmt.Sprint("d/n", (n+1)%2)))
		if err != nil {
			return err
		}
	}
}

// denied commits as a user who may write in only one of two directories.
func denied(ctx context.Context, args []string) error {
	if os.Geteuid() == 0 {
		const nobody = 65534
		if err := os.Chown(args[0], nobody, nobody); err != nil {
			return err
		}
		if err := syscall.Setuid(nobody); err != nil {
			return err
		}
	}
	s, err := dir.Open(args[0], nil)
	if err != nil {
		return err
	}
	const before = "own/a=old theirs/a=old"
	if err := s.Commit(ctx, nil, kv.Put("own/a", []byte("old")), kv.Put("theirs/a", []byte("old"))); err != nil {
		return err
	}
	if err := os.Chmod(filepath.Join(args[0], "theirs"), 0o555); err != nil {
		return err
	}
	for _, ops := range [][]kv.Op{
		{kv.Put("own/a", []byte("new")), kv.Put("theirs/a", []byte("new"))},
		{kv.Put("own/a", []byte("new")), kv.Create("theirs/below/b", []byte("new"))},
		{kv.Delete("own/a"), kv.Delete("theirs/a")},
		{kv.Delete("theirs/a")},
	} {
		if err := s.Commit(ctx, nil, ops...); !errors.Is(err, kv.ErrDenied) {
			return fmt.Errorf("%v: %v", ops, err)
		}
		entries, err := s.List(ctx, "")
		if err != nil {
			return fmt.Errorf("list after %v: %w", ops, err)
		}
		if got := shown(entries); got != before {
			return fmt.Errorf("%v left %s", ops, got)
		}
	}
	// What it may write in, but not read, it can't sync: not for one key, nor for the journal of
	// several.
	for unread, all := range map[string][][]kv.Op{
		"blind":  {{kv.Put("blind/a", []byte("new"))}, {kv.Put("own/a", []byte("new")), kv.Put("blind/a", []byte("new"))}},
		".kedge": {{kv.Put("own/a", []byte("new")), kv.Put("own/b", []byte("new"))}},
	} {
		unread = filepath.Join(args[0], unread)
		if err := os.MkdirAll(unread, 0o755); err != nil {
			return err
		}
		for _, ops := range all {
			if err := os.Chmod(unread, 0o333); err != nil {
				return err
			}
			if err := s.Commit(ctx, nil, ops...); !errors.Is(err, kv.ErrDenied) {
				return fmt.Errorf("%s, which it may not read: %v: %v", unread, ops, err)
			}
			if err := os.Chmod(unread, 0o755); err != nil {
				return err
			}
			entries, err := s.List(ctx, "")
			if err != nil {
				return err
			}
			if got := shown(entries); got != before {
				return fmt.Errorf("%s, which it may not read: %v left %s", unread, ops, got)
			}
		}
	}
	err = s.Commit(ctx, nil, kv.Put("own/a", []byte("new")), kv.Put("own/b", []byte("new")))
	if err == nil {
		fmt.Println("done")
	}
	return err
}

// sticky commits as nobody in directories that all may write, but where only a file's owner may replace or remove it.
func sticky(ctx context.Context, args []string) error {
	const nobody = 65534
	path := func(name string) string { return filepath.Join(args[0], name) }
	if _, err := dir.Open(args[0], nil); err != nil {
		return err
	}
	for _, name := range []string{"own", "mine", "theirs"} {
		if err := os.Mkdir(path(name), 0o755); err != nil {
			return err
		}
	}
	// The value of own/held is nobody's. The record of its holder, which isn't alive, is root's.
	for _, name := range []string{"mine/a", "own/held", "theirs/a", ".kedge/held/own@held"} {
		if err := os.WriteFile(path(name), []byte("old"), 0o644); err != nil {
			return err
		}
	}
	for _, name := range []string{".", "own", "own/held", "mine", ".kedge", ".kedge/sessions", ".kedge/tmp"} {
		if err := os.Chown(path(name), nobody, nobody); err != nil {
			return err
		}
	}
	for _, name := range []string{"mine", "theirs", ".kedge/held"} {
		if err := os.Chmod(path(name), os.ModeSticky|0o777); err != nil {
			return err
		}
	}
	if err := syscall.Setuid(nobody); err != nil {
		return err
	}
	s, err := dir.Open(args[0], nil)
	if err != nil {
		return err
	}
	const before = "mine/a=old own/held=old theirs/a=old"
	for _, ops := range [][]kv.Op{
		{kv.Put("own/a", []byte("new")), kv.Put("theirs/a", []byte("new"))},
		{kv.Put("own/a", []byte("new")), kv.Delete("theirs/a")},
		{kv.Put("own/a", []byte("new")), kv.Put("theirs/b", []byte("new")), kv.Put("theirs/a", []byte("new"))},
		{kv.Put("own/a", []byte("new")), kv.Delete("own/held")},
	} {
		if err := s.Commit(ctx, nil, ops...); !errors.Is(err, kv.ErrDenied) {
			return fmt.Errorf("%v: %v", ops, err)
		}
		entries, err := s.List(ctx, "")
		if err != nil {
			return fmt.Errorf("list after %v: %w", ops, err)
		}
		if got := shown(entries); got != before {
			return fmt.Errorf("%v left %s", ops, got)
		}
	}
	for _, ops := range [][]kv.Op{
		{kv.Put("theirs/b", []byte("old")), kv.Put("theirs/c", []byte("old"))},
		{kv.Put("theirs/b", []byte("new")), kv.Delete("theirs/c")},
		{kv.Put("mine/a", []byte("new")), kv.Put("own/held", []byte("new"))},
	} {
		if err := s.Commit(ctx, nil, ops...); err != nil {
			return fmt.Errorf("%v: %w", ops, err)
		}
	}
	fmt.Println("done")
	return nil
}

// crash makes one commit, of as many of crashOps as the third argument says, and kills itself at the step of the
// second's number.
func crash(ctx context.Context, args []string) error {
	s, err := dir.Open(args[0], nil)
	if err != nil {
		return err
	}
	die, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	ops, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	n := 0
	dir.SetStep(s, func(string) {
		if n++; n > die {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	})
	if err := s.Commit(ctx, nil, crashOps()[:ops]...); err != nil {
		return err
	}
	fmt.Println("done")
	return nil
}

func open(tb testing.TB, path string) *dir.Store {
	tb.Helper()
	s, err := dir.Open(path, nil)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { s.Close() })
	return s
}

func storePath(t *testing.T) string {
	t.Helper()
	return filepath.Join(t.TempDir(), "kv")
}
