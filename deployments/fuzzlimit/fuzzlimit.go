// Package fuzzlimit bounds what one input of a fuzz target may cost, for tests.
package fuzzlimit

import (
	"fmt"
	"runtime/metrics"
	"testing"
	"time"
)

const (
	// Time is how long one input may take; on a machine that is busy a parser stands still for seconds.
	Time = 10 * time.Second
	// Memory is how much may be allocated for one input, in bytes, freed meanwhile or not.
	Memory = 256 << 20
)

// Run calls parse, and fails if it takes longer than Time or more than Memory, which somebody may not take who can have
// data parsed. input is named in the failure.
func Run(t testing.TB, input any, parse func()) {
	t.Helper()
	before := allocated()
	stuck := time.AfterFunc(Time, func() { panic(fmt.Sprintf("it takes longer than %v: %q", Time, input)) })
	parse()
	stuck.Stop()
	if took := allocated() - before; took > Memory {
		t.Errorf("%q takes %d MiB", input, took>>20)
	}
}

// allocated returns how many bytes were ever allocated. Unlike runtime.ReadMemStats it stops nothing.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}
