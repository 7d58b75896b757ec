package command

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const runMark = "KEDGE_RUN="

// EndLeftovers ends what a crashed agent's command left running, so that it can be run again: every process that
// has run's mark in its environment, process groups and sessions of its own included, gets SIGTERM, and from 5 s
// later on SIGKILL. It reports how many there were, and an error where some may still be there: ctx ended, or they
// can't be killed.
func EndLeftovers(ctx context.Context, run string) (int, error) {
	pids, err := marked(run)
	found := len(pids)
	if err != nil || found == 0 {
		return found, err
	}
	begin, poll := time.Now(), time.NewTicker(20*time.Millisecond)
	defer poll.Stop()
	for _, pid := range pids {
		unix.Kill(pid, unix.SIGTERM)
	}
	for {
		if pids, err = marked(run); err != nil || len(pids) == 0 {
			return found, err
		}
		switch waited := time.Since(begin); {
		case waited > 2*grace:
			return found, fmt.Errorf("%d processes of a command that was cut off can't be ended, such as %d", len(pids), pids[0])
		case waited > grace: // also what they started since
			for _, pid := range pids {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return found, context.Cause(ctx)
		}
	}
}

// marked lists the processes whose environment has run's mark. Processes that end meanwhile, and those of other
// users where the agent isn't root, are passed over: the agent couldn't end them either.
func marked(run string) ([]int, error) {
	if run == "" {
		return nil, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("looking for processes of a command that was cut off: %w", err)
	}
	mark := []byte("\x00" + runMark + run + "\x00")
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err == nil && bytes.Contains(append([]byte{0}, env...), mark) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
