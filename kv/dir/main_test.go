package dir_test

import (
	"context"
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
