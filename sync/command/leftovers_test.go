package command

import (
	"bytes"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

// After a check only what began since is looked at: looking at all that runs takes longer than most checks.
func TestBegunSince(t *testing.T) {
	t.Parallel()
	start := func() int {
		cmd := exec.Command("/bin/sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd.Process.Pid
	}
	listed := func(first int, begin time.Time) []int {
		pids, err := begunSince(first, begin)()
		if err != nil {
			t.Fatal(err)
		}
		return pids
	}
	few := false
	for range 50 { // a busy machine may start too much else, or too late
		begin, first, second := time.Now(), start(), start()
		pids := listed(first, begin)
		if !slices.Contains(pids, first) || !slices.Contains(pids, second) {
			t.Fatalf("%v of %d and %d", pids, first, second)
		}
		if few = !slices.Contains(pids, os.Getpid()); few {
			break
		}
	}
	if !few {
		t.Error("all processes are looked at, those that began before the check as well")
	}

	// If numbers may have begun anew, or many were given, all are looked at.
	last, ok := lastNumber()
	if !ok {
		t.Fatal("the last number isn't known")
	}
	for what, pids := range map[string][]int{
		"a long check":     listed(last, time.Now().Add(-2*numbersWithin)),
		"numbers anew":     listed(last+100_000, time.Now()),
		"many other":       listed(last-numbersMany-1, time.Now()),
		"an early process": listed(1, time.Now()),
	} {
		if !slices.Contains(pids, 1) || !slices.Contains(pids, os.Getpid()) {
			t.Errorf("%s: %v", what, pids)
		}
	}
}

// A process in the middle of execve(2) shows no environment for a moment: it has its mark all the same.
func TestMarkedInExec(t *testing.T) {
	t.Parallel()
	const mark = "in-exec"
	cmd := exec.Command("/bin/sh", "-c", `exec /bin/sh -c "$SCRIPT"`)
	cmd.Env = []string{`SCRIPT=exec /bin/sh -c "$SCRIPT"`, runMark + mark}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	only := func() ([]int, error) { return []int{cmd.Process.Pid}, nil }
	for i := range 2000 {
		if pids, err := markedAmong(only, mark, 0); err != nil || len(pids) != 1 {
			t.Fatalf("look %d: %v, %v", i, pids, err)
		}
	}
}

// What has no environment for good isn't waited for: threads of the kernel, what has exited, and what was given none.
func TestNoEnviron(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.Env = []string{}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	pid := cmd.Process.Pid
	env, execing := environOf(pid)
	for begin := time.Now(); execing && time.Since(begin) < execWithin; { // Start returns in the middle of execve(2)
		env, execing = environOf(pid)
	}
	if len(env) != 0 || execing {
		t.Errorf("what was given no environment has %q, or is waited for", env)
	}
	cmd.Process.Kill()
	for !bytes.Equal(statOf(pid)[0], []byte("Z")) { // a zombie stays until somebody waits for it
		time.Sleep(time.Millisecond)
	}
	if !noEnviron(pid) {
		t.Error("what has exited is waited for")
	}
	if name, _ := os.ReadFile("/proc/2/comm"); string(name) == "kthreadd\n" && !noEnviron(2) {
		t.Error("a thread of the kernel is waited for")
	}
	if cmd.Wait(); !noEnviron(pid) {
		t.Error("what is gone is waited for")
	}
}
