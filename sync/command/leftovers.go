package command

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const runMark = "KEDGE_RUN="

// EndLeftovers ends the processes of commands that ran with the mark run when the agent crashed, so that the commands
// can run again. Every process with the mark in its environment gets SIGTERM, and from 5 s later on SIGKILL, whatever
// its process group and session. EndLeftovers returns how many it found at first. It returns an error if some may still
// run: ctx ended, /proc can't be read, or they survived SIGKILL for 5 s.
func EndLeftovers(ctx context.Context, run string) (int, error) {
	pids, err := markedProcesses(run)
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
		if pids, err = markedProcesses(run); err != nil || len(pids) == 0 {
			return found, err
		}
		switch waited := time.Since(begin); {
		case waited > 2*grace:
			return found, fmt.Errorf("processes of a command that was cut off survive SIGKILL (%d, the first is %d): "+
				"end them by hand", len(pids), pids[0])
		case waited > grace: // pids includes processes that were started since SIGTERM
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

// killMarked kills the processes of list that have run's mark and began no earlier than since,
// whatever their session. As they may have started others meanwhile, it repeats that until there
// are none, at most five times. That is enough, as a check doesn't fork faster than it is killed.
func killMarked(run string, since uint64, list func() ([]int, error)) {
	for range 5 {
		pids, err := markedAmong(list, run, since)
		if err != nil || len(pids) == 0 {
			return
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// markedProcesses returns the processes of this machine that markedAmong finds. If the agent isn't root, those are only
// processes of its own user, as it couldn't end others either.
func markedProcesses(run string) ([]int, error) {
	return markedAmong(processes, run, 0)
}

// markedAmong returns those processes of list that have run's mark in their environment, without the agent itself and
// without those that end meanwhile. It leaves out processes that began before since, a time as beganAt returns it; 0
// leaves out none. It compares the times first, because reading the environment of a process that hangs may take long.
// A process in the middle of execve(2) is read again, for up to execWithin.
func markedAmong(list func() ([]int, error), run string, since uint64) ([]int, error) {
	if run == "" {
		return nil, nil
	}
	all, err := list()
	if err != nil {
		return nil, fmt.Errorf("looking for processes of a command that was cut off: %w", err)
	}
	mark := []byte("\x00" + runMark + run + "\x00")
	self := os.Getpid()
	unread := slices.DeleteFunc(all, func(pid int) bool { return pid == self || since > 0 && beganAt(pid) < since })
	var pids []int
	for begin := time.Now(); ; time.Sleep(execPoll) {
		var execs []int
		for _, pid := range unread {
			switch env, execing := environOf(pid); {
			case execing:
				execs = append(execs, pid)
			case bytes.Contains(append([]byte{0}, env...), mark):
				pids = append(pids, pid)
			}
		}
		if unread = execs; len(unread) == 0 || time.Since(begin) > execWithin {
			return pids, nil
		}
	}
}

// environOf returns the environment that a process was started with. It is empty if the process was given none, has
// ended, or is another user's and the agent isn't root. In the middle of execve(2) it is empty, too, and execing is
// set.
func environOf(pid int) (env []byte, execing bool) {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	return env, err == nil && len(env) == 0 && !noEnviron(pid)
}

const (
	execPoll   = 200 * time.Microsecond
	execWithin = time.Second // for all processes together; exec may take that long if the disk is slow
)

// noEnviron reports whether a process has no environment for good: it was given none, is exiting or gone, or is a
// thread of the kernel. A process in the middle of execve(2) is none of these: fields 50 and 51, the bounds of its
// environment, aren't set yet. See proc(5), stat.
func noEnviron(pid int) bool {
	const exiting, kernel = 0x4, 0x200000 // PF_EXITING and PF_KTHREAD of linux/sched.h
	stat := statOf(pid)
	start, end := stat.field(50), stat.field(51)
	return stat.field(9)&(exiting|kernel) != 0 || start == end && end != 0 || stat == nil
}

// processes lists all processes.
func processes() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

const (
	numbersWithin = time.Second // a machine can't use up all process numbers, and begin again, in this time
	numbersMany   = 256         // trying more numbers than this takes longer than trying all processes
)

// begunSince returns a function that lists the process first, which began at begin, and all that
// began after it. Some of the numbers in the list may be those of threads, or unused. Looking at
// all processes of a machine takes longer than most checks, and a check runs every few seconds.
// Linux assigns process numbers in ascending order, and shows the last one. If the last number
// doesn't tell which processes are new, the function lists all processes.
func begunSince(first int, begin time.Time) func() ([]int, error) {
	return func() ([]int, error) {
		last, ok := lastNumber()
		if !ok || last < first || last-first > numbersMany || time.Since(begin) > numbersWithin {
			return processes()
		}
		pids := make([]int, 0, last-first+1)
		for pid := first; pid <= last; pid++ {
			pids = append(pids, pid)
		}
		return pids, nil
	}
}

// lastNumber returns the number that Linux assigned last to a process or thread; false if it can't be read. See
// proc(5), loadavg.
func lastNumber() (int, bool) {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return 0, false
	}
	fields := bytes.Fields(text)
	if len(fields) < 5 {
		return 0, false
	}
	last, err := strconv.Atoi(string(fields[4]))
	return last, err == nil
}

// beganAt returns when a process began, in clock ticks since the machine's boot; 0: it has ended.
func beganAt(pid int) uint64 { return statOf(pid).field(22) }

// stat has the fields of a process's /proc/PID/stat, from field 3 on: see proc(5). It is nil if the process has ended.
type stat [][]byte

func statOf(pid int) stat {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil
	}
	// Field 2, the name, may contain anything; it ends at the last parenthesis.
	return bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
}

// field returns the value of a numeric field, by its number in proc(5), from 4 on; 0 if it isn't there or is negative.
func (s stat) field(number int) uint64 {
	if len(s) <= number-3 {
		return 0
	}
	n, err := strconv.ParseUint(string(s[number-3]), 10, 64)
	if err != nil {
		return 0
	}
	return n
}
