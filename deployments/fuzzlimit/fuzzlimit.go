// Package fuzzlimit bounds what one input of a fuzz target may cost, for tests.
package fuzzlimit

import (
	"fmt"
	"os"
	"runtime/metrics"
	"syscall"
	"testing"
	"time"
)

const (
	// Time is how much processor time one input may take.
	Time = 10 * time.Second
	// Waiting is how long one input may take in wall-clock time. It is generous, as a parser may rarely get a processor on
	// a busy machine. (go test -fuzz itself ends a worker that takes ten seconds of wall-clock time, with "hung or
	// terminated" and exit status 2. On a busy machine that is no bug of the parser.)
	Waiting = 5 * time.Minute
	// Memory is how many bytes may be allocated for one input, including those that are freed meanwhile.
	Memory = 256 << 20
)

// Run calls parse, and fails the test if the process meanwhile allocates more than Memory. It
// panics if parse takes longer than Time or Waiting. No input may cost more, as others than the
// operator write what kedge parses. The failure and the panic name input.
func Run(t testing.TB, input any, parse func()) {
	t.Helper()
	before := allocated()
	stop := guard(Time, Waiting, func(most time.Duration) {
		panic(fmt.Sprintf("it takes longer than %v: %q", most, input))
	})
	parse()
	stop()
	if took := allocated() - before; took > Memory {
		t.Errorf("%q takes %d MiB", input, took>>20)
	}
}

// guard calls late with the bound that was reached: busy bounds the processor time of the whole process, waiting the
// elapsed time. Calling stop before the bound is reached ends the guard. stop must not be called twice.
func guard(busy, waiting time.Duration, late func(most time.Duration)) (stop func()) {
	begun, used := time.Now(), processorTime()
	done := make(chan struct{})
	timer := time.AfterFunc(min(busy, waiting), func() {
		for {
			spent := processorTime() - used
			switch {
			case spent >= busy:
				late(busy)
				return
			case time.Since(begun) >= waiting:
				late(waiting)
				return
			}
			select {
			case <-done:
				return
			case <-time.After(busy / 10):
			}
		}
	})
	return func() { timer.Stop(); close(done) }
}

// processorTime returns the processor time that this process has taken so far.
func processorTime() time.Duration {
	var usage syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &usage) // never fails
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// allocated returns the bytes allocated since the process started. Unlike runtime.ReadMemStats it doesn't stop the
// world.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// Dir returns an empty directory that is removed after the test: in memory if the machine has a file system for that.
// A target that writes files syncs them as the agent does, and on a disk takes a hundred times as long.
func Dir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "kedge-fuzz-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the test's directory: %v", err)
		}
	})
	return dir
}
