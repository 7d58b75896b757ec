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
	err = s.Commit(ctx, nil, kv.Put("own/a", []byte("new")), kv.Put("own/b", []byte("new")))
	if err == nil {
		fmt.Println("done")
	}
	return err
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
