package command

import (
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
		"a long check":     listed(last, time.Now().Add(-2*numbersLast)),
		"numbers anew":     listed(last+100_000, time.Now()),
		"many other":       listed(last-numbersMany-1, time.Now()),
		"an early process": listed(1, time.Now()),
	} {
		if !slices.Contains(pids, 1) || !slices.Contains(pids, os.Getpid()) {
			t.Errorf("%s: %v", what, pids)
		}
	}
}
