package artifact

import (
	"sync"
	"time"
)

// Progress is the progress of staging or publishing, in bytes. Total is 0 while unknown.
type Progress struct {
	Phase       string // "fetch", "verify", "pack", "upload"
	Done, Total int64
}

// meter reports progress, at most four times a second and once at the end. With a nil report it does nothing.
type meter struct {
	phase  string
	report func(Progress)

	mu         sync.Mutex
	sum, total int64
	last       time.Time
}

func newMeter(phase string, total int64, report func(Progress)) *meter {
	return &meter{phase: phase, total: total, report: report}
}

func (m *meter) add(n int64) {
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

// expect adds to the total.
func (m *meter) expect(n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total += n
}

func (m *meter) done() {
	if m.report == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report(Progress{Phase: m.phase, Done: m.sum, Total: m.total})
}

// Write counts bytes; it writes nothing.
func (m *meter) Write(data []byte) (int, error) {
	m.add(int64(len(data)))
	return len(data), nil
}
