package kv_test

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"kedge/kv"
)

// childEnv makes the test's program a kedge process of its own, which tests stop and kill.
const childEnv = "KEDGE_KV_TEST_CHILD"

func TestMain(m *testing.M) {
	if job := os.Getenv(childEnv); job != "" {
		if err := child(job, os.Args[1:]); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	// Most of these tests wait for a Consul's clock and not for a processor.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// child's args are where the store is: file://DIR, or Consul's address.
func child(job string, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	config := kv.Config{URL: args[0]}
	if !strings.HasPrefix(args[0], "file:") {
		config = kv.Config{Consul: &api.Config{Address: args[0]}}
	}
	s, err := kv.Open(ctx, config)
	if err != nil {
		return err
	}
	switch job {
	case "lease": // takes the lease, and writes under it until that fails for good
		l, err := s.Lease(ctx, "mirror/lease", "child", 10*time.Second)
		if err != nil {
			return err
		}
		fmt.Println("held")
		for n := 0; ; n++ {
			err := s.Commit(ctx, l, kv.Put("desired/k", fmt.Append(nil, "child ", n)))
			if errors.Is(err, kv.ErrLeaseLost) {
				fmt.Println("refused")
				<-l.Context().Done()
				fmt.Println("ended:", context.Cause(l.Context()))
				return nil
			}
			if err != nil && !errors.Is(err, kv.ErrUnavailable) {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
	case "presence":
		name := "child"
		if len(args) > 1 {
			name = args[1]
		}
		p, err := s.Presence(ctx, name)
		if err == nil {
			err = p.Put(ctx, "status/prod/web/"+name, []byte("ready"))
		}
		if err != nil {
			return err
		}
		fmt.Println("held")
		<-ctx.Done()
	case "commits": // as fast as it can, each of two keys and a deletion
		fmt.Println("held")
		for n := 0; ; n++ {
			v := fmt.Append(nil, n)
			err := s.Commit(ctx, nil, kv.Put("d/a", v), kv.Put("d/b", v), kv.Put(fmt.Sprint("d/n", n%2), v), kv.Delete(fmt.Sprint("d/n", (n+1)%2)))
			if err != nil {
				return err
			}
		}
	case "crash": // one commit of so many operations, in which it is killed at the step of that number
		die, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		ops, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		n := 0
		kv.SetStep(s, func(string) {
			if n++; n > die {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		})
		if err := s.Commit(ctx, nil, crashOps()[:ops]...); err != nil {
			return err
		}
		fmt.Println("done")
	default:
		return fmt.Errorf("no job %q", job)
	}
	return nil
}

// childProcess is another kedge process.
type childProcess struct {
	cmd *exec.Cmd
	out *bufio.Reader
}

func startChild(t *testing.T, job string, args ...string) *childProcess {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &childProcess{cmd: exec.Command(self, args...)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+job, "GOCOVERDIR="+t.TempDir())
	c.cmd.Stderr = os.Stderr
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := c.cmd.StdinPipe() // not this process's
	if err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(stdout)
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = c.cmd.Process.Signal(syscall.SIGKILL)
		_ = c.cmd.Wait()
	})
	return c
}

func (c *childProcess) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := c.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// expect waits for a line of the child's.
func (c *childProcess) expect(t *testing.T, want string) {
	t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if !strings.HasPrefix(line, want) {
		t.Fatalf("the child says %q, want %q", line, want)
	}
}

func dirURL(t *testing.T) (dir, url string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "kv")
	return dir, "file://" + dir
}
