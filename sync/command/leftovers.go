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

// EndLeftovers ends processes that a crashed agent's command left running, so that the command can run again.
// Every process with run's mark in its environment gets SIGTERM, and from 5 s later on SIGKILL, whatever its
// process group and session. It returns how many there were, and an error if some may still run: ctx ended, or
// they can't be killed.
func EndLeftovers(ctx context.Context, run string) (int, error) {
	pids, err := marked(run, 0)
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
		if pids, err = marked(run, 0); err != nil || len(pids) == 0 {
			return found, err
		}
		switch waited := time.Since(begin); {
		case waited > 2*grace:
			return found, fmt.Errorf("%d processes of a command that was cut off can't be ended, such as %d", len(pids), pids[0])
		case waited > grace: // including those that they have started since
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

// killMarked kills processes with run's mark that began no earlier than since, whatever their session. It finds
// what they start meanwhile in the next of a few rounds; a check doesn't fork faster than it is killed.
func killMarked(run string, since uint64) {
	for range 5 {
		pids, err := marked(run, since)
		if err != nil || len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// marked returns the processes with run's mark in their environment that began no earlier than since, a time of
// beganAt. Reading the environment of a process waits for it, and it may hang; since excludes most. Processes that
// end meanwhile are skipped, and, if the agent isn't root, those of other users, which it couldn't end either.
func marked(run string, since uint64) ([]int, error) {
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
		if since > 0 && beganAt(pid) < since {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err == nil && bytes.Contains(append([]byte{0}, env...), mark) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// beganAt returns when a process began, in clock ticks since the machine's boot; 0: it has ended. See proc(5),
// stat.
func beganAt(pid int) uint64 {
	const startTime = 22 - 3 // the name, which may contain anything, ends at the last parenthesis
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= startTime {
		return 0
	}
	ticks, err := strconv.ParseUint(string(fields[startTime]), 10, 64)
	if err != nil {
		return 0
	}
	return ticks
}
