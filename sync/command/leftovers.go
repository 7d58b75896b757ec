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

// killMarked kills what bears run's mark and began no earlier than since, sessions of its own included. What they start
// meanwhile is found in the next round: there are a few, as something that forks faster than it is killed is no check.
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

// marked lists the processes whose environment has run's mark, of those that began no earlier than since, as beganAt
// gives it: to read an environment waits for its process, which may hang, and few have begun since a moment ago.
// Processes that end meanwhile, and those of other users where the agent isn't root, are passed over: the agent
// couldn't end them either.
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

// beganAt returns when a process began, in clock ticks since the machine did; 0: it is gone. See proc(5), stat.
func beganAt(pid int) uint64 {
	const startTime = 22 - 3 // the name, which may hold anything, ends at the last parenthesis
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
