// Package meter reports how far work on bytes is: fetching, packing, making deltas, uploading.
package meter

import (
	"sync"
	"time"
)

// Progress is the progress of staging or publishing, in bytes. Total is 0 while unknown, and may grow.
type Progress struct {
	Phase       string // "fetch", "pack", "delta", "upload"
	Done, Total int64
}

// Meter counts bytes and reports their progress, at most four times a second and once at the end. Without a report
// function it does nothing. Several goroutines may use it.
type Meter struct {
	phase  string
	report func(Progress)

	mu         sync.Mutex
	sum, total int64
	last       time.Time
}

// New returns a meter for a phase of total bytes (0: not known yet). The meter passes its progress to report, if not
// nil.
func New(phase string, total int64, report func(Progress)) *Meter {
	return &Meter{phase: phase, total: total, report: report}
}

// Add counts n bytes as done. A negative n takes back bytes that have to be fetched again.
func (m *Meter) Add(n int64) {
	if m.report == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.sum += n
	if now := time.Now(); now.Sub(m.last) >= 250*time.Millisecond {
		m.last = now
		m.report(Progress{Phase: m.phase, Done: m.sum, Total: m.total})
	}
}

// Expect adds n bytes to the total.
func (m *Meter) Expect(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total += n
}

// Finish reports the final progress.
func (m *Meter) Finish() {
	if m.report == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report(Progress{Phase: m.phase, Done: m.sum, Total: m.total})
}

// Write counts the bytes of data as done, and discards them.
func (m *Meter) Write(data []byte) (int, error) {
	m.Add(int64(len(data)))
	return len(data), nil
}
