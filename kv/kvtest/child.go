package kvtest

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/kv"
)

// childEnv is the variable that makes the test's program run a job, in a process that tests can stop and kill.
const childEnv = "KEDGE_KV_TEST_CHILD"

// Job is what a child process does. args are those of StartChild; ctx ends after two minutes.
type Job func(ctx context.Context, args []string) error

// Main is a package's TestMain. It runs the tests or, in a process that StartChild started, a job.
func Main(m *testing.M, jobs map[string]Job) {
	if name := os.Getenv(childEnv); name != "" {
		job := jobs[name]
		if job == nil {
			job = func(context.Context, []string) error { return fmt.Errorf("no job %q", name) }
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := job(ctx, os.Args[1:]); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	// Most of these tests wait for Consul's timers, not for a processor.
	flag.Parse()
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// LeaseJob returns a Job that acquires the lease of the store that open returns for the first argument. It writes under
// the lease until that is lost, and prints "held", "refused" and "ended: CAUSE".
func LeaseJob(open func(where string) (kv.Store, error)) Job {
	return func(ctx context.Context, args []string) error {
		s, err := open(args[0])
		if err != nil {
			return err
		}
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
	}
}

// PresenceJob returns a Job that holds an entry in the store that open returns for the first argument, and prints
// "held". The node's name is the second argument, or "child".
func PresenceJob(open func(where string) (kv.Store, error)) Job {
	return func(ctx context.Context, args []string) error {
		s, err := open(args[0])
		if err != nil {
			return err
		}
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
		return nil
	}
}

// Child is a process that StartChild started.
type Child struct {
	cmd *exec.Cmd
	out *bufio.Reader
}

// StartChild starts a process that does one of Main's jobs, and is killed when the test ends.
func StartChild(t *testing.T, job string, args ...string) *Child {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &Child{cmd: exec.Command(self, args...)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+job, "GOCOVERDIR="+t.TempDir())
	c.cmd.Stderr = os.Stderr
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := c.cmd.StdinPipe() // not this process's own
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

// Signal sends the child a signal.
func (c *Child) Signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := c.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// Wait waits until the child has ended, and returns how it failed; nil: it didn't.
func (c *Child) Wait() error { return c.cmd.Wait() }

// Expect waits for the next line of the child's output, and fails the test unless it begins with want.
func (c *Child) Expect(t *testing.T, want string) {
	t.Helper()
	line, err := c.out.ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if !strings.HasPrefix(line, want) {
		t.Fatalf("the child says %q, want %q", line, want)
	}
}
