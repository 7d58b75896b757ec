// Package meter reports how far work on bytes is: fetching, verifying, packing, uploading.
package meter

import (
	"sync"
	"time"
)

// Progress is the progress of staging or publishing, in bytes. Total is 0 while unknown.
type Progress struct {
	Phase       string // "fetch", "verify", "pack", "upload"
	Done, Total int64
}

// Meter counts bytes and reports their progress, at most four times a second and once at the end. With a nil report it
// does nothing. Several goroutines may use it.
type Meter struct {
	phase  string
	report func(Progress)

	mu         sync.Mutex
	sum, total int64
	last       time.Time
}

// New returns a meter for a phase of total bytes (0: not known yet). It passes the progress to report, which may be
// nil.
func New(phase string, total int64, report func(Progress)) *Meter {
	return &Meter{phase: phase, total: total, report: report}
}

// Add counts n bytes as done.
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
